"""The semantics of attention, written once: tiled, on any device, forward and backward.

With the keys that row i sees (bottom-right aligned: i + d - left <= j <= i + d + right, d = seqlen_k - seqlen_q) and

    s(i, j) = softmax_scale * q_i . k_j              then softcap * tanh(s / softcap)     where softcap > 0 (Gemma 2)
              - slope * |i + d - j| + k_bias_j       ALiBi (Press et al. 2022), and a bias for each key
    lse_i   = log(sum_j exp(s(i, j)) + exp(sink))    the sink: a logit that has no value (Xiao et al. 2024, gpt-oss)
    out_i   = sum_j exp(s(i, j) - lse_i) v_j

computed by the online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022, algorithm 1), so that extra
memory is O(seqlen * head_dim). The backward recomputes P from lse (FlashAttention, algorithm 4); a gradient of lse
costs one subtraction: dS = P * (dP - (rowsum(dout * out) - dlse)).

Everything is accumulated in float32, in float64 for float64 inputs. A row that sees no key has out = 0, lse = sink (-inf
without one) and zero gradients, but for the sink's own. Packed sequences are worked on one by one, by their visible rows
alone; where those stand is read from the device, which synchronises on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .call import WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV, Inputs

LOG2_E = 1.4426950408889634


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_shape(seqlen_q: int, seqlen_k: int, group: int) -> tuple[int, int]:
    """(rows of queries, rows of keys) of a tile; group = query heads that share a key head, folded into the rows."""
    return max(1, min(seqlen_q, 256 // group)), max(1, min(seqlen_k, 512))


def heads_at_once(block_q: int, block_k: int, group: int, device: torch.device) -> int:
    """Key heads (of all sequences) that one tile step handles together: a score tile fits a core's cache, or fills a GPU."""
    elements = 2**19 if device.type == "cpu" else 2**24
    return max(1, elements // (block_q * block_k * group))


# --- pieces: what is dense and has one diagonal ---


class _Piece(NamedTuple):
    """A dense problem inside a call: all sequences of a dense one, one part of its keys, or one packed sequence.

    Row i of `rows` stands level with key i + offset of `keys`. part: where a split call keeps its results.
    """

    rows: slice
    keys: slice
    offset: int
    sequence: int | None = None
    part: int | None = None


def _visible_rows(cu_seqlens: Tensor, seqused: Tensor | None, leftpad: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """(begin, end), each (batch) int64, of the rows that each sequence shows; whatever the values, 0 <= begin <= end <= total."""
    cu_seqlens = cu_seqlens.long().clamp(0, total)
    begin = cu_seqlens[:-1]
    owned = (cu_seqlens[1:] - begin).clamp(min=0)
    first = torch.zeros_like(owned) if leftpad is None else torch.minimum(leftpad.long().clamp(min=0), owned)
    last = owned if seqused is None else torch.minimum(seqused.long().clamp(min=0), owned)
    return begin + first, begin + torch.maximum(first, last)


def _pieces(inputs: Inputs) -> Iterator[_Piece]:
    if inputs.packed:
        rows = _visible_rows(inputs.cu_seqlens_q, inputs.seqused_q, inputs.leftpad_q, inputs.q.shape[0])
        keys = _visible_rows(inputs.cu_seqlens_k, inputs.seqused_k, inputs.leftpad_k, inputs.k.shape[0])
        for sequence, (q_begin, q_end, k_begin, k_end) in enumerate(torch.stack([*rows, *keys], 1).tolist()):
            offset = (k_end - k_begin) - (q_end - q_begin)
            yield _Piece(slice(q_begin, q_end), slice(k_begin, k_end), offset, sequence)
        return
    seqlen_q, seqlen_k = inputs.q.shape[1], inputs.k.shape[1]
    rows, offset = slice(0, seqlen_q), seqlen_k - seqlen_q
    if not inputs.split_boundaries:
        yield _Piece(rows, slice(0, seqlen_k), offset)
    for part, begin in enumerate(inputs.split_boundaries[:-1]):
        yield _Piece(rows, slice(begin, inputs.split_boundaries[part + 1]), offset - begin, part=part)


class _Tile(NamedTuple):
    keys: slice
    hidden: Tensor | None  # (rows, keys) bool, True where a row does not see a key; None where all are seen
    distance: Tensor | None  # (rows, keys), |i + d - j| of ALiBi


class _Group(NamedTuple):
    """The sequences and key heads of a piece that are worked on together."""

    sequences: slice
    heads: slice
    query_heads: slice


class _Problem:
    """A piece of a call: views of its tensors as (batch, seqlen, heads, dim), its groups and its tiles."""

    def __init__(self, inputs: Inputs, piece: _Piece) -> None:
        self.inputs, self.piece = inputs, piece
        self.q = self.rows_of(inputs.q)
        self.k, self.v = (self.keys_of(t) for t in (inputs.k, inputs.v))
        self.k_bias = None if inputs.k_bias is None else self.bias_of(inputs.k_bias)
        self.batch, self.seqlen_q, self.num_heads, _ = self.q.shape
        self.seqlen_k, self.num_heads_kv, self.head_dim_v = self.v.shape[1:]
        self.slopes = inputs.alibi_slopes
        if self.slopes is not None and self.slopes.dim() == 2 and piece.sequence is not None:
            self.slopes = self.slopes[piece.sequence]
        self.group = self.num_heads // self.num_heads_kv
        self.window_left, self.window_right = inputs.window_left, 0 if inputs.causal else inputs.window_right
        self.dtype = accumulation_dtype(inputs.q.dtype)
        self.block_q, self.block_k = tile_shape(self.seqlen_q, self.seqlen_k, self.group)

    # Views of whole tensors of the call: what this piece owns of them.

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Of q, dq, and of the part's out and dout: (batch, seqlen_q, num_heads, dim)."""
        return (tensor[None] if self.inputs.packed else tensor)[:, self.piece.rows]

    def keys_of(self, tensor: Tensor) -> Tensor:
        """Of k, v, dk, dv: (batch, seqlen_k, num_heads_kv, dim)."""
        return (tensor[None] if self.inputs.packed else tensor)[:, self.piece.keys]

    def bias_of(self, tensor: Tensor) -> Tensor:
        """Of k_bias: (batch, num_heads_kv, seqlen_k)."""
        return (tensor[None] if self.inputs.packed else tensor)[..., self.piece.keys]

    def statistics_of(self, tensor: Tensor) -> Tensor:
        """Of the part's lse and dlse: (batch, num_heads, seqlen_q)."""
        return (tensor[None] if self.inputs.packed else tensor)[..., self.piece.rows]

    def part_of(self, tensor: Tensor) -> Tensor:
        """Of out, lse and their gradients in a split call."""
        return tensor if self.piece.part is None else tensor[self.piece.part]

    # Groups and tiles.

    def groups(self) -> Iterator[_Group]:
        together = heads_at_once(self.block_q, self.block_k, self.group, self.q.device)
        heads = min(together, self.num_heads_kv)
        sequences = max(1, together // self.num_heads_kv)
        for b in range(0, self.batch, sequences):
            for h in range(0, self.num_heads_kv, heads):
                end = min(h + heads, self.num_heads_kv)
                yield _Group(slice(b, min(b + sequences, self.batch)), slice(h, end), slice(h * self.group, end * self.group))

    def row_blocks(self) -> Iterator[slice]:
        for begin in range(0, self.seqlen_q, self.block_q):
            yield slice(begin, min(begin + self.block_q, self.seqlen_q))

    def tiles(self, rows: slice) -> Iterator[_Tile]:
        first, last = rows.start + self.piece.offset, rows.stop - 1 + self.piece.offset  # level with the rows
        begin = max(0, first - self.window_left) if self.window_left >= 0 else 0
        end = min(self.seqlen_k, last + self.window_right + 1) if self.window_right >= 0 else self.seqlen_k
        for key_begin in range(begin, end, self.block_k):
            keys = slice(key_begin, min(key_begin + self.block_k, end))
            left_edge = self.window_left >= 0 and keys.start < last - self.window_left
            right_edge = self.window_right >= 0 and keys.stop - 1 > first + self.window_right
            hidden = distance = None
            if left_edge or right_edge or self.slopes is not None:
                level = torch.arange(first, last + 1, device=self.q.device)[:, None]
                ahead = torch.arange(keys.start, keys.stop, device=self.q.device) - level
                if left_edge:
                    hidden = ahead < -self.window_left
                if right_edge:
                    beyond = ahead > self.window_right
                    hidden = beyond if hidden is None else hidden | beyond
                if self.slopes is not None:
                    distance = ahead.abs().to(self.dtype)
            yield _Tile(keys, hidden, distance)

    # Folding: query heads of a key head become rows, sequences and key heads one batch.

    def fold_keys(self, tensor: Tensor, group: _Group) -> Tensor:
        """(batch, seqlen_k, num_heads_kv, dim) -> (sequences * key heads, seqlen_k, dim) of the group."""
        return tensor[group.sequences, :, group.heads].transpose(1, 2).to(self.dtype).flatten(0, 1)

    def unfold_keys(self, target: Tensor, group: _Group, values: Tensor) -> None:
        """The inverse of fold_keys, into target."""
        target = target[group.sequences, :, group.heads].transpose(1, 2)
        target.copy_(values.view(target.shape))

    def fold_rows(self, tensor: Tensor, group: _Group, rows: slice) -> Tensor:
        """(batch, seqlen_q, num_heads, dim) -> (sequences * key heads, group * rows, dim) of the group."""
        return self._grouped(tensor, group, rows).to(self.dtype).flatten(0, 1).flatten(1, 2)

    def unfold_rows(self, target: Tensor, group: _Group, rows: slice, values: Tensor) -> None:
        """The inverse of fold_rows, added to target."""
        grouped = self._grouped(target, group, rows)
        grouped.add_(values.view(grouped.shape))

    def _grouped(self, tensor: Tensor, group: _Group, rows: slice) -> Tensor:
        by_head = tensor[group.sequences, rows, group.query_heads].unflatten(2, (-1, self.group))
        return by_head.permute(0, 2, 3, 1, 4)

    def fold_statistics(self, tensor: Tensor, group: _Group, rows: slice) -> Tensor:
        """(batch, num_heads, seqlen_q) -> (sequences * key heads, group * rows) of the group."""
        of_group = tensor[group.sequences, group.query_heads, rows].unflatten(1, (-1, self.group))
        return of_group.to(self.dtype).flatten(0, 1).flatten(1, 2)

    def unfold_statistics(self, target: Tensor, group: _Group, rows: slice, values: Tensor) -> None:
        of_group = target[group.sequences, group.query_heads, rows]
        of_group.copy_(values.view(of_group.shape))

    def fold_heads(self, tensor: Tensor, group: _Group) -> Tensor:
        """(num_heads) or (batch, num_heads) -> (sequences * key heads, group, 1) of the group."""
        of_group = tensor.expand(self.batch, -1)[group.sequences, group.query_heads].unflatten(1, (-1, self.group))
        return of_group.to(self.dtype).flatten(0, 1)[..., None]

    def by_query_head(self, values: Tensor, group: _Group) -> Tensor:
        """(sequences * key heads, group * rows) -> (sequences, query heads of the group, rows)."""
        return values.unflatten(0, (-1, group.heads.stop - group.heads.start)).unflatten(2, (self.group, -1)).flatten(1, 2)

    # Scores.

    @property
    def q_factor(self) -> float:
        softcap = self.inputs.softcap
        return self.inputs.softmax_scale / softcap if softcap > 0 else self.inputs.softmax_scale

    def biases(self, group: _Group) -> tuple[Tensor | None, Tensor | None]:
        """ALiBi's slopes (sequences * key heads, group, 1, 1) and the keys' bias (sequences * key heads, 1, seqlen_k)."""
        slopes = None if self.slopes is None else self.fold_heads(self.slopes, group)[..., None]
        if self.k_bias is None:
            return slopes, None
        return slopes, self.k_bias[group.sequences, group.heads].to(self.dtype).flatten(0, 1)[:, None]

    def scores(self, q_scaled: Tensor, keys: Tensor, tile: _Tile, biases: tuple) -> tuple[Tensor, Tensor | None]:
        """Masked scores of a tile, and tanh(s / softcap) for the backward (None without softcap)."""
        slopes, k_bias = biases
        scores = torch.bmm(q_scaled, keys[:, tile.keys].mT)
        tanh = None
        if self.inputs.softcap > 0:
            tanh = scores.tanh_()  # q_scaled holds softmax_scale / softcap
            scores = tanh * self.inputs.softcap
        if slopes is not None:
            scores.unflatten(1, (self.group, -1)).sub_(slopes * tile.distance)
        if k_bias is not None:
            of_tile = k_bias[..., tile.keys]
            scores.add_(of_tile).masked_fill_(of_tile == -torch.inf, -torch.inf)  # whatever a hidden key holds
        if tile.hidden is not None:
            scores.unflatten(1, (self.group, -1)).masked_fill_(tile.hidden, -torch.inf)
        return scores, tanh


# --- forward ---


def forward(inputs: Inputs, return_max_logit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit): out in q's dtype, the others in the accumulation dtype; shapes: Inputs.out_shape, lse_shape.

    max_logit (num_heads): the largest score of each query head, -inf where nothing is visible; (0) unless asked for.
    """
    dtype = accumulation_dtype(inputs.q.dtype)
    out = inputs.q.new_zeros(inputs.out_shape)
    lse = inputs.q.new_full(inputs.lse_shape, -torch.inf, dtype=dtype)
    num_heads = inputs.q.shape[-2] if return_max_logit else 0
    max_logit = inputs.q.new_full((num_heads,), -torch.inf, dtype=dtype)
    if out.numel() == 0:
        return out, lse, max_logit
    for piece in _pieces(inputs):
        problem = _Problem(inputs, piece)
        for group in problem.groups():
            _forward_group(problem, group, out, lse, max_logit)
    return out, lse, max_logit


def _forward_group(problem: _Problem, group: _Group, out: Tensor, lse: Tensor, max_logit: Tensor) -> None:
    out, lse = problem.rows_of(problem.part_of(out)), problem.statistics_of(problem.part_of(lse))
    keys, values = problem.fold_keys(problem.k, group), problem.fold_keys(problem.v, group)
    biases = problem.biases(group)
    sinks = None if problem.inputs.sinks is None else problem.fold_heads(problem.inputs.sinks, group)
    for rows in problem.row_blocks():
        q_scaled = problem.fold_rows(problem.q, group, rows) * problem.q_factor
        row_max = q_scaled.new_full(q_scaled.shape[:2], -torch.inf)
        row_sum = torch.zeros_like(row_max)
        acc = q_scaled.new_zeros(*q_scaled.shape[:2], problem.head_dim_v)
        for tile in problem.tiles(rows):
            scores, _ = problem.scores(q_scaled, keys, tile, biases)
            new_max = torch.maximum(row_max, scores.amax(-1))
            base = new_max.masked_fill(new_max == -torch.inf, 0.0)  # a row that has seen nothing yet
            p = scores.sub_(base[..., None]).exp_()
            rescale = torch.exp(row_max - base)
            row_sum.mul_(rescale).add_(p.sum(-1))
            acc.mul_(rescale[..., None]).baddbmm_(p, values[:, tile.keys])
            row_max = new_max
        if max_logit.numel():
            largest = max_logit[group.query_heads]
            torch.maximum(largest, problem.by_query_head(row_max, group).amax((0, 2)), out=largest)
        if sinks is not None:
            # The last step of the online softmax: a score without a value.
            sink = sinks.expand(-1, -1, rows.stop - rows.start).flatten(1)
            new_max = torch.maximum(row_max, sink)
            base = new_max.masked_fill(new_max == -torch.inf, 0.0)
            rescale = torch.exp(row_max - base)
            row_sum.mul_(rescale).add_(torch.exp(sink - base))
            acc.mul_(rescale[..., None])
            row_max = new_max
        seen = row_sum != 0  # NaN counts as seen: a NaN input shows itself
        acc.div_(row_sum.masked_fill(~seen, 1.0)[..., None])
        problem.unfold_rows(out, group, rows, acc)
        problem.unfold_statistics(lse, group, rows, row_max + row_sum.log())


# --- backward ---


def backward(dout: Tensor | None, dlse: Tensor | None, inputs: Inputs, out: Tensor, lse: Tensor, wanted: int) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dsinks, dk_bias), contiguous, in their inputs' dtypes; of shape (0) where `wanted` lacks the bit.

    dout None: no gradient flows into out; dlse likewise.
    """
    # What is absent has no gradient.
    wanted &= ~(WANT_DSINKS * (inputs.sinks is None) | WANT_DK_BIAS * (inputs.k_bias is None))
    gradients = _Gradients.zeros(inputs, wanted)
    if out.numel() > 0 and (dout is not None or dlse is not None):
        if dout is None:
            dout = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        for piece in _pieces(inputs):
            problem = _Problem(inputs, piece)
            statistics = [None if t is None else problem.statistics_of(problem.part_of(t)) for t in (lse, dlse)]
            rows = [problem.rows_of(problem.part_of(t)) for t in (out, dout)]
            for group in problem.groups():
                _backward_group(problem, group, *rows, *statistics, gradients, wanted)
    like = (inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.k_bias)
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(gradients, like, strict=True))


class _Gradients(NamedTuple):
    """Results of the backward. Sums over pieces (dq of a split call, dsinks) are kept in the accumulation dtype."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor
    dk_bias: Tensor

    @classmethod
    def zeros(cls, inputs: Inputs, wanted: int) -> _Gradients:
        wide = accumulation_dtype(inputs.q.dtype)

        def zeros(bit: int, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
            if like is None or not wanted & bit:
                return inputs.q.new_zeros(0, dtype=dtype if like is None else like.dtype)
            return like.new_zeros(like.shape, dtype=dtype)

        return cls(
            zeros(WANT_DQ, inputs.q, wide if inputs.split_boundaries else None),
            zeros(WANT_DK, inputs.k),
            zeros(WANT_DV, inputs.v),
            zeros(WANT_DSINKS, inputs.sinks, wide),
            zeros(WANT_DK_BIAS, inputs.k_bias, wide),
        )


def _backward_group(
    problem: _Problem, group: _Group, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, gradients: _Gradients,
    wanted: int,
) -> None:  # fmt: skip
    keys, values = problem.fold_keys(problem.k, group), problem.fold_keys(problem.v, group)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dbias = keys.new_zeros(keys.shape[:2])
    biases = problem.biases(group)
    for rows in problem.row_blocks():
        q_scaled = problem.fold_rows(problem.q, group, rows) * problem.q_factor
        row_dout = problem.fold_rows(dout, group, rows)
        row_lse = problem.fold_statistics(lse, group, rows)
        unseen = row_lse == -torch.inf
        base = row_lse.masked_fill(unseen, 0.0)
        delta = (row_dout * problem.fold_rows(out, group, rows)).sum(-1)
        if dlse is not None:
            delta -= problem.fold_statistics(dlse, group, rows)
        delta.masked_fill_(unseen, 0.0)
        if wanted & WANT_DSINKS:
            sink = problem.fold_heads(problem.inputs.sinks, group).expand(-1, -1, rows.stop - rows.start).flatten(1)
            of_rows = torch.exp(sink - base) * delta
            gradients.dsinks[group.query_heads] -= problem.by_query_head(of_rows, group).sum((0, 2))
        if not wanted & (WANT_DQ | WANT_DK | WANT_DV | WANT_DK_BIAS):
            continue
        row_dq = torch.zeros_like(q_scaled)
        for tile in problem.tiles(rows):
            scores, tanh = problem.scores(q_scaled, keys, tile, biases)
            p = scores.sub_(base[..., None]).exp_()
            if wanted & WANT_DV:
                dvalues[:, tile.keys].baddbmm_(p.mT, row_dout)
            if not wanted & (WANT_DQ | WANT_DK | WANT_DK_BIAS):
                continue
            ds = torch.bmm(row_dout, values[:, tile.keys].mT).sub_(delta[..., None]).mul_(p)
            if wanted & WANT_DK_BIAS:
                dbias[:, tile.keys] += ds.sum(1)
            if tanh is not None:
                # d(softcap * tanh(x))/dx with x = s / softcap: the factor softcap undoes q_factor's division.
                ds.mul_(tanh.square_().neg_().add_(1.0)).mul_(problem.inputs.softcap)
            if wanted & WANT_DQ:
                row_dq.baddbmm_(ds, keys[:, tile.keys])
            if wanted & WANT_DK:
                dkeys[:, tile.keys].baddbmm_(ds.mT, q_scaled)
        if wanted & WANT_DQ:
            problem.unfold_rows(problem.rows_of(gradients.dq), group, rows, row_dq.mul_(problem.q_factor))
    if wanted & WANT_DK:
        problem.unfold_keys(problem.keys_of(gradients.dk), group, dkeys)
    if wanted & WANT_DV:
        problem.unfold_keys(problem.keys_of(gradients.dv), group, dvalues)
    if wanted & WANT_DK_BIAS:
        target = problem.bias_of(gradients.dk_bias)[group.sequences, group.heads]
        target.copy_(dbias.view(target.shape))


def bwd_preprocess(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, alignment: int) -> tuple[Tensor, Tensor]:
    """(delta, lse_log2), each (batch, num_heads, seqlen_q rounded up to alignment) float32: csrc/common/bwd_preprocess.cuh."""
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    unseen = lse == -torch.inf
    padding = -lse.shape[-1] % alignment
    delta = torch.nn.functional.pad(delta.masked_fill(unseen, 0.0), (0, padding))
    lse_log2 = (lse * LOG2_E).masked_fill(unseen, 0.0)
    return delta, torch.nn.functional.pad(lse_log2, (0, padding), value=torch.inf)
