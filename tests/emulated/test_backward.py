"""The backward kernels, emulated: gradients against the oracle, schedules against each other, exact probes."""

from __future__ import annotations

import sys
from pathlib import Path

import cases
import oracle
import pytest
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

sys.path.append(str(Path(__file__).resolve().parents[1] / "emulator"))
import mutate

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper")

ALL_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
SCORED = {"alibi": "heads", "k_bias": "hidden", "softcap": 5.0}
KINDS = ({}, {"causal": True}, {"window_size": (70, 20)}, {"window_size": (70, 20), **SCORED})
# Every row of the table: several query heads a KV head, rings that wrap, odd ends, packed sequences, parts of the keys, and
# tiles of keys that no query sees.
ROWS = tuple(
    case
    for d, d_v in ALL_DIMS
    for kind in KINDS
    for fields in [{"head_dim": d, "head_dim_v": d_v, **kind}]
    for case in (
        Case("wrap", 330, 290, batch=1, num_heads=2, num_heads_kv=1, **fields),
        cases.packed("bwd", ((140, 300), (0, 9), (230, 130), (7, 0)), num_heads=2, num_heads_kv=1, **fields),
        Case("parts", 70, 200, batch=1, splits=(0, 70, 70, 200), **fields),
        Case("unseen", 60, 300, batch=1, **fields),
    )
)
ODD = tuple(
    Case("zero_fill", 150, 140, batch=1, num_heads_kv=1, head_dim=d, head_dim_v=d_v, causal=n % 2 == 0, layout="padded")
    for n, (d, d_v) in enumerate(((8, 8), (40, 72), (104, 56), (72, 120), (136, 128), (168, 40), (192, 136), (200, 248)))
)
# Rows that sequences do not show, several heads and batches, scores without softcap, and a cap that wants a precise tanh.
SHOWN = {
    "seqused_q": (120, 0, 200, 5), "seqused_k": (290, 5, 100, 0), "leftpad_q": (10, 0, 3, 0), "leftpad_k": (20, 0, 9, 0),
}  # fmt: skip
MORE = tuple(
    case
    for d, d_v in ALL_DIMS
    for fields in [{"num_heads": 2, "num_heads_kv": 1, "head_dim": d, "head_dim_v": d_v}]
    for case in (
        *(cases.packed("shown", ((140, 300), (0, 9), (230, 130), (7, 0)), **SHOWN, **kind, **fields) for kind in KINDS),
        Case("many", 70, 150, batch=3, num_heads=3, num_heads_kv=3, head_dim=d, head_dim_v=d_v),
        Case("alibi", 150, 140, batch=1, alibi="heads", causal=True, **fields),
        Case("large_cap", 150, 140, batch=1, softcap=600.0, softmax_scale=3.0, **fields),
    )
)
COVERED = {c.name: c for c in (*cases.CASES.values(), *ROWS, *MORE, *ODD)}


def ran() -> set[str]:
    return {report.kernel for report in _emulator.reports() if report.kernel.startswith("bwd_sm90")}


def planned(case: Case, dtype: torch.dtype) -> flash_ext.Explanation:
    return flash_ext.explain(**cases.meta(case, dtype), device_info=f"sm90:{env.EMULATE_SMS}")


reached: set[str] = set()


@pytest.mark.parametrize("name", [name for name, c in COVERED.items() if planned(c, torch.bfloat16).backend == "sm90"])
def test_case(name: str, schedule) -> None:
    case = COVERED[name]
    dtype = torch.bfloat16 if len(name) % 2 else torch.float16
    schedule("checks" if len(name) % 3 else "late")
    _emulator.reset_reports()
    cases.check_case(case, "cpu", dtype, backend="sm90", deterministic=len(name) % 2 == 0)
    reached.update(ran())
    if 0 not in (case.batch, case.seqlen_q, case.seqlen_k) and case.sequences is None:
        assert len(ran()) == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize("case", ROWS[::4], ids=lambda c: c.name)
def test_every_row(case: Case, dtype: torch.dtype, schedule) -> None:
    schedule("adversarial1", sms=3)
    cases.check_case(case, "cpu", dtype, backend="sm90")


def gradients(case: Case, deterministic: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    result = cases.run(case, cases.build(case, "cpu", dtype), flash_ext.attention, backend="sm90", deterministic=deterministic)
    return result.dq, result.dk, result.dv


DETERMINISTIC = (
    Case("order", 330, 520, batch=1, num_heads=2, num_heads_kv=1, head_dim=64),
    Case("order", 330, 520, batch=1, num_heads=2, num_heads_kv=1, head_dim=128, causal=True),
    Case("order", 200, 300, batch=1, num_heads=2, num_heads_kv=1, head_dim=256, causal=True),
    Case("order", 300, 420, batch=1, num_heads=2, num_heads_kv=2, head_dim=128, window_size=(150, 90)),
)
ORDERS = (
    ("plain", 1), ("late", 4), ("adversarial1", 3), ("adversarial1", 8), ("adversarial2", 4), ("adversarial3", 2),
    ("adversarial3", 8),
)  # fmt: skip


@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda c: c.name + (f"d{c.head_dim}"))
def test_a_deterministic_backward_gives_the_same_bits_under_every_schedule(case: Case, schedule) -> None:
    results = []
    for name, num_sms in ORDERS:
        schedule(name, sms=num_sms)
        results.append(gradients(case, deterministic=True))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


