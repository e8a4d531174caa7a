"""flash-attn's decoding function on flash_ext's cache attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kvcache import attention_with_kvcache
from .common import refuse_fp8, rows, window


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn.flash_attn_with_kvcache (flash-attn 2) with its signature and defaults, on flash_ext.

    Shapes, dtypes and errors: flash_ext.attention_with_kvcache, where cache_leftpad is called leftpad_k, block_table
    page_table, and return_softmax_lse return_lse. Without cache_seqlens the caches are full. causal is off by default, as
    in flash-attn. As there, nothing has a gradient: q, k and v are detached.

    Differences: pages may have any size; lse of a row that sees no key is -inf; on the CPU lengths, indices and page table
    are checked.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache, v_cache: (batch_cache, seqlen, num_heads_kv, head_dim), or with block_table (num_blocks, block_size,
            num_heads_kv, head_dim); changed in place where k and v are given.
        k, v: (batch, seqlen_new, num_heads_kv, head_dim) to append, or None.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2).
        cache_seqlens: (batch,) int32, an int, or None for the whole cache (then k and v cannot be appended).
        cache_batch_idx, cache_leftpad: (batch,) int32. block_table: (batch, blocks) int32.
        softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits: as attention_with_kvcache.

    Returns:
        out (batch, seqlen_q, num_heads, head_dim_v), with return_softmax_lse (out, lse), lse (batch, num_heads, seqlen_q).
    """
    refuse_fp8("flash_attn_with_kvcache", q=q, k_cache=k_cache, v_cache=v_cache)
    return attend(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, rotary_interleaved=rotary_interleaved,
        alibi_slopes=alibi_slopes, num_splits=num_splits, return_softmax_lse=return_softmax_lse,
    )  # fmt: skip


def attend(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, *,
    softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits, return_softmax_lse, **more,
):  # fmt: skip
    """flash_attn_with_kvcache for both versions; more: further arguments of flash_ext.attention_with_kvcache."""
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("flash_attn_with_kvcache: k and v need cache_seqlens, which says where they go")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    with torch.no_grad():
        return attention_with_kvcache(
            rows(q), k_cache, v_cache, rows(k), rows(v),
            cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, leftpad_k=cache_leftpad, page_table=block_table,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, causal=causal,
            window_size=window(window_size), softcap=softcap if softcap > 0 else 0.0, softmax_scale=softmax_scale,
            num_splits=num_splits, return_lse=return_softmax_lse, **more,
        )  # fmt: skip
