"""FlashMLA's dense decoding (flash_mla.flash_mla_with_kvcache) on flash_ext's cache attention.

Differences: pages may have any size, head dims are any that flash_ext takes, float16 and CPU tensors too; no plan is made ahead,
because parts of the keys are chosen on the device by the call itself; lse of a row that sees no key is -inf (there: +inf).
NotImplementedError, with name and value, for sparse attention (indices and what belongs to it), attn_sink and 8-bit caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kvcache import attention_with_kvcache
from .common import refuse, refuse_fp8, rows


def get_mla_metadata(*arguments: Any, **options: Any) -> tuple[None, None]:
    """(None, None): flash_mla_with_kvcache takes a plan, and needs none. The arguments of FlashMLA's function are not looked at."""
    return None, None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed multi-head latent attention: flash_ext.attention_with_kvcache with v_cache=k_cache[..., :head_dim_v].

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), latent columns first, such as 512 + 64.
        k_cache: (num_blocks, block_size, num_heads_kv, head_dim); without block_table (batch, seqlen, num_heads_kv, head_dim).
        block_table: (batch, blocks) int32.
        cache_seqlens: (batch,) int32.
        head_dim_v: columns of a row that are its value, such as 512.
        tile_scheduler_metadata, num_splits: not needed, and not looked at.
        softmax_scale: 1 / sqrt(head_dim) by default.
        causal: as attention_with_kvcache; off by default, as there.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v), lse (batch, num_heads, seqlen_q) float32. No gradients.
    """
    function = "flash_mla.flash_mla_with_kvcache"
    refuse(
        function, is_fp8_kvcache=is_fp8_kvcache, indices=indices, attn_sink=attn_sink, extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache, topk_length=topk_length, extra_topk_length=extra_topk_length,
    )  # fmt: skip
    refuse_fp8(function, q=q, k_cache=k_cache)
    with torch.no_grad():
        return attention_with_kvcache(
            rows(q), k_cache, k_cache[..., :head_dim_v], cache_seqlens=cache_seqlens, page_table=block_table,
            softmax_scale=softmax_scale, causal=bool(causal), return_lse=True,
        )  # fmt: skip
