"""torch.nn.functional.scaled_dot_product_attention, computed by flash_ext.attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention import attention
from .common import describe, refuse, rows

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention with its signature and its conventions.

    Args:
        query: (..., num_heads, seqlen_q, head_dim), at least two dimensions.
        key: (..., num_heads, seqlen_k, head_dim); with enable_gqa fewer heads, of which num_heads is a multiple. Leading
            dimensions broadcast.
        value: (..., num_heads, seqlen_k, head_dim_v).
        attn_mask: a mask of keys: every query of a head sees the same keys. That is a shape (..., 1, seqlen_k) or one that is
            expanded over the queries, or seqlen_q = 1. bool: True takes part. Floating: added to the scores, and differentiable.
            With enable_gqa it must not differ between heads.
        dropout_p: 0.
        is_causal: row i sees keys j <= i (aligned to the top left).
        scale: factor on q . k, 1 / sqrt(head_dim) by default.
        enable_gqa: key and value may have fewer heads than query.

    Returns:
        (..., num_heads, seqlen_q, head_dim_v), dtype of query. A query that sees no key has the result 0.

    Nothing here synchronises. Under autocast tensors are cast as by torch's.

    Raises:
        NotImplementedError: dropout_p > 0, nested tensors, an attn_mask that is not one of keys.
        TypeError, ValueError: as flash_ext.attention, and both attn_mask and is_causal.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_NAME}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise NotImplementedError(f"{_NAME}: not supported by flash_ext: a nested tensor ({name})")
        if tensor.dim() < 2:
            raise ValueError(f"{_NAME}: {name} must have at least 2 dimensions, got {tensor.dim()}")
    refuse(_NAME, dropout_p=dropout_p or None)
    if attn_mask is not None and is_causal:
        raise ValueError(f"{_NAME}: attn_mask must be None when is_causal is True")
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]

    plain = max(t.dim() for t in (query, key, value)) == 2
    query, key, value = (t if t.dim() > 2 else t.unsqueeze(0) for t in (query, key, value))
    batch = _broadcast(*(t.shape[:-3] for t in (query, key, value)))
    if not enable_gqa:
        heads = _broadcast(*(t.shape[-3:-2] for t in (query, key, value)))
        query = query.expand(*query.shape[:-3], *heads, *query.shape[-2:])
        if key.shape[-3] != value.shape[-3]:  # otherwise one head for all stays one head
            key, value = (t.expand(*t.shape[:-3], *heads, *t.shape[-2:]) for t in (key, value))
    query, key, value = (t.expand(*batch, *t.shape[-3:]).reshape(math.prod(batch), *t.shape[-3:]) for t in (query, key, value))
    num_heads, num_heads_kv = query.shape[1], key.shape[1]
    k_bias = None if attn_mask is None else _key_bias(attn_mask, batch, num_heads, num_heads_kv, seqlen_q, seqlen_k)

    causal, window_size = False, (-1, -1)
    if is_causal and seqlen_k >= seqlen_q:
        # Aligned to the top left, the keys past the last query are visible to nobody; without them both alignments agree.
        causal, key, value = True, key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    elif is_causal:
        # Row i sees keys up to i + seqlen_k - seqlen_q + right, which is i.
        window_size = (-1, seqlen_q - seqlen_k)
    out = attention(
        *(rows(t.transpose(1, 2)) for t in (query, key, value)),
        causal=causal, window_size=window_size, softmax_scale=scale, k_bias=k_bias,
    ).transpose(1, 2)  # fmt: skip
    return out[0, 0] if plain else out.reshape(*batch, *out.shape[1:])


def _broadcast(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise ValueError(
            f"{_NAME}: query, key and value must have leading dimensions that broadcast, "
            f"got {', '.join(str(tuple(s)) for s in shapes)}"
        ) from error


def _key_bias(mask: Tensor, batch: torch.Size, num_heads: int, num_heads_kv: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """attn_mask as k_bias (batch, num_heads_kv, seqlen_k) float32; shapes and strides decide, no value is read."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{_NAME}: attn_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{_NAME}: attn_mask must be of dtype bool or floating, got {mask.dtype}")
    given = mask
    while mask.dim() < 3 + len(batch):
        mask = mask.unsqueeze(0)
    try:
        torch.broadcast_shapes(mask.shape, (*batch, num_heads, seqlen_q, seqlen_k))
    except RuntimeError:
        mask = None
    if mask is None or mask.dim() > 3 + len(batch):
        raise ValueError(
            f"{_NAME}: attn_mask must broadcast to {(*batch, num_heads, seqlen_q, seqlen_k)}, got {tuple(given.shape)}"
        )
    if mask.shape[-2] != 1 and mask.stride(-2) != 0:
        raise NotImplementedError(
            f"{_NAME}: not supported by flash_ext: attn_mask={describe(given)}: only a mask of keys, the same for every query "
            f"(..., 1, {seqlen_k}); is_causal, and the windows of flash_ext.attention, need no mask"
        )
    if given.requires_grad and given.is_leaf and 0 in given.stride():
        # Its rows share their memory, and the gradient of all of them arrives at the first.
        raise NotImplementedError(
            f"{_NAME}: not supported by flash_ext: attn_mask={describe(given)}, an expanded leaf that requires a gradient: pass "
            "the mask before it was expanded"
        )
    keys = mask[..., :1, :].squeeze(-2)
    one_for_all = keys.shape[-2] == 1 or keys.stride(-2) == 0
    if num_heads != num_heads_kv and not one_for_all:
        raise NotImplementedError(
            f"{_NAME}: not supported by flash_ext: attn_mask={describe(given)}: with {num_heads} heads of query for "
            f"{num_heads_kv} of key it must be the same for all heads"
        )
    if one_for_all:
        keys = keys[..., :1, :]
    if keys.dtype == torch.bool:
        keys = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, -torch.inf)
    keys = keys.float().expand(*batch, num_heads_kv, seqlen_k)
    return rows(keys.reshape(math.prod(batch), num_heads_kv, seqlen_k))
