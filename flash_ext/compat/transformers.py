"""flash_ext as an attention implementation of Hugging Face's transformers.

    name = flash_ext.compat.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=name)

Two functions are registered: the mask function (transformers_masks.py, called once a forward pass) and the attention
function (here, called once a layer). transformers is imported by register() alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..varlen import attention_varlen
from .common import refuse, rows
from .transformers_masks import Structure, make_mask, read_mask

# Not 'flash...': transformers takes every name with that word for one of its own FlashAttention integrations, looks for a
# package or a kernel of the name, and lets models replace it.
NAME = "fext"

# The first version whose mask functions are called as make_mask is.
_MINIMUM = (5, 14)
_NEEDED = "register: transformers >= 5.14 is needed (pip install 'transformers>=5.14')"

# Arguments that models of transformers give to attention functions, and that change the result.
_UNSUPPORTED = ("position_bias", "head_mask", "layer_head_mask", "attention_similarity", "indices", "block_indices", "sinks")


def register(name: str = NAME) -> str:
    """Make flash_ext an attention implementation of transformers (>= 5.14), for every model, in this process.

    Args:
        name: the implementation's name, to be passed as attn_implementation. It must not contain 'flash'.

    Returns:
        name. Registering twice does no harm.

    What then works: causal and bidirectional models; padded batches, left, right or with holes; grouped-query heads; sliding
    windows, softcap and sinks; every cache of transformers but paged ones; several sequences in a row of a batch, by
    position_ids or by cu_seq_lens_q and cu_seq_lens_k. Results at tokens equal those of "sdpa" (or "eager" where sdpa lacks
    softcap or sinks) up to rounding; at padding, where those compute an average over something, they are 0. Masks take
    (batch, keys) memory instead of (batch, queries, keys).

    The mask function reads the padding mask on the host once a forward pass, as transformers' own do, in order to leave out a
    mask without padding; not while it is compiled or captured into a CUDA graph.

    Raises:
        ImportError: transformers is missing or too old.
        ValueError: name contains 'flash'.

    The functions raise NotImplementedError, with the name of what is not supported: dropout, attention weights as an output,
    dense position biases, masks that models draw between queries and keys (blocks of images, trees, chunks), paged caches.
    """
    if "flash" in name:
        raise ValueError(f"register: name must not contain 'flash' (transformers would take it for its own), got {name!r}")
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ImportError(f"{_NEEDED}: {error}") from error
    if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < _MINIMUM:
        raise ImportError(f"{_NEEDED}: found {transformers.__version__}")

    def attention_mask(*args: Any, **kwargs: Any) -> Tensor:
        return make_mask(masking_utils, *args, **kwargs)

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    return name


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function; arguments as transformers passes them.

    Args:
        module: the layer; its is_causal counts where neither is_causal nor a mask of ours says more.
        query: (batch, num_heads, seqlen_q, head_dim).
        key, value: (batch, num_heads_kv, seqlen_k, head_dim), head_dim of value may differ.
        attention_mask: None, what make_mask made, a padding mask (batch, seqlen_k), or a mask of keys (batch, 1, 1, seqlen_k),
            bool (True takes part) or floating (added to the scores).
        scaling: factor on q . k.
        sliding_window: keys that a row sees, itself included; two-sided without causal.
        softcap, s_aux: softcap and sinks (num_heads) of flash_ext.attention.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1) int32: the batch, flattened, holds several sequences one after another.

    Returns:
        (out, None): out (batch, seqlen_q, num_heads, head_dim of value).
    """
    refuse(
        "transformers attention", dropout=dropout or None, cache=None if cache is None else type(cache).__name__,
        output_attentions=output_attentions, **{name: kwargs.get(name) for name in _UNSUPPORTED},
    )  # fmt: skip
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    structure = read_mask(attention_mask, query, key, bool(is_causal), sliding_window, getattr(module, "config", None))
    options: dict[str, Any] = {
        "causal": structure.causal,
        "softmax_scale": scaling,
        "window_size": structure.window_size,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    query, key, value = (rows(t.transpose(1, 2)) for t in (query, key, value))
    if cu_seq_lens_q is None and structure.cu_seqlens is not None:
        cu_seq_lens_q = cu_seq_lens_k = structure.cu_seqlens
    if cu_seq_lens_q is not None:
        return _several_sequences(
            query, key, value, (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), structure, options
        )
    if structure.seqlen_k is not None:
        key, value = key[:, : structure.seqlen_k], value[:, : structure.seqlen_k]
    k_bias = structure.key_bias
    if k_bias is not None:
        k_bias = k_bias[:, None].expand(key.shape[0], key.shape[2], key.shape[1])
    return attention(query, key, value, k_bias=k_bias, **options), None


def _several_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[Tensor, Tensor | None],
    longest: tuple,
    structure: Structure,
    options: dict,
) -> tuple[Tensor, None]:
    """A batch whose rows, one after another, hold sequences that do not follow the batch."""
    if cu_seqlens[1] is None:
        raise ValueError("transformers attention: cu_seq_lens_k must be given with cu_seq_lens_q")
    if structure.key_bias is not None or structure.seqlen_k is not None:
        raise NotImplementedError("transformers attention: not supported by flash_ext: a padding mask together with cu_seq_lens_q")
    out = attention_varlen(
        *(t.flatten(0, 1) for t in (query, key, value)), cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1],
        max_seqlen_q=longest[0], max_seqlen_k=longest[1], **options,
    )  # fmt: skip
    return out.unflatten(0, query.shape[:2]), None


__all__ = ["NAME", "attention_forward", "register"]
