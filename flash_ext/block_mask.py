"""BlockMask: any mask as lists of blocks, so that attention visits only blocks that hold something (docs/block_masks.md).

A block is BLOCK x BLOCK scores. Empty blocks are in no list; full ones carry no mask; partial ones carry a bit for each
score. The lists stand twice, for each block of queries (forward) and for each block of keys (backward). The idea of block
kinds: FlashAttention (Dao et al. 2022, section 3.3), FlexAttention (Dong et al. 2024), Binary Block Masking (Sharma and
Geiping 2024); lists of single blocks, because full blocks need not be neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # kMaskBlock of csrc/common/block_list.cuh
EMPTY, PARTIAL, FULL = 0, 1, 2
MASK_FN = "mask_fn(b, h, q_idx, kv_idx)"

# (b, h, q_idx, kv_idx) of n blocks, shapes (n), (n), (n, BLOCK), (n, BLOCK) int64, to what is visible, (n, BLOCK, BLOCK) bool.
Cells = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def num_blocks(seqlen: int) -> int:
    return -(-seqlen // BLOCK)


def _cells_at_once(device: torch.device) -> int:
    """Scores of a mask that are evaluated together: their temporaries fit a core's memory, or fill a GPU."""
    return 2**27 if device.type == "cuda" else 2**22


WORDS = BLOCK // 32  # of 32 bits in a row of a block


