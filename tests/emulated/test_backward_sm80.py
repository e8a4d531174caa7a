"""The backward below Hopper, emulated: every row that fits the emulated device's shared memory, gradients against the
oracle; the order of deterministic sums; what lies behind rows and columns."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, _host, env

pytestmark = pytest.mark.skipif(env.EMULATE == "sm90", reason="the backward of other GPUs")

KIB = 99 if env.EMULATE in ("sm86", "sm89", "sm120") else 163
DIMS = (64, 128, 256)
SCORED = {"softcap": 5.0, "alibi": "heads", "k_bias": "hidden"}
KINDS = ({}, {"causal": True}, {"window_size": (70, 20)}, {"window_size": (70, 20), **SCORED})
NAMES = ("full", "causal", "local", "local_scored")
BUILT = {row["name"] for row in _host.variants()}


def row(dtype: str, head_dim: int, kind: int) -> str:
    """The row for one of KINDS, or a skip where this build lacks it."""
    name = f"bwd_sm80_{dtype}_d{head_dim}_{NAMES[kind]}_smem{KIB}"
    if name not in BUILT:
        pytest.skip(f"this build has no {name}")
    return name


def check(case: Case, dtype: torch.dtype, deterministic: bool, expected: str) -> None:
    _emulator.reset_reports()
    cases.check_case(case, "cpu", dtype, backend="sm80", deterministic=deterministic)
    ran = {report.kernel for report in _emulator.reports() if report.kernel.startswith("bwd_sm80")}
    assert ran == {expected}


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("kind", range(4), ids=NAMES)
@pytest.mark.parametrize("head_dim", DIMS)
def test_rows(head_dim: int, kind: int, dtype: str, schedule) -> None:
    """Several query heads a KV head, stages that wrap, odd ends, packed sequences, and tiles of keys that no query sees."""
    name, element = row(dtype, head_dim, kind), torch.bfloat16 if dtype == "bf16" else torch.float16
    fields = {"head_dim": head_dim, **KINDS[kind]}
    schedule("checks" if dtype == "bf16" else "late")
    check(Case("wrap", 330, 290, batch=1, num_heads=2, num_heads_kv=1, **fields), element, dtype == "bf16", name)
    lengths = ((140, 300), (0, 9), (230, 130), (7, 0))
    check(cases.packed("bwd", lengths, num_heads=2, num_heads_kv=1, **fields), element, dtype == "fp16", name)
    if dtype == "bf16":
        check(Case("unseen", 60, 300, batch=1, **fields), element, False, name)


ODD = ((136, 128), (168, 40), (192, 136), (200, 248), (40, 72))


@pytest.mark.parametrize("dims", ODD, ids=str)
def test_head_dims_between_rows(dims: tuple[int, int], schedule) -> None:
    schedule("adversarial1")
    covering = next(d for d in DIMS if d >= max(dims))
    case = Case("zero_fill", 150, 140, batch=1, num_heads_kv=1, head_dim=dims[0], head_dim_v=dims[1], causal=True, layout="padded")
    check(case, torch.bfloat16, True, row("bf16", covering, 1))


ORDERS = (("plain", 1), ("late", 4), ("adversarial1", 8), ("adversarial2", 3), ("adversarial3", 2))


@pytest.mark.parametrize("head_dim", DIMS)
def test_deterministic_gradients_have_the_same_bits_under_every_schedule(head_dim: int, schedule) -> None:
    row("bf16", head_dim, 1)
    case = Case("order", 200, 300, batch=1, num_heads=2, num_heads_kv=1, head_dim=head_dim, causal=True)
    results = []
    for name, num_sms in ORDERS:
        schedule(name, sms=num_sms)
        result = cases.run(case, cases.build(case, "cpu", torch.bfloat16), flash_ext.attention, backend="sm80", deterministic=True)
        results.append((result.dq, result.dk, result.dv))
    for other, expected in itertools.product(results[1:], results[:1]):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
