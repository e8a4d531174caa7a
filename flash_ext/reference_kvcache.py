"""The semantics of attention over a KV cache, written once: appended rows, rotary embedding, pages, on any device.

Keys are read in blocks of KEY_BLOCK rows that start at multiples of it, whatever the cache's capacity, page size or page
order: so a paged cache gives the bits of the dense one. Arithmetic is float32, float64 for float64 inputs; rotated rows are
rounded to the cache's dtype, as kernels hold them. On a GPU nothing is read back: every block up to the capacity is visited.

Values that nobody checked are clamped: lengths to [0, capacity], leftpad_k to [0, length], positions to the rotary tables,
pages and batch indices to the cache. A new row without a place of its own (beyond the capacity, or through an index out of
range) is not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEY_BLOCK = 128
BLOCK_ROWS = 64  # of a cache, with one scale
_SCORES_AT_ONCE = 2**22  # elements of a tile of scores


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Scoring:
    """What turns q . k into a masked score. A window side of -1 is unbounded; causal has become right = 0."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float


@dataclass(frozen=True)
class Cache:
    """Where the rows of each sequence lie: dense (batch, seqlen, heads, dim), or pages of rows with a table.

    capacity: rows that a sequence can have. length: (batch) int64, rows that it has, clamped.
    """

    rows: int  # of a page; of a whole sequence in a dense cache
    blocks: int  # pages, or sequences of a dense cache
    capacity: int
    length: Tensor
    page_table: Tensor | None
    batch_index: Tensor | None

    @classmethod
    def of(cls, k_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None, batch_index: Tensor | None) -> Cache:
        rows = k_cache.shape[1]
        capacity = rows if page_table is None else rows * page_table.shape[1]
        return cls(rows, k_cache.shape[0], capacity, cache_seqlens.long().clamp(0, capacity), page_table, batch_index)

    def place(self, sequences: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(page or sequence of the cache, row in it, whether that place is its own) of rows (sequences, n)."""
        inside = (row >= 0) & (row < self.capacity)
        row = row.clamp(0, self.capacity - 1)
        if self.page_table is not None:
            block = self.page_table.long()[sequences[:, None], row // self.rows]
            offset = row % self.rows
        else:
            owner = sequences if self.batch_index is None else self.batch_index.long()[sequences]
            block, offset = owner[:, None].expand(row.shape), row
        inside = inside & (block >= 0) & (block < self.blocks)
        return block.clamp(0, self.blocks - 1), offset, inside


def rotate(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (batch, rows, heads, dim) turned by the angles of position (batch, rows), in x's dtype.

    RoFormer (Su et al. 2021), equation 34, on the first 2 * cos.shape[1] columns: pairs of neighbours where interleaved
    (GPT-J), columns i and i + rotary_dim / 2 otherwise (GPT-NeoX). cos, sin: (positions, rotary_dim / 2).
    """
    position = position.clamp(0, cos.shape[0] - 1)
    wide = accumulation_dtype(x.dtype)
    c, s = (table.to(wide)[position][:, :, None] for table in (cos, sin))
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * c - second * s, first * s + second * c)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def append(cache: Cache, targets: tuple[tuple[Tensor, Tensor], ...]) -> None:
    """Write each (rows (batch, n, heads, dim), cache tensor) behind the sequences' ends, in place."""
    new = targets[0][0]
    if new.shape[0] == 0 or new.shape[1] == 0 or cache.capacity == 0 or cache.blocks == 0:
        return
    device = new.device
    row = cache.length[:, None] + torch.arange(new.shape[1], device=device)
    block, offset, own = (t.flatten() for t in cache.place(torch.arange(new.shape[0], device=device), row))
    # A row without a place repeats the first one that has one: no value is read back, and nothing else is overwritten.
    first = own.to(torch.uint8).argmax()
    source = torch.arange(own.numel(), device=device).where(own, first)
    block, offset = block[source], offset[source]
    for values, target in targets:
        rows = values.flatten(0, 1)[source]
        target.index_put_((block, offset), rows.where(own.any(), target[block, offset]))


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache: Cache,
    leftpad: Tensor | None,
    scoring: Scoring,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    descales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """(out (batch, seqlen_q, num_heads, head_dim_v) in q's dtype, lse (batch, num_heads, seqlen_q)) over the cache's rows.

    descales: factors of k's and v's rows (float32, shapes as attention_with_kvcache); None: 1."""
    batch, seqlen_q, num_heads, _ = q.shape
    wide = accumulation_dtype(q.dtype)
    out = q.new_zeros(batch, seqlen_q, num_heads, v_cache.shape[3])
    lse = q.new_full((batch, num_heads, seqlen_q), -torch.inf, dtype=wide)
    if out.numel() == 0:
        return out, lse
    group = num_heads // k_cache.shape[2]
    block_q = max(1, min(seqlen_q, 256 // group))
    sequences = max(1, _SCORES_AT_ONCE // (num_heads * block_q * KEY_BLOCK))
    for begin in range(0, batch, sequences):
        part = torch.arange(begin, min(begin + sequences, batch), device=q.device)
        for row in range(0, seqlen_q, block_q):
            rows = slice(row, min(row + block_q, seqlen_q))
            out[part, rows], lse[part, :, rows] = _attend_rows(
                q, k_cache, v_cache, cache, leftpad, scoring, sinks, alibi_slopes, descales, part, rows
            )
    return out, lse


def _scale(descale: Tensor | None, sequences: Tensor, block: Tensor, offset: Tensor) -> Tensor | float:
    """What the rows at places (sequences, n) are multiplied with: (sequences, n, heads, 1), or a number for all."""
    if descale is None:
        return 1.0
    if descale.dim() < 2:
        return descale.reshape(())
    if descale.dim() == 2:
        return descale[sequences][:, None, :, None]
    return descale[block, :, offset // BLOCK_ROWS][..., None]


def _attend_rows(q, k_cache, v_cache, cache, leftpad, scoring, sinks, alibi_slopes, descales, part, rows):  # fmt: skip
    seqlen_q, num_heads, wide = q.shape[1], q.shape[2], accumulation_dtype(q.dtype)
    heads_kv = k_cache.shape[2]
    length = cache.length[part]
    start = torch.zeros_like(length) if leftpad is None else leftpad[part].long().clamp(min=0).minimum(length)
    visible = length - start
    # (sequences, heads_kv, group, rows, ...): grouped heads share their keys.
    q_rows = q[part, rows].to(wide).transpose(1, 2).unflatten(1, (heads_kv, -1)) * scoring.softmax_scale
    diagonal = torch.arange(rows.start, rows.stop, device=q.device) + (visible - seqlen_q)[:, None]
    row_max = q_rows.new_full(q_rows.shape[:-1], -torch.inf)
    row_sum = torch.zeros_like(row_max)
    acc = q_rows.new_zeros(*q_rows.shape[:-1], v_cache.shape[3])
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(wide).expand(q.shape[0], num_heads)[part].unflatten(1, (heads_kv, -1))[..., None, None]

    end = cache.capacity if q.device.type != "cpu" else int(length.max())
    for key in range(0, end if cache.blocks else 0, KEY_BLOCK):
        row = torch.arange(key, key + KEY_BLOCK, device=q.device)
        block, offset, _ = cache.place(part, row.expand(len(part), -1))
        position = row - start[:, None]
        present = (position >= 0) & (row < length[:, None])
        # Rows that nobody may see become zeros, so that NaN in them cannot meet a weight of zero.
        keys, values = (
            torch.where(present[..., None, None], c[block, offset].to(wide) * _scale(descale, part, block, offset), 0).transpose(
                1, 2
            )[:, :, None]
            for c, descale in zip((k_cache, v_cache), descales, strict=True)
        )
        scores = q_rows @ keys.mT
        if scoring.softcap > 0:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        distance = position[:, None] - diagonal[..., None]  # (sequences, rows, keys)
        if alibi_slopes is not None:
            scores = scores - slopes * distance.abs()[:, None, None]
        seen = present[:, None].expand(distance.shape)
        if scoring.window_left >= 0:
            seen = seen & (distance >= -scoring.window_left)
        if scoring.window_right >= 0:
            seen = seen & (distance <= scoring.window_right)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        new_max = torch.maximum(row_max, scores.amax(-1))
        base = new_max.masked_fill(new_max == -torch.inf, 0.0)
        weights = torch.exp(scores - base[..., None])
        rescale = torch.exp(row_max - base)
        row_sum = row_sum * rescale + weights.sum(-1)
        acc = acc * rescale[..., None] + weights @ values
        row_max = new_max

    nothing = row_sum == 0  # NaN counts as seen: a NaN input shows itself
    own_lse = (row_max + row_sum.log()).flatten(1, 2)
    acc = (acc / row_sum.masked_fill(nothing, 1.0)[..., None]).flatten(1, 2)
    if sinks is not None:
        with_sink = torch.logaddexp(own_lse, sinks.to(wide)[:, None])
        share = torch.exp(own_lse - with_sink).masked_fill(nothing.flatten(1, 2), 0.0)
        acc, own_lse = acc * share[..., None], with_sink
    return acc.transpose(1, 2).to(q.dtype), own_lse
