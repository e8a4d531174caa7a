"""BlockMask: what the lists hold, built from dense masks, functions, FlexAttention's masks, and known structures."""

from __future__ import annotations

import itertools
import subprocess
import sys

import block_mask_checks as checks
import pytest
import torch
from torch import Tensor

from flash_ext import block_mask, masks
from flash_ext.block_mask import BLOCK, BlockMask, create_block_mask


def bottom_right(seqlen_q: int, seqlen_k: int) -> Tensor:
    """key - (row + seqlen_k - seqlen_q)."""
    return torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - (seqlen_k - seqlen_q)


def kinds_of(mask: Tensor) -> Tensor:
    """By definition, block by block: 0 empty, 1 partial, 2 full (all rows that exist, all BLOCK keys)."""
    rows, columns = -(-mask.shape[-2] // BLOCK), -(-mask.shape[-1] // BLOCK)
    kinds = torch.zeros(*mask.shape[:2], rows, columns, dtype=torch.int64)
    for b, h, m, n in torch.cartesian_prod(*(torch.arange(size) for size in kinds.shape)).view(-1, 4).tolist():
        block = mask[b, h, m * BLOCK : (m + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK]
        kinds[b, h, m, n] = 0 if not block.any() else 2 if block.all() and block.shape[1] == BLOCK else 1
    return kinds


def check_lists(found: BlockMask, mask: Tensor) -> None:
    """Both directions name each kept block once, with its kind, partial ones first; the bits are the mask's."""
    wanted = kinds_of(mask)
    assert torch.equal(found.to_dense(), mask)
    slots = {}
    for lists, kinds in ((found.rows, wanted), (found.columns, wanted.transpose(2, 3))):
        assert lists.offsets.dtype == lists.entries.dtype == lists.num_partial.dtype == torch.int32
        assert lists.num_partial.shape == kinds.shape[:3]
        offsets, entries = lists.offsets.tolist(), lists.entries.tolist()
        assert offsets[0] == 0 and offsets[-1] == len(entries) == (wanted > 0).sum()
        for line, of_line in enumerate(kinds.flatten(0, 2)):
            partial, full = ((of_line == kind).nonzero().flatten().tolist() for kind in (1, 2))
            of_list = entries[offsets[line] : offsets[line + 1]]
            assert [block for block, _ in of_list] == partial + full
            assert lists.num_partial.flatten()[line] == len(partial)
            assert [slot < 0 for _, slot in of_list] == [False] * len(partial) + [True] * len(full)
            head, own = divmod(line, kinds.shape[2])
            for block, slot in of_list[: len(partial)]:
                where = (head, own, block) if lists is found.rows else (head, block, own)
                assert slots.setdefault(slot, where) == where  # a block has the same bits in both directions
    assert sorted(slots) == list(range(found.num_partial))
    # Bit 2 c + e of word w: column 8 c + 2 w + e, of a row for each query, or for each key.
    for slot, (head, m, n) in list(slots.items())[:3]:
        block = torch.zeros(BLOCK, BLOCK, dtype=torch.bool)
        of_mask = mask.flatten(0, 1)[head, m * BLOCK : (m + 1) * BLOCK, n * BLOCK : (n + 1) * BLOCK]
        block[: of_mask.shape[0], : of_mask.shape[1]] = of_mask
        for which, rows in ((0, block), (1, block.mT)):
            for row, word in ((0, 0), (1, 3), (77, 2), (127, 1)):
                bits = found.bits[slot, which, row, word].item() & 0xFFFFFFFF
                assert bits == sum(1 << (2 * c + e) for c in range(16) for e in (0, 1) if rows[row, 8 * c + 2 * word + e])


@pytest.mark.parametrize("name", checks.RANDOM)
def test_orders_and_turns(name: str) -> None:
    """Longest lines first, the last block of keys last; a turn counts the blocks before it, in that order, of its line."""
    mask = checks.random_mask(name)
    made = create_block_mask(mask, mask.shape[0], mask.shape[1], *mask.shape[2:])
    where = made.coordinates()
    for order, along in ((made.row_order, 2), (made.column_order, 3)):
        counts = torch.bincount(where[:, along], minlength=len(order))
        counts = counts[order] if along == 2 else counts[order[:-1]]
        assert sorted(order.tolist()) == list(range(len(order))) and (counts.diff() <= 0).all()
    assert made.column_order[-1] == len(made.column_order) - 1
    rank = {block: i for i, block in enumerate(made.column_order.tolist())}
    kept = {tuple(entry[:4]) for entry in where.tolist()}
    place = 0
    for line, (begin, end) in enumerate(itertools.pairwise(made.columns.offsets.tolist())):
        b, h, n = line // len(rank) // mask.shape[1], line // len(rank) % mask.shape[1], line % len(rank)
        for m, _ in made.columns.entries[begin:end].tolist():
            before = sum((b, h, m, other) in kept for other in rank if rank[other] < rank[n])
            assert made.turns[place] == before
            place += 1
    assert place == len(made.turns)


@pytest.mark.parametrize("name", checks.RANDOM)
def test_lists_of_random_masks(name: str) -> None:
    mask = checks.random_mask(name)
    batch, heads, seqlen_q, seqlen_k = mask.shape
    from_tensor = create_block_mask(mask, batch, heads, seqlen_q, seqlen_k)
    check_lists(from_tensor, mask)
    from_fn = create_block_mask(lambda b, h, q_idx, kv_idx: mask[b, h, q_idx, kv_idx], batch, heads, seqlen_q, seqlen_k)
    for a, b in zip(from_tensor.tensors(), from_fn.tensors(), strict=True):
        assert torch.equal(a, b)


def test_in_pieces_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = checks.random_mask("half")
    ids = torch.arange(900) // 150
    made = [create_block_mask(mask, 1, 4, *mask.shape[2:]), masks.document_mask(ids)]
    monkeypatch.setattr(block_mask, "_cells_at_once", lambda device: 1)
    again = [create_block_mask(mask, 1, 4, *mask.shape[2:]), masks.document_mask(ids)]
    for a, b in zip(made, again, strict=True):
        assert torch.equal(a.to_dense(), b.to_dense()) and torch.equal(a.rows.entries, b.rows.entries)


@pytest.mark.parametrize("sizes", ((0, 300), (300, 0), (0, 0)))
def test_no_queries_or_keys(sizes: tuple[int, int]) -> None:
    for made in (
        create_block_mask(torch.ones(sizes, dtype=torch.bool), None, None, *sizes),
        create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 2, 3, *sizes),
        masks.sliding_window_mask(*sizes, (-1, 0)),
    ):
        assert made.to_dense().shape[2:] == sizes and made.num_kept == 0 and made.density == 0
        assert len(made.rows.offsets) == made.rows.num_partial.numel() + 1


def test_and_window() -> None:
    mask, other = checks.random_mask("half"), torch.rand(3, 1, 257, 384) < 0.7
    made = create_block_mask(mask, None, 4, 257, 384)
    joined = made & create_block_mask(other, 3, None, 257, 384)
    check_lists(joined, mask & other)
    distance = bottom_right(257, 384)
    for causal, window, keep in (
        (True, (-1, -1), distance <= 0),
        (False, (30, 100), (distance >= -30) & (distance <= 100)),
        (True, (200, 7), (distance >= -200) & (distance <= 0)),
    ):
        check_lists(made.within_window(causal, window), mask & keep)
        assert made.within_window(causal, window) is made.within_window(causal, window)
    assert made.within_window(False, (-1, -1)) is made
    with pytest.raises(ValueError, match="batch of masks that are joined"):
        joined & create_block_mask(other[:2], 2, None, 257, 384)
    with pytest.raises(ValueError, match="unlike lengths"):
        made & create_block_mask(other[..., :300], 3, None, 257, 300)


@pytest.mark.parametrize("block_size", (128, 64, 256, (96, 160)), ids=str)
def test_from_flex(block_size: int | tuple[int, int]) -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    limit = torch.tensor([200, 40])
    made = flex.create_block_mask(
        lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < limit[b]), 2, None, 300, 500, "cpu", block_size
    )
    distance = torch.arange(300)[:, None] - torch.arange(500)
    check_lists(BlockMask.from_flex(made), ((distance >= 0) & (distance < limit[:, None, None]))[:, None])