def test_without_it_dk_and_dv_are_the_same_bits_and_dq_need_not_be(schedule) -> None:
    """The reason why the order is worth its price; and a probe that the test above can fail."""
    case = DETERMINISTIC[0]
    results = []
    for name, num_sms in ORDERS:
        schedule(name, sms=num_sms)
        results.append(gradients(case, deterministic=False))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other[1:], results[0][1:], strict=True))
    assert any(not torch.equal(other[0], results[0][0]) for other in results[1:])


def test_a_turn_passed_on_before_the_sum_is_complete_is_caught(schedule) -> None:
    """cp.async.bulk.wait_group.read says that the source may be overwritten, not that the sum is in memory."""
    case = DETERMINISTIC[1]
    kernel = "bwd_sm90_bf16_d128_causal"
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


def test_frozen_inputs_cost_no_gradient(schedule) -> None:
    """What needs no gradient gets none, and the others are the same bits."""
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 150, 2, 64, generator=generator).bfloat16() for _ in range(3)]
    dout = torch.randn(1, 150, 2, 64, generator=generator).bfloat16()

    def run(needed: tuple[bool, ...]) -> list[torch.Tensor | None]:
        leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        flash_ext.attention(*leaves, causal=True, deterministic=True, backend="sm90").backward(dout)
        return [leaf.grad for leaf in leaves]

    everything = run((True, True, True))
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        for got, expected, asked in zip(run(needed), everything, needed, strict=True):
            assert torch.equal(got, expected) if asked else got is None


def test_rows_and_columns_beyond_the_tensors_hold_nan(schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(1, 100, 2, 72, generator=generator).bfloat16() for _ in range(4)]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = flash_ext.attention(*leaves, deterministic=True, backend="sm90")
        return torch.autograd.grad(out, leaves, dout)

    expected = run(*clean)
    poisoned = []
    for tensor in clean:
        larger = torch.full((2, 200, 4, 160), torch.nan, dtype=torch.bfloat16)
        larger[1:, :100, 1:3, :72] = tensor
        poisoned.append(larger[1:, :100, 1:3, :72])
    assert all(torch.equal(a, b) for a, b in zip(run(*poisoned), expected, strict=True))


def test_rows_that_see_no_key_give_zeros(schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, n, 2, 64, generator=generator).bfloat16() for n in (260, 20, 20, 260))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flash_ext.attention(*leaves, causal=True, return_lse=True, backend="sm90")
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, torch.full_like(lse, torch.nan).where(lse.isinf(), 0.0)))
    assert (dq[:, :240] == 0).all() and all(torch.isfinite(g).all() for g in (dq, dk, dv)) and dk.abs().sum() > 0


@pytest.mark.parametrize("head_dim,head_dim_v", ALL_DIMS)
@pytest.mark.parametrize("level", (3, 5))
def test_gradients_of_saturated_scores(head_dim: int, head_dim_v: int, level: int, schedule) -> None:
    """Every score lies near level times the cap, where softcap's derivative, 1 - tanh^2, is about 1e-2 or 2e-4, and found from
    the weight: the error of dq and dk stays that of the 16-bit roundings. (192, 128) takes the row of (192, 192)."""
    schedule("checks")
    cap = 5.0
    generator = torch.Generator().manual_seed(0)
    q, k = ((torch.randn(1, n, 2, head_dim, generator=generator) * 0.3 + 1).bfloat16() for n in (150, 140))
    v, dout = (torch.randn(1, n, 2, head_dim_v, generator=generator).bfloat16() for n in (140, 150))
    options = {"softcap": cap, "softmax_scale": level * cap / head_dim}
    planned = flash_ext.explain(q, k, v, device_info="sm90", **options).backward.variant
    assert planned == f"bwd_sm90_bf16_d{head_dim}_local_scored"

    def gradients_of(backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(flash_ext.attention(*leaves, **options, backend=backend), leaves, dout)

    inputs = (q, k, v)
    expected = oracle.dense_results(inputs, dout, None, torch.float64, options)
    for got, reference, name in zip(gradients_of("sm90"), gradients_of("reference"), ("dq", "dk", "dv"), strict=True):
        true = getattr(expected, name)
        error, allowed = ((g.double() - true).norm() / true.norm() for g in (got, reference))
        assert error < 2 * allowed, f"{name}: {error:.1e}, the reference {allowed:.1e}"
