"""flash_ext.quantize_fp8: every step against an independent spelling of it, the rotation, shapes, and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import flash_ext
from flash_ext import quantize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (8, 24, 64, 96, 128, 192, 256)


def e4m3_values() -> np.ndarray:
    """The 127 values from 0 to 448 by the format's definition: exponent bias 7, three mantissa bits, no infinity."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


def nearest_even(x: np.ndarray) -> np.ndarray:
    """Codes (of |x| <= 448) by comparing distances in float64; of two equally near, the even code."""
    table = e4m3_values()
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    upper = np.clip(np.searchsorted(table, magnitude), 1, 126)
    lower = upper - 1
    low, high = magnitude - table[lower], table[upper] - magnitude
    code = np.where((low < high) | ((low == high) & (lower % 2 == 0)), lower, upper)
    return (code | (np.signbit(x) << 7)).astype(np.uint8)


def slow_rotation(row: np.ndarray) -> np.ndarray:
    """One row, butterflies written out in float32."""
    head_dim = len(row)
    n = math.gcd(head_dim, 1 << 20)
    y = [np.float32(-x if flip else x) for x, flip in zip(row, quantize.sign_bits(head_dim), strict=True)]
    distance = 1
    while distance < n:
        for i in range(head_dim):
            if not i & distance:
                a, b = y[i], y[i + distance]
                y[i], y[i + distance] = a + b, a - b
        distance *= 2
    return np.array(y, np.float32) * np.float32(n**-0.5)