def test_from_flex_takes_nothing_else() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.attention\.flex_attention\.BlockMask, got int"):
        BlockMask.from_flex(3)


def medusa_parents(heads: int, choices: int) -> Tensor:
    """A tree of `choices` candidates for each of `heads` next tokens."""
    nodes = sum(choices**depth for depth in range(1, heads + 1))
    return torch.arange(nodes) // choices - 1


@pytest.mark.parametrize("context", (0, 200))
def test_trees(context: int) -> None:
    parents = medusa_parents(5, 3)
    n = len(parents)
    closest = torch.eye(n, dtype=torch.bool)
    closest[torch.arange(n)[parents >= 0], parents[parents >= 0]] = True
    every = closest.clone()
    for _ in range(5):
        every = (every.float() @ closest.float()) > 0
    ones = torch.ones(n, context, dtype=torch.bool)
    for ancestors, tree in ((True, every), (False, closest)):
        made = masks.tree_mask(parents, context_length=context, ancestors=ancestors)
        check_lists(made, torch.cat([ones, tree], 1)[None, None])
    shuffled = masks.tree_mask([-1, 0, -1, 1, 0, 2, 3, 2])
    assert shuffled.to_dense()[0, 0, 6].tolist() == [True, True, False, True, False, False, True, False]


@pytest.mark.parametrize("causal", (False, True))
def test_documents(causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 6, (2, 700), generator=generator)
    ids[0] = ids[0].sort().values
    ids[:, 600:660] = -1
    ids[1, 128:400] = 9
    keep = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
    if causal:
        keep &= bottom_right(700, 700) <= 0
    made = masks.document_mask(ids, causal=causal)
    check_lists(made, keep[:, None])
    check_lists(masks.document_mask(ids[0].int(), causal=causal), keep[:1, None])
    assert made.num_partial < made.num_kept


