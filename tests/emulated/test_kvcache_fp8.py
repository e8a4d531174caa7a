"""The FP8 forward over a KV cache, emulated: against the oracle on the written-out values, pages, parts, schedules."""

from __future__ import annotations

from dataclasses import replace

import cases
import kvcache_cases
import kvcache_fp8_cases
import pytest
import torch
from kvcache_cases import Case
from kvcache_fp8_cases import CASES_FP8, SCALES

import flash_ext
from flash_ext import _emulator, _host, env

ROWS = {row["name"] for row in _host.variants() if row["op"].startswith("fwd_fp8_cache")}
if env.EMULATE != "sm90" or not ROWS:
    pytest.skip("only Hopper has FP8 kernels that read a cache", allow_module_level=True)

# Weights are rounded to three mantissa bits; see test_forward_fp8.py.
FROBENIUS_BOUND = 0.032


def attend(made: dict, scales: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"backend": "sm90", "out_dtype": torch.float16, **options}
    return flash_ext.attention_with_kvcache(**{**made, **scales, **options}, return_lse=True)


def clone(made: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in made.items()}


def assert_close(out: torch.Tensor, lse: torch.Tensor, truth: kvcache_cases.Truth) -> None:
    assert not torch.isnan(out).any()
    norm = truth.out.norm()
    assert (out.double() - truth.out).norm() <= FROBENIUS_BOUND * norm + 1e-6
    if truth.out.numel():
        assert (out.double() - truth.out).abs().max() <= 2**-3 * truth.out.abs().max() + 1e-3
    hidden = torch.isinf(truth.lse)
    assert torch.equal(torch.isinf(lse), hidden)
    torch.testing.assert_close(lse[~hidden].double(), truth.lse[~hidden], rtol=1e-5, atol=1e-5)


COVERED = [
    (name, scale)
    for name, case in CASES_FP8.items()
    for scale in SCALES
    if kvcache_fp8_cases.takes(case, scale) and kvcache_fp8_cases.kernels_take(case, scale)
]


@pytest.mark.parametrize("name,scale", COVERED)
def test_case(name: str, scale: str, schedule) -> None:
    schedule("late" if scale == "tensor" else "checks")
    case = CASES_FP8[name]
    made, scales = kvcache_fp8_cases.build(case, scale, "cpu")
    before = clone(made)
    _emulator.reset_reports()
    with cases.poisoned_memory():
        out, lse = attend(made, scales)
    kvcache_fp8_cases.check_caches(case, made, before)
    if out.numel():
        assert any(report.kernel in ROWS for report in _emulator.reports())
    assert_close(out, lse, kvcache_fp8_cases.expected(case, made, scales))


