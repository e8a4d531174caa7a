"""BlockMasks of known structures, built without a mask of seqlen_q x seqlen_k scores: whole blocks are judged by bounds over
their rows and keys, and single scores are evaluated only in blocks that the bounds leave open.

Sources: packed documents, Krell et al. 2021; prefix LM, Raffel et al. 2020; sliding windows with global tokens, Longformer
(Beltagy et al. 2020); trees of candidate tokens, MEDUSA (Cai et al. 2024); block-sparse attention, FlashAttention (Dao et al.
2022, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .block_mask import BLOCK, FULL, PARTIAL, BlockMask, build, check_sizes, empty_mask, num_blocks, unpack_bits

_INTEGERS = (torch.int32, torch.int64)


def _bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., seqlen) to the least and the largest value of each block, (..., blocks)."""
    blocks = num_blocks(values.shape[-1])
    padded = values[..., -1:].expand(*values.shape[:-1], blocks * BLOCK - values.shape[-1])
    grouped = torch.cat([values, padded], -1).unflatten(-1, (blocks, BLOCK))
    return grouped.amin(-1), grouped.amax(-1)


def _kinds(some: Tensor, every: Tensor) -> Tensor:
    """some: a score of the block may be visible; every: all are for certain (which implies some)."""
    return torch.where(every, FULL, some.to(torch.uint8) * PARTIAL).to(torch.uint8)


