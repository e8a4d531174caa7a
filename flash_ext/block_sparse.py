"""Block-sparse attention: FlashAttention's variant with a coarse mask of whole blocks (Dao et al. 2022, section 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import attention
from .block_mask import BlockMask
from .masks import coarse_block_mask


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | BlockMask,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, ...]:
    """Attention to the blocks that a coarse mask keeps; the others are neither read nor computed.

    Args:
        q, k, v: as in flash_ext.attention.
        block_mask: bool (batch or 1, num_heads or 1, ceil(seqlen_q / block_size[0]), ceil(seqlen_k / block_size[1])) or its last
            two dimensions; or a BlockMask made before (flash_ext.masks.coarse_block_mask), which saves the building and its
            synchronisation at every call.
        block_size: scores of a coarse block (queries, keys); multiples of 128 are quickest. Not with a BlockMask.
        causal: also hide what attention's causal hides.
        options: the other options of flash_ext.attention.

    Returns:
        What flash_ext.attention returns. A query whose blocks are all hidden has out = 0 and lse = -inf.

    Raises:
        What flash_ext.attention raises; ValueError for a block_mask of another shape or dtype.
    """
    if not isinstance(block_mask, BlockMask):
        block_mask = coarse_block_mask(block_mask, q.shape[1], k.shape[1], block_size=block_size)
    elif tuple(block_size) != (128, 128):
        raise ValueError(f"block_sparse_attention: block_size describes a coarse mask, not a BlockMask, got {block_size}")
    return attention(q, k, v, block_mask=block_mask, causal=causal, **options)
