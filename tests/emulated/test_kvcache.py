"""The kernels around attention over a KV cache, emulated: appended rows, lengths and parts, and the combination of parts."""

from __future__ import annotations

import warnings
from dataclasses import replace

import cases
import kvcache_cases
import pytest
import torch
from kvcache_cases import CASES, Case

import flash_ext
from flash_ext import _emulator, _host, env

KERNEL_ARCH = "sm90" if env.EMULATE == "sm90" else "sm80"
TWO_BYTES = (torch.bfloat16, torch.float16)
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}

pytestmark = pytest.mark.skipif(not any(row["op"] == "append_kv" for row in _host.variants()), reason="this build has no append_kv")


def kernels_take(case: Case) -> bool:
    rotary_dim = case.rotary_dim or case.head_dim
    dims = case.head_dim % 8 == 0 and (case.head_dim_v or 8) % 8 == 0
    return dims and (case.rotary == "none" or rotary_dim % 16 == 0)


def append(made: dict, split: list[int], **changes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = {
        "k": None,
        "v": None,
        "leftpad_k": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "rotary_interleaved": True,
        **made,
        **changes,
    }
    causal, window = a.get("causal", True), a.get("window_size", (-1, -1))
    return torch.ops.flash_ext.append_kv(
        a["q"], a["k_cache"], a["v_cache"], a["k"], a["v"], a["cache_seqlens"], a["cache_batch_idx"], a["leftpad_k"],
        a["page_table"], a["rotary_cos"], a["rotary_sin"], a["rotary_interleaved"], causal or window != (-1, -1), split,
    )  # fmt: skip


APPENDED = {name: case for name, case in CASES.items() if kernels_take(case)}


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", APPENDED)
def test_append(name: str, dtype: torch.dtype, schedule) -> None:
    schedule("checks" if dtype == torch.bfloat16 else "adversarial1")
    case = APPENDED[name]
    made = kvcache_cases.build(case, "cpu", dtype)
    before = {n: value.clone() if isinstance(value, torch.Tensor) else value for n, value in made.items()}
    _emulator.reset_reports()
    with cases.poisoned_memory():
        q_rotated, lengths, part_begin = append(made, [])
    assert [r.kernel for r in _emulator.reports()] == [f"append_kv_{KERNEL_ARCH}_{SHORT[dtype]}"]
    kvcache_cases.check_caches(case, made, kvcache_cases.expected(case, before, torch.float64), before)
    assert lengths.tolist() == [n + (case.seqlen_new or 0) for n in case.lengths] and part_begin.numel() == 0
    if case.rotary == "none":
        assert q_rotated.numel() == 0
        return
    moves = before.get("causal", True) or before.get("window_size", (-1, -1)) != (-1, -1)
    for b, length in enumerate(case.lengths):
        wanted = kvcache_cases._rotated(before["q"][b].double(), length, int(moves), before)
        torch.testing.assert_close(q_rotated[b].double(), wanted, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("layout", ("padded", "odd_stride", "heads_first"))
def test_strided_rows(layout: str, schedule) -> None:
    schedule("checks")
    case = Case("strided", (9, 20), seqlen_q=3, seqlen_new=3, page_size=4, rotary="halves")
    made, other = (kvcache_cases.build(case, "cpu", torch.bfloat16) for _ in range(2))
    laid = {name: cases.lay_out(made[name], layout) for name in ("q", "k", "v")}
    laid |= {name: torch.cat((made[name][:1], made[name]))[1:] for name in ("rotary_cos", "rotary_sin")}
    for a, b in zip(append(made, [], **laid), append(other, []), strict=True):
        assert torch.equal(a, b)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(made[name].nan_to_num(), other[name].nan_to_num())


def test_values_out_of_range_are_clamped_or_dropped(schedule) -> None:
    """What the reference does with them (tests/cpu/test_kvcache.py); the emulator would see any access outside the caches."""
    schedule("checks")
    huge, tiny = 2**31 - 1, -(2**31)
    for page_size in (None, 4):
        case = Case("clamp", (8, 5, 3), seqlen_new=2, page_size=page_size, capacity=12, rotary="interleaved")
        table = kvcache_cases.build(case, "cpu", torch.bfloat16)["page_table"]
        indices = [{"page_table": torch.where(torch.arange(3) == 1, x, table)} for x in (huge, tiny)] if page_size else []
        indices += [] if page_size else [{"cache_batch_idx": torch.tensor([2, x, 0], dtype=torch.int32)} for x in (huge, tiny, 3)]
        lengths = [{"cache_seqlens": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 11), (12, -1, 10))]
        for changes in (*indices, *lengths):
            results = []
            for op in (append, reference_append):
                made = kvcache_cases.build(case, "cpu", torch.bfloat16)
                for name in ("rotary_cos", "rotary_sin"):
                    made[name] = made[name][:7]  # positions beyond the tables are clamped too
                op(made, [], **changes)
                results.append((made["k_cache"].nan_to_num(7.0), made["v_cache"].nan_to_num(7.0)))
            torch.testing.assert_close(results[0][0], results[1][0], rtol=0.02, atol=0.02)
            assert torch.equal(results[0][1], results[1][1])


def reference_append(made: dict, _: list[int], **changes) -> None:
    a = {**made, **changes}
    torch.ops.flash_ext.reference_kvcache(
        a["q"], a["k_cache"], a["v_cache"], a["k"], a["v"], a["cache_seqlens"], a["cache_batch_idx"], None, a["page_table"],
        a["rotary_cos"], a["rotary_sin"], a["rotary_interleaved"], None, None, 0.1, True, -1, -1, 0.0, False, "",
    )  # fmt: skip


# --- parts ---


def chosen(lengths: list[int], items: int, ctas: int, splits: int, window: int, block_n: int) -> list[int]:
    """The parts of each sequence, by the rule of csrc/common/splits.cuh written again, for one row of queries."""
    seqlen_q = 1

    def tiles_of(n: int) -> int:
        begin = max(0, n - seqlen_q - window) if window >= 0 else 0
        return -(-n // block_n) - begin // block_n if n > 0 else 0

    tiles = [tiles_of(n) for n in lengths]

    def parts(tile_count: int, target: int) -> int:
        return max(1, min(splits if splits else -(-tile_count // target), tile_count, 256))

    if splits:
        return [parts(t, 1) for t in tiles]
    best, total = None, sum(tiles)
    for rounds in (*range(1, 9), *((12, 16, 24, 32) if block_n >= 128 and seqlen_q <= 8 else ())):
        target = max(2, -(-total * items // (ctas * rounds)))
        counts = [parts(t, target) for t in tiles]
        longest = max((-(-t // p) for t, p in zip(tiles, counts, strict=True)), default=0)
        in_rounds = -(-sum(counts) * items // ctas) * (longest + 1)
        cost = min(in_rounds, -(-(total + sum(counts)) * items // ctas) + longest)
        if best is None or cost < best[0]:
            best = (cost, counts)
    return best[1]


@pytest.mark.parametrize("splits", (0, 1, 3, 40, 300))
@pytest.mark.parametrize(
    "lengths", ((5000,), (0,), (64, 65, 128, 0, 9000), tuple(range(0, 3000, 7)), (100,) * 300, (30000, *(10,) * 290)), ids=len
)
def test_parts_of_the_keys(lengths: tuple[int, ...], splits: int, schedule) -> None:
    schedule("checks")
    batch = len(lengths)
    for items, ctas, window, block_n in (
        (8, 132, -1, 64),
        (1, 132, 1000, 64),
        (32, 20, -1, 64),
        (8, 132, -1, 128),
        (2, 132, -1, 128),
    ):
        q = torch.zeros(batch, 1, 8, 8, dtype=torch.bfloat16)
        cache = torch.zeros(1, 40000, 1, 8, dtype=torch.bfloat16).expand(batch, -1, -1, -1)
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        leftpad = torch.tensor([n // 10 for n in lengths], dtype=torch.int32)
        split_by = [items, ctas, splits, block_n, window]
        _, got_lengths, part_begin = torch.ops.flash_ext.append_kv(
            q, cache, cache, None, None, seqlens, None, leftpad, None, None, None, True, True, split_by
        )  # fmt: skip
        visible = [n - n // 10 for n in lengths]
        assert got_lengths.tolist() == list(lengths)
        assert part_begin.diff().tolist() == chosen(visible, items, ctas, splits, window, block_n) and part_begin[0] == 0


# --- combine ---


@pytest.mark.parametrize("name,num_sms", (("checks", 4), ("late", 1), ("adversarial1", 3)))
@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize(
    "head_dim_v,with_sinks", ((8, False), (64, True), (72, False), (128, True), (200, True), (256, False), (512, True))
)
def test_combine(head_dim_v: int, with_sinks: bool, dtype: torch.dtype, name: str, num_sms: int, schedule) -> None:
    schedule(name, sms=num_sms)
    generator = torch.Generator().manual_seed(head_dim_v)
    parts_of = [1, 0, 3, 40, 2]  # a sequence may even have no part at all
    batch, seqlen_q, heads = len(parts_of), 3, 5
    total = sum(parts_of)
    out_partial = torch.randn(total + 2, heads, seqlen_q, head_dim_v, generator=generator)
    lse_partial = 3 * torch.randn(total + 2, heads, seqlen_q, generator=generator)
    # Parts that saw nothing hold garbage; one row that no part saw; parts beyond the last were never written.
    lse_partial[2, 1], lse_partial[5:9, :, 2], lse_partial[0, 0, 0] = -torch.inf, -torch.inf, -torch.inf
    out_partial[lse_partial == -torch.inf] = torch.nan
    out_partial[total:], lse_partial[total:] = torch.nan, torch.nan
    part_begin = torch.tensor([0, *parts_of]).cumsum(0).int()
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    out = torch.full((batch, seqlen_q, 2 * heads, head_dim_v), torch.nan, dtype=dtype)[:, :, :heads]
    lse = torch.full((batch, heads, seqlen_q), torch.nan)
    _emulator.reset_reports()
    torch.ops.flash_ext.combine(out_partial, lse_partial, part_begin, sinks, out, lse)
    covered = next(d for d in (64, 128, 256, 512) if d >= head_dim_v)
    assert [r.kernel for r in _emulator.reports()] == [f"combine_{KERNEL_ARCH}_{SHORT[dtype]}_d{covered}"]
    for b in range(batch):
        part = slice(int(part_begin[b]), int(part_begin[b + 1]))
        logits, values = lse_partial[part].double(), out_partial[part].double()
        if with_sinks:
            logits = torch.cat((logits, sinks.double()[None, :, None].expand(1, -1, seqlen_q)))
            values = torch.cat((values, torch.zeros(1, heads, seqlen_q, head_dim_v, dtype=torch.float64)))
        whole = torch.logsumexp(logits, 0) if len(logits) else torch.full((heads, seqlen_q), -torch.inf, dtype=torch.float64)
        shares = torch.exp(logits - whole.masked_fill(whole == -torch.inf, 0.0))
        expected = (shares[..., None] * values.nan_to_num()).sum(0).transpose(0, 1)
        torch.testing.assert_close(lse[b].double(), whole, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out[b].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_combine_passes_nan_on(schedule) -> None:
    schedule("checks")
    out_partial, lse_partial = torch.ones(2, 1, 2, 64), torch.zeros(2, 1, 2)
    lse_partial[1, 0, 1] = torch.nan
    out, lse = torch.empty(1, 2, 1, 64, dtype=torch.bfloat16), torch.empty(1, 1, 2)
    torch.ops.flash_ext.combine(out_partial, lse_partial, torch.tensor([0, 2], dtype=torch.int32), None, out, lse)
    assert (out[0, 0] == 1).all() and out[0, 1].isnan().all() and lse[0, 0, 1].isnan() and not lse[0, 0, 0].isnan()


def test_combine_reads_no_part_beyond_the_last(schedule) -> None:
    """part_begin is device memory: garbage in it must not lead outside the partial results."""
    schedule("checks")
    out_partial, lse_partial = torch.ones(2, 1, 1, 64), torch.zeros(2, 1, 1)
    for garbage in ((0, 99), (-7, 2), (5, 1), (1, -3)):
        out, lse = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16), torch.empty(1, 1, 1)
        torch.ops.flash_ext.combine(out_partial, lse_partial, torch.tensor(garbage, dtype=torch.int32), None, out, lse)


def test_sectors_are_the_fewest(schedule) -> None:
    """Every global request moves whole sectors: 512 bytes a load of partial results, 16 bytes a lane of appended rows."""
    schedule("plain", profile=True)
    _emulator.reset_reports()
    made = kvcache_cases.build(
        Case("sectors", (64,) * 4, seqlen_new=8, page_size=16, head_dim=128, num_heads=8), "cpu", torch.bfloat16
    )
    append(made, [])
    out, lse = torch.empty(4, 1, 8, 128, dtype=torch.bfloat16), torch.empty(4, 8, 1)
    part_begin = torch.arange(0, 20, 4, dtype=torch.int32)
    torch.ops.flash_ext.combine(torch.zeros(16, 8, 1, 128), torch.zeros(16, 8, 1), part_begin, None, out, lse)
    moved = {}
    for report in _emulator.reports():
        for stats in report.instructions:
            kind = stats.opcode.split(".")[0] + ("16" if ".v4." in stats.opcode else "8" if ".v2." in stats.opcode else "")
            if ".global" in stats.opcode and kind[2:].isdigit():
                sectors, requests = moved.get((report.kernel.split("_")[0], kind), (0, 0))
                moved[report.kernel.split("_")[0], kind] = sectors + stats.global_sectors, requests + stats.global_requests
    pieces = 2 * 4 * 8 * 2 * 128 // 8 // 32  # warps' worth of 16-byte pieces of k and v
    assert moved == {
        ("append", "ld16"): (16 * pieces, pieces), ("append", "st16"): (16 * pieces, pieces),
        ("combine", "ld16"): (16 * 128, 128), ("combine", "st8"): (8 * 32, 32),
    }  # fmt: skip


# --- the whole call ---

HAS_ROWS = any(row["op"] == "fwd_cache" and f"sm{row['arch']}" == KERNEL_ARCH for row in _host.variants())
needs_rows = pytest.mark.skipif(not HAS_ROWS, reason="this build has no kernel that reads a cache for this GPU")
COVERED = {name: case for name, case in APPENDED.items() if max(case.head_dim, case.head_dim_v or 0) <= 256}


def attend(made: dict, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_ext.attention_with_kvcache(**{**made, **changes}, return_lse=True, backend=KERNEL_ARCH)


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_rows
@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", COVERED)
def test_case(name: str, dtype: torch.dtype, schedule) -> None:
    schedule("checks" if dtype == torch.bfloat16 else "late")
    kvcache_cases.check_case(COVERED[name], "cpu", dtype, backend=KERNEL_ARCH)


@needs_rows
@pytest.mark.parametrize("page_size", (1, 5, 8, 16, 64, 128, 256))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_paged_gives_the_bits_of_dense(page_size: int, head_dim: int, schedule) -> None:
    """By TMA and gathered, with parts and without; in unused pages and rows lies NaN."""
    schedule("late")
    dense = Case("law", (300, 0, 77), seqlen_q=2, seqlen_new=2, head_dim=head_dim, num_heads=6, rotary="halves", capacity=512)
    paged = replace(dense, page_size=page_size, page_gap=1)
    for splits in (0, 1, 3):
        made, pages = (kvcache_cases.build(case, "cpu", torch.bfloat16) for case in (dense, paged))
        for name in ("k_cache", "v_cache"):
            for b, length in enumerate(dense.lengths):
                for j in range(length):
                    pages[name][kvcache_cases.slot(paged, pages["page_table"], None, b, j)] = made[name][b, j]
        caches = {name: pages[name] for name in ("k_cache", "v_cache", "page_table")}
        expected = attend(made, num_splits=splits)
        assert same(attend({**made, **caches}, num_splits=splits), expected)
        assert torch.isfinite(expected[0]).all()


@needs_rows
def test_every_kernel_is_reached(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for dtype in TWO_BYTES:
        for head_dim in (64, 128, 256):
            for page_size in (3, 16, None):
                for options in ({}, {"softcap": 3.0, "window_size": (100, 0)}):
                    case = Case("reach", (400, 0), seqlen_q=2, head_dim=head_dim, page_size=page_size, options=options)
                    made = kvcache_cases.build(case, "cpu", dtype)
                    for splits, scale in ((0, 0.1), (1, -0.1)):
                        attend(made, num_splits=splits, softmax_scale=scale)
    ran = {report.kernel for report in _emulator.reports()}
    rows = (row for row in _host.variants() if row["op"].startswith("fwd_cache") and f"sm{row['arch']}" == KERNEL_ARCH)
    assert {row["name"] for row in rows} <= ran


LONG = (
    Case("wrap", (1500, 700, 0, 129), seqlen_q=1, seqlen_new=1, num_heads=8, num_heads_kv=2, head_dim=128, page_size=16),
    Case("wrap", (1500, 700, 0, 129), seqlen_q=1, seqlen_new=1, num_heads=8, num_heads_kv=2, head_dim=128, page_size=6),
    Case("wrap", (1100, 0, 650), seqlen_q=70, num_heads=4, num_heads_kv=1, head_dim=64, page_size=1),
    Case("wrap", (700, 900), seqlen_q=3, num_heads=4, num_heads_kv=1, head_dim=256, page_size=9),
    Case("wrap", (1100, 0, 650), seqlen_q=70, num_heads=4, num_heads_kv=4, head_dim=64),
)


@needs_rows
@pytest.mark.parametrize("num_sms", (1, 2, 5))
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case: Case, num_sms: int, schedule) -> None:
    """Persistent CTAs, rings that wrap, and copies that come late or out of order."""
    results = []
    for name in ("plain", "late", "adversarial1", "adversarial2", "adversarial3"):
        schedule(name, sms=num_sms)
        made = kvcache_cases.build(case, "cpu", torch.bfloat16)
        with cases.poisoned_memory():
            results.append(attend(made))
    assert all(same(result, results[0]) for result in results[1:])


@needs_rows
@pytest.mark.parametrize("page_size", (None, 1, 16))
def test_every_split_count(page_size: int | None, schedule) -> None:
    schedule("checks")
    case = Case("splits", (900, 3, 400, 0), seqlen_q=2, page_size=page_size, head_dim=64, num_heads=8, sinks=True)
    made = kvcache_cases.build(case, "cpu", torch.float16)
    whole = attend(made, num_splits=1)
    for splits in (2, 3, 4, 5, 7, 8, 16, 256, 0):
        for got, expected in zip(attend(made, num_splits=splits), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@needs_rows
@pytest.mark.parametrize("page_size", (None, 1, 16, 64, 256))
def test_every_key_moves_once_in_whole_sectors(page_size: int | None, schedule) -> None:
    """Decoding is bound by memory: the cache's bytes, and no others, whatever the page size."""
    schedule("plain", profile=True)
    lengths, heads_kv = (1024, 512), 2
    case = Case("bytes", lengths, num_heads=8, num_heads_kv=heads_kv, head_dim=128, page_size=page_size)
    _emulator.reset_reports()
    attend(kvcache_cases.build(case, "cpu", torch.bfloat16), num_splits=1)
    (report,) = _emulator.reports()
    copied = sum(stats.tma_bytes for stats in report.instructions)
    gathered = 32 * sum(s.global_sectors for s in report.instructions if s.opcode.startswith("cp.async.cg"))
    # By TMA a tile of queries is a box of 64 rows, of which few exist.
    queries = len(lengths) * (heads_kv * 64 if KERNEL_ARCH == "sm90" else 8) * 2 * 128
    assert copied + gathered == queries + sum(lengths) * heads_kv * 2 * 2 * 128
    assert (gathered > 0) == (page_size == 1 or KERNEL_ARCH == "sm80") and (copied > 0) == (gathered == 0 or KERNEL_ARCH == "sm90")


@needs_rows
@pytest.mark.parametrize("page_size", (4, 16))
def test_decoding_step_by_step(page_size: int, schedule) -> None:
    """The call sequence of a replayed graph: the same tensors, lengths that grow on the device."""
    schedule("late")
    case = Case("steps", (14, 0, 60), seqlen_new=1, num_heads=8, head_dim=64, page_size=page_size, capacity=160, rotary="halves")
    made, reference = (kvcache_cases.build(case, "cpu", torch.bfloat16) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(70):
        for name in ("q", "k", "v"):
            made[name].copy_(torch.randn(made[name].shape, generator=generator))
            reference[name].copy_(made[name])
        out, lse = attend(made)
        if step % 10 == 0:
            expected = flash_ext.attention_with_kvcache(**reference, return_lse=True, backend="reference")
            torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, expected[1], rtol=1e-3, atol=1e-3)
        else:
            flash_ext.attention_with_kvcache(**reference, backend="reference")
        for tensors in (made, reference):
            tensors["cache_seqlens"] += 1


@needs_rows
@pytest.mark.parametrize("page_size", (None, 3, 16))
def test_values_nobody_checked_stay_inside(page_size: int | None, schedule) -> None:
    """Garbage lengths, tables, indices and padding: what the reference makes of them, and no access outside the caches."""
    schedule("checks")
    huge, tiny = 2**31 - 1, -(2**31)
    case = Case("garbage", (150, 40, 9), seqlen_new=2, seqlen_q=2, page_size=page_size, head_dim=64, capacity=192)
    table = kvcache_cases.build(case, "cpu", torch.bfloat16)["page_table"]
    changes = [{"cache_seqlens": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 190), (191, -1, 250))]
    changes += [{"leftpad_k": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 3),)]
    if page_size:
        changes += [{"page_table": torch.where(torch.arange(table.shape[1]) % 2 == 1, x, table)} for x in (huge, tiny)]
    else:
        changes += [{"cache_batch_idx": torch.tensor([2, x, 0], dtype=torch.int32)} for x in (huge, tiny, 3)]
    for change in changes:
        results = []
        for backend in (KERNEL_ARCH, "reference"):
            a = {"leftpad_k": None, **kvcache_cases.build(case, "cpu", torch.bfloat16), **change}
            for name in ("k_cache", "v_cache"):
                a[name].nan_to_num_(0.25)
            names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "cache_batch_idx", "leftpad_k", "page_table")
            options = (None, None, True, None, None, 0.125, True, -1, -1, 0.0, 0, False, backend)
            results.append(torch.ops.flash_ext.kvcache(*(a[name] for name in names), *options))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@needs_rows
def test_values_are_checked_where_they_are_there(schedule) -> None:
    schedule("plain")
    made = kvcache_cases.build(Case("checked", (8, 5), seqlen_new=2, page_size=16), "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="must not exceed the capacity"):
        attend(made, cache_seqlens=torch.tensor([8, 99], dtype=torch.int32))
    with pytest.raises(ValueError, match="page_table entries"):
        attend(made, page_table=made["page_table"] - 50)


def test_what_no_kernel_covers_falls_back_and_says_so(schedule) -> None:
    schedule("plain")
    made = kvcache_cases.build(Case("fallback", (20, 33), head_dim=20, seqlen_new=1, page_size=5), "cpu", torch.bfloat16)
    with pytest.warns(flash_ext.FallbackWarning, match="attention_with_kvcache runs on the reference backend"):
        flash_ext.attention_with_kvcache(**made)
    with pytest.raises(RuntimeError, match=f"backend '{KERNEL_ARCH}' cannot run this call"):
        attend(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_ext.attention_with_kvcache(**made, backend="reference")


@pytest.mark.skipif(not HAS_ROWS or env.EMULATE != "sm90", reason="a Hopper can run the rows of either group")
@pytest.mark.parametrize("name", [name for name in COVERED if name.startswith(("decode", "paged", "splits", "leftpad"))])
def test_a_hopper_runs_the_rows_for_other_gpus_where_they_are_asked_for(name: str, schedule) -> None:
    schedule("late")
    _emulator.reset_reports()
    kvcache_cases.check_case(COVERED[name], "cpu", torch.bfloat16, backend="sm80")
    assert any(report.kernel.startswith("fwd_cache_sm80") for report in _emulator.reports())
