"""mma.sync of every shape and format, ldmatrix and stmatrix; the sm_80 forms also compiled for sm_80."""

from __future__ import annotations

import numpy as np
import pytest
from formats import check_product, decode, pack_a, pack_accumulator, pack_b, random_matrix, sum_as_hopper, unpack_accumulator
from harness import In, Kernels, Out

SM90 = Kernels("mma.cu")
SM80 = Kernels("mma.cu", arch="sm_80", flags=("-DSM80_ONLY",))
SM89 = Kernels("mma.cu", arch="sm_89", flags=("-DSM89_ONLY",))

MMA = {  # kernel: a, b, d
    "k16_f32_bf16": ("bf16", "bf16", "f32"), "k16_f32_f16": ("f16", "f16", "f32"), "k16_f16_f16": ("f16", "f16", "f16"),
    "k8_f32_bf16": ("bf16", "bf16", "f32"), "k8_f32_f16": ("f16", "f16", "f32"), "k8_f16_f16": ("f16", "f16", "f16"),
    "k8_f32_tf32": ("tf32", "tf32", "f32"), "k4_f32_tf32": ("tf32", "tf32", "f32"),
    "k32_s32_s8": ("s8", "s8", "s32"), "k32_s32_u8_s8": ("u8", "s8", "s32"), "k16_s32_s8": ("s8", "s8", "s32"),
    "k32_s32_s8_satfinite": ("s8", "s8", "s32"),
    "k32_f32_e4m3": ("e4m3", "e4m3", "f32"), "k32_f32_e4m3_e5m2": ("e4m3", "e5m2", "f32"),
    "k32_f32_e5m2": ("e5m2", "e5m2", "f32"),
}  # fmt: skip


FP8 = [kernel for kernel in MMA if "e4m3" in kernel or "e5m2" in kernel]  # begins with sm_89
RUNS = [pytest.param(SM90, kernel, id=f"sm90-{kernel}") for kernel in MMA]
RUNS += [pytest.param(SM80, kernel, id=f"sm80-{kernel}") for kernel in MMA if kernel not in FP8]
RUNS += [pytest.param(SM89, kernel, id=f"sm89-{kernel}") for kernel in FP8]


@pytest.mark.parametrize("kernels, kernel", RUNS)
def test_mma(kernels, kernel, rng):
    a_kind, b_kind, d_kind = MMA[kernel]
    k = int(kernel.split("_")[0][1:])
    half = d_kind == "f16"
    for exact in (True, True, False):
        exact = exact or d_kind == "s32"
        a, b = random_matrix(a_kind, (16, k), rng, exact), random_matrix(b_kind, (8, k), rng, exact)
        c = random_matrix(d_kind, (16, 8), rng, exact)
        c_registers = pack_accumulator(c.codes, half)
        out = np.zeros_like(c_registers)
        kernels.launch(kernel, 1, 32, Out(out), In(pack_a(a.codes)), In(pack_b(b.codes)), In(c_registers), checks=True)
        check_product(d_kind, unpack_accumulator(out, (16, 8), half), a.values, b.values, c.values, exact)


@pytest.mark.parametrize("kernel", FP8)
def test_the_model_of_the_fp8_accumulator(kernel, rng):
    """fp8_fraction_bits is that of wgmma (test_fp8_accumulator.py), to the bit."""
    a_kind, b_kind, _ = MMA[kernel]
    a, b = random_matrix(a_kind, (16, 32), rng, False), random_matrix(b_kind, (8, 32), rng, False)
    c = random_matrix("f32", (16, 8), rng, False)
    for bits in (13, 9):
        out = np.zeros_like(pack_accumulator(c.codes, False))
        registers = (In(pack_a(a.codes)), In(pack_b(b.codes)), In(pack_accumulator(c.codes, False)))
        SM89.launch(kernel, 1, 32, Out(out), *registers, checks=True, fp8_fraction_bits=bits)
        got = decode("f32", unpack_accumulator(out, (16, 8), False))
        assert np.array_equal(got, sum_as_hopper((a_kind, b_kind), a.values, b.values, c.values, bits))


def test_satfinite():
    full = np.full((4, 32), 0x7F7F7F7F, np.uint32)
    c = np.full((4, 32), 0x7FFFFFF0, np.uint32)
    for kernel, want in (("k32_s32_s8_satfinite", 0x7FFFFFFF), ("k32_s32_s8", 0x7FFFFFF0 + 32 * 127 * 127)):
        out = np.zeros_like(c)
        SM90.launch(kernel, 1, 32, Out(out), In(full), In(full[:2].copy()), In(c))
        assert (out == want).all()


def matrices_and_offsets(rng) -> tuple[np.ndarray, np.ndarray]:
    """A shared-memory image, and 32 distinct 16-byte rows of it in random order."""
    image = rng.integers(0, 1 << 16, 64 * 8).astype(np.uint16)
    return image, (16 * rng.permutation(64)[:32]).astype(np.uint32)


def fragments(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Registers [matrix, lane] of 8x8 matrices [matrix, row, column]."""
    if transposed:
        rows = rows.swapaxes(1, 2)
    return np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows), 32)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kernels", [SM80, SM90], ids=["sm80", "sm90"])
def test_ldmatrix(kernels, count, transposed, rng):
    image, offsets = matrices_and_offsets(rng)
    out = np.zeros((count, 32), np.uint32)
    name = f"ldmatrix_x{count}" + "_trans" * transposed
    kernels.launch(name, 1, 32, Out(out), In(image), image.nbytes, In(offsets), shared=image.nbytes, checks=True)
    rows = image.reshape(-1, 8)[offsets[: 8 * count] // 16].reshape(count, 8, 8)
    np.testing.assert_array_equal(out, fragments(rows, transposed))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed, rng):
    image, offsets = matrices_and_offsets(rng)
    rows = rng.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    out = np.zeros_like(image)
    SM90.launch(
        f"stmatrix_x{count}" + "_trans" * transposed, 1, 32, Out(out), In(image), image.nbytes, In(offsets),
        In(fragments(rows, transposed)), shared=image.nbytes, checks=True,
    )  # fmt: skip
    want = image.copy().reshape(-1, 8)
    want[offsets[: 8 * count] // 16] = rows.reshape(-1, 8)
    np.testing.assert_array_equal(out.reshape(-1, 8), want)
