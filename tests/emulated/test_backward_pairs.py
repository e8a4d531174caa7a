"""The backward on pairs of CTAs, emulated: gradients against the oracle, schedules against each other, traffic, planted bugs."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))
import mutate

VARIANTS = {row["name"] for row in pytest.importorskip("flash_ext._host").variants()}
pytestmark = [
    pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper"),
    pytest.mark.skipif(not any(name.endswith("_pair") for name in VARIANTS), reason="this build has no rows of pairs"),
]

DIMS = (128, 256)
# Rings that wrap, several query heads a KV head; odd ends; one tile of keys, whose partner has none; an odd number of tiles;
# packed sequences, empty ones too; parts of the keys; tiles of keys that no query sees; columns beyond the head dimension;
# rows that sequences do not show.
CASES = tuple(
    case
    for d in DIMS
    for causal in (False, True)
    for fields in [{"head_dim": d, "causal": causal}]
    for case in (
        Case("wrap", 330, 290, batch=1, num_heads=2, num_heads_kv=1, **fields),
        Case("alone", 70, 50, batch=1, **fields),
        Case("odd", 200, 3 * d // 2 + 190, batch=1, num_heads=1, num_heads_kv=1, **fields),
        cases.packed("pairs", ((140, 300), (0, 9), (230, 130), (7, 0)), num_heads=2, num_heads_kv=1, **fields),
        Case("parts", 70, 200, batch=1, splits=(0, 70, 70, 200), **fields),
        Case("unseen", 60, 300, batch=1, **fields),
        Case("zero_fill", 150, 140, batch=1, num_heads_kv=1, **{**fields, "head_dim": d - 16}, layout="padded"),
    )
) + tuple(
    cases.packed(
        "pairs_shown", ((140, 300), (0, 9), (230, 130), (7, 0)), num_heads=2, num_heads_kv=1, head_dim=d, causal=causal,
        seqused_q=(120, 0, 200, 5), seqused_k=(290, 5, 100, 0), leftpad_q=(10, 0, 3, 0), leftpad_k=(20, 0, 9, 0),
    )
    for d in DIMS
    for causal in (False, True)
)  # fmt: skip


@pytest.fixture(autouse=True)
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", "always")


def ran() -> set[str]:
    return {report.kernel for report in _emulator.reports() if report.kernel.startswith("bwd_sm90")}


def pick(schedule, case: Case) -> None:
    """Schedules, dtypes and numbers of SMs taken in turn."""
    number = CASES.index(case)
    schedule(("checks", "late", "adversarial1", "adversarial2")[number % 4], sms=(4, 1, 3, 8)[number // 4 % 4])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients(case: Case, dtype: torch.dtype, schedule) -> None:
    pick(schedule, case)
    _emulator.reset_reports()
    cases.check_case(case, "cpu", dtype, backend="sm90", deterministic=CASES.index(case) % 2 == 0)
    if case.sequences is None:
        mask = "causal" if case.causal else "full"
        assert ran() == {f"bwd_sm90_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_d{-(-case.head_dim // 128) * 128}_{mask}_pair"}


def gradients(case: Case, deterministic: bool) -> tuple[torch.Tensor, ...]:
    tensors = cases.build(case, "cpu", torch.bfloat16)
    result = cases.run(case, tensors, flash_ext.attention, backend="sm90", deterministic=deterministic)
    return result.dq, result.dk, result.dv


ORDERS = (
    ("plain", 1), ("late", 4), ("adversarial1", 3), ("adversarial1", 8), ("adversarial2", 4), ("adversarial3", 2),
    ("adversarial3", 8),
)  # fmt: skip
ORDERED = tuple(
    Case("order", 330, 2 * d + 300, batch=1, num_heads=2, num_heads_kv=heads_kv, head_dim=d, causal=causal)
    for d, causal, heads_kv in ((128, True, 1), (128, False, 2), (256, True, 2), (256, False, 1))
)


@pytest.mark.parametrize("case", ORDERED, ids=lambda c: c.name + f"d{c.head_dim}")
def test_deterministic_gradients_are_the_same_bits_under_every_schedule(case: Case, schedule) -> None:
    """Whichever CTA of a pair forms dQ of a tile, and whatever the number of CTAs."""
    results = []
    for name, num_sms in ORDERS:
        schedule(name, sms=num_sms)
        results.append(gradients(case, deterministic=True))
    for other in results[1:]:
        assert all(torch.equal(got, expected) for got, expected in zip(other, results[0], strict=True))


def moved(kernel_end: str) -> dict[str, int]:
    """Bytes by what moves them: copies to shared memory, reductions of float32, copies between CTAs."""
    report = next(report for report in _emulator.reports() if report.kernel.endswith(kernel_end))
    kinds = {"reduced": "cp.reduce", "sent": "cp.async.bulk.shared::cluster.shared::cta", "loaded": "cp.async.bulk"}
    total = dict.fromkeys(kinds, 0)
    for stats in report.instructions:
        kind = next((kind for kind, opcode in kinds.items() if stats.opcode.startswith(opcode)), None)
        if kind:
            total[kind] += stats.tma_bytes
    return total


@pytest.mark.parametrize("head_dim", DIMS)
def test_pairs_halve_what_dq_adds_to_memory(head_dim: int, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("traffic", 512, 512, batch=1, num_heads=1, num_heads_kv=1, head_dim=head_dim)
    totals = {}
    for choice, end in (("never", "_full"), ("always", "_pair")):
        monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", choice)
        schedule("plain", profile=True)
        _emulator.reset_reports()
        gradients(case, deterministic=False)
        totals[choice] = moved(end)
    tiles_of_keys = 512 // (128 if head_dim == 128 else 64)
    assert totals["never"]["reduced"] == tiles_of_keys * 512 * head_dim * 4 == 2 * totals["always"]["reduced"]
    # dS of every tile of scores (128 pays half of that: only dS of tiles whose dQ the peer forms), 2 bytes each.
    assert totals["always"]["sent"] == 512 * 512 * 2 // (2 if head_dim == 128 else 1) and totals["never"]["sent"] == 0


def test_a_cta_that_leaves_before_its_peer_is_caught(schedule) -> None:
    """The last barrier of the cluster keeps shared memory and mbarriers in place for the peer's copies and arrivals."""
    kernel = "bwd_sm90_bf16_d128_full_pair"
    case = Case("exit", 200, 100, batch=1, num_heads=1, num_heads_kv=1, head_dim=128)
    schedule("plain")
    gradients(case, deterministic=False)
    lines = _emulator.kernel_ptx(kernel).splitlines()
    entries = [i for i, line in enumerate(lines) if ".entry " in line] + [len(lines)]
    begin = next(i for i in entries if f".entry {kernel}(" in lines[i])
    last = max(i for i in range(begin, entries[entries.index(begin) + 1]) if "barrier.cluster.wait" in lines[i])
    assert "barrier.cluster.arrive" in lines[last - 1]
    edited = "\n".join([*lines[: last - 1], *lines[last + 1 :]])
    _emulator.replace_ptx(kernel, edited)
    try:
        caught = set()
        for seed in range(1, 7):
            schedule("adversarial2", seed=seed)
            try:
                gradients(case, deterministic=False)
            except RuntimeError:
                caught.add(_emulator.take_diagnostic().kind)
        assert "cluster-exit" in caught
    finally:
        _emulator.replace_ptx(kernel, None)


def test_a_turn_passed_on_before_the_sum_is_complete_is_caught(schedule) -> None:
    case, kernel = ORDERED[0], "bwd_sm90_bf16_d128_causal_pair"
    schedule("late", sms=4)
    gradients(case, deterministic=True)
    ptx = _emulator.kernel_ptx(kernel)
    site = mutate.sites(ptx, kernel, ["weaken_copy_wait"])[0]
    _emulator.replace_ptx(kernel, mutate.apply(ptx, site))
    try:
        with pytest.raises(RuntimeError, match="incomplete-reduction"):
            gradients(case, deterministic=True)
    finally:
        _emulator.replace_ptx(kernel, None)