def slow_quantize(x: np.ndarray, hadamard: bool, groups: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """groups: index expressions of x (rows of any number, last axis head_dim), each with one scale."""
    y = np.apply_along_axis(slow_rotation, -1, x) if hadamard else x
    codes, scales = np.zeros(x.shape, np.uint8), []
    for group in groups:
        values = y[group]
        finite = np.isfinite(values)
        amax = np.abs(values[finite]).max(initial=np.float32(0))
        a = np.maximum(amax, np.float32(2.0**-100))
        descale, factor = a / np.float32(448), np.float32(448) / a
        with np.errstate(invalid="ignore", over="ignore"):
            codes[group] = np.where(finite, nearest_even(np.where(finite, values, 0) * factor), 0x7F)
        scales.append(descale)
    return codes, np.array(scales, np.float32)


def assert_same(x8: torch.Tensor, descale: torch.Tensor, codes: np.ndarray, scales: np.ndarray) -> None:
    assert x8.dtype == torch.float8_e4m3fn and x8.is_contiguous() and descale.dtype == torch.float32
    assert np.array_equal(x8.view(torch.uint8).numpy(), codes)
    assert np.array_equal(descale.numpy().ravel().view(np.uint32), scales.view(np.uint32))


def test_rounding_is_to_nearest_even_at_every_value_and_midpoint() -> None:
    table = e4m3_values().astype(np.float32)
    middle = (table[1:] + table[:-1]) / 2
    near = np.concatenate([table, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    x = np.concatenate([near, -near])
    assert np.array_equal(quantize.to_e4m3(torch.from_numpy(x)).view(torch.uint8).numpy(), nearest_even(x))
    beyond = torch.tensor([449.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    assert quantize.to_e4m3(beyond).view(torch.uint8).tolist() == [0x7E, 0x7E, 0xFE, 0x7F, 0x7F, 0x7F]


@pytest.mark.parametrize("hadamard", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bits(head_dim: int, dtype: torch.dtype, hadamard: bool) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    batch, seqlen, heads = 2, 130, 2
    x = (torch.randn(batch, seqlen, heads, head_dim, generator=generator) * 3).to(dtype)
    x[0, 70] *= 200
    x[1, 64:128, 1] = 0
    values = x.float().numpy()
    blocks = [np.s_[b, 64 * r : 64 * r + 64, h] for b in range(batch) for h in range(heads) for r in range(3)]
    whole = [np.s_[b, :, h] for b in range(batch) for h in range(heads)]
    for scale, groups, shape in (("block", blocks, (2, 2, 3)), ("head", whole, (2, 2)), ("tensor", [np.s_[:]], ())):
        x8, descale = flash_ext.quantize_fp8(x, scale, hadamard)
        assert descale.shape == shape
        assert_same(x8, descale, *slow_quantize(values, hadamard, groups))


@pytest.mark.parametrize("hadamard", (False, True))
def test_packed_bits(hadamard: bool) -> None:
    x = torch.randn(300, 2, 64, generator=torch.Generator().manual_seed(0))
    bounds = [3, 3, 70, 134, 135, 290]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    values = x.numpy()
    sequences = list(itertools.pairwise(bounds))
    x8, descale = flash_ext.quantize_fp8(x, "head", hadamard, cu_seqlens=cu_seqlens)
    assert_same(x8, descale, *slow_quantize(values, hadamard, [np.s_[a:b, h] for a, b in sequences for h in range(2)]))
    x8, descale = flash_ext.quantize_fp8(x, "block", hadamard, cu_seqlens=cu_seqlens)
    assert descale.shape == (1, 2, 300 // 64 + 5)
    expected = np.full((2, 300 // 64 + 5), np.float32(2.0**-100) / np.float32(448))
    codes = np.zeros(x.shape, np.uint8)
    for b, (begin, end) in enumerate(sequences):
        for r, row in enumerate(range(begin, end, 64)):
            rows = slice(row, min(row + 64, end))
            part, scales = slow_quantize(values[rows], hadamard, [np.s_[:, h] for h in range(2)])
            codes[rows] = part
            expected[:, begin // 64 + b + r] = scales
    assert_same(x8, descale, codes, expected.ravel())


@pytest.mark.parametrize("bounds", ([0], [0, 0], [5, 2, 9], [-7, 400], [10, 20, 15, 30]))
def test_broken_cu_seqlens_neither_raise_nor_leave_the_tensor(bounds: list[int]) -> None:
    x = torch.randn(33, 1, 8)
    for scale in ("block", "head"):
        x8, descale = flash_ext.quantize_fp8(x, scale, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        assert x8.shape == x.shape and torch.isfinite(descale).all()


@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
def test_the_rotation_is_orthogonal_and_spreads_outliers(head_dim: int) -> None:
    m = quantize.rotate(torch.eye(head_dim)).double()
    n = {96: 32, 192: 64}.get(head_dim, head_dim)
    torch.testing.assert_close(m @ m.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-6)
    scaled = (m * n**0.5).round()
    assert ((scaled.abs() == 1) | (scaled == 0)).all() and (scaled != 0).sum() == n * head_dim
    # In integers the orthogonality is exact.
    assert torch.equal(scaled @ scaled.T, n * torch.eye(head_dim, dtype=torch.float64))
    one = torch.zeros(1, head_dim)
    one[0, 5] = 100.0
    assert quantize.rotate(one).abs().max() <= 100 * n**-0.5 * 1.0001


SIGNS = {64: 0xB13C21E4, 96: 0x3ED44CE0, 128: 0x8D3B2B58, 192: 0xEC1F499D, 256: 0x2C124941}


def test_the_signs_never_change() -> None:
    """Written down, since q and k of different releases must match: the first 32 columns as a number."""
    first = {d: sum(bit << i for i, bit in enumerate(quantize.sign_bits(d)[:32])) for d in (64, 96, 128, 192, 256)}
    assert first == SIGNS
    for head_dim in first:
        flipped = sum(quantize.sign_bits(head_dim))
        assert head_dim / 4 < flipped < 3 * head_dim / 4


def test_values_that_are_not_finite_and_extremes() -> None:
    x = torch.ones(1, 64, 1, 8)
    x[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -0.0, 0.0, 1e-30, -1.0])
    x8, descale = flash_ext.quantize_fp8(x)
    assert descale.item() == np.float32(2.0) / np.float32(448)
    assert x8.view(torch.uint8)[0, 0, 0].tolist() == [0x7F, 0x7F, 0x7F, 0x7E, 0x80, 0, 0, 0xF6]
    for amax in (3e38, 1e-38, 2.0**-149):
        x8, descale = flash_ext.quantize_fp8(torch.full((1, 1, 1, 8), amax))
        assert 0 < descale.item() < torch.inf and torch.isfinite(x8.float()).all()
        if amax > 2.0**-100:
            assert (x8.float() == 448).all()


def test_the_error_is_that_of_three_mantissa_bits() -> None:
    x = torch.randn(1, 200, 2, 128)
    for scale in quantize.SCALES:
        x8, descale = flash_ext.quantize_fp8(x, scale)
        full = descale if scale == "tensor" else descale[:, None, :, None] if scale == "head" else None
        if full is None:
            full = descale.repeat_interleave(64, 2)[:, :, :200].transpose(1, 2)[..., None]
        error = (x8.float() * full - x).abs()
        assert (error <= 2.0**-4 * x.abs() + full * 2.0**-10).all()


def test_shapes_without_elements() -> None:
    for shape, blocks in (((0, 5, 2, 64), 1), ((2, 0, 2, 64), 0), ((2, 64, 2, 64), 1)):
        for scale, expected in (("block", (*shape[:1], 2, blocks)), ("head", (shape[0], 2)), ("tensor", ())):
            x8, descale = flash_ext.quantize_fp8(torch.zeros(shape), scale)
            assert x8.shape == shape and descale.shape == expected and (descale == np.float32(2.0**-100) / np.float32(448)).all()


def test_fake_kernels_tell_the_shapes() -> None:
    cu = torch.zeros(4, dtype=torch.int32)
    for x, given in ((torch.zeros(2, 130, 3, 64), None), (torch.zeros(130, 3, 64), cu)):
        for scale in quantize.SCALES:
            torch.library.opcheck(torch.ops.flash_ext.quantize_fp8.default, (x, scale, True, given))


def test_there_is_no_gradient() -> None:
    x = torch.randn(1, 3, 1, 8, requires_grad=True)
    assert not flash_ext.quantize_fp8(x)[1].requires_grad
    with pytest.raises((NotImplementedError, RuntimeError), match=r"straight_through|does not require grad|no gradient"):
        torch.ops.flash_ext.quantize_fp8(x, "head", False, None)[1].sum().backward()


@pytest.mark.parametrize(
    "arguments,options,error,texts",
    (
        (([1, 2],), {}, TypeError, ["x must be a torch.Tensor, got list"]),
        ((torch.zeros(1, 1, 1, 8), 3, 1), {}, TypeError, ["scale must be a str, got int", "hadamard must be a bool, got int"]),
        ((torch.zeros(1, 1, 1, 8), "row"), {}, ValueError, ["scale must be one of block, head, tensor, got 'row'"]),
        ((torch.zeros(1, 1, 1, 8, dtype=torch.float64),), {}, ValueError, ["bfloat16, float16 or float32, got torch.float64"]),
        ((torch.zeros(1, 1),), {}, ValueError, ["4 dimensions", "got 2"]),
        ((torch.zeros(1, 1, 1, 257),), {}, ValueError, ["[1, 256], got 257"]),
        ((torch.zeros(1, 1, 8, 8).transpose(2, 3),), {}, ValueError, ["contiguous (stride 1), got stride 8"]),
        ((torch.zeros(5, 1, 8),), {}, ValueError, ["cu_seqlens must be given for a packed x with scale='block'"]),
        ((torch.zeros(1, 1, 1, 8),), {"cu_seqlens": torch.zeros(2)}, ValueError, ["packed x of 3 dimensions", "must be int32"]),
    ),
)  # fmt: skip
def test_bad_input(arguments: tuple, options: dict, error: type, texts: list[str]) -> None:
    with pytest.raises(error) as caught:
        flash_ext.quantize_fp8(*arguments, **options)
    assert str(caught.value).startswith("quantize_fp8: ")
    for text in texts:
        assert text in str(caught.value)