def pack_bits(cells: Tensor) -> Tensor:
    """(n, BLOCK, BLOCK) bool to (n, 2, BLOCK, WORDS) int32: a row for each query, then a row for each key.

    Bit 2 c + e of word w is column 8 c + 2 w + e: what one thread of a matrix instruction holds of a row (fragment.cuh).
    """
    both = torch.stack([cells, cells.transpose(1, 2)], 1)
    columns = both.unflatten(-1, (BLOCK // 8, WORDS, 2)).transpose(-3, -2).reshape(-1, 2, BLOCK, WORDS * 4, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=cells.device)
    return columns.to(torch.uint8).mul(weights).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(bits: Tensor) -> Tensor:
    """The inverse of pack_bits, from the rows of queries."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits[:, 0].contiguous().view(torch.uint8)
    columns = octets[..., None].bitwise_right_shift(shifts).bitwise_and(1).bool()
    return columns.view(-1, BLOCK, WORDS, BLOCK // 8, 2).transpose(2, 3).reshape(-1, BLOCK, BLOCK)


def mask_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kinds and bits of every block of dense masks: what the op flash_ext::mask_blocks does where no kernel serves the device.

    mask: (n, seqlen_q, seqlen_k) bool. kinds: (n, blocks of queries, blocks of keys) uint8. A block is full when every query
    that exists sees all its BLOCK keys, so a ragged last block of keys is at most partial. bits: (n, blocks of queries, blocks
    of keys, 2, BLOCK, WORDS) int32 as of pack_bits, 0 beyond the edges; undefined for blocks that are not partial.
    """
    n, seqlen_q, seqlen_k = mask.shape
    rows, columns = num_blocks(seqlen_q), num_blocks(seqlen_k)
    kinds = mask.new_empty(n, rows, columns, dtype=torch.uint8)
    bits = mask.new_empty(n, rows, columns, 2, BLOCK, WORDS, dtype=torch.int32)
    if columns == 0:
        return kinds, bits
    for i in range(n):
        for row in range(rows):
            strip = mask[i, row * BLOCK : (row + 1) * BLOCK]
            exist = strip.shape[0]
            strip = torch.nn.functional.pad(strip, (0, columns * BLOCK - seqlen_k, 0, BLOCK - exist))
            blocks = strip.view(BLOCK, columns, BLOCK).transpose(0, 1)
            seen = blocks[:, :exist].sum((1, 2))
            kinds[i, row] = (seen > 0).to(torch.uint8) + (seen == exist * BLOCK)
            bits[i, row] = pack_bits(blocks.contiguous())
    return kinds, bits


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The blocks that each block of queries visits, or, transposed, each block of keys. Lines are numbered (b, h, block).

    offsets: (lines + 1) int32; line i owns entries[offsets[i] : offsets[i + 1]]. num_partial: (batch, num_heads, blocks) int32;
    that many of a line's entries come first and are partial, the others are full. entries: (kept, 2) int32: the block's number
    along the other sequence, and its place in BlockMask.bits, -1 for a full block. Both parts of a line ascend.
    """

    offsets: Tensor
    num_partial: Tensor
    entries: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.num_partial, self.entries


def _lists(shape: tuple[int, int, int], partial: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]) -> BlockLists:
    """partial and full: (line, other block) int64 of their blocks, partial ones in the order of their bits."""
    lines = shape[0] * shape[1] * shape[2]
    device = partial[0].device
    # Sorted by (line, partial before full, other block).
    line = torch.cat([partial[0], full[0]])
    slot = torch.cat([torch.arange(len(partial[0]), device=device), torch.full_like(full[0], -1)])
    order = torch.cat([partial[1], full[1]]).argsort(stable=True)
    order = order[(line[order] * 2 + (slot[order] < 0)).argsort(stable=True)]
    entries = torch.stack([torch.cat([partial[1], full[1]])[order], slot[order]], 1)
    counts = torch.zeros(2, lines, dtype=torch.int64, device=device)
    counts[0].index_add_(0, line, torch.ones_like(line))
    counts[1].index_add_(0, partial[0], torch.ones_like(partial[0]))
    offsets = torch.nn.functional.pad(counts[0].cumsum(0), (1, 0))
    return BlockLists(offsets.int(), counts[1].int().view(shape), entries.int())


def _order(lists: BlockLists, last_at_end: bool) -> Tensor:
    """(blocks) int64: from the longest lines to the shortest, over batch and heads together.

    last_at_end: the last block, which may be ragged, comes last. A tile of half a block may then be missing at the end alone,
    where no turn waits for it.
    """
    lines = lists.offsets.diff().view(lists.num_partial.shape).sum((0, 1))
    if last_at_end and len(lines):
        lines[-1] = -1
    return lines.argsort(descending=True, stable=True)


def _turns(columns: BlockLists, blocks_q: int, order: Tensor) -> Tensor:
    """(kept) int32: the rank of each entry's block of keys, in that order, among those that list the same block of queries."""
    kept, device = columns.entries.shape[0], columns.entries.device
    blocks_k = max(1, columns.num_partial.shape[2])
    lines = torch.arange(columns.num_partial.numel(), device=device)
    column = lines.repeat_interleave(columns.offsets.diff().long(), output_size=kept)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    row = column // blocks_k * blocks_q + columns.entries[:, 0]
    row, sorted_by = (row * blocks_k + rank[column % blocks_k]).sort(stable=True)
    row = row // blocks_k
    place = torch.arange(kept, device=device)
    return torch.empty_like(place).scatter_(0, sorted_by, place - torch.searchsorted(row, row)).int()


class _Kept:
    """The blocks found so far: coordinates of the partial and of the full ones, and the bits of the former."""

    def __init__(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> None:
        self.batch, self.num_heads, self.seqlen_q, self.seqlen_k = batch, num_heads, seqlen_q, seqlen_k
        self.partial: list[Tensor] = [torch.empty(0, 4, dtype=torch.int64, device=device)]
        self.full: list[Tensor] = [torch.empty(0, 4, dtype=torch.int64, device=device)]
        self.bits: list[Tensor] = [torch.empty(0, 2, BLOCK, WORDS, dtype=torch.int32, device=device)]

    def add(self, where: Tensor, kinds: Tensor, bits: Tensor) -> None:
        """where: (n, 4) int64, the blocks' (b, h, row, column); kinds: (n) uint8; bits: (n, 2, BLOCK, WORDS) int32."""
        is_partial = kinds == PARTIAL
        self.partial.append(where[is_partial])
        self.bits.append(bits[is_partial])
        self.full.append(where[kinds == FULL])

    def block_mask(self) -> BlockMask:
        partial, full = torch.cat(self.partial), torch.cat(self.full)
        if len(partial) + len(full) >= 2**31:
            raise ValueError(f"BlockMask: {len(partial) + len(full)} blocks are more than 32-bit offsets can count")
        rows = (self.batch, self.num_heads, num_blocks(self.seqlen_q))
        columns = (self.batch, self.num_heads, num_blocks(self.seqlen_k))

        def lines(where: Tensor, blocks: int, along: int) -> Tensor:
            return (where[:, 0] * self.num_heads + where[:, 1]) * blocks + where[:, along]

        return BlockMask(
            self.seqlen_q,
            self.seqlen_k,
            _lists(rows, *((lines(w, rows[2], 2), w[:, 3]) for w in (partial, full))),
            _lists(columns, *((lines(w, columns[2], 3), w[:, 2]) for w in (partial, full))),
            torch.cat(self.bits),
        )


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys each query sees, as lists of blocks; for attention(..., block_mask=...), reusable across layers and calls.

    Built by create_block_mask, BlockMask.from_flex, the functions of flash_ext.masks, or `&` of two masks, on the device that
    it will be used on. Building reads the number of kept blocks back to the host; using it reads and allocates nothing of size
    seqlen_q * seqlen_k. Nothing about it depends on the kernel that will run: every kernel's tile divides its blocks.

    Args:
        seqlen_q, seqlen_k: the lengths that it was built for.
        rows: the lists of blocks of keys, for each (batch, head, block of queries).
        columns: the lists of blocks of queries, for each (batch, head, block of keys).
        bits: (partial blocks, 2, 128, 4) int32: which keys each query of a block sees, and which queries see each key. Bit
            2 c + e of word w in a row stands for column 8 c + 2 w + e.
        row_order, column_order: (blocks) int32, derived: blocks of queries, and of keys, from the one that visits the most blocks
            to the one that visits the fewest: the order in which kernels take them.
        turns: (kept) int32, derived: of each entry of columns, how many blocks of keys the block of queries has before its own
            in that order: the order in which a deterministic backward sums dq.

    batch and num_heads are 1 for a mask that all sequences, or all heads, share. The lists are trusted: build them by the
    functions above.
    """

    seqlen_q: int
    seqlen_k: int
    rows: BlockLists
    columns: BlockLists
    bits: Tensor
    row_order: Tensor = field(init=False)
    column_order: Tensor = field(init=False)
    turns: Tensor = field(init=False)
    _derived: dict[Any, BlockMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        column_order = _order(self.columns, last_at_end=True)
        object.__setattr__(self, "row_order", _order(self.rows, last_at_end=False).int())
        object.__setattr__(self, "column_order", column_order.int())
        object.__setattr__(self, "turns", _turns(self.columns, num_blocks(self.seqlen_q), column_order))

    @property
    def batch(self) -> int:
        return self.rows.num_partial.shape[0]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.rows.num_partial.shape[1]

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def num_kept(self) -> int:
        """Blocks that are not empty, over batch and heads."""
        return self.rows.entries.shape[0]

    @property
    def num_partial(self) -> int:
        return self.bits.shape[0]

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, the share of the work that is left; 0 for an empty mask."""
        total = self.batch * self.num_heads * num_blocks(self.seqlen_q) * num_blocks(self.seqlen_k)
        return self.num_kept / total if total else 0.0

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch={self.batch}, num_heads={self.num_heads}, seqlen_q={self.seqlen_q}, seqlen_k={self.seqlen_k}, "
            f"kept={self.num_kept}, partial={self.num_partial}, density={self.density:.3g}, device='{self.device}')"
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The ten tensors in the order of the ops' arguments."""
        return (*self.rows.tensors(), *self.columns.tensors(), self.bits, self.turns, self.row_order, self.column_order)

    def to(self, device: torch.device | str) -> BlockMask:
        """A copy on another device."""
        rows, columns = (BlockLists(*(t.to(device) for t in lists.tensors())) for lists in (self.rows, self.columns))
        return BlockMask(self.seqlen_q, self.seqlen_k, rows, columns, self.bits.to(device))

    def coordinates(self) -> Tensor:
        """(kept, 5) int64: b, h, block of queries, block of keys, place in bits or -1, in the order of the row lists."""
        counts = self.rows.offsets.diff().long()
        line = torch.arange(len(counts), device=self.device).repeat_interleave(counts, output_size=self.num_kept)
        blocks = max(1, num_blocks(self.seqlen_q))
        head = line // blocks
        entries = self.rows.entries.long()
        return torch.stack([head // self.num_heads, head % self.num_heads, line % blocks, entries[:, 0], entries[:, 1]], 1)

    def to_dense(self) -> Tensor:
        """(batch, num_heads, seqlen_q, seqlen_k) bool, for looking at small masks."""
        rows, columns = num_blocks(self.seqlen_q), num_blocks(self.seqlen_k)
        dense = torch.zeros(self.batch, self.num_heads, rows, columns, BLOCK, BLOCK, dtype=torch.bool, device=self.device)
        b, h, m, n, slot = self.coordinates().unbind(1)
        full, partial = slot < 0, slot >= 0
        dense[b[full], h[full], m[full], n[full]] = True
        dense[b[partial], h[partial], m[partial], n[partial]] = unpack_bits(self.bits[slot[partial]])
        dense = dense.transpose(3, 4).reshape(self.batch, self.num_heads, rows * BLOCK, columns * BLOCK)
        return dense[..., : self.seqlen_q, : self.seqlen_k].contiguous()

    def __and__(self, other: BlockMask) -> BlockMask:
        """What both masks show."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.seqlen_q, self.seqlen_k, self.device) != (other.seqlen_q, other.seqlen_k, other.device):
            raise ValueError(f"BlockMask: masks of unlike lengths or devices cannot be joined: {self} & {other}")
        shape = []
        for name, a, b in (("batch", self.batch, other.batch), ("num_heads", self.num_heads, other.num_heads)):
            if a != b and 1 not in (a, b):
                raise ValueError(f"BlockMask: {name} of masks that are joined must be equal or 1, got {a} and {b}")
            shape.append(max(a, b))
        kept = _Kept(shape[0], shape[1], self.seqlen_q, self.seqlen_k, self.device)
        mine, theirs = (mask._numbered(shape[0], shape[1]) for mask in (self, other))
        if len(mine[0]) and len(theirs[0]):
            # Both are sorted by the block's number: every block of this mask looks itself up in the other.
            at = torch.searchsorted(theirs[0], mine[0]).clamp(max=len(theirs[0]) - 1)
            common = theirs[0][at] == mine[0]
            number, slots = mine[0][common], (mine[1][common], theirs[1][at[common]])
            where = torch.stack(self._unnumbered(number, shape[1]), 1)
            for part in torch.arange(len(number), device=self.device).split(2**16):
                words = [m.bits.new_full((len(part), *m.bits.shape[1:]), -1) for m in (self, other)]
                for bits, mask, slot in zip(words, (self, other), slots, strict=True):
                    is_partial = slot[part] >= 0
                    bits[is_partial] = mask.bits[slot[part][is_partial]]
                both = words[0] & words[1]
                is_full = (slots[0][part] < 0) & (slots[1][part] < 0)
                kinds = torch.where(is_full, FULL, (both != 0).flatten(1).any(1).to(torch.int64) * PARTIAL)
                kept.add(where[part], kinds, both)
        return kept.block_mask()

    def _numbered(self, batch: int, num_heads: int) -> tuple[Tensor, Tensor]:
        """Every kept block's number in a mask of that batch and heads, ascending, and its place in bits."""
        b, h, m, n, slot = self.coordinates().unbind(1)
        if self.batch != batch:
            b, h, m, n, slot = (t.repeat(batch) for t in (b, h, m, n, slot))
            b = torch.arange(batch, device=self.device).repeat_interleave(len(b) // batch)
        if self.num_heads != num_heads:
            each = len(h)
            b, h, m, n, slot = (t.repeat(num_heads) for t in (b, h, m, n, slot))
            h = torch.arange(num_heads, device=self.device).repeat_interleave(each)
        number = ((b * num_heads + h) * num_blocks(self.seqlen_q) + m) * num_blocks(self.seqlen_k) + n
        order = number.argsort()
        return number[order], slot[order]

    def _unnumbered(self, number: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, columns = num_blocks(self.seqlen_q), num_blocks(self.seqlen_k)
        head = number // columns // rows
        return head // num_heads, head % num_heads, number // columns % rows, number % columns

    def within_window(self, causal: bool, window_size: tuple[int, int]) -> BlockMask:
        """This mask and that of attention's causal and window_size (bottom-right aligned), built once and kept."""
        key = (causal, *window_size)
        if not causal and window_size[0] < 0 and window_size[1] < 0:
            return self
        if key not in self._derived:
            from .masks import sliding_window_mask

            right = 0 if causal else window_size[1]
            window = sliding_window_mask(self.seqlen_q, self.seqlen_k, (window_size[0], right), device=self.device)
            self._derived[key] = self & window
        return self._derived[key]

    def violations(self, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> list[str]:
        """Why the mask does not fit a call, in the words of an argument error; empty when it does."""
        found = []
        for name, mine, wanted in (("seqlen_q", self.seqlen_q, seqlen_q), ("seqlen_k", self.seqlen_k, seqlen_k)):
            if mine != wanted:
                found.append(f"block_mask was built for {name} {mine}, got {wanted}")
        for name, mine, wanted in (("batch", self.batch, batch), ("num_heads", self.num_heads, num_heads)):
            if mine not in (1, wanted):
                found.append(f"block_mask.{name} must be 1 or that of q, got {mine} and {wanted}")
        if self.device != device:
            found.append(f"block_mask.device must equal q.device, got {self.device} and {device}; block_mask.to(device) moves it")
        return found

    @staticmethod
    def from_flex(flex: Any) -> BlockMask:
        """A BlockMask from torch.nn.attention.flex_attention's, of any block size: its full blocks are visible, its partial
        ones where its mask_mod says so, all others hidden.

        Args:
            flex: torch's BlockMask; its lists' device becomes the result's.

        Raises:
            TypeError: flex is something else. What its mask_mod raises passes unchanged.
        """
        wanted = ("kv_num_blocks", "kv_indices", "BLOCK_SIZE", "mask_mod")
        missing = [name for name in wanted if not hasattr(flex, name)]
        if missing:
            raise TypeError(
                f"from_flex: flex must be a torch.nn.attention.flex_attention.BlockMask, got {type(flex).__name__} "
                f"without {', '.join(missing)}"
            )
        size = flex.BLOCK_SIZE if isinstance(flex.BLOCK_SIZE, (tuple, list)) else (flex.BLOCK_SIZE,) * 2
        partial = _flex_matrix(flex.kv_num_blocks, flex.kv_indices)
        lists = getattr(flex, "full_kv_num_blocks", None)
        full = torch.zeros_like(partial) if lists is None else _flex_matrix(lists, flex.full_kv_indices)
        table = torch.where(full, FULL, partial.to(torch.uint8) * PARTIAL).to(torch.uint8)
        batch, num_heads, rows, columns = table.shape
        seqlen_q, seqlen_k = getattr(flex, "seq_lengths", (rows * size[0], columns * size[1]))
        of_partial = vmapped(flex.mask_mod, "from_flex")

        def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            kind = table[b[:, None, None], h[:, None, None], q_idx[:, :, None] // size[0], kv_idx[:, None] // size[1]]
            return (kind == FULL) | ((kind == PARTIAL) & of_partial(b, h, q_idx, kv_idx))

        # A block may touch several of theirs: it is empty, or full, only when all of them are.
        spans = [_touched(length, own, table.device) for length, own in ((seqlen_q, size[0]), (seqlen_k, size[1]))]

        def kinds(rows_wanted: Tensor) -> Tensor:
            lowest = highest = None
            for i in range(spans[0].shape[1]):
                for j in range(spans[1].shape[1]):
                    some = table[:, :, spans[0][rows_wanted, i]][..., spans[1][:, j]]
                    lowest = some if lowest is None else torch.minimum(lowest, some)
                    highest = some if highest is None else torch.maximum(highest, some)
            return torch.where(lowest == FULL, FULL, (highest > EMPTY).to(torch.uint8) * PARTIAL).to(torch.uint8)

        return build(batch, num_heads, seqlen_q, seqlen_k, table.device, kinds, cells)


def _flex_matrix(counts: Tensor, indices: Tensor) -> Tensor:
    """FlexAttention's lists (batch, heads, rows), (batch, heads, rows, columns) as a bool matrix."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    matrix = torch.zeros_like(indices, dtype=torch.int32)
    return matrix.scatter_add_(-1, indices.long(), listed.int()) > 0


def _touched(seqlen: int, size: int, device: torch.device) -> Tensor:
    """(blocks, n) int64: the foreign blocks, of `size` positions, that each of our blocks touches, with repetitions."""
    begin = torch.arange(num_blocks(seqlen), device=device) * BLOCK
    first, last = begin // size, (begin + BLOCK - 1).clamp(max=seqlen - 1) // size
    most = -(-(BLOCK - 1) // size) + 1
    return torch.minimum(first[:, None] + torch.arange(most, device=device), last[:, None])


def empty_mask(batch: int, num_heads: int, seqlen_q: int, seqlen_k: int, device: torch.device) -> BlockMask:
    """A mask that shows nothing."""
    return _Kept(batch, num_heads, seqlen_q, seqlen_k, device).block_mask()


def build(
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
    kinds: Callable[[Tensor], Tensor],
    cells: Cells,
) -> BlockMask:
    """A BlockMask from what is known of whole blocks, with single scores evaluated only where that does not decide.

    kinds: from (r) int64, numbers of blocks of queries, to (batch, num_heads, r, blocks of keys) uint8: EMPTY, FULL, or PARTIAL
    for "unknown". The last block of keys is checked against the edge here. cells: see Cells; positions are always valid.
    """
    kept = _Kept(batch, num_heads, seqlen_q, seqlen_k, device)
    columns = num_blocks(seqlen_k)
    at_once = _cells_at_once(device)
    for rows in _row_ranges(seqlen_q, max(1, at_once // max(1, batch * num_heads * columns))):
        of_rows = kinds(torch.arange(*rows, device=device)).contiguous()
        if seqlen_k % BLOCK:
            of_rows[..., -1].clamp_(max=PARTIAL)
        where = of_rows.nonzero()
        kind = of_rows[where.unbind(1)]
        where[:, 2] += rows[0]
        known = where[kind == FULL]
        kept.full.append(known)
        unknown = where[kind == PARTIAL]
        for part in unknown.split(max(1, at_once // BLOCK**2)) if len(unknown) else ():
            kept.add(part, *_evaluate(part, seqlen_q, seqlen_k, cells))
    return kept.block_mask()


def _row_ranges(seqlen_q: int, step: int) -> Iterator[tuple[int, int]]:
    rows = num_blocks(seqlen_q)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def _evaluate(where: Tensor, seqlen_q: int, seqlen_k: int, cells: Cells) -> tuple[Tensor, Tensor]:
    """Kinds and bits of single blocks."""
    within = torch.arange(BLOCK, device=where.device)
    q_idx, kv_idx = where[:, 2, None] * BLOCK + within, where[:, 3, None] * BLOCK + within
    q_exists, kv_exists = q_idx < seqlen_q, kv_idx < seqlen_k
    seen = cells(where[:, 0], where[:, 1], q_idx.clamp(max=seqlen_q - 1), kv_idx.clamp(max=seqlen_k - 1))
    seen = seen & q_exists[:, :, None] & kv_exists[:, None]
    count = seen.sum((1, 2))
    return (count > 0).to(torch.uint8) + (count == q_exists.sum(1) * BLOCK), pack_bits(seen)


def checked(mask_fn: Callable, name: str) -> Callable:
    """mask_fn with its result checked, for a call with scalars under vmap."""

    def call(*position: Tensor) -> Tensor:
        cell = mask_fn(*position)
        if not isinstance(cell, Tensor):
            raise TypeError(f"{name}: {MASK_FN} must return a bool tensor of shape (), got {type(cell).__name__}")
        if cell.dim() != 0 or cell.dtype != torch.bool:
            raise ValueError(
                f"{name}: {MASK_FN} must return a bool tensor of shape (), got {cell.dtype} of shape {tuple(cell.shape)}"
            )
        return cell

    return call


def vmapped(mask_fn: Callable, name: str) -> Cells:
    """The Cells of a function of single positions."""
    function = checked(mask_fn, name)
    for in_dims in ((None, None, None, 0), (None, None, 0, None), (0, 0, 0, 0)):
        function = torch.vmap(function, in_dims=in_dims)
    return function


def create_block_mask(
    mask_or_fn: Tensor | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    batch: int | None,
    num_heads: int | None,
    seqlen_q: int,
    seqlen_k: int,
    *,
    device: torch.device | str | None = None,
) -> BlockMask:
    """A BlockMask from a dense mask or a function of single positions, evaluated once, in pieces.

    Args:
        mask_or_fn: a bool tensor (batch, num_heads, seqlen_q, seqlen_k), first dimensions of 1 shared, or (seqlen_q, seqlen_k);
            or a mask_fn(b, h, q_idx, kv_idx) as FlexAttention's: from scalar int64 tensors to a scalar bool tensor, True where
            the query sees the key. It runs under torch.vmap and may index tensors that it closes over.
        batch, num_heads: how many sequences and query heads have masks of their own; None (or 1): one mask for all. A tensor's
            own first dimensions decide; these are checked against them.
        seqlen_q, seqlen_k: lengths; 0 is allowed.
        device: of the lists, for a function; torch's default device if None. A tensor's lists are on its own device.

    Returns:
        BlockMask. A mask of a known structure is built quicker by flash_ext.masks, which looks at few single positions.

    Raises:
        TypeError: a wrong Python type, or a mask_fn that returns no tensor.
        ValueError: a wrong shape, dtype or device. What mask_fn raises passes unchanged.
    """
    sizes = {"batch": batch, "num_heads": num_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    check_sizes("create_block_mask", sizes, {"batch": 1, "num_heads": 1}, optional=("batch", "num_heads"))
    if isinstance(mask_or_fn, Tensor):
        mask = _checked_mask(mask_or_fn, sizes, device)
        kept = _Kept(*mask.shape, mask.device)

        def strip(b: int, h: int, begin: int, end: int) -> Tensor:
            return mask[b, h, begin:end]
    elif callable(mask_or_fn):
        where = torch.device(device) if device is not None else torch.get_default_device()
        kept = _Kept(batch or 1, num_heads or 1, seqlen_q, seqlen_k, where)
        function = checked(mask_or_fn, "create_block_mask")
        for in_dims in ((None, None, None, 0), (None, None, 0, None)):
            function = torch.vmap(function, in_dims=in_dims)
        keys = torch.arange(seqlen_k, device=where)

        def strip(b: int, h: int, begin: int, end: int) -> Tensor:
            index_b, index_h = (torch.tensor(i, device=where) for i in (b, h))
            return function(index_b, index_h, torch.arange(begin, end, device=where), keys)
    else:
        raise TypeError(f"create_block_mask: mask_or_fn must be a bool tensor or a function, got {type(mask_or_fn).__name__}")
    if seqlen_q == 0 or seqlen_k == 0:
        return kept.block_mask()
    step = max(1, _cells_at_once(kept.bits[0].device) // (BLOCK * seqlen_k))
    for b in range(kept.batch):
        for h in range(kept.num_heads):
            for begin, end in _row_ranges(seqlen_q, step):
                with torch.no_grad():
                    cells = strip(b, h, begin * BLOCK, min(end * BLOCK, seqlen_q))
                kinds, bits = torch.ops.flash_ext.mask_blocks(cells[None].contiguous())
                where_kept = kinds[0].nonzero()
                row, column = where_kept.unbind(1)
                head = torch.tensor([[b, h]], device=row.device).expand(len(row), 2)
                at = torch.stack([head[:, 0], head[:, 1], row + begin, column], 1)
                kept.add(at, kinds[0, row, column], bits[0, row, column])
    return kept.block_mask()


def check_sizes(name: str, sizes: dict[str, Any], least: dict[str, int], optional: tuple[str, ...] = ()) -> None:
    """TypeError or ValueError that lists every size that is no int, or below its least value (0 by default)."""
    given = {key: value for key, value in sizes.items() if not (value is None and key in optional)}
    wrong = [
        f"{k} must be an int, got {type(v).__name__}" for k, v in given.items() if not isinstance(v, int) or isinstance(v, bool)
    ]
    if wrong:
        raise TypeError(f"{name}: " + "; ".join(wrong))
    small = [f"{k} must be at least {least.get(k, 0)}, got {v}" for k, v in given.items() if v < least.get(k, 0)]
    if small:
        raise ValueError(f"{name}: " + "; ".join(small))


def _checked_mask(mask: Tensor, sizes: dict[str, int | None], device: Any) -> Tensor:
    """The mask with 4 dimensions."""
    found = []
    if mask.dtype != torch.bool:
        found.append(f"mask.dtype must be bool, got {mask.dtype}")
    if device is not None and mask.device != torch.empty(0, device=device).device:
        found.append(f"device is that of the mask, got {device} and {mask.device}")
    lengths = (sizes["seqlen_q"], sizes["seqlen_k"])
    if mask.dim() not in (2, 4) or tuple(mask.shape[-2:]) != lengths:
        found.append(
            f"mask.shape must be (batch or 1, num_heads or 1, {lengths[0]}, {lengths[1]}) or its last two, got {tuple(mask.shape)}"
        )
    elif mask.dim() == 4:
        for name, size in zip(("batch", "num_heads"), mask.shape[:2], strict=True):
            if size not in (1, sizes[name] or 1):
                found.append(f"mask.{name} must be 1 or {name}, got {size} and {sizes[name]}")
    if found:
        raise ValueError("create_block_mask: " + "; ".join(found))
    return mask if mask.dim() == 4 else mask[None, None]
