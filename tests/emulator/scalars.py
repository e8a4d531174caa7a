"""Exact scalar arithmetic for references: rounding to any small float format, integers by type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Int:
    bits: int
    signed: bool

    def decode(self, raw: int) -> int:
        return raw - (1 << self.bits) if self.signed and raw >> (self.bits - 1) else raw

    def encode(self, value: int) -> int:
        return int(value) & ((1 << self.bits) - 1)

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - self.signed)) - 1

    def clamp(self, value: int) -> int:
        return max(self.low, min(self.high, value))

    def samples(self, rng: np.random.Generator, count: int) -> list[int]:
        top = 1 << self.bits
        special = [0, 1, 2, 3, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1, 31, 32, 33]
        small = rng.integers(0, 256, count // 4).tolist()
        wide = rng.integers(0, top, count, dtype=np.uint64 if self.bits == 64 else np.int64).tolist()
        return pick(rng, [value % top for value in special + small + wide], count)


@dataclass(frozen=True)
class Float:
    exponent_bits: int
    mantissa_bits: int
    finite: bool = False  # e4m3: no infinity, one NaN pattern

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def nan(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def largest(self) -> int:
        return self.nan - 1 if self.finite else self.infinity - 1

    def decode(self, raw: int) -> float:
        sign = -1.0 if raw >> (self.bits - 1) else 1.0
        magnitude = raw & ((1 << (self.bits - 1)) - 1)
        if self.finite:
            if magnitude == self.nan:
                return math.nan
        elif magnitude >= self.infinity:
            return sign * math.inf if magnitude == self.infinity else math.nan
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if exponent:
            mantissa |= 1 << self.mantissa_bits
        return sign * math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)

    def encode(self, value: Fraction | float, mode: str = "rn", negative_zero: bool = False, saturate: bool = False) -> int:
        """Rounds exactly; `mode` is rn, rz, rm, rp or rna (nearest, ties away)."""
        top = 1 << (self.bits - 1)
        if isinstance(value, float):
            if math.isnan(value):
                return self.nan
            if math.isinf(value):
                return (top if value < 0 else 0) | (self.largest if saturate or self.finite else self.infinity)
            negative_zero = math.copysign(1, value) < 0
            value = Fraction(value)
        sign = top if value < 0 or (value == 0 and negative_zero) else 0
        magnitude = abs(value)
        if magnitude == 0:
            return sign
        exponent = max(floor_log2(magnitude), 1 - self.bias)
        scaled = magnitude / Fraction(2) ** (exponent - self.mantissa_bits)
        steps = scaled.numerator // scaled.denominator
        rest = scaled - steps
        if mode == "rn":
            up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and steps & 1)
        elif mode == "rna":
            up = rest >= Fraction(1, 2)
        else:
            up = rest > 0 and mode == ("rm" if sign else "rp")
        steps += int(up)
        # Bit patterns are ordered like values, so a carry into the exponent needs no care.
        raw = ((exponent + self.bias - 1) << self.mantissa_bits) + steps
        limit = self.largest
        if raw > limit:
            to_zero = mode == "rz" or mode == ("rp" if sign else "rm")
            raw = limit if saturate or to_zero or self.finite else self.infinity
        return sign | raw

    def samples(self, rng: np.random.Generator, count: int) -> list[int]:
        top = 1 << self.bits
        one = self.bias << self.mantissa_bits
        special = [0, top >> 1, one, one | top >> 1, one + 1, 1, self.largest, self.nan]
        special += [] if self.finite else [self.infinity, self.infinity | top >> 1]
        near = [self.encode(float(x)) for x in rng.normal(0, 4, count)]
        any_bits = rng.integers(0, top, count // 3, dtype=np.uint64 if self.bits == 64 else np.int64).tolist()
        return pick(rng, special + near + any_bits, count)


def pick(rng: np.random.Generator, values: list[int], count: int) -> list[int]:
    return [int(values[i]) for i in rng.integers(0, len(values), count)]


def floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


F16, BF16, F32, F64 = Float(5, 10), Float(8, 7), Float(8, 23), Float(11, 52)
E4M3, E5M2, TF32 = Float(4, 3, finite=True), Float(5, 2), Float(8, 10)

TYPES: dict[str, Int | Float] = {
    **{f"{kind}{bits}": Int(bits, kind == "s") for kind in "usb" for bits in (8, 16, 32, 64)},
    "f16": F16,
    "bf16": BF16,
    "f32": F32,
    "f64": F64,
}


def lanes(raw: int, part_bits: int) -> list[int]:
    """A packed register's parts, low first."""
    return [raw & ((1 << part_bits) - 1), raw >> part_bits]


def packed(low: int, high: int, part_bits: int) -> int:
    return low | high << part_bits


def flush(value: float, kind: Float) -> float:
    """Subnormals of a format become zero, as with .ftz."""
    tiny = math.ldexp(1.0, 1 - kind.bias)
    return math.copysign(0.0, value) if abs(value) < tiny else value


def arithmetic(kind: Float, mode: str, operation: str, *operands: float) -> int:
    """add, sub, mul, fma, div or sqrt of exact operands, rounded once."""
    a, b, c = (*operands, 0.0, 0.0)[:3]
    with np.errstate(all="ignore"):
        x, y, z = np.float64(a), np.float64(b), np.float64(c)
        # What double precision gives: right for infinities, NaN and the sign of zero.
        rough = float({"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z, "div": x / y, "sqrt": np.sqrt(x)}[operation])
    if not all(map(math.isfinite, operands)) or (operation == "div" and b == 0):
        return kind.encode(rough)
    if operation == "sqrt":
        if a <= 0:
            return kind.encode(rough)
        scale = 4**400  # plenty of bits: the root is exact or far from a tie
        number = Fraction(a)
        root = Fraction(math.isqrt(number.numerator * scale * scale // number.denominator), scale)
        return kind.encode(root if root * root == number else root + Fraction(1, scale * 4), mode)
    fa, fb, fc = Fraction(a), Fraction(b), Fraction(c)
    exact = {"add": fa + fb, "sub": fa - fb, "mul": fa * fb, "fma": fa * fb + fc, "div": fa / fb if fb else fa}[operation]
    negative = math.copysign(1, rough) < 0
    if exact == 0 and operation in ("add", "sub", "fma"):
        # A sum that cancels is -0 when rounding down, +0 else; equal zeros keep their sign.
        terms = (fa * fb, fc) if operation == "fma" else (fa, fb)
        if terms[0] != 0:
            negative = mode == "rm"
        elif mode == "rm":
            first = math.copysign(1, a) * (math.copysign(1, b) if operation == "fma" else 1)
            second = math.copysign(1, c if operation == "fma" else b) * (-1 if operation == "sub" else 1)
            negative = first < 0 or second < 0
    return kind.encode(exact, mode, negative_zero=negative)


def ulps(kind: Float, got: int, want: int) -> float:
    """Distance in units in the last place; 0 for two NaNs, infinity for a lone NaN."""
    a, b = kind.decode(got), kind.decode(want)
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    if a == b:
        return 0.0
    if math.isinf(a) or math.isinf(b):
        return math.inf
    top = 1 << (kind.bits - 1)
    order = [-(raw ^ top) if raw & top else raw for raw in (got, want)]
    return abs(order[0] - order[1])
