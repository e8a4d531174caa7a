"""The functions of FlashAttention-3 (flash-attn's hopper/flash_attn_interface.py), with its signatures.

They differ from flash-attn 2.8 (flash_ext.compat itself) in the order of their arguments (no dropout_p), in seqused_q and
seqused_k, and in return_attn_probs, which returns (out, softmax_lse). Tensors are those of flash_ext.compat.flash_attn_2.

num_splits 0 and 1 (with a cache, any number), pack_gqa and scheduler_metadata only tune speed: the planner decides about them, and
results do not depend on them.

q, k and v (or a qkv) of float8_e4m3fn give a bfloat16 out and have no gradient; q_descale, k_descale and v_descale, their scales,
are (batch, nheads_k) float32, or None for 1. Every kind that flash_ext.attention takes is taken here too. Where FlashAttention-3
ignores scales of 16-bit tensors, here they are an error.

Errors: NotImplementedError, with name and value, for qv without a cache, attention_chunk, num_splits > 1 and sm_margin; otherwise
those of flash_ext.attention and flash_ext.attention_varlen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..merge import merge_attention
from ..varlen import attention_varlen
from . import kvcache
from .common import describe, offsets, refuse, refuse_fp8, rows, split, window

Result = Tensor | tuple[Tensor, Tensor]


def _options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": bool(causal),
        "window_size": window(window_size),
        "softcap": softcap if softcap > 0 else 0.0,
        "deterministic": True if deterministic else None,
        "return_lse": bool(return_attn_probs),
    }


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """FlashAttention-3's flash_attn_qkvpacked_func.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or with num_heads_q (batch, seqlen, num_heads_q + 2 * nheads_k, headdim).
        num_heads_q: query heads of a qkv with four dimensions.

    Returns:
        out (batch, seqlen, nheads, headdim), or (out, softmax_lse (batch, nheads, seqlen)).
    """
    function = "flash_attn_3.flash_attn_qkvpacked_func"
    refuse(function, attention_chunk=attention_chunk or None, sm_margin=sm_margin or None)
    if num_heads_q is None or qkv.dim() == 5:
        q, k, v = split(function, "qkv without num_heads_q", qkv, 2, 3)
    elif qkv.dim() != 4:
        raise ValueError(f"{function}: qkv must have 5 dimensions, or 4 with num_heads_q, got {qkv.dim()}")
    else:
        num_heads_kv, rest = divmod(qkv.shape[2] - num_heads_q, 2)
        if rest or num_heads_kv < 1:
            raise ValueError(f"{function}: qkv.shape[2] must be num_heads_q + 2 * nheads_k, got {qkv.shape[2]} and {num_heads_q}")
        q, k, v = qkv.split([num_heads_q, num_heads_kv, num_heads_kv], dim=2)
    return attention(
        rows(q), rows(k), rows(v), q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        **_options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs),
    )  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """FlashAttention-3's flash_attn_func: out (batch, seqlen_q, nheads, headdim_v), or (out, softmax_lse)."""
    function = "flash_attn_3.flash_attn_func"
    _refuse(function, qv, attention_chunk, num_splits, sm_margin)
    return attention(
        rows(q), rows(k), rows(v), q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        **_options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs),
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """FlashAttention-3's flash_attn_varlen_func.

    Args:
        q: (total_q, nheads, headdim), or without cu_seqlens_q (batch, seqlen_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim), or without cu_seqlens_k (batch, seqlen_k, nheads_k, headdim).
        seqused_q, seqused_k: (batch) int32, how many rows of each sequence count.

    Returns:
        out with the shape of q (headdim of v), or (out, softmax_lse): (nheads, total_q), or without cu_seqlens_q
        (batch, nheads, seqlen_q).
    """
    function = "flash_attn_3.flash_attn_varlen_func"
    _refuse(function, qv, attention_chunk, num_splits, sm_margin)
    batch_shape = None
    if cu_seqlens_q is None:
        batch_shape = q.shape[:2]
        q, cu_seqlens_q = q.flatten(0, 1), offsets(*batch_shape, q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = offsets(k.shape[0], k.shape[1], k.device)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    result = attention_varlen(
        rows(q), rows(k), rows(v), cu_seqlens_q=rows(cu_seqlens_q), cu_seqlens_k=rows(cu_seqlens_k), max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, seqused_q=rows(seqused_q), seqused_k=rows(seqused_k), q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale,
        **_options(softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs),
    )  # fmt: skip
    if batch_shape is None:
        return result
    out, lse = result if return_attn_probs else (result, None)
    out = out.unflatten(0, batch_shape)
    return (out, lse.unflatten(1, batch_shape).transpose(0, 1)) if return_attn_probs else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-3's flash_attn_combine: attention over all keys from attention over disjoint parts of them.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, headdim_v), there float32, here any floating dtype.
        lse_partial: (num_splits, batch, seqlen, nheads) float32 (heads last, unlike the softmax_lse of the other functions).
        out: (batch, seqlen, nheads, headdim_v), to be written in place, or None.
        out_dtype: dtype of a new out; that of out_partial by default.

    Returns:
        (out, lse): out (batch, seqlen, nheads, headdim_v), lse (batch, seqlen, nheads). Both have a gradient unless out is given.

    Raises:
        TypeError, ValueError: as flash_ext.merge_attention; an out of another dtype than out_dtype.
    """
    merged, lse = merge_attention(out_partial, lse_partial.transpose(-1, -2))
    lse = lse.transpose(-1, -2)
    if out is None:
        return merged.to(out_dtype or out_partial.dtype), lse
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"flash_attn_3.flash_attn_combine: out.dtype must be out_dtype, got {out.dtype} and {out_dtype}")
    with torch.no_grad():
        return out.copy_(merged), lse


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """FlashAttention-3's flash_attn_with_kvcache; see flash_ext.compat.flash_attn_with_kvcache, whose block_table is page_table.

    qv (absorbed latent attention: q (..., 64), qv (..., 512), k_cache (..., 64), v_cache (..., 512)) needs caches in one memory, as
    v_cache = cache[..., :512] and k_cache = cache[..., 512:] are, and goes without rotary_cos; q is copied.

    Besides the arguments of the other functions, packed queries and packed new keys (cu_seqlens_q, cu_seqlens_k_new) and
    rotary_seqlens are not supported. max_seqlen_q goes with cu_seqlens_q, and has no meaning without it. scheduler_metadata
    changes nothing: see get_scheduler_metadata.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v); with return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum):
        softmax_lse (batch, nheads, seqlen_q); the last two, there the workspace of splits, are empty tensors.
    """
    function = "flash_attn_3.flash_attn_with_kvcache"
    refuse(
        function, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens,
        attention_chunk=attention_chunk or None, sm_margin=sm_margin or None,
    )  # fmt: skip
    if qv is not None:
        refuse(function, rotary_cos=rotary_cos, rotary_sin=rotary_sin)  # it would turn latent columns
        refuse_fp8(function, qv=qv, q=q, k_cache=k_cache, v_cache=v_cache)
        q, k_cache, k = _absorbed(function, q, qv, k_cache, v_cache, k, v)
        v_cache, v = k_cache[..., : v_cache.shape[3]], None
    result = kvcache.attend(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
        softmax_scale=softmax_scale, causal=bool(causal), window_size=window(window_size), softcap=softcap if softcap > 0 else 0.0,
        rotary_interleaved=bool(rotary_interleaved), num_splits=num_splits, return_softmax_lse=bool(return_softmax_lse),
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    return (*result, q.new_empty(0), q.new_empty(0)) if return_softmax_lse else result


def _absorbed(
    function: str, q: Tensor, qv: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, k_cache, k) whose rows are those of (qv, v_cache, v) followed by those of (q, k_cache, k): scores are q.k + qv.v.

    The caches must lie so in memory, as vLLM's do: v_cache = cache[..., :512], k_cache = cache[..., 512:]. q and k are copied.
    """
    dims = v_cache.shape[3], k_cache.shape[3]
    strides = k_cache.stride()
    together = k_cache.shape[:3] == v_cache.shape[:3] and strides == v_cache.stride() and strides[3] == 1
    if not together or k_cache.data_ptr() != v_cache.data_ptr() + dims[0] * v_cache.element_size():
        raise NotImplementedError(
            f"{function}: qv needs columns of k_cache that lie behind those of v_cache in the same rows of memory, "
            f"v_cache = cache[..., :{dims[0]}] and k_cache = cache[..., {dims[0]}:]"
        )
    cache = v_cache.as_strided((*v_cache.shape[:3], sum(dims)), strides)
    if (k is None) != (v is None):
        raise ValueError(f"{function}: k and v must be given together")
    row = None if k is None or v is None else torch.cat((v, k), -1)
    return torch.cat((qv, q), -1), cache, row


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """FlashAttention-3's get_scheduler_metadata: there a plan of the splits, made once for the layers of a step.

    flash_ext needs none: every call decides on the device, from the lengths that it finds there. So this returns an empty int32
    tensor on cache_seqlens' device, for flash_attn_with_kvcache's scheduler_metadata and to be copied into a graph's buffers.

    Args:
        cache_seqlens: (batch_size,) int32. The other arguments describe the calls to come; they are not looked at.

    Raises:
        TypeError, ValueError: cache_seqlens is no int32 tensor of shape (batch_size,).
        NotImplementedError: for what flash_attn_with_kvcache refuses: cu_seqlens_q, cu_seqlens_k_new, attention_chunk, sm_margin.
    """
    function = "flash_attn_3.get_scheduler_metadata"
    refuse(
        function, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, attention_chunk=attention_chunk or None,
        sm_margin=sm_margin or None,
    )  # fmt: skip
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(f"{function}: cache_seqlens must be a torch.Tensor, got {type(cache_seqlens).__name__}")
    if cache_seqlens.dtype != torch.int32 or tuple(cache_seqlens.shape) != (batch_size,):
        raise ValueError(
            f"{function}: cache_seqlens must be int32 of shape (batch_size,) = ({batch_size},), got {describe(cache_seqlens)}"
        )
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _refuse(function, qv, attention_chunk, num_splits, sm_margin) -> None:
    refuse(
        function, qv=qv, attention_chunk=attention_chunk or None, num_splits=num_splits if num_splits > 1 else None,
        sm_margin=sm_margin or None,
    )  # fmt: skip