def test_prefixes() -> None:
    lengths, row = torch.tensor([0, 130, 700]), torch.arange(700)
    keep = (row <= row[:, None]) | (row < lengths[:, None, None])
    check_lists(masks.prefix_lm_mask(lengths, 700), keep[:, None])
    check_lists(masks.prefix_lm_mask(130, 700), keep[1:2, None])


def test_windows_with_global_tokens() -> None:
    tokens = torch.zeros(900, dtype=torch.bool)
    tokens[[0, 5, 400, 899]] = True
    tokens[640:768] = True
    for seqlen_q in (700, 900, 1100):
        distance = bottom_right(seqlen_q, 900)
        at = torch.arange(seqlen_q) + 900 - seqlen_q
        keep = ((distance >= -100) & (distance <= 30)) | tokens | (tokens[at.clamp(min=0)] & (at >= 0))[:, None]
        check_lists(masks.sliding_window_mask(seqlen_q, 900, (100, 30), global_tokens=tokens), keep[None, None])


@pytest.mark.parametrize("block_size", ((128, 128), (16, 256), (256, 128), (100, 33)), ids=str)
def test_coarse_masks(block_size: tuple[int, int]) -> None:
    shape = (-(-500 // block_size[0]), -(-700 // block_size[1]))
    coarse = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1)) < 0.4
    keep = coarse.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)[..., :500, :700]
    check_lists(masks.coarse_block_mask(coarse, 500, 700, block_size=block_size), keep)
    causal = masks.coarse_block_mask(coarse, 500, 700, block_size=block_size, causal=True)
    check_lists(causal, keep & (bottom_right(500, 700) <= 0))


def test_rcm_gathers_a_scattered_band() -> None:
    pytest.importorskip("scipy")
    n = 900
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    band = bottom_right(n, n).abs() <= 5
    scattered = band[order][:, order]
    made = create_block_mask(scattered, None, None, n, n)
    permutation, inverse = masks.rcm_permutation(scattered)
    assert torch.equal(permutation[inverse], torch.arange(n))
    assert all(torch.equal(a, b) for a, b in zip((permutation, inverse), masks.rcm_permutation(made), strict=True))
    gathered = create_block_mask(scattered[permutation][:, permutation], None, None, n, n)
    assert made.density == 1 and gathered.num_kept <= 3 * 8 - 2
    for nothing in (torch.zeros(0, 0, dtype=torch.bool), torch.zeros(7, 7, dtype=torch.bool)):
        assert len(masks.rcm_permutation(nothing)[0]) == len(nothing)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match="needs SciPy: pip install scipy"):
        masks.rcm_permutation(torch.ones(3, 3, dtype=torch.bool))