def test_out_dtypes(schedule) -> None:
    schedule("checks")
    case = Case("dtypes", (200, 77), seqlen_q=2, num_heads=6)
    made, scales = kvcache_fp8_cases.build(case, "head", "cpu")
    for splits in (1, 2):
        half, default = (attend(made, scales, num_splits=splits, out_dtype=dtype)[0] for dtype in (torch.float16, None))
        assert half.dtype == torch.float16 and default.dtype == torch.bfloat16
        torch.testing.assert_close(half.bfloat16(), default, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("page_size", (1, 5, 8, 64, 128, 256))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_paged_gives_the_bits_of_dense(page_size: int, head_dim: int, schedule) -> None:
    """By TMA and gathered, with parts and without; in unused pages and rows lies NaN."""
    schedule("late")
    dense = Case("law", (300, 0, 77), seqlen_q=2, seqlen_new=2, head_dim=head_dim, num_heads=6, capacity=512)
    paged = replace(dense, page_size=page_size, page_gap=2)
    for splits in (0, 1, 3):
        made, scales = kvcache_fp8_cases.build(dense, "head", "cpu")
        pages, _ = kvcache_fp8_cases.build(paged, "head", "cpu")
        for name in ("k_cache", "v_cache"):
            for b, length in enumerate(dense.lengths):
                for j in range(length):
                    pages[name][kvcache_cases.slot(paged, pages["page_table"], None, b, j)] = made[name][b, j]
        caches = {name: pages[name] for name in ("k_cache", "v_cache", "page_table")}
        expected = attend(made, scales, num_splits=splits)
        got = attend({**made, **caches}, scales, num_splits=splits)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.isfinite(expected[0]).all()


def test_every_kernel_is_reached(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for head_dim in (64, 128, 256):
        for page_size in (3, 64, None):
            for options in ({}, {"softcap": 3.0, "window_size": (100, 0)}):
                case = Case("reach", (400, 0), seqlen_q=2, head_dim=head_dim, page_size=page_size, options=options)
                made, _ = kvcache_fp8_cases.build(case, "none", "cpu")
                for splits in (0, 1):
                    attend(made, {}, num_splits=splits, softmax_scale=-0.1)
    assert {report.kernel for report in _emulator.reports()} >= ROWS


LONG = (
    Case("wrap", (1500, 700, 0, 129), seqlen_new=1, num_heads=8, num_heads_kv=2, head_dim=128, page_size=64),
    Case("wrap", (1500, 700, 0, 129), seqlen_new=1, num_heads=8, num_heads_kv=2, head_dim=128, page_size=6),
    Case("wrap", (1100, 0, 650), seqlen_q=70, num_heads=4, num_heads_kv=1, head_dim=64, page_size=1),
    Case("wrap", (700, 900), seqlen_q=3, num_heads=4, num_heads_kv=1, head_dim=256),
    Case("wrap", (700, 900), seqlen_q=3, num_heads=4, num_heads_kv=1, head_dim=256, options={"softcap": 9.0}),
)


@pytest.mark.parametrize("num_sms", (1, 5))
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case: Case, num_sms: int, schedule) -> None:
    """Persistent CTAs, rings that wrap, and copies that come late or out of order."""
    results = []
    for name in ("plain", "late", "adversarial1", "adversarial2", "adversarial3"):
        schedule(name, sms=num_sms)
        made, scales = kvcache_fp8_cases.build(case, "block" if kvcache_fp8_cases.takes(case, "block") else "head", "cpu")
        with cases.poisoned_memory():
            results.append(attend(made, scales))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


@pytest.mark.parametrize("page_size", (None, 1, 64))
def test_every_key_moves_once_in_whole_sectors(page_size: int | None, schedule) -> None:
    """Half the bytes of a 16-bit cache, and no others, whatever the page size."""
    schedule("plain", profile=True)
    lengths, heads_kv = (1024, 512), 2
    case = Case("bytes", lengths, num_heads=8, num_heads_kv=heads_kv, head_dim=128, page_size=page_size)
    _emulator.reset_reports()
    made, _ = kvcache_fp8_cases.build(case, "none", "cpu")
    attend(made, {}, num_splits=1)
    (report,) = _emulator.reports()
    copied = sum(stats.tma_bytes for stats in report.instructions)
    gathered = 32 * sum(s.global_sectors for s in report.instructions if s.opcode.startswith("cp.async.cg"))
    queries = len(lengths) * heads_kv * 64 * 128  # boxes of 64 rows, of which few exist
    assert copied + gathered == queries + sum(lengths) * heads_kv * 2 * 128
    assert (gathered > 0) == (page_size == 1)


def test_values_nobody_checked_stay_inside(schedule) -> None:
    """Garbage lengths, tables and indices, with scales that stand in the cache: no access outside, results of the reference."""
    schedule("checks")
    huge, tiny = 2**31 - 1, -(2**31)
    for page_size in (None, 64):
        case = Case("garbage", (150, 40, 9), seqlen_new=2, seqlen_q=2, page_size=page_size, capacity=192)
        table = kvcache_cases.build(case, "cpu", torch.bfloat16)["page_table"]
        changes = [{"cache_seqlens": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 190), (191, -1, 250))]
        if page_size:
            changes += [{"page_table": torch.where(torch.arange(3) % 2 == 1, x, table)} for x in (huge, tiny)]
        else:
            changes += [{"cache_batch_idx": torch.tensor([2, x, 0], dtype=torch.int32)} for x in (huge, tiny, 3)]
        for change in changes:
            results = []
            for backend in ("sm90", "reference"):
                made, scales = kvcache_fp8_cases.build(case, "block", "cpu")
                a = {**made, **change}
                for name in ("k_cache", "v_cache"):
                    a[name] = a[name].float().nan_to_num(0.25).to(kvcache_fp8_cases.FP8)
                names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "cache_batch_idx")
                options = (None, a["page_table"], None, None, True, None, None, 0.125, True, -1, -1, 0.0, 0)
                results.append(
                    torch.ops.flash_ext.kvcache_fp8(
                        *(a[name] for name in names), *options, *scales.values(), torch.float16, False, backend
                    )
                )
            for got, wanted in zip(*results, strict=True):
                assert (got - wanted).norm() <= FROBENIUS_BOUND * wanted.norm()


def test_what_no_kernel_covers_falls_back_and_says_so(schedule) -> None:
    schedule("plain")
    made, scales = kvcache_fp8_cases.build(Case("fallback", (20, 33), leftpad=(1, 2)), "block", "cpu")
    with pytest.warns(flash_ext.FallbackWarning, match=r"attention_with_kvcache \(FP8\) runs on the reference backend"):
        attend(made, scales, backend=None)
    with pytest.raises(RuntimeError, match="scales of 64 rows of a cache with leftpad_k"):
        attend(made, scales)
    made, _ = kvcache_fp8_cases.build(Case("fallback", (20, 33), head_dim=24), "none", "cpu")
    with pytest.raises(RuntimeError, match="head dims must be multiples of 16"):
        attend(made, {})
