"""Merging attention over parts of the keys, by the log-sum-exp of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def merge_attention(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint parts of them, differentiable.

    lse = log(sum_p exp(lse_p) + exp(sink)), out = sum_p exp(lse_p - lse) * out_p: FlashAttention's online softmax between
    parts instead of tiles (Dao et al. 2022, section 3.1; Flash-Decoding, Dao et al. 2023). The parts must be made without
    sinks. A part with lse = -inf does not count, whatever its out; where every part's is, out = 0 and lse = -inf (the
    sink), and no gradient is NaN.

    Args:
        outs: one tensor for each part, as a sequence or stacked in front: (batch, seqlen_q, num_heads, head_dim_v), or
            packed (total_q, num_heads, head_dim_v); any floating dtype.
        lses: likewise (batch, num_heads, seqlen_q), or packed (num_heads, total_q); natural logarithms.
        sinks: (num_heads), a logit without a value for each query head, or None.

    Returns:
        (out, lse): out in the dtype of outs; lse in that of lses. Computed in float32, in float64 where lses are float64.

    Raises:
        TypeError, ValueError: parts that do not fit together; every violated rule in one message.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    _check(outs, lses, sinks)
    dtype = torch.promote_types(lses.dtype, torch.float32)
    wide = lses.to(dtype)
    base = wide.detach().amax(0)  # cancels from both results, and needs no gradient
    if sinks is not None:
        sink = sinks.to(dtype)[:, None]  # over (batch,) num_heads, rows
        base = torch.maximum(base, sink.detach())
    base = base.masked_fill(base == -torch.inf, 0.0)
    weights = torch.exp(wide - base)
    total = weights.sum(0)
    if sinks is not None:
        total = total + torch.exp(sink - base)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (base + total.log()).masked_fill(empty, -torch.inf)

    def over_rows(statistics: Tensor) -> Tensor:
        return statistics.transpose(-1, -2)[..., None]

    parts = outs.to(dtype).masked_fill(over_rows(lses == -torch.inf), 0.0)
    out = (over_rows(weights / total) * parts).sum(0)
    return out.to(outs.dtype), lse.to(lses.dtype)


def _stacked(name: str, parts: Any) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if not isinstance(parts, Sequence) or not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"merge_attention: {name} must be a torch.Tensor or a sequence of them, got {type(parts).__name__}")
    if not parts:
        raise ValueError(f"merge_attention: {name} must hold at least one part, got 0")
    kinds = {(tuple(part.shape), part.dtype, part.device) for part in parts}
    if len(kinds) > 1:
        text = ", ".join(f"{tuple(part.shape)} {part.dtype} {part.device}" for part in parts)
        raise ValueError(f"merge_attention: {name} must have one shape, dtype and device, got {text}")
    return torch.stack(tuple(parts))


def _check(outs: Tensor, lses: Tensor, sinks: Tensor | None) -> None:
    if sinks is not None and not isinstance(sinks, Tensor):
        raise TypeError(f"merge_attention: sinks must be a torch.Tensor or None, got {type(sinks).__name__}")
    found = []
    for name, tensor in (("outs", outs), ("lses", lses), ("sinks", sinks)):
        if tensor is not None and not tensor.is_floating_point():
            found.append(f"{name}.dtype must be a floating type, got {tensor.dtype}")
        if tensor is not None and tensor.device != outs.device:
            found.append(f"{name}.device must equal outs.device, got {tensor.device} and {outs.device}")
    if outs.dim() not in (4, 5):
        found.append(
            "outs must be (parts, batch, seqlen_q, num_heads, head_dim_v) or (parts, total_q, num_heads, head_dim_v), got "
            f"shape {tuple(outs.shape)}"
        )
    else:
        *front, rows, heads, _ = outs.shape
        if tuple(lses.shape) != (*front, heads, rows):
            found.append(f"lses must have shape {(*front, heads, rows)} beside outs {tuple(outs.shape)}, got {tuple(lses.shape)}")
        if front[0] == 0:
            found.append("outs must hold at least one part, got 0")
        if sinks is not None and tuple(sinks.shape) != (heads,):
            found.append(f"sinks must have shape ({heads},), got {tuple(sinks.shape)}")
    if found:
        raise ValueError("merge_attention: " + "; ".join(found))
