"""The model of Hopper's FP8 accumulator: the emulator's switch against numpy, and the facts that the model states."""

from __future__ import annotations

import numpy as np
import pytest
from formats import BYTES, Coded, decode, random_matrix, sum_as_hopper
from harness import make_options
from test_wgmma import Layout, run

K = 32
CASES = (
    ("e4m3_ss", "e4m3", "e4m3", "f32"),
    ("e4m3_rs", "e4m3", "e4m3", "f32"),
    ("e4m3_e5m2_ss", "e4m3", "e5m2", "f32"),
    ("e5m2_e4m3_rs", "e5m2", "e4m3", "f32"),
    ("e4m3_f16_ss", "e4m3", "e4m3", "f16"),
)


def wgmma(kernel: str, d_kind: str, a: Coded, b: Coded, c: Coded, bits: int = 13, **how) -> np.ndarray:
    layouts = (None if "_rs" in kernel else Layout(64, 1, "128B", False)), Layout(64, 1, "128B", False)
    return decode(d_kind, run(kernel, d_kind, a, b, c, layouts, {"checks": True, "fp8_fraction_bits": bits}, **how))


def coded(kind: str, values: np.ndarray) -> Coded:
    """Values that the format holds exactly."""
    values = np.asarray(values, np.float64)
    if BYTES[kind] == 4:
        return Coded(values.astype(np.float32).view(np.uint32), values)
    table = decode(kind, np.arange(1 << 8 * BYTES[kind]))
    order = np.argsort(table)  # NaN last
    codes = order[np.searchsorted(table[order], values)].astype(np.uint8)
    assert (decode(kind, codes) == values).all()
    return Coded(codes, values)


def all_codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Coded:
    """Every finite code, of any size: subnormals, zeros, the largest."""
    table = decode(kind, np.arange(256))
    codes = rng.choice(np.flatnonzero(~np.isnan(table)), shape).astype(np.uint8)
    return Coded(codes, table[codes])


@pytest.mark.parametrize("kernel,a_kind,b_kind,d_kind", CASES, ids=lambda x: str(x))
@pytest.mark.parametrize("bits", (13, 9))
def test_every_bit_is_that_of_the_model(kernel, a_kind, b_kind, d_kind, bits, rng):
    for draw in (all_codes, random_matrix):
        a, b = draw(a_kind, (64, K), rng), draw(b_kind, (64, K), rng)
        if d_kind == "f16":  # sums that fit
            a = random_matrix(a_kind, (64, K), rng, exact=False)
            b = random_matrix(b_kind, (64, K), rng, exact=False)
        c = random_matrix(d_kind, (64, 64), rng, exact=False)
        for scale_d in (True, False):
            got = wgmma(kernel, d_kind, a, b, c, bits, scale_d=scale_d)
            want = sum_as_hopper((a_kind, b_kind), a.values, b.values, c.values * scale_d, bits, d_kind)
            assert np.array_equal(got, want)
        if d_kind == "f32":  # chained: the truncated sum is the next accumulator
            again = sum_as_hopper((a_kind, b_kind), a.values, b.values, want, bits)
            assert np.array_equal(wgmma(kernel, d_kind, a, b, c, bits, scale_d=False, repeat=2), again)


def one_sum(products: list[tuple[float, float]], c: float = 0.0) -> float:
    """Row 0, column 0 of a wgmma whose other elements are zero."""
    a, b, old = np.zeros((64, K)), np.zeros((64, K)), np.zeros((64, 64))
    for k, (x, y) in enumerate(products):
        a[0, k], b[0, k] = x, y
    old[0, 0] = c
    return wgmma("e4m3_ss", "f32", coded("e4m3", a), coded("e4m3", b), coded("f32", old))[0, 0]


def test_small_products_vanish_beside_a_large_one():
    large, small = 2.0**7, 2.0**-9
    for first in (True, False):  # the order is nothing to a fused sum
        products = [(large, large)] + [(small, small)] * 31
        assert one_sum(products if first else products[::-1], -large * large) == 0.0
    assert one_sum([(small, small)] * 32) == 32 * small * small


def test_terms_and_result_are_truncated_not_rounded():
    ulp = 2.0**-13
    assert one_sum([(0.25, 1.0)] * 4, 0.75 * ulp) == 1.0
    assert one_sum([(-0.25, 1.0)] * 4, -0.75 * ulp) == -1.0
    assert one_sum([(0.25, 1.0)] * 4, ulp) == 1.0 + ulp
    assert one_sum([(1.0, 1.0)], 1.0 + 3 * ulp) == 2.0 + 2 * ulp


def test_alignment_is_by_coded_exponents():
    """1.5 * 1.5 = 2.25 aligns as 2^0 and not as 2^1, and a subnormal operand has the exponent of the smallest normal one."""
    x = 1.0 - 2.0**-14
    assert one_sum([(1.5, 1.5), (-1.5, 1.5)], x) == 1.0 - 2.0**-13
    assert one_sum([(2.25, 1.0), (-2.25, 1.0)], x) == 1.0 - 2.0**-12
    subnormal = 2.0**-9
    assert one_sum([(subnormal, 1.0), (-subnormal, 1.0)], 2.0**-20) == 0.0  # below 2^(-6 - 13)
    assert one_sum([(subnormal, 1.0), (-subnormal, 1.0)], 2.0**-19) == 2.0**-19


def test_infinity_and_nan_survive():
    assert one_sum([(1.0, 1.0)], np.inf) == np.inf
    assert np.isnan(one_sum([(1.0, 1.0)], np.nan))
    a = np.zeros((64, K), np.uint8)
    a[0, 0] = 0x7F  # NaN
    ones = coded("e4m3", np.ones((64, K)))
    got = wgmma("e4m3_ss", "f32", Coded(a, None), ones, coded("f32", np.zeros((64, 64))))
    assert np.isnan(got[0]).all() and (got[1:] == 0).all()


def test_a_long_sum_stops_growing_unless_it_is_flushed():
    """What two-level accumulation is for: beside 2^14, products of 1 are lost, all 32 of every instruction."""
    ones = coded("e4m3", np.ones((64, K)))
    start = coded("f32", np.full((64, 64), 2.0**14))
    assert (wgmma("e4m3_ss", "f32", ones, ones, start, repeat=100) == 2.0**14).all()
    part = wgmma("e4m3_ss", "f32", ones, ones, coded("f32", np.zeros((64, 64))), repeat=100)
    assert (part == 3200).all()
    assert (wgmma("e4m3_ss", "f32", ones, ones, start, bits=0, repeat=100) == 2.0**14 + 3200).all()


def test_other_types_and_the_default_are_not_touched(rng):
    assert make_options().fp8_fraction_bits == 0
    a, b = (random_matrix("bf16", (64, 16), rng, exact=False) for _ in range(2))
    c = random_matrix("f32", (64, 64), rng, exact=False)
    layouts = (Layout(64, 2, "128B", False),) * 2
    exact, truncated = (run("bf16_ss", "f32", a, b, c, layouts, {"fp8_fraction_bits": bits}) for bits in (0, 13))
    assert np.array_equal(exact, truncated)


@pytest.mark.parametrize("bits", (14, 200))
def test_more_bits_than_the_model_has_are_refused(bits):
    with pytest.raises(ValueError, match="at most 13"):
        make_options(fp8_fraction_bits=bits)
