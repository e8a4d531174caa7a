"""The backward kernels where some inputs need no gradient: what is left out, and that the rest are the same bits."""

from __future__ import annotations

import itertools
import re

import cases
import pytest
import torch
from cases import Case

import flash_ext
from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="the backward of Hopper")

DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations("qkv", n)]
KINDS = ({}, {"causal": True}, {"window_size": (70, 20)})
CASES = tuple(
    case
    for n, (d, d_v) in enumerate(DIMS)
    for fields in [{"head_dim": d, "head_dim_v": d_v, "num_heads": 2, "num_heads_kv": 1}]
    for case in (
        *(Case("frozen", 330, 290, batch=1, **kind, **fields) for kind in (KINDS[n % 3], KINDS[(n + 1) % 3])),
        cases.packed("frozen", ((140, 300), (0, 9), (230, 130), (7, 0)), **KINDS[(n + 2) % 3], **fields),
        Case("frozen", 70, 200, batch=1, splits=(0, 70, 70, 200), **fields),
    )
)


def kernel_of(case: Case, wanted: tuple[str, ...], dtype: torch.dtype) -> str:
    """The row for these gradients: that which leaves out dq, or dk and dv, or nothing."""
    dims = f"d{case.head_dim}" if case.head_dim == case.head_dim_v else f"d{case.head_dim}x{case.head_dim_v}"
    name = f"bwd_sm90_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_{dims}"
    if wanted == ("q",):
        return f"{name}_local_dq"
    if "q" not in wanted:
        return f"{name}_local_dkv"
    return f"{name}_{'causal' if case.causal else 'full' if case.window_size == (-1, -1) else 'local'}"


def gradients(case: Case, tensors: cases.Tensors, wanted: tuple[str, ...], **options) -> dict[str, torch.Tensor]:
    leaves = {name: getattr(tensors, name).detach().requires_grad_(name in wanted) for name in "qkv"}
    made = cases.Tensors(**leaves, dout=tensors.dout, dlse=tensors.dlse, side=tensors.side)
    with cases.poisoned_memory():
        out, lse, *_ = cases.call(case, made, backend="sm90", deterministic=True, **options)
        results = [(r, g) for r, g in ((out, tensors.dout), (lse, tensors.dlse)) if g is not None]
        found = torch.autograd.grad([r for r, _ in results], [leaves[name] for name in wanted], [g for _, g in results])
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", ("checks", "late", "adversarial1"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_wanted_gradients_are_the_bits_of_all_of_them(case: Case, name: str, schedule) -> None:
    """All of them are held to the oracle in test_backward.py, and here once."""
    dtype = torch.bfloat16 if name == "checks" else torch.float16
    schedule(name, sms=3)
    tensors = cases.build(case, "cpu", dtype)
    everything = gradients(case, tensors, ("q", "k", "v"))
    for wanted in SUBSETS if name == "checks" else (("q",), ("k",), ("k", "v")):
        _emulator.reset_reports()
        got = gradients(case, tensors, wanted)
        assert {r.kernel for r in _emulator.reports() if r.kernel.startswith("bwd_sm90") and "_d" in r.kernel} == {
            kernel_of(case, wanted, dtype)
        }
        for which, gradient in got.items():
            assert torch.equal(gradient, everything[which]), which


def multiply_adds() -> int:
    """Of the wgmma of the last backward kernel: each is counted by four warps."""
    (report,) = [r for r in _emulator.reports() if re.match(r"bwd_sm90_\w+_d\d", r.kernel)]
    total = 0
    for stats in report.instructions:
        if found := re.match(r"wgmma\.mma_async\S*\.m64n(\d+)k16", stats.opcode):
            total += 64 * int(found[1]) * 16 * stats.executions
    return total // 4


@pytest.mark.parametrize("dim,dim_v", DIMS)
def test_products_of_frozen_inputs_are_left_out(dim: int, dim_v: int, schedule) -> None:
    """S and dP always, dV and dK of what k and v need, dQ of what q needs."""
    schedule("plain", profile=True)
    case = Case("frozen", 256, 256, batch=1, num_heads=1, num_heads_kv=1, head_dim=dim, head_dim_v=dim_v)
    tensors = cases.build(case, "cpu", torch.bfloat16)
    pairs = 256 * 256
    columns = 64 * -(-dim // 64)  # of dQ, whose products are of whole blocks of 64
    for wanted in SUBSETS:
        _emulator.reset_reports()
        gradients(case, tensors, wanted)
        expected = dim + dim_v
        if "q" in wanted:
            expected += columns
        if wanted != ("q",):
            expected += dim + dim_v
        assert multiply_adds() == pairs * expected, wanted


def test_a_learnt_bias_takes_the_row_with_all_gradients(schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 150, 2, 64, generator=generator).bfloat16() for _ in range(4))
    bias = torch.randn(1, 2, 150, generator=generator)

    def run(*needed: bool) -> list[torch.Tensor | None]:
        leaves = [t.clone().requires_grad_(n) for t, n in zip((q, k, v, bias), needed, strict=True)]
        out = flash_ext.attention(*leaves[:3], k_bias=leaves[3], deterministic=True, backend="sm90")
        out.backward(dout)
        return [leaf.grad for leaf in leaves]

    everything = run(True, True, True, True)
    _emulator.reset_reports()
    got = run(False, False, False, True)
    assert "bwd_sm90_bf16_d64_local_scored" in {r.kernel for r in _emulator.reports()}
    assert torch.equal(got[3], everything[3]) and got[:3] == [None] * 3
