"""What calls over a KV cache read and write: the fewest bytes, no other layer's rows, and launches that lengths do not change."""

from __future__ import annotations

import cases
import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

import flash_ext
from flash_ext import _emulator, env

MADE = kvcache_cases.build(Case("any", (5,)), "cpu", torch.bfloat16)
GROUP = flash_ext.explain_with_kvcache(**MADE).backend
pytestmark = pytest.mark.skipif(GROUP == "reference", reason="this build has no kernel of the emulated GPU that reads a cache")


def attend(made: dict, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_ext.attention_with_kvcache(**{**made, **changes}, return_lse=True, backend=GROUP)


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- bytes ---


def moved(kernel: str = "") -> int:
    """Bytes of global memory that the launches since reset_reports touched, in whole sectors; TMA's as it counts them."""
    return sum(
        stats.tma_bytes + 32 * stats.global_sectors
        for report in _emulator.reports()
        if report.kernel.startswith(kernel)
        for stats in report.instructions
        if not stats.opcode.startswith("ld.param")  # constant memory
    )


@pytest.mark.parametrize("page_size", (None, 1, 16))
def test_a_split_call_moves_the_fewest_bytes(page_size: int | None, schedule) -> None:
    """Keys and values once, partial results written and read once, queries, results: within 5 %."""
    schedule("plain", profile=True)
    heads, heads_kv, dim, lengths, splits = 16, 2, 128, (4096, 2048), 4
    case = Case("bytes", lengths, num_heads=heads, num_heads_kv=heads_kv, head_dim=dim, page_size=page_size)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    _emulator.reset_reports()
    attend(made, num_splits=splits)
    keys = sum(lengths) * heads_kv * 2 * dim * 2
    partial = 2 * len(lengths) * splits * heads * (dim + 1) * 4
    # A part reads its queries again; by TMA in boxes of 64 rows, of which there are as many as heads share a key head.
    boxes = 64 if GROUP == "sm90" else heads // heads_kv
    queries = len(lengths) * splits * heads_kv * boxes * dim * 2
    results = len(lengths) * heads * (dim * 2 + 4)
    table = 4 * sum(lengths) // page_size * heads_kv * 2 if page_size else 0  # each tile of keys and of values looks them up
    least = keys + partial + queries + results + table
    assert moved() <= 1.05 * least, (moved(), least)
    assert moved("fwd_cache") >= keys + queries


@pytest.mark.skipif(env.EMULATE != "sm90", reason="gathers of the Hopper rows, 32 lanes a request")
@pytest.mark.parametrize("page_size,leftpad", ((1, None), (3, None), (16, (5, 0))))
def test_gathers_ask_for_whole_rows(page_size: int, leftpad: tuple[int, int] | None, schedule) -> None:
    """16 bytes a lane, 512 a request: 16 sectors, 5 % fewer at most where rows end a tile early."""
    schedule("plain", profile=True)
    case = Case("sectors", (2048, 1024), num_heads=8, head_dim=128, page_size=page_size, leftpad=leftpad)
    _emulator.reset_reports()
    attend(kvcache_cases.build(case, "cpu", torch.bfloat16), num_splits=1)
    gathered = [s for r in _emulator.reports() for s in r.instructions if s.opcode.startswith("cp.async.cg")]
    requests, sectors = (sum(getattr(s, name) for s in gathered) for name in ("global_requests", "global_sectors"))
    assert requests > 0 and 0.95 * 16 * requests <= sectors <= 16 * requests


# --- where rows lie ---


@pytest.mark.parametrize("gap", (0, 8, 24), ids=lambda gap: f"gap{gap}")
@pytest.mark.parametrize("page_size", (1, 5, 16, 128))
def test_a_cache_that_interleaves_layers(page_size: int, gap: int, schedule) -> None:
    """A page holds every layer, and ends at any multiple of 16 bytes: same bits, and no other layer is read or written."""
    schedule("checks")
    case = Case("layers", (300, 0, 77), seqlen_q=2, seqlen_new=2, num_heads=4, head_dim=64, page_size=page_size, rotary="halves")
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    pages, _, heads, dim = made["k_cache"].shape
    of_layer = 2 * page_size * heads * dim
    memory = torch.full((pages, 3 * of_layer + gap), torch.nan, dtype=torch.bfloat16)
    layers = memory[:, : 3 * of_layer].unflatten(1, (3, 2, page_size, heads, dim))
    for kind, name in enumerate(("k_cache", "v_cache")):
        layers[:, 1, kind].copy_(made[name])
    moved_in = {"k_cache": layers[:, 1, 0], "v_cache": layers[:, 1, 1]}
    assert moved_in["k_cache"].stride(0) == 3 * of_layer + gap
    before = memory.clone()
    expected = attend(made)
    assert same(attend(made, **moved_in), expected) and torch.isfinite(expected[0]).all()
    for name, cache in moved_in.items():
        assert torch.equal(cache.nan_to_num(7.0), made[name].nan_to_num(7.0))
    layers[:, 1] = before[:, : 3 * of_layer].unflatten(1, (3, 2, page_size, heads, dim))[:, 1]
    assert torch.equal(memory.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("page_size", (None, 3, 16))
def test_heads_may_come_before_rows(page_size: int | None, schedule) -> None:
    """(pages, heads, page_size, dim), as FlashInfer's HND caches lie."""
    schedule("checks")
    case = Case("hnd", (300, 40), seqlen_new=1, num_heads=4, head_dim=64, page_size=page_size)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    turned = {name: made[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_cache", "v_cache")}
    assert same(attend(made, **turned), attend(made))


@pytest.mark.parametrize("page_size", (1, 6, 32))
def test_pages_in_any_order_and_shared(page_size: int, schedule) -> None:
    """A common prefix is stored once; moving the pages changes nothing but the table."""
    schedule("late")
    case = Case("shared", (192, 150, 192), num_heads=4, head_dim=64, page_size=page_size)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    shared = 96 // page_size
    table = made["page_table"]
    table[1:, :shared] = table[0, :shared]
    own = {name: made[name][table.long()].flatten(1, 2) for name in ("k_cache", "v_cache")}
    expected = attend(made, **own, page_table=None)
    assert same(attend(made), expected)
    order = torch.randperm(made["k_cache"].shape[0], generator=torch.Generator().manual_seed(1))
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).int()
    turned = {name: made[name][order] for name in ("k_cache", "v_cache")}
    assert same(attend(made, **turned, page_table=places[table.long()]), expected)


# --- replays ---


@pytest.mark.parametrize("num_splits", (0, 1, 3))
@pytest.mark.parametrize("page_size", (None, 6, 16))
def test_lengths_change_no_launch(page_size: int | None, num_splits: int, schedule) -> None:
    """What a captured graph would replay: the same kernels, grids and shared memory from an empty cache to a full one, and the
    results of a call that knew the lengths. Without checks, as in a graph, the host never sees them."""
    schedule("checks")
    capacity = 1536
    case = Case(
        "replay", (0, 0, 0), seqlen_new=1, num_heads=8, head_dim=64, page_size=page_size, capacity=capacity, rotary="halves"
    )
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    for name in ("k_cache", "v_cache"):
        made[name].copy_(torch.randn(made[name].shape, generator=torch.Generator().manual_seed(len(name))))
    launches = set()
    for lengths in ((0, 0, 0), (1, 0, 700), (1535, 128, 1), (1535, 1535, 1535), (64, 1000, 0)):
        made["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        reference = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
        _emulator.reset_reports()
        with cases.poisoned_memory():
            got = torch.ops.flash_ext.kvcache(
                made["q"], made["k_cache"], made["v_cache"], made["k"], made["v"], made["cache_seqlens"], None, None,
                made["page_table"], made["rotary_cos"], made["rotary_sin"], made["rotary_interleaved"], None, None, 0.125,
                True, -1, -1, 0.0, num_splits, False, GROUP,
            )  # fmt: skip
        launches.add(tuple((r.kernel, tuple(r.grid), tuple(r.block), r.dynamic_shared_bytes) for r in _emulator.launches()))
        expected = flash_ext.attention_with_kvcache(**reference, softmax_scale=0.125, return_lse=True, backend="reference")
        torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-3)
    assert len(launches) == 1


@pytest.mark.parametrize("num_splits", (1, 4, 16))
@pytest.mark.parametrize("page_size", (None, 6, 16))
def test_a_fixed_number_of_splits_is_batch_invariant(page_size: int | None, num_splits: int, schedule) -> None:
    """A sequence gives the same bits alone and beside any others."""
    schedule("plain")
    case = Case("invariant", (700, 3, 65, 1200, 0), seqlen_q=2, num_heads=8, head_dim=64, page_size=page_size, capacity=1300)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    out, lse = attend(made, num_splits=num_splits)
    for chosen in ((3,), (1, 3), (4, 2, 0)):
        index = torch.tensor(chosen)
        names = ("q", "cache_seqlens", *(("page_table",) if page_size else ("k_cache", "v_cache")))
        some = {name: made[name][index] for name in names}
        assert same(attend(made, num_splits=num_splits, **some), (out[index], lse[index]))


def test_the_invariance_can_be_lost(schedule) -> None:
    """With the splits chosen for the batch as a whole, rounding does depend on it: what the test above would see."""
    schedule("plain")
    case = Case("invariant", (700, *(1200,) * 12), seqlen_q=2, num_heads=8, num_heads_kv=1, head_dim=64, capacity=1300)
    made = kvcache_cases.build(case, "cpu", torch.bfloat16)
    alone = {name: made[name][:1] for name in ("q", "cache_seqlens", "k_cache", "v_cache")}
    told = [flash_ext.explain_with_kvcache(**{**made, **alone}), flash_ext.explain_with_kvcache(**made)]
    assert told[0].max_parts != told[1].max_parts
    assert not same(attend(made, **alone), tuple(t[:1] for t in attend(made)))
