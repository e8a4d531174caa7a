"""What tests of BlockMasks share: masks of every kind, and attention by its definition under a dense mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# (batch of the mask, heads of the mask, seqlen_q, seqlen_k, density): ragged edges, more queries than keys, single rows.
RANDOM = {
    "empty": (1, 1, 200, 300, 0.0),
    "sparse": (2, 1, 300, 400, 0.002),
    "half": (1, 4, 257, 384, 0.5),
    "dense": (2, 4, 130, 127, 0.98),
    "all": (1, 1, 256, 256, 1.0),
    "all_ragged": (1, 1, 100, 300, 1.0),
    "one_row": (1, 4, 1, 260, 0.5),
    "one_key": (2, 1, 260, 1, 0.5),
}


def random_mask(name: str) -> Tensor:
    """(batch or 1, heads or 1, seqlen_q, seqlen_k) bool, with full blocks apart from each other, empty rows and empty columns."""
    batch, heads, seqlen_q, seqlen_k, density = RANDOM[name]
    generator = torch.Generator().manual_seed(list(RANDOM).index(name))
    mask = torch.rand(batch, heads, seqlen_q, seqlen_k, generator=generator) < density
    if 0 < density < 1:
        mask[..., :128, :128] = True
        mask[..., :128, 256:] = True
        mask[:, -1, 128:140] = False
        mask[..., 130:200, 128:256] = False
        mask[..., 1:, -1] = False
    return mask


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit) under keep (batch or 1, heads or 1, seqlen_q, seqlen_k), differentiable, in the inputs' dtype."""
    group = q.shape[2] // k.shape[2]
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        row = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        distance = (row - torch.arange(k.shape[2], device=q.device)).abs().to(scores.dtype)
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance
    if k_bias is not None:
        scores = scores + k_bias.repeat_interleave(group, dim=1)[:, :, None]
    keep = keep.expand_as(scores)
    max_logit = scores.masked_fill(~keep, -math.inf).amax((0, 2, 3))
    # A constant key without value keeps rows that see nothing apart from NaN; only a sink has weight there.
    extra = (
        scores.new_full((*scores.shape[:3], 1), -math.inf) if sinks is None else sinks[:, None, None].expand(*scores.shape[:3], 1)
    )
    sees = keep.any(-1, keepdim=True) | (sinks is not None)
    scores = torch.cat([scores.masked_fill(~keep & sees, -math.inf), extra], -1)
    weights = torch.where(sees, torch.softmax(scores, -1), 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~sees[..., 0], -math.inf)
    return (weights[..., :-1].to(v.dtype) @ v).transpose(1, 2), lse, max_logit


def inputs(keep: Tensor, batch: int, heads: int, heads_kv: int, dim: int, dim_v: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, dout, dlse for a mask; dtype of the first four."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    seqlen_q, seqlen_k = keep.shape[-2:]
    return (
        normal(batch, seqlen_q, heads, dim), normal(batch, seqlen_k, heads_kv, dim), normal(batch, seqlen_k, heads_kv, dim_v),
        normal(batch, seqlen_q, heads, dim_v), torch.randn(batch, heads, seqlen_q, generator=generator, dtype=torch.float64),
    )  # fmt: skip


def results(attend: Any, leaves: dict[str, Tensor], dout: Tensor | None, dlse: Tensor | None) -> dict[str, Tensor]:
    """out, lse, max_logit and the gradient of each leaf that floats, of attend(**leaves)."""
    leaves = {name: t.detach().clone().requires_grad_(name != "alibi_slopes") for name, t in leaves.items()}
    out, lse, max_logit = attend(**leaves)
    total = out.new_zeros((), dtype=lse.dtype)
    for result, gradient in ((out, dout), (lse.masked_fill(lse.isinf(), 0.0), dlse)):
        if gradient is not None:
            total = total + (result * gradient.to(result.dtype)).sum()
    wanted = [t for t in leaves.values() if t.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
    named = zip((n for n, t in leaves.items() if t.requires_grad), wanted, gradients, strict=True)
    found = {f"d{name}": torch.zeros_like(t) if g is None else g for name, t, g in named}
    return {"out": out.detach(), "lse": lse.detach(), "max_logit": max_logit.detach(), **found}


def shuffled(mask: Any, seed: int) -> Any:
    """The same mask with each line's partial blocks, and its full blocks, in another order."""
    from flash_ext.block_mask import BlockLists, BlockMask

    generator = torch.Generator().manual_seed(seed)

    def shuffle(lists: BlockLists) -> BlockLists:
        entries = lists.entries.clone()
        for line, partial in enumerate(lists.num_partial.flatten().tolist()):
            begin, end = lists.offsets[line].item(), lists.offsets[line + 1].item()
            for a, b in ((begin, begin + partial), (begin + partial, end)):
                entries[a:b] = lists.entries[a:b][torch.randperm(b - a, generator=generator)]
        return BlockLists(lists.offsets, lists.num_partial, entries)

    return BlockMask(mask.seqlen_q, mask.seqlen_k, shuffle(mask.rows), shuffle(mask.columns), mask.bits)