def _block_ends(m: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """First and last position of the blocks m, int64."""
    return m * BLOCK, (m * BLOCK + BLOCK - 1).clamp(max=seqlen - 1)


def _checked_integers(name: str, argument: str, tensor: Any, dims: str) -> Tensor:
    """An int tensor (seqlen) or (batch, seqlen) as (batch, seqlen) int64."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _INTEGERS or tensor.dim() not in (1, 2):
        raise ValueError(f"{name}: {argument} must be int32 or int64 of shape {dims}, got {tensor.dtype} {tuple(tensor.shape)}")
    return (tensor if tensor.dim() == 2 else tensor[None]).long()


def document_mask(doc_ids: Tensor, *, causal: bool = False) -> BlockMask:
    """Tokens see the tokens of their own document: for several documents packed into one sequence.

    Args:
        doc_ids: (seqlen) or (batch, seqlen) int32 or int64: the document of each token, any numbers in any order; documents that
            lie together make the sparsest lists. A negative number is padding, which sees nothing and is seen by nothing.
        causal: tokens see no later token.

    Returns:
        BlockMask of seqlen queries and keys, on doc_ids' device, shared by all heads, and by all sequences if doc_ids has one
        dimension. Blocks are judged by the least and largest number in them.

    Raises:
        TypeError, ValueError: doc_ids is no such tensor.
    """
    ids = _checked_integers("document_mask", "doc_ids", doc_ids, "(seqlen) or (batch, seqlen)")
    batch, seqlen = ids.shape
    if seqlen == 0:
        return empty_mask(batch, 1, 0, 0, ids.device)
    least, largest = _bounds(ids)

    def kinds(m: Tensor) -> Tensor:
        low, high = least[:, m, None], largest[:, m, None]
        some = (low <= largest[:, None]) & (least[:, None] <= high) & (high >= 0) & (largest[:, None] >= 0)
        every = some & (low == high) & (least == largest)[:, None] & (low == least[:, None])
        if causal:
            n = torch.arange(num_blocks(seqlen), device=ids.device)
            some, every = some & (n <= m[:, None]), every & (n < m[:, None])
        return _kinds(some, every)[:, None]

    def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        of_q, of_k = ids[b[:, None], q_idx][:, :, None], ids[b[:, None], kv_idx][:, None]
        seen = (of_q == of_k) & (of_q >= 0)
        return seen & (kv_idx[:, None] <= q_idx[:, :, None]) if causal else seen

    return build(batch, 1, seqlen, seqlen, ids.device, kinds, cells)


def prefix_lm_mask(prefix_lengths: Tensor | int, seqlen: int, *, device: torch.device | str | None = None) -> BlockMask:
    """Every token sees the prefix of its sequence; tokens after it also see what came before them (prefix language model).

    Args:
        prefix_lengths: an int for all sequences, or (batch) int32 or int64.
        seqlen: of queries and keys.
        device: of the lists, where prefix_lengths is an int; torch's default device if None.

    Returns:
        BlockMask, shared by all heads.

    Raises:
        TypeError, ValueError: arguments of another kind.
    """
    check_sizes("prefix_lm_mask", {"seqlen": seqlen}, {})
    if isinstance(prefix_lengths, Tensor):
        if prefix_lengths.dim() != 1:
            raise ValueError(
                f"prefix_lm_mask: prefix_lengths must be (batch) int32 or int64, got shape {tuple(prefix_lengths.shape)}"
            )
        prefix = _checked_integers("prefix_lm_mask", "prefix_lengths", prefix_lengths, "(batch)")[0]
    else:
        check_sizes("prefix_lm_mask", {"prefix_lengths": prefix_lengths}, {})
        prefix = torch.tensor([prefix_lengths], device=device)
    if seqlen == 0:
        return empty_mask(len(prefix), 1, 0, 0, prefix.device)
    first_key, last_key = _block_ends(torch.arange(num_blocks(seqlen), device=prefix.device), seqlen)

    def kinds(m: Tensor) -> Tensor:
        first, last = (t[:, None] for t in _block_ends(m, seqlen))
        ends = prefix[:, None, None]
        return _kinds((first_key <= last) | (first_key < ends), (last_key <= first) | (last_key < ends))[:, None]

    def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx[:, None] <= q_idx[:, :, None]) | (kv_idx < prefix[b][:, None])[:, None]

    return build(len(prefix), 1, seqlen, seqlen, prefix.device, kinds, cells)


def sliding_window_mask(
    seqlen_q: int,
    seqlen_k: int,
    window_size: tuple[int, int],
    *,
    global_tokens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """A sliding window, and tokens that see and are seen by everything (Longformer).

    Args:
        seqlen_q, seqlen_k: lengths.
        window_size: (left, right), inclusive, -1 for no bound, as attention's: query i sees the keys from
            i + seqlen_k - seqlen_q - left to i + seqlen_k - seqlen_q + right. (-1, 0) is the causal mask.
        global_tokens: (seqlen_k) bool, True for global tokens: every query sees them, and the query that stands at one (bottom-
            right aligned) sees every key, window or not. None: there are none.
        device: of the lists; that of global_tokens, or torch's default device, if None.

    Returns:
        BlockMask, shared by all sequences and heads. `& sliding_window_mask(n, n, (-1, 0))` makes it causal.

    Raises:
        TypeError, ValueError: arguments of another kind.
    """
    check_sizes("sliding_window_mask", {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}, {})
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"sliding_window_mask: window_size must be a pair (left, right) of ints, got {window_size!r}")
    check_sizes("sliding_window_mask", dict(zip(("window_size left", "window_size right"), window_size, strict=True)),
                {"window_size left": -1, "window_size right": -1})  # fmt: skip
    if global_tokens is not None:
        if not isinstance(global_tokens, Tensor):
            raise TypeError(
                f"sliding_window_mask: global_tokens must be a torch.Tensor or None, got {type(global_tokens).__name__}"
            )
        if global_tokens.dtype != torch.bool or global_tokens.shape != (seqlen_k,):
            raise ValueError(
                f"sliding_window_mask: global_tokens must be bool of shape ({seqlen_k}), got {global_tokens.dtype} "
                f"{tuple(global_tokens.shape)}"
            )
    where = torch.empty(0, device=global_tokens.device if device is None and global_tokens is not None else device).device
    if seqlen_q == 0 or seqlen_k == 0:
        return empty_mask(1, 1, seqlen_q, seqlen_k, where)
    offset = seqlen_k - seqlen_q
    far = seqlen_q + seqlen_k
    left, right = (far if side < 0 else min(side, far) for side in window_size)
    first_key, last_key = _block_ends(torch.arange(num_blocks(seqlen_k), device=where), seqlen_k)
    is_global_k = torch.zeros(seqlen_k, dtype=torch.bool, device=where) if global_tokens is None else global_tokens.to(where)
    # Queries before the first key are nobody's.
    at = torch.arange(seqlen_q, device=where) + offset
    is_global_q = is_global_k[at.clamp(min=0)] & (at >= 0)
    every_k, some_k = (t.bool() for t in _bounds(is_global_k.to(torch.uint8)))
    every_q, some_q = (t.bool() for t in _bounds(is_global_q.to(torch.uint8)))

    def kinds(m: Tensor) -> Tensor:
        first, last = (t[:, None] + offset for t in _block_ends(m, seqlen_q))
        some = (last_key >= first - left) & (first_key <= last + right)
        every = (first_key >= last - left) & (last_key <= first + right)
        return _kinds(some | some_k | some_q[m, None], every | every_k | every_q[m, None])[None, None]

    def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = kv_idx[:, None] - q_idx[:, :, None] - offset
        seen = (distance >= -left) & (distance <= right)
        return seen | is_global_k[kv_idx][:, None] | is_global_q[q_idx][:, :, None]

    return build(1, 1, seqlen_q, seqlen_k, where, kinds, cells)


def tree_mask(
    parents: Tensor | list[int],
    *,
    context_length: int = 0,
    ancestors: bool = True,
    device: torch.device | str | None = None,
) -> BlockMask:
    """Candidate tokens of a tree see themselves and their ancestors, and a context before the tree (MEDUSA).

    Args:
        parents: (n) int32 or int64, or a list: each node's parent, before it in the list; -1 for a root (there may be many).
        context_length: keys before the first node, which every node sees: seqlen_k = context_length + n.
        ancestors: False leaves of the ancestors only the parent.
        device: of the lists; that of parents, or torch's default device, if None.

    Returns:
        BlockMask of n queries and context_length + n keys, shared by all sequences and heads. Ancestors are found by the times at
        which a depth-first walk enters and leaves a node, so that memory is linear in n.

    Raises:
        TypeError, ValueError: arguments of another kind, a parent that does not stand before its child.
    """
    if not isinstance(parents, Tensor):
        parents = torch.tensor(parents, dtype=torch.int64, device=device)
    parent = _checked_integers("tree_mask", "parents", parents, "(n)")
    if parents.dim() != 1:
        raise ValueError(f"tree_mask: parents must have 1 dimension, got shape {tuple(parents.shape)}")
    check_sizes("tree_mask", {"context_length": context_length}, {})
    where = parents.device if device is None else torch.empty(0, device=device).device
    of = parent[0].tolist()
    n, seqlen_k = len(of), context_length + len(of)
    bad = next((i for i, p in enumerate(of) if not -1 <= p < i), None)
    if bad is not None:
        raise ValueError(f"tree_mask: a parent must be -1 or stand before its child, got parents[{bad}] = {of[bad]}")
    if n == 0:
        return empty_mask(1, 1, 0, seqlen_k, where)
    # A node is entered after its elder siblings' subtrees; the context is an ancestor of everything.
    size = [1] * n
    for i in range(n - 1, -1, -1):
        if of[i] >= 0:
            size[of[i]] += size[i]
    entered, next_free, free_root = [0] * n, [0] * n, 0
    for i, p in enumerate(of):
        if p < 0:
            entered[i], free_root = free_root, free_root + size[i]
        else:
            entered[i], next_free[p] = next_free[p], next_free[p] + size[i]
        next_free[i] = entered[i] + 1
    enter_q = torch.tensor(entered, device=where)
    leave_q = enter_q + torch.tensor(size, device=where)
    enter_k = torch.cat([torch.zeros(context_length, dtype=torch.int64, device=where), enter_q])
    leave_k = torch.cat([torch.full((context_length,), n, device=where), leave_q])
    parent_q = parent[0].to(where)
    (q_low, q_high), (k_low, _), (_, k_high) = _bounds(enter_q), _bounds(enter_k), _bounds(leave_k)
    k_high_enter, k_low_leave = _bounds(enter_k)[1], _bounds(leave_k)[0]

    def kinds(m: Tensor) -> Tensor:
        low, high = q_low[m, None], q_high[m, None]
        last_key = _block_ends(torch.arange(num_blocks(seqlen_k), device=where), seqlen_k)[1]
        some = (k_low <= high) & (low < k_high)
        every = (k_high_enter <= low) & (high < k_low_leave)
        # Without ancestors the intervals bound from above only; the context is sure all the same.
        return _kinds(some, (every if ancestors else torch.zeros_like(every)) | (last_key < context_length))[None, None]

    def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        key = kv_idx[:, None]
        if ancestors:
            at = enter_q[q_idx][:, :, None]
            seen = (enter_k[kv_idx][:, None] <= at) & (at < leave_k[kv_idx][:, None])
        else:
            node = key - context_length
            seen = (node == q_idx[:, :, None]) | (node == parent_q[q_idx][:, :, None])
        return seen | (key < context_length)

    return build(1, 1, n, seqlen_k, where, kinds, cells)


def coarse_block_mask(
    coarse: Tensor, seqlen_q: int, seqlen_k: int, *, block_size: tuple[int, int] = (128, 128), causal: bool = False
) -> BlockMask:
    """The mask of block-sparse attention: whole blocks of scores are visible or hidden.

    Args:
        coarse: bool (batch or 1, num_heads or 1, rows, columns) or (rows, columns), with rows = ceil(seqlen_q / block_size[0]) and
            columns = ceil(seqlen_k / block_size[1]).
        seqlen_q, seqlen_k: lengths.
        block_size: scores of a coarse block (queries, keys), any positive ints; FlashAttention v1 has (16, 256). Multiples of 128
            need no bits.
        causal: also hide what attention's causal hides.

    Returns:
        BlockMask on coarse's device.

    Raises:
        TypeError, ValueError: arguments of another kind or shape.
    """
    if not isinstance(coarse, Tensor):
        raise TypeError(f"block_sparse_attention: block_mask must be a torch.Tensor or a BlockMask, got {type(coarse).__name__}")
    if not isinstance(block_size, (tuple, list)) or len(block_size) != 2:
        raise TypeError(f"block_sparse_attention: block_size must be a pair of ints, got {block_size!r}")
    names = ("block_size queries", "block_size keys")
    check_sizes("block_sparse_attention", {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k}, {})
    check_sizes("block_sparse_attention", dict(zip(names, block_size, strict=True)), dict.fromkeys(names, 1))
    shape = (-(-seqlen_q // block_size[0]), -(-seqlen_k // block_size[1]))
    if coarse.dtype != torch.bool or coarse.dim() not in (2, 4) or tuple(coarse.shape[-2:]) != shape:
        raise ValueError(
            f"block_sparse_attention: block_mask must be bool of shape (batch or 1, num_heads or 1, {shape[0]}, {shape[1]}) or its "
            f"last two, got {coarse.dtype} {tuple(coarse.shape)}"
        )
    table = coarse if coarse.dim() == 4 else coarse[None, None]
    spans = [_spans(length, own, table.device) for length, own in ((seqlen_q, block_size[0]), (seqlen_k, block_size[1]))]
    # Sums over rectangles of the table, from its two-dimensional prefix sums.
    sums = torch.nn.functional.pad(table.long().cumsum(-1).cumsum(-2), (1, 0, 1, 0))

    def kinds(m: Tensor) -> Tensor:
        (top, bottom), (start, end) = spans[0][m].unbind(1), spans[1].unbind(1)
        rows = sums[:, :, bottom] - sums[:, :, top]
        count = rows[..., end] - rows[..., start]
        return _kinds(count > 0, count == (bottom - top)[:, None] * (end - start))

    def cells(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return table[b[:, None, None], h[:, None, None], q_idx[:, :, None] // block_size[0], kv_idx[:, None] // block_size[1]]

    mask = build(table.shape[0], table.shape[1], seqlen_q, seqlen_k, table.device, kinds, cells)
    return mask.within_window(causal, (-1, -1))


def _spans(seqlen: int, size: int, device: torch.device) -> Tensor:
    """(blocks, 2) int64: the coarse blocks [begin, end) that each block touches."""
    begin = torch.arange(num_blocks(seqlen), device=device) * BLOCK
    return torch.stack([begin // size, (begin + BLOCK).clamp(max=seqlen).add(size - 1) // size], 1)


def rcm_permutation(mask: Tensor | BlockMask) -> tuple[Tensor, Tensor]:
    """An order of tokens that brings the visible pairs of a very sparse mask close to the diagonal: reverse Cuthill-McKee
    (George 1971), by SciPy, on the host.

    Attention is the same in any order of tokens: with q, k and v permuted by `permutation` along seqlen, the mask
    mask[permutation][:, permutation], and out permuted back by `inverse`. Fewer blocks are kept, so attention is quicker.

    Args:
        mask: (seqlen, seqlen) bool, or a BlockMask of equal lengths shared by all sequences and heads. The pattern need not be
            symmetric; mask | mask.T is what is reordered.

    Returns:
        permutation: (seqlen) int64, on mask's device: the old position of each new one.
        inverse: (seqlen) int64: the new position of each old one.

    Raises:
        TypeError, ValueError: mask is of another kind or shape.
        ImportError: SciPy is not installed.
    """
    if isinstance(mask, BlockMask):
        if mask.seqlen_q != mask.seqlen_k or mask.batch != 1 or mask.num_heads != 1:
            raise ValueError(f"rcm_permutation: mask must be square and shared by all sequences and heads, got {mask}")
        row, column = _visible_pairs(mask)
        seqlen, device = mask.seqlen_q, mask.device
    elif isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"rcm_permutation: mask must be bool of shape (seqlen, seqlen), got {mask.dtype} {tuple(mask.shape)}")
        row, column = mask.nonzero().unbind(1)
        seqlen, device = mask.shape[0], mask.device
    else:
        raise TypeError(f"rcm_permutation: mask must be a torch.Tensor or a BlockMask, got {type(mask).__name__}")
    try:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import reverse_cuthill_mckee
    except ImportError as error:
        raise ImportError("rcm_permutation needs SciPy: pip install scipy") from error
    if seqlen == 0:
        permutation = torch.empty(0, dtype=torch.int64, device=device)
        return permutation, permutation.clone()
    row, column = row.cpu().numpy(), column.cpu().numpy()
    pattern = coo_matrix(([True] * len(row), (row, column)), shape=(seqlen, seqlen)).tocsr()
    order = reverse_cuthill_mckee((pattern + pattern.T).tocsr(), symmetric_mode=True)
    permutation = torch.from_numpy(order.astype("int64")).to(device)
    return permutation, permutation.argsort()


def _visible_pairs(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Row and key of every visible score of a shared mask."""
    rows, columns = [], []
    for part in mask.coordinates().split(2**10):
        slot = part[:, 4]
        cells = torch.ones(len(part), BLOCK, BLOCK, dtype=torch.bool, device=mask.device)
        cells[slot >= 0] = unpack_bits(mask.bits[slot[slot >= 0]])
        block, row, column = cells.nonzero().unbind(1)
        row, column = part[block, 2] * BLOCK + row, part[block, 3] * BLOCK + column
        exists = row < mask.seqlen_q
        rows.append(row[exists])
        columns.append(column[exists])
    return torch.cat(rows), torch.cat(columns)
