"""The semantics of attention, written once: tiled, on any device, forward and backward.

With s(i, j) = softmax_scale * q_i . k_j, capped to softcap * tanh(s / softcap) where softcap > 0, and the keys that row
i sees (bottom-right aligned: i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right):

    lse_i = log sum_j exp(s(i, j))        out_i = sum_j exp(s(i, j) - lse_i) v_j

computed by the online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1), so that extra
memory is O(seqlen * head_dim). The backward recomputes P from lse (FlashAttention, algorithm 4); a gradient of lse
costs one subtraction: dS = P * (dP - (rowsum(dout * out) - dlse)).

Everything is accumulated in float32, in float64 for float64 inputs. A row that sees no key has out = 0, lse = -inf and
zero gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """What turns q . k into a masked score. A window side of -1 is unbounded; causal has become right = 0."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_shape(seqlen_q: int, seqlen_k: int, group: int) -> tuple[int, int]:
    """(rows of queries, rows of keys) of a tile; group = query heads that share a key head, folded into the rows."""
    return max(1, min(seqlen_q, 256 // group)), max(1, min(seqlen_k, 512))


def heads_at_once(block_q: int, block_k: int, group: int, device: torch.device) -> int:
    """Key heads (of all sequences) that one tile step handles together: a score tile fits a core's cache, or fills a GPU."""
    elements = 2**19 if device.type == "cpu" else 2**24
    return max(1, elements // (block_q * block_k * group))


def key_range(row_begin: int, row_end: int, seqlen_q: int, seqlen_k: int, scoring: Scoring) -> tuple[int, int]:
    """The keys that any of these rows sees."""
    offset = seqlen_k - seqlen_q
    begin = max(0, row_begin + offset - scoring.window_left) if scoring.window_left >= 0 else 0
    end = min(seqlen_k, row_end + offset + scoring.window_right) if scoring.window_right >= 0 else seqlen_k
    return begin, max(begin, end)


@dataclass(frozen=True)
class _Tile:
    rows: slice
    keys: slice
    hidden: Tensor | None  # (rows, keys) bool, True where a row does not see a key; None where all are seen


class _Problem:
    """Shapes of a call, its tiles, and the parts (sequences x key heads) that are worked on together."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> None:
        self.batch, self.seqlen_q, self.num_heads, self.head_dim = q.shape
        self.seqlen_k, self.num_heads_kv, self.head_dim_v = k.shape[1], k.shape[2], v.shape[3]
        self.group = self.num_heads // self.num_heads_kv
        self.scoring = scoring
        self.device = q.device
        self.dtype = accumulation_dtype(q.dtype)
        self.block_q, self.block_k = tile_shape(self.seqlen_q, self.seqlen_k, self.group)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        together = heads_at_once(self.block_q, self.block_k, self.group, self.device)
        heads = min(together, self.num_heads_kv)
        sequences = max(1, together // self.num_heads_kv)
        for b in range(0, self.batch, sequences):
            for h in range(0, self.num_heads_kv, heads):
                yield slice(b, min(b + sequences, self.batch)), slice(h, min(h + heads, self.num_heads_kv))

    def tiles(self, row_begin: int) -> Iterator[_Tile]:
        row_end = min(row_begin + self.block_q, self.seqlen_q)
        begin, end = key_range(row_begin, row_end, self.seqlen_q, self.seqlen_k, self.scoring)
        for key_begin in range(begin, end, self.block_k):
            keys = slice(key_begin, min(key_begin + self.block_k, end))
            yield _Tile(slice(row_begin, row_end), keys, self._hidden(row_begin, row_end, keys))

    def _hidden(self, row_begin: int, row_end: int, keys: slice) -> Tensor | None:
        left, right = self.scoring.window_left, self.scoring.window_right
        offset = self.seqlen_k - self.seqlen_q
        left_edge = left >= 0 and keys.start < row_end - 1 + offset - left
        right_edge = right >= 0 and keys.stop - 1 > row_begin + offset + right
        if not left_edge and not right_edge:
            return None
        diagonal = torch.arange(row_begin + offset, row_end + offset, device=self.device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=self.device)
        hidden = torch.zeros((), dtype=torch.bool, device=self.device)
        if left_edge:
            hidden = key < diagonal - left
        if right_edge:
            hidden = hidden | (key > diagonal + right)
        return hidden

    def fold_keys(self, tensor: Tensor, part: tuple[slice, slice]) -> Tensor:
        """(batch, seqlen_k, num_heads_kv, dim) -> (sequences * key heads, seqlen_k, dim) of the part."""
        sequences, heads = part
        return tensor[sequences, :, heads].transpose(1, 2).to(self.dtype).flatten(0, 1)

    def fold_rows(self, tensor: Tensor, part: tuple[slice, slice], rows: slice) -> Tensor:
        """(batch, seqlen_q, num_heads, dim) -> (sequences * key heads, group * rows, dim) of the part."""
        grouped = self._grouped(tensor, part, rows)
        return grouped.permute(0, 2, 3, 1, 4).to(self.dtype).flatten(0, 1).flatten(1, 2)

    def store_rows(self, target: Tensor, part: tuple[slice, slice], rows: slice, values: Tensor) -> None:
        """The inverse of fold_rows, into target."""
        grouped = self._grouped(target, part, rows).permute(0, 2, 3, 1, 4)
        grouped.copy_(values.view(grouped.shape))

    def _grouped(self, tensor: Tensor, part: tuple[slice, slice], rows: slice) -> Tensor:
        sequences, heads = part
        query_heads = slice(heads.start * self.group, heads.stop * self.group)
        return tensor[sequences, rows, query_heads].unflatten(2, (heads.stop - heads.start, self.group))

    def fold_statistics(self, tensor: Tensor, part: tuple[slice, slice], rows: slice) -> Tensor:
        """(batch, num_heads, seqlen_q) -> (sequences * key heads, group * rows) of the part."""
        sequences, heads = part
        query_heads = slice(heads.start * self.group, heads.stop * self.group)
        of_part = tensor[sequences, query_heads, rows].unflatten(1, (heads.stop - heads.start, self.group))
        return of_part.to(self.dtype).flatten(0, 1).flatten(1, 2)

    def store_statistics(self, target: Tensor, part: tuple[slice, slice], rows: slice, values: Tensor) -> None:
        sequences, heads = part
        query_heads = slice(heads.start * self.group, heads.stop * self.group)
        of_part = target[sequences, query_heads, rows]
        of_part.copy_(values.view(of_part.shape))

    def scores(self, q_scaled: Tensor, keys: Tensor, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """Masked scores of a tile, and tanh(s / softcap) for the backward (None without softcap)."""
        scores = torch.bmm(q_scaled, keys[:, tile.keys].mT)
        tanh = None
        if self.scoring.softcap > 0:
            tanh = scores.tanh_()  # q_scaled holds softmax_scale / softcap
            scores = tanh * self.scoring.softcap
        if tile.hidden is not None:
            scores.unflatten(1, (self.group, -1)).masked_fill_(tile.hidden, -torch.inf)
        return scores, tanh

    @property
    def q_factor(self) -> float:
        softcap = self.scoring.softcap
        return self.scoring.softmax_scale / softcap if softcap > 0 else self.scoring.softmax_scale


def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """(out, lse): out (batch, seqlen_q, num_heads, head_dim_v) in q's dtype, lse (batch, num_heads, seqlen_q), natural log."""
    problem = _Problem(q, k, v, scoring)
    out = q.new_zeros(problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim_v)
    lse = q.new_full((problem.batch, problem.num_heads, problem.seqlen_q), -torch.inf, dtype=problem.dtype)
    if out.numel() == 0 or problem.seqlen_k == 0:
        return out, lse
    for part in problem.parts():
        keys, values = problem.fold_keys(k, part), problem.fold_keys(v, part)
        for row_begin in range(0, problem.seqlen_q, problem.block_q):
            rows = slice(row_begin, min(row_begin + problem.block_q, problem.seqlen_q))
            q_scaled = problem.fold_rows(q, part, rows) * problem.q_factor
            row_max = q_scaled.new_full(q_scaled.shape[:2], -torch.inf)
            row_sum = torch.zeros_like(row_max)
            acc = q_scaled.new_zeros(*q_scaled.shape[:2], problem.head_dim_v)
            for tile in problem.tiles(row_begin):
                scores, _ = problem.scores(q_scaled, keys, tile)
                new_max = torch.maximum(row_max, scores.amax(-1))
                base = new_max.masked_fill(new_max == -torch.inf, 0.0)  # a row that has seen nothing yet
                p = scores.sub_(base[..., None]).exp_()
                rescale = torch.exp(row_max - base)
                row_sum.mul_(rescale).add_(p.sum(-1))
                acc.mul_(rescale[..., None]).baddbmm_(p, values[:, tile.keys])
                row_max = new_max
            seen = row_sum != 0  # NaN counts as seen: a NaN input shows itself
            acc.div_(row_sum.masked_fill(~seen, 1.0)[..., None])
            problem.store_rows(out, part, rows, acc)
            problem.store_statistics(lse, part, rows, row_max + row_sum.log())
    return out, lse


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the inputs' dtype. dout None: no gradient flows into out; dlse likewise."""
    problem = _Problem(q, k, v, scoring)
    dq, dk, dv = (tensor.new_zeros(tensor.shape) for tensor in (q, k, v))
    if out.numel() == 0 or problem.seqlen_k == 0 or (dout is None and dlse is None):
        return dq, dk, dv
    if dout is None:
        dout = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    for part in problem.parts():
        keys, values = problem.fold_keys(k, part), problem.fold_keys(v, part)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for row_begin in range(0, problem.seqlen_q, problem.block_q):
            rows = slice(row_begin, min(row_begin + problem.block_q, problem.seqlen_q))
            q_scaled = problem.fold_rows(q, part, rows) * problem.q_factor
            row_dout = problem.fold_rows(dout, part, rows)
            row_lse = problem.fold_statistics(lse, part, rows)
            unseen = row_lse == -torch.inf
            base = row_lse.masked_fill(unseen, 0.0)
            delta = (row_dout * problem.fold_rows(out, part, rows)).sum(-1)
            if dlse is not None:
                delta -= problem.fold_statistics(dlse, part, rows)
            delta.masked_fill_(unseen, 0.0)
            row_dq = torch.zeros_like(q_scaled)
            for tile in problem.tiles(row_begin):
                scores, tanh = problem.scores(q_scaled, keys, tile)
                p = scores.sub_(base[..., None]).exp_()
                dvalues[:, tile.keys].baddbmm_(p.mT, row_dout)
                ds = torch.bmm(row_dout, values[:, tile.keys].mT).sub_(delta[..., None]).mul_(p)
                if tanh is not None:
                    # d(softcap * tanh(x))/dx with x = s / softcap: the factor softcap undoes q_factor's division.
                    ds.mul_(tanh.square_().neg_().add_(1.0)).mul_(scoring.softcap)
                row_dq.baddbmm_(ds, keys[:, tile.keys])
                dkeys[:, tile.keys].baddbmm_(ds.mT, q_scaled)
            problem.store_rows(dq, part, rows, row_dq.mul_(problem.q_factor))
        sequences, heads = part
        for gradient, accumulated in ((dk, dkeys), (dv, dvalues)):
            target = gradient[sequences, :, heads].transpose(1, 2)
            target.copy_(accumulated.view(target.shape))
    return dq, dk, dv


def bwd_preprocess(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, alignment: int) -> tuple[Tensor, Tensor]:
    """(delta, lse_log2), each (batch, num_heads, seqlen_q rounded up to alignment) float32: csrc/common/bwd_preprocess.cuh."""
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    unseen = lse == -torch.inf
    padding = -lse.shape[-1] % alignment
    delta = torch.nn.functional.pad(delta.masked_fill(unseen, 0.0), (0, padding))
    lse_log2 = (lse * 1.4426950408889634).masked_fill(unseen, 0.0)
    return delta, torch.nn.functional.pad(lse_log2, (0, padding), value=torch.inf)
