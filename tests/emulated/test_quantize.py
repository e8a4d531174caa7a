"""quantize_fp8's kernels, emulated: the bits of the definition in torch ops."""

from __future__ import annotations

import pytest
import torch

import flash_ext
from flash_ext import _emulator, env

if env.EMULATE in ("sm80", "sm86"):
    pytest.skip("8-bit floats begin with compute capability 8.9", allow_module_level=True)

ARCH = "sm90" if env.EMULATE == "sm90" else "sm89"
TWO_BYTES = (torch.bfloat16, torch.float16)


def variant(dtype: torch.dtype, head_dim: int) -> str:
    covered = next(d for d in (64, 128, 256) if d >= head_dim)
    return f"quantize_fp8_{ARCH}_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_d{covered}"


def check(x: torch.Tensor, scale: str, hadamard: bool, cu_seqlens: torch.Tensor | None = None, kernel: str = "") -> None:
    _emulator.reset_reports()
    x8, descale = flash_ext.quantize_fp8(x, scale, hadamard, cu_seqlens=cu_seqlens)
    assert {report.kernel for report in _emulator.reports()} == ({kernel} if kernel else set())
    expected8, expected = torch.ops.flash_ext.reference_quantize_fp8(x, scale, hadamard, cu_seqlens)
    assert x8.dtype == expected8.dtype and x8.is_contiguous() and x8.shape == expected8.shape
    assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8))
    assert descale.shape == expected.shape and torch.equal(descale.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name,num_sms", (("checks", 4), ("late", 1), ("adversarial1", 3)))
@pytest.mark.parametrize("hadamard", (False, True))
@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("head_dim", (8, 64, 80, 96, 128, 192, 248, 256))
def test_bits(head_dim: int, dtype: torch.dtype, hadamard: bool, name: str, num_sms: int, schedule) -> None:
    schedule(name, sms=num_sms)
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 131, 3, head_dim, generator=generator)
    x[0, 70] *= 50
    x[1, 64:128, 1] = 0
    x[0, 3, 0, 5], x[0, 4, 1, 0], x[1, 130, 2, 1] = torch.nan, torch.inf, -torch.inf
    x[1, 129, 2, :4] = 1e-30
    x = x.to(dtype)
    for scale in ("block", "head", "tensor"):
        check(x, scale, hadamard, kernel=variant(dtype, head_dim))


@pytest.mark.parametrize("hadamard", (False, True))
@pytest.mark.parametrize("scale", ("block", "head", "tensor"))
def test_packed_bits(scale: str, hadamard: bool, schedule) -> None:
    schedule("checks")
    x = torch.randn(300, 2, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bounds in ([3, 3, 70, 134, 135, 290], [0, 300], [0, 64, 128, 300, 300]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if scale != "tensor" else None
        check(x, scale, hadamard, cu_seqlens, variant(x.dtype, 96))


def test_broken_cu_seqlens_stay_within_the_tensors(schedule) -> None:
    schedule("checks")
    x = torch.randn(200, 1, 64).bfloat16()
    for bounds in ([5, 2, 9], [-7, 4000], [10, 150, 15, 30], [-(2**31), 2**31 - 1]):
        for scale in ("block", "head"):
            flash_ext.quantize_fp8(x, scale, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_strides_and_copies(schedule) -> None:
    schedule("checks")
    x = torch.randn(2, 70, 3, 64).half()
    kernel = variant(x.dtype, 64)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), "block", True, kernel=kernel)
    odd = torch.empty(2, 70, 3, 65, dtype=torch.float16)[..., :64].copy_(x)
    check(odd, "block", False, kernel=kernel)
    check(x[:, :1].expand(2, 70, 3, 64), "head", True, kernel=kernel)


def test_what_has_no_kernel_runs_as_torch_ops(schedule) -> None:
    schedule("checks")
    check(torch.randn(1, 70, 2, 64), "block", True)
    check(torch.randn(1, 70, 2, 20).bfloat16(), "head", True)


def test_shapes_without_elements(schedule) -> None:
    schedule("checks")
    for shape in ((0, 5, 2, 64), (2, 0, 2, 64)):
        for scale in ("block", "head", "tensor"):
            check(torch.zeros(shape, dtype=torch.bfloat16), scale, True)


def test_every_block_of_every_row_is_executed(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for dtype in TWO_BYTES:
        for head_dim in (64, 128, 256):
            x = torch.randn(2, 70, 2, head_dim).to(dtype)
            for hadamard in (False, True):
                for scale in ("block", "head", "tensor"):
                    flash_ext.quantize_fp8(x, scale, hadamard)
                for bounds in ([1, 66, 70], [1, 70]):
                    flash_ext.quantize_fp8(x[0], "block", hadamard, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    reports = _emulator.reports()
    assert len(reports) == 6
    assert [(r.kernel, b.first_line) for r in reports for b in r.blocks if not b.executions] == []
