"""Narrow number formats as numpy code tables, and random matrices whose products are exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def _table(exponent_bits: int, mantissa_bits: int, finite: bool) -> np.ndarray:
    """Values of all codes; infinities and NaN are NaN, so that they are never drawn."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = codes & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    significand = mantissa + (exponent > 0) * (1 << mantissa_bits)
    values = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    top = exponent == (1 << exponent_bits) - 1
    values[top & (mantissa == (1 << mantissa_bits) - 1) if finite else top] = np.nan
    return np.where(codes >> exponent_bits + mantissa_bits, -values, values)


_FLOATS = {"f16": (5, 10, False), "bf16": (8, 7, False), "e4m3": (4, 3, True), "e5m2": (5, 2, False)}
BYTES = {"f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4, "s8": 1, "u8": 1, "f32": 4, "s32": 4}
CODES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass
class Coded:
    codes: np.ndarray  # uint8, uint16 or uint32
    values: np.ndarray  # float64


def decode(kind: str, codes: np.ndarray) -> np.ndarray:
    if kind in _FLOATS:
        return _table(*_FLOATS[kind])[codes]
    codes = np.ascontiguousarray(codes)
    if kind == "tf32":
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return codes.view({"s8": np.int8, "u8": np.uint8, "f32": np.float32, "s32": np.int32}[kind]).astype(np.float64)


def random_matrix(kind: str, shape: tuple[int, ...], rng: np.random.Generator, exact: bool = True) -> Coded:
    """Integers of -4 to 4, or (not `exact`) reals of -2 to 2; tf32 has bits below its precision."""
    if kind in ("s8", "u8", "s32"):
        low = 0 if kind == "u8" else -100
        values = rng.integers(low, 100, shape)
        codes = values.astype({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[kind]).view(CODES[BYTES[kind]])
        return Coded(codes, values.astype(np.float64))
    wanted = rng.integers(-4, 5, shape).astype(np.float64) if exact else rng.uniform(-2, 2, shape)
    if kind in _FLOATS:
        table = _table(*_FLOATS[kind])
        finite = np.flatnonzero(~np.isnan(table))
        order = finite[np.argsort(table[finite], kind="stable")]
        codes = order[np.clip(np.searchsorted(table[order], wanted), 0, len(order) - 1)].astype(CODES[BYTES[kind]])
    else:
        codes = wanted.astype(np.float32).view(np.uint32)
        if kind == "tf32":
            codes = codes & np.uint32(0xFFFFE000) | rng.integers(0, 1 << 13, shape).astype(np.uint32)
    return Coded(codes, decode(kind, codes))


def _significand_exponent(values: np.ndarray, smallest: int) -> tuple[np.ndarray, np.ndarray]:
    """values = significand * 2**exponent, significands in [1, 2) or, below 2**smallest, less; 0 has exponent -126."""
    exponent = np.maximum(np.frexp(np.asarray(values, np.float64))[1] - 1, smallest)
    return np.where(values == 0, 0.0, np.ldexp(values, -exponent)), np.where(values == 0, -126, exponent)


def sum_as_hopper(
    kinds: tuple[str, str], a: np.ndarray, b: np.ndarray, c: np.ndarray, fraction_bits: int = 13, d_kind: str = "f32"
) -> np.ndarray:
    """One fp8 wgmma, a (m, 32) @ b (n, 32).T + c (m, n), as src/fp8_accumulator.h has it: the emulator's switch
    fp8_fraction_bits, in float64. Finite numbers only; returns float32 or float16 values as float64."""
    smallest = {"e4m3": -6, "e5m2": -14}
    (a_s, a_e), (b_s, b_e) = (_significand_exponent(x, smallest[kind]) for kind, x in zip(kinds, (a, b), strict=True))
    c_s, c_e = _significand_exponent(c, -126)
    terms = a_s[:, None, :] * b_s[None, :, :], a_e[:, None, :] + b_e[None, :, :]
    significands, exponents = (np.concatenate([t, x[..., None]], axis=2) for t, x in zip(terms, (c_s, c_e), strict=True))
    largest = exponents.max(axis=2)
    aligned = np.trunc(np.ldexp(significands, fraction_bits + exponents - largest[..., None]))
    total = np.ldexp(aligned.sum(axis=2), largest - fraction_bits)
    if d_kind == "f16":
        return total.astype(np.float16).astype(np.float64)
    significand, exponent = _significand_exponent(total, -126)
    return np.ldexp(np.trunc(np.ldexp(significand, fraction_bits)), exponent - fraction_bits)


def accumulator_coords(registers: int, half: bool, warps: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each accumulator element, [register, thread] or, packed f16, [register, thread, 2]."""
    thread = np.arange(32 * warps)[None, :, None]
    register = np.arange(registers)[:, None, None]
    part = np.arange(2)[None, None, :] if half else np.zeros((1, 1, 1), int)
    if half:
        register = 2 * register + part
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register >> 1 & 1)
    column = 8 * (register >> 2) + 2 * (thread % 4) + (register & 1)
    row, column = np.broadcast_arrays(row, column)
    return (row, column) if half else (row[..., 0], column[..., 0])


def pack_accumulator(matrix: np.ndarray, half: bool) -> np.ndarray:
    """Codes of a (rows, n) accumulator to uint32 registers [register, thread]."""
    rows, n = matrix.shape
    row, column = accumulator_coords(n // 4 if half else n // 2, half, rows // 16)
    elements = matrix[row, column]
    return np.ascontiguousarray(elements).view(np.uint32).reshape(row.shape[:2])


def unpack_accumulator(registers: np.ndarray, shape: tuple[int, int], half: bool) -> np.ndarray:
    row, column = accumulator_coords(len(registers), half, shape[0] // 16)
    codes = registers.view(np.uint16).reshape(row.shape) if half else registers
    matrix = np.zeros(shape, codes.dtype)
    matrix[row, column] = codes
    return matrix


def pack_a(codes: np.ndarray) -> np.ndarray:
    """A of (rows, k) codes to registers [register, thread]: wgmma with 64 rows, mma.sync with 16."""
    rows, k = codes.shape
    packed = 4 // codes.itemsize
    register = np.arange(k * codes.itemsize // 8)[:, None, None]
    thread = np.arange(2 * rows)[None, :, None]
    element = np.arange(packed)[None, None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register & 1)
    column = packed * (thread % 4) + element + 4 * packed * (register >> 1)
    return np.ascontiguousarray(codes[row, column]).view(np.uint32)[..., 0]


def pack_b(codes: np.ndarray) -> np.ndarray:
    """B of mma.sync, (8, k) codes, to registers [register, lane]."""
    packed = 4 // codes.itemsize
    register = np.arange(codes.shape[1] * codes.itemsize // 16)[:, None, None]
    lane = np.arange(32)[None, :, None]
    element = np.arange(packed)[None, None, :]
    return np.ascontiguousarray(codes[lane // 4, packed * (lane % 4) + element + 4 * packed * register]).view(np.uint32)[..., 0]


def check_product(d_kind: str, got: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, exact: bool) -> None:
    """Codes of D against a @ b.T + c: equal for integers, else within the roundings of f32 sums."""
    want = a @ b.T + c
    bound = np.zeros_like(want)
    if not exact:
        bound = (a.shape[1] + 2) * 2.0**-24 * (np.abs(a) @ np.abs(b).T + np.abs(c))
        if d_kind == "f16":
            bound = bound + 2.0**-11 * np.abs(want)
    error = np.abs(decode(d_kind, got) - want)
    assert (error <= bound).all(), f"{(error > bound).sum()} of {error.size} wrong, worst {error.max()}"
