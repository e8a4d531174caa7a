"""The semantics of attention with a BlockMask: block by block over its lists, on any device, forward and backward.

The same arithmetic as reference.py, for the scores that the mask shows:

    s(i, j) = softmax_scale * q_i . k_j, capped by softcap, less alibi_slope * |i + seqlen_k - seqlen_q - j|, plus k_bias_j
    lse_i = log(sum_j exp(s(i, j)) + exp(sink))        out_i = sum_j exp(s(i, j) - lse_i) v_j

Empty blocks are never read. Each block of queries takes all its blocks of keys together: extra memory is O(BLOCK * seqlen_k).
Everything is accumulated in float32, in float64 for float64 inputs. The lists are read back to the host, once a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_mask import BLOCK, num_blocks, unpack_bits
from .call import WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV, BlockMaskInputs
from .reference import accumulation_dtype


@dataclass(frozen=True)
class _Unit:
    """A block of queries of one sequence and of the query heads that share both the mask and the key head."""

    batch: int
    heads: slice
    head_kv: int
    rows: slice
    blocks: Tensor  # (n) int64, of keys
    keep: Tensor  # (rows, n * BLOCK) bool


class _Problem:
    def __init__(self, inputs: BlockMaskInputs) -> None:
        q, k, v = inputs[:3]
        offsets, num_partial, self.entries, self.bits = inputs.row_lists()
        self.inputs = inputs
        self.batch, self.seqlen_q, self.num_heads, _ = q.shape
        self.seqlen_k, self.num_heads_kv = k.shape[1], k.shape[2]
        self.group = self.num_heads // self.num_heads_kv
        self.dtype = accumulation_dtype(q.dtype)
        self.offsets, self.num_partial = offsets.tolist(), num_partial.flatten().tolist()
        self.mask_batch, self.mask_heads, self.mask_rows = num_partial.shape
        self.keys, self.values = self.blocked(k), self.blocked(v)

    def blocked(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen_k, num_heads_kv, dim) -> (batch, num_heads_kv, blocks, BLOCK, dim), zeros beyond seqlen_k."""
        wide = torch.nn.functional.pad(tensor.transpose(1, 2).to(self.dtype), (0, 0, 0, -self.seqlen_k % BLOCK))
        return wide.unflatten(2, (num_blocks(self.seqlen_k), BLOCK))

    def units(self) -> Iterator[_Unit]:
        """Those with keys; the mask of a line is unpacked once for all that share it."""
        for mask_batch in range(self.mask_batch):
            for mask_head in range(self.mask_heads):
                for row in range(self.mask_rows):
                    yield from self._units_of_line(mask_batch, mask_head, row)

    def _units_of_line(self, mask_batch: int, mask_head: int, row: int) -> Iterator[_Unit]:
        line = (mask_batch * self.mask_heads + mask_head) * self.mask_rows + row
        entries = self.entries[self.offsets[line] : self.offsets[line + 1]].long()
        if len(entries) == 0:
            return
        rows = slice(row * BLOCK, min((row + 1) * BLOCK, self.seqlen_q))
        keep = torch.ones(len(entries), BLOCK, BLOCK, dtype=torch.bool, device=entries.device)
        partial = self.num_partial[line]
        keep[:partial] = unpack_bits(self.bits[entries[:partial, 1]])
        keep = keep[:, : rows.stop - rows.start].transpose(0, 1).flatten(1)
        for batch in range(self.batch) if self.mask_batch == 1 else (mask_batch,):
            if self.mask_heads > 1:
                heads = slice(mask_head, mask_head + 1)
                yield _Unit(batch, heads, mask_head // self.group, rows, entries[:, 0], keep)
                continue
            for head_kv in range(self.num_heads_kv):
                heads = slice(head_kv * self.group, (head_kv + 1) * self.group)
                yield _Unit(batch, heads, head_kv, rows, entries[:, 0], keep)

    def of_rows(self, tensor: Tensor, unit: _Unit) -> Tensor:
        """(batch, seqlen_q, num_heads, dim) -> (heads, rows, dim)."""
        return tensor[unit.batch, unit.rows, unit.heads].transpose(0, 1).to(self.dtype)

    def of_keys(self, blocked: Tensor, unit: _Unit) -> Tensor:
        """(keys, dim)."""
        return blocked[unit.batch, unit.head_kv, unit.blocks].flatten(0, 1)

    def sink(self, unit: _Unit) -> Tensor | None:
        """(heads, 1)."""
        return None if self.inputs.sinks is None else self.inputs.sinks[unit.heads, None].to(self.dtype)

    def scores_of(self, q: Tensor, keys: Tensor, unit: _Unit) -> tuple[Tensor, Tensor | None]:
        """(heads, rows, keys) masked scores, and tanh(s / softcap) for the backward (None without softcap)."""
        inputs = self.inputs
        s = (q * inputs.softmax_scale) @ keys.mT
        tanh = None
        if inputs.softcap > 0:
            tanh = torch.tanh(s / inputs.softcap)
            s = tanh * inputs.softcap
        position = (unit.blocks[:, None] * BLOCK + torch.arange(BLOCK, device=s.device)).flatten()
        if inputs.alibi_slopes is not None:
            slopes = inputs.alibi_slopes if inputs.alibi_slopes.dim() == 1 else inputs.alibi_slopes[unit.batch]
            row = torch.arange(unit.rows.start, unit.rows.stop, device=s.device) + self.seqlen_k - self.seqlen_q
            s = s - slopes[unit.heads, None, None].to(self.dtype) * (row[:, None] - position).abs().to(self.dtype)
        if inputs.k_bias is not None:
            s = s + inputs.k_bias[unit.batch, unit.head_kv, position.clamp(max=self.seqlen_k - 1)].to(self.dtype)
        return s.masked_fill(~unit.keep, -torch.inf), tanh


def forward(inputs: BlockMaskInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit), shapes and dtypes as those of attention's results."""
    problem = _Problem(inputs)
    q, v = inputs.q, inputs.v
    shape = (problem.batch, problem.num_heads, problem.seqlen_q)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(shape, -torch.inf, dtype=problem.dtype)
    if inputs.sinks is not None:
        lse.copy_(inputs.sinks[:, None].expand(shape))
    max_logit = q.new_full((problem.num_heads,), -torch.inf, dtype=problem.dtype)
    for unit in problem.units():
        s, _ = problem.scores_of(problem.of_rows(q, unit), problem.of_keys(problem.keys, unit), unit)
        row_max = s.amax(-1)
        max_logit[unit.heads] = torch.maximum(max_logit[unit.heads], row_max.amax(-1))
        sink = problem.sink(unit)
        if sink is not None:
            row_max = torch.maximum(row_max, sink)
        base = row_max.masked_fill(row_max == -torch.inf, 0.0)  # a row that sees nothing
        p = s.sub_(base[..., None]).exp_()
        row_sum = p.sum(-1)
        if sink is not None:
            row_sum = row_sum + torch.exp(sink - base)
        acc = p @ problem.of_keys(problem.values, unit)
        acc.div_(row_sum.masked_fill(row_sum == 0, 1.0)[..., None])  # NaN stays: a NaN input shows itself
        out[unit.batch, unit.rows, unit.heads] = acc.transpose(0, 1).to(out.dtype)
        lse[unit.batch, unit.heads, unit.rows] = base + row_sum.log()
    return out, lse, max_logit


def backward(
    dout: Tensor | None, dlse: Tensor | None, inputs: BlockMaskInputs, out: Tensor, lse: Tensor, wanted: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks, dk_bias) in their inputs' dtypes; (0,) for what is not wanted (bits of call.WANT_*).

    dout None: no gradient flows into out; dlse likewise.
    """
    problem = _Problem(inputs)
    q, k, v = inputs[:3]
    dq = torch.zeros_like(q, dtype=problem.dtype)
    dk, dv = torch.zeros_like(problem.keys), torch.zeros_like(problem.values)
    dk_bias = problem.keys.new_zeros(problem.keys.shape[:4])
    if dout is None:
        dout = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    delta_all = (dout.to(problem.dtype) * out.to(problem.dtype)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta_all = delta_all - dlse
    unseen = lse == -torch.inf
    delta_all = delta_all.masked_fill(unseen, 0.0)
    base_all = lse.to(problem.dtype).masked_fill(unseen, 0.0)
    for unit in problem.units():
        rows_q, keys = problem.of_rows(q, unit), problem.of_keys(problem.keys, unit)
        rows_dout, values = problem.of_rows(dout, unit), problem.of_keys(problem.values, unit)
        s, tanh = problem.scores_of(rows_q, keys, unit)
        p = s.sub_(base_all[unit.batch, unit.heads, unit.rows, None]).exp_()
        ds = p * (rows_dout @ values.mT - delta_all[unit.batch, unit.heads, unit.rows, None])
        at = (unit.batch, unit.head_kv, unit.blocks)  # no block twice: indexed addition is exact and deterministic
        dv[at] += (p.flatten(0, 1).mT @ rows_dout.flatten(0, 1)).unflatten(0, (-1, BLOCK))
        dk_bias[at] += ds.sum((0, 1)).unflatten(0, (-1, BLOCK))
        if tanh is not None:
            ds = ds * (1.0 - tanh.square())
        ds = ds * inputs.softmax_scale
        dq[unit.batch, unit.rows, unit.heads] = (ds @ keys).transpose(0, 1)
        dk[at] += (ds.flatten(0, 1).mT @ rows_q.flatten(0, 1)).unflatten(0, (-1, BLOCK))

    def keys_of(blocked: Tensor) -> Tensor:
        return blocked.flatten(2, 3)[:, :, : problem.seqlen_k]

    def result(bit: int, like: Tensor | None, value: Tensor | None) -> Tensor:
        if like is None or value is None or not wanted & bit:
            return q.new_empty(0, dtype=torch.float32 if like is None else like.dtype)
        return value.to(like.dtype, memory_format=torch.contiguous_format)

    dsinks = None
    if inputs.sinks is not None:
        # d lse / d sink is the sink's weight; a row without keys gives it all of its weight.
        weight = torch.exp(inputs.sinks.to(problem.dtype)[:, None] - base_all).masked_fill(unseen, 0.0)
        dsinks = -(weight * delta_all).sum((0, 2))
    return (
        result(WANT_DQ, q, dq),
        result(WANT_DK, k, keys_of(dk).transpose(1, 2)),
        result(WANT_DV, v, keys_of(dv).transpose(1, 2)),
        result(WANT_DSINKS, inputs.sinks, dsinks),
        result(WANT_DK_BIAS, inputs.k_bias, keys_of(dk_bias)),
    )