class OwnError(Exception):
    pass


def _raising(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    raise OwnError("mine")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: create_block_mask(_raising, None, None, 4, 4), OwnError, "^mine$"),
        (lambda: create_block_mask(lambda b, h, q, k: True, None, None, 4, 4), TypeError, "must return a bool tensor .* got bool"),
        (lambda: create_block_mask(lambda b, h, q, k: q, None, None, 4, 4), ValueError, r"got torch.int64 of shape \(\)"),
        (
            lambda: create_block_mask(lambda b, h, q, k: (q + torch.zeros(3)) > 0, None, None, 4, 4),
            ValueError, r"must return a bool tensor of shape \(\), got torch.bool of shape \(3,\)",
        ),
        (lambda: create_block_mask(3, None, None, 4, 4), TypeError, "must be a bool tensor or a function, got int"),
        (lambda: create_block_mask(torch.ones(4, 4), None, None, 4, 4), ValueError, "mask.dtype must be bool, got torch.float32"),
        (
            lambda: create_block_mask(torch.ones(2, 3, 4, 5, dtype=torch.bool), 3, 3, 4, 4),
            ValueError, r"mask.shape must be \(batch or 1, num_heads or 1, 4, 4\)",
        ),
        (
            lambda: create_block_mask(torch.ones(2, 3, 4, 4, dtype=torch.bool), 3, None, 4, 4),
            ValueError, "mask.batch must be 1 or batch, got 2 and 3; mask.num_heads must be 1 or num_heads, got 3 and None",
        ),
        (lambda: create_block_mask(_raising, 0, None, 4, -1), ValueError, "batch must be at least 1, got 0; seqlen_k must be at"),
        (lambda: create_block_mask(_raising, None, None, 4, 4.0), TypeError, "seqlen_k must be an int, got float"),
        (lambda: masks.document_mask([1, 2]), TypeError, "doc_ids must be a torch.Tensor, got list"),
        (lambda: masks.document_mask(torch.ones(3)), ValueError, "doc_ids must be int32 or int64 of shape"),
        (lambda: masks.prefix_lm_mask(torch.ones(3, 3).int(), 4), ValueError, r"prefix_lengths must be \(batch\)"),
        (lambda: masks.prefix_lm_mask(-1, 4), ValueError, "prefix_lengths must be at least 0, got -1"),
        (lambda: masks.sliding_window_mask(4, 4, (-2, 0)), ValueError, "window_size left must be at least -1, got -2"),
        (lambda: masks.sliding_window_mask(4, 4, 3), TypeError, "window_size must be a pair"),
        (lambda: masks.sliding_window_mask(4, 4, (1, 1), global_tokens=torch.ones(4)), ValueError, "global_tokens must be bool"),
        (lambda: masks.tree_mask([-1, 1]), ValueError, r"stand before its child, got parents\[1\] = 1"),
        (lambda: masks.tree_mask([0.5]), ValueError, "parents"),
        (lambda: masks.coarse_block_mask(torch.ones(2, 3, dtype=torch.bool), 300, 300), ValueError, r"num_heads or 1, 3, 3\)"),
        (lambda: masks.coarse_block_mask(torch.ones(3, 3).bool(), 300, 300, block_size=(0, 5)), ValueError, "at least 1, got 0"),
        (lambda: masks.rcm_permutation(torch.ones(3, 4).bool()), ValueError, r"shape \(seqlen, seqlen\)"),
        (lambda: masks.rcm_permutation(5), TypeError, "must be a torch.Tensor or a BlockMask"),
    ),
)  # fmt: skip
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_memory_is_that_of_the_kept_blocks() -> None:
    """A mask of 2^36 scores, packed documents of 4096 tokens: its lists, and the memory that building takes."""
    code = (
        "import resource, torch\n"
        "from flash_ext import masks\n"
        "ids = torch.arange(1 << 18) // 4096\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "made = masks.document_mask(ids)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert made.num_kept == 64 * 32 * 32 and made.num_partial == 0, made\n"
        "assert after - before < 600_000, after - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
