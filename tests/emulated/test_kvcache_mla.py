"""Absorbed multi-head latent attention over a cache, emulated: values that are the first columns of the keys."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import cases
import kvcache_cases
import pytest
import torch
from kvcache_cases import CASES, Case

import flash_ext
from flash_ext import _emulator, _host, env

ROWS = {row["name"]: row for row in _host.variants() if row["op"].startswith("fwd_mla")}
TWO_BYTES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(env.EMULATE != "sm90" or not ROWS, reason="kernels over latent vectors are Hopper's")

COVERED = {n: c for n, c in CASES.items() if c.shared and c.head_dim > 256 and not c.options.get("softcap")}


def latent(lengths: tuple[int, ...], num_heads: int = 4, **fields) -> Case:
    dims = {"head_dim": 576, "head_dim_v": 512, "num_heads_kv": 1}
    return Case("latent", lengths, num_heads=num_heads, shared=True, **{**dims, **fields})


def attend(made: dict, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_ext.attention_with_kvcache(**{**made, **changes}, return_lse=True, backend="sm90")


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", COVERED)
def test_case(name: str, dtype: torch.dtype, schedule) -> None:
    schedule("checks" if dtype == torch.bfloat16 else "late")
    _emulator.reset_reports()
    kvcache_cases.check_case(COVERED[name], "cpu", dtype, backend="sm90")
    assert any(report.kernel in ROWS for report in _emulator.reports())


@pytest.mark.parametrize("page_size", (1, 5, 8, 16, 32, 64, 128, 192))
def test_paged_gives_the_bits_of_dense(page_size: int, schedule) -> None:
    """By TMA and gathered, with parts and without; in unused pages, rows and gaps lies NaN."""
    schedule("late")
    dense = latent((300, 0, 77), num_heads=6, seqlen_q=2, seqlen_new=2, capacity=384)
    paged = replace(dense, page_size=page_size, page_gap=1)
    for splits in (0, 1, 3):
        made, pages = (kvcache_cases.build(case, "cpu", torch.bfloat16) for case in (dense, paged))
        for b, length in enumerate(dense.lengths):
            for j in range(length):
                pages["k_cache"][kvcache_cases.slot(paged, pages["page_table"], None, b, j)] = made["k_cache"][b, j]
        caches = {name: pages[name] for name in ("k_cache", "v_cache", "page_table")}
        expected = attend(made, num_splits=splits)
        assert same(attend({**made, **caches}, num_splits=splits), expected)
        assert torch.isfinite(expected[0]).all()


def test_shared_pages(schedule) -> None:
    """A common prefix that is stored once."""
    schedule("checks")
    made = kvcache_cases.build(latent((160, 150), page_size=16), "cpu", torch.bfloat16)
    made["page_table"][1, :4] = made["page_table"][0, :4]
    own = made["k_cache"][made["page_table"].long()].flatten(1, 2)
    expected = attend(made, k_cache=own, v_cache=own[..., :512], page_table=None)
    assert same(attend(made), expected)


LONG = (
    latent((700, 300, 0, 129), num_heads=70, seqlen_new=1, page_size=16),
    latent((700, 300, 0, 129), num_heads=16, seqlen_q=5, seqlen_new=5, page_size=6),
    latent((500, 0, 650), num_heads=4, num_heads_kv=2, seqlen_q=40),
)


@pytest.mark.parametrize("num_sms", (1, 2, 5))
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_every_schedule_gives_the_same_bits(case: Case, num_sms: int, schedule) -> None:
    """Persistent CTAs, rings that wrap, weights that are handed over late, and copies that come late or out of order."""
    results = []
    for name in ("plain", "late", "adversarial1", "adversarial2", "adversarial3"):
        schedule(name, sms=num_sms)
        made = kvcache_cases.build(case, "cpu", torch.bfloat16)
        with cases.poisoned_memory():
            results.append(attend(made))
    assert all(same(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("page_size", (None, 1, 16))
def test_every_split_count(page_size: int | None, schedule) -> None:
    schedule("checks")
    case = latent((900, 3, 400, 0), num_heads=8, seqlen_q=2, page_size=page_size, sinks=True)
    made = kvcache_cases.build(case, "cpu", torch.float16)
    whole = attend(made, num_splits=1)
    for splits in (2, 3, 4, 5, 7, 8, 14, 15, 256, 0):
        for got, expected in zip(attend(made, num_splits=splits), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("page_size", (None, 1, 8, 16, 64, 256))
def test_every_row_moves_once_in_whole_sectors(page_size: int | None, schedule) -> None:
    """Keys and values are the same bytes, and are read once; whatever the page size."""
    schedule("plain", profile=True)
    lengths = (1024, 512)
    _emulator.reset_reports()
    attend(kvcache_cases.build(latent(lengths, num_heads=64, page_size=page_size), "cpu", torch.bfloat16), num_splits=1)
    (report,) = _emulator.reports()
    copied = sum(stats.tma_bytes for stats in report.instructions)
    gathered = 32 * sum(s.global_sectors for s in report.instructions if s.opcode.startswith("cp.async.cg"))
    queries = len(lengths) * 64 * 2 * 576
    assert copied + gathered == queries + sum(lengths) * 2 * 576
    assert (gathered > 0) == (page_size == 1)
    written = [s for s in report.instructions if s.opcode.startswith("st.global.v4")]
    assert 32 * sum(s.global_sectors for s in written) == len(lengths) * 64 * 2 * 512


def of_a_dense_cache(ptx: list[str], block) -> bool:
    """Whether a block reads batch_index: kernels that gather have pages."""
    files = dict(re.match(r"\s*\.file\s+(\d+)\s+\"(.*)\"", line).groups() for line in ptx if line.lstrip().startswith(".file"))
    begin = max(i for i in range(block.first_line) if ".loc" in ptx[i])
    for line in ptx[begin : block.last_line]:
        place = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if place and int(place[2]) > 0 and "batch_index" in Path(files[place[1]]).read_text().splitlines()[int(place[2]) - 1]:
            return True
    return False


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
def test_every_block_is_executed(dtype: torch.dtype, schedule) -> None:
    schedule("late")
    _emulator.reset_reports()
    for page_size in (None, 16, 64, 3):
        for heads_kv, seqlen_q in ((1, 1), (1, 40), (3, 70)):
            for options in ({}, {"causal": False, "window_size": (90, 20)}, {"softmax_scale": -2.0}):
                for splits in (0, 1):
                    fields = {"num_heads_kv": heads_kv, "seqlen_q": seqlen_q, "page_size": page_size, "options": options}
                    leftpad = (17, 0) if page_size == 3 else None
                    made = kvcache_cases.build(
                        latent((400, 0), num_heads=6, sinks=splits == 1, leftpad=leftpad, **fields), "cpu", dtype
                    )
                    attend(made, num_splits=splits)
    batch = latent((70,) * 40, options={"num_splits": 2})
    attend(kvcache_cases.build(batch, "cpu", dtype))
    attend(kvcache_cases.build(replace(batch, page_size=1), "cpu", dtype))
    for splits in (1, 3):
        fields = {"batch_idx": (2, 0), "leftpad": (3, 1), "options": {"num_splits": splits}}
        attend(kvcache_cases.build(latent((150, 40), num_heads=96, **fields), "cpu", dtype))
    attend(kvcache_cases.build(latent((0,)), "cpu", dtype))
    gathered = kvcache_cases.build(latent((400, 0, 150, 70), num_heads=6, num_heads_kv=2, page_size=3, seqlen_q=20), "cpu", dtype)
    for seed in range(40):  # consumers that free the halves of a tile at any distance
        for order in ("adversarial", "random"):
            schedule("adversarial2", schedule=order, seed=seed)
            attend(gathered, num_splits=seed % 3)
    reports = [report for report in _emulator.reports() if report.kernel in ROWS]
    suffix = "bf16" if dtype == torch.bfloat16 else "fp16"
    assert {report.kernel for report in reports} == {name for name in ROWS if suffix in name}
    missed = []
    for report in reports:
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            if not block.executions and not ("gather" in report.kernel and of_a_dense_cache(ptx, block)):
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line]]
                missed.append(f"{report.kernel}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:4])}")
    assert not missed, "\n".join(missed)


# --- appended rows ---


@pytest.mark.parametrize("page_size", (None, 4, 16))
def test_a_row_is_stored_once(page_size: int | None, schedule) -> None:
    """576 columns a row where k brings v along; and where v is given it takes the first 512, each of them written once too."""
    schedule("checks", profile=True)
    case = latent((64,) * 3, seqlen_new=8, page_size=page_size)
    caches, values = [], []
    for given in (None, "columns", "others"):
        made = kvcache_cases.build(case, "cpu", torch.bfloat16)
        made["v"] = {None: None, "columns": made["k"][..., :512], "others": torch.ones(3, 8, 1, 512, dtype=torch.bfloat16)}[given]
        _emulator.reset_reports()
        attend(made, cache_seqlens=made["cache_seqlens"])
        (append,) = [report for report in _emulator.reports() if report.kernel.startswith("append_kv")]
        stored = sum(s.global_sectors for s in append.instructions if s.opcode.startswith("st.global.v4"))
        assert 32 * stored == 3 * 8 * 2 * 576
        caches.append(made["k_cache"].nan_to_num(7.0))
        reference = kvcache_cases.build(case, "cpu", torch.bfloat16)
        flash_ext.attention_with_kvcache(**{**reference, "v": made["v"]}, backend="reference")
        assert torch.equal(caches[-1], reference["k_cache"].nan_to_num(7.0))
        values.append(made["v"])
    assert torch.equal(caches[0], caches[1]) and not torch.equal(caches[0], caches[2])


@pytest.mark.parametrize("page_size", (4, 64))
def test_decoding_step_by_step(page_size: int, schedule) -> None:
    """The call sequence of a replayed graph: the same tensors, lengths that grow on the device."""
    schedule("late")
    case = latent((14, 0, 60), num_heads=8, seqlen_new=1, page_size=page_size, capacity=192)
    made, reference = (kvcache_cases.build(case, "cpu", torch.bfloat16) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(70):
        for name in ("q", "k"):
            made[name].copy_(torch.randn(made[name].shape, generator=generator))
            reference[name].copy_(made[name])
        out, lse = attend(made)
        expected = flash_ext.attention_with_kvcache(**reference, return_lse=True, backend="reference")
        if step % 10 == 0:
            torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, expected[1], rtol=1e-3, atol=1e-3)
        for tensors in (made, reference):
            tensors["cache_seqlens"] += 1


# --- what stands in device memory, and what no kernel takes ---


@pytest.mark.parametrize("page_size", (None, 3, 16))
def test_values_nobody_checked_stay_inside(page_size: int | None, schedule) -> None:
    """Garbage lengths, tables, indices and padding: what the reference makes of them, and no access outside the cache."""
    schedule("checks")
    huge, tiny = 2**31 - 1, -(2**31)
    case = latent((150, 40, 9), seqlen_new=2, seqlen_q=2, page_size=page_size, capacity=192)
    table = kvcache_cases.build(case, "cpu", torch.bfloat16)["page_table"]
    changes = [{"cache_seqlens": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 190), (191, -1, 250))]
    changes += [{"leftpad_k": torch.tensor(x, dtype=torch.int32)} for x in ((huge, tiny, 3),)]
    if page_size:
        changes += [{"page_table": torch.where(torch.arange(table.shape[1]) % 2 == 1, x, table)} for x in (huge, tiny)]
    else:
        changes += [{"cache_batch_idx": torch.tensor([2, x, 0], dtype=torch.int32)} for x in (huge, tiny, 3)]
    for change in changes:
        results = []
        for backend in ("sm90", "reference"):
            a = {"leftpad_k": None, **kvcache_cases.build(case, "cpu", torch.bfloat16), **change}
            a["k_cache"].nan_to_num_(0.25)
            names = ("q", "k_cache", "v_cache", "k", "v", "cache_seqlens", "cache_batch_idx", "leftpad_k", "page_table")
            options = (None, None, True, None, None, 0.125, True, -1, -1, 0.0, 0, False, backend)
            results.append(torch.ops.flash_ext.kvcache(*(a[name] for name in names), *options))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_values_of_their_own_have_no_kernel(schedule) -> None:
    schedule("plain")
    made = kvcache_cases.build(latent((20, 33)), "cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"head dims above 256 need a v_cache that is k_cache\[..., :head_dim_v\]"):
        attend(made, v_cache=made["v_cache"].clone())
    with pytest.raises(RuntimeError, match="no kernel takes softcap or alibi_slopes with head dims above 256"):
        attend(made, softcap=2.0)
    expected = flash_ext.attention_with_kvcache(**made, backend="reference")
    with pytest.warns(flash_ext.FallbackWarning, match="head dims above 256"):
        got = flash_ext.attention_with_kvcache(**{**made, "v_cache": made["v_cache"].clone()})
    assert torch.equal(got, expected)
