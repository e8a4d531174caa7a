"""Arithmetic, comparison and conversion instructions against exact scalar arithmetic."""

from __future__ import annotations

import math

import harness
import numpy as np
import pytest
from ptx_cases import Raw, case, module_ptx, run_case
from scalars import BF16, E4M3, E5M2, F16, F32, F64, TF32, TYPES, arithmetic, flush

import build

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
INTEGERS = ["s16", "u16", "s32", "u32", "s64", "u64"]


def wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def no_zero(a: int, b: int, *rest: int) -> tuple[int, ...]:
    return (a, b if b not in (0, M32, M64, 0xFFFF) else 3, *rest)  # -1 with the least integer overflows


def integer_cases() -> list:
    cases = []
    for t in INTEGERS:
        bits = TYPES[t].bits
        b = f"b{bits}"
        cases += [
            case(f"add.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b: a + b),
            case(f"sub.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b: a - b),
            case(f"mul.lo.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b: a * b),
            case(f"mul.hi.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b, n=bits: a * b >> n),
            case(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {t} -> {t}", lambda a, b, c: a * b + c),
            case(f"div.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", quotient, limit=no_zero),
            case(f"rem.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b: a - quotient(a, b) * b, limit=no_zero),
            case(f"min.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", min),
            case(f"max.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", max),
            case(f"shr.{t} {{d}}, {{a}}, {{b}}", f"{t} u32 -> {t}", lambda a, n: a >> min(n, 64)),
            case(f"shl.{b} {{d}}, {{a}}, {{b}}", f"{t} u32 -> {t}", lambda a, n, w=bits: a << n if n < w else 0),
        ]
        if bits < 64:
            w = wide(t)
            cases += [
                case(f"mul.wide.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {w}", lambda a, b: a * b),
                case(f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {w} -> {w}", lambda a, b, c: a * b + c),
            ]
        if bits > 16:
            cases += [
                case(f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {t} -> {t}", lambda a, b, c, n=bits: (a * b >> n) + c),
                case(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {t} -> {t}", lambda a, b, c: c + abs(a - b)),
                case(f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} u32 u32 -> {t}", lambda a, p, n, t=t: bit_field(t, a, p, n)),
                case(f"bfind.{t} {{d}}, {{a}}", f"{t} -> u32", lambda a, t=t: find_bit(a)),
            ]
        if t[0] == "s":
            cases += [
                case(f"abs.{t} {{d}}, {{a}}", f"{t} -> {t}", abs),
                case(f"neg.{t} {{d}}, {{a}}", f"{t} -> {t}", lambda a: -a),
            ]
    for bits in (16, 32, 64):
        b, u = f"b{bits}", f"u{bits}"
        cases += [
            case(f"and.{b} {{d}}, {{a}}, {{b}}", f"{u} {u} -> {u}", lambda a, b: a & b),
            case(f"or.{b} {{d}}, {{a}}, {{b}}", f"{u} {u} -> {u}", lambda a, b: a | b),
            case(f"xor.{b} {{d}}, {{a}}, {{b}}", f"{u} {u} -> {u}", lambda a, b: a ^ b),
            case(f"not.{b} {{d}}, {{a}}", f"{u} -> {u}", lambda a: ~a),
            case(f"cnot.{b} {{d}}, {{a}}", f"{u} -> {u}", lambda a: int(a == 0)),
        ]
    for bits in (32, 64):
        b, u = f"b{bits}", f"u{bits}"
        cases += [
            case(f"popc.{b} {{d}}, {{a}}", f"{u} -> u32", lambda a: a.bit_count()),
            case(f"clz.{b} {{d}}, {{a}}", f"{u} -> u32", lambda a, n=bits: n - a.bit_length()),
            case(f"brev.{b} {{d}}, {{a}}", f"{u} -> {u}", lambda a, n=bits: int(f"{a:0{n}b}"[::-1], 2)),
            case(f"bfi.{b} {{d}}, {{a}}, {{b}}, 5, 9", f"{u} {u} -> {u}", lambda a, b: b & ~(511 << 5) | (a & 511) << 5),
        ]
    cases += [
        case("add.sat.s32 {d}, {a}, {b}", "s32 s32 -> s32", lambda a, b: TYPES["s32"].clamp(a + b)),
        case("sub.sat.s32 {d}, {a}, {b}", "s32 s32 -> s32", lambda a, b: TYPES["s32"].clamp(a - b)),
        case(
            "add.cc.u32 {d}, {a}, {b}; addc.u32 {e}, {c}, 0", "u32 u32 u32 -> u32 u32", lambda a, b, c: (a + b, c + (a + b >> 32))
        ),
        case("sub.cc.u32 {d}, {a}, {b}; subc.u32 {e}, {c}, 0", "u32 u32 u32 -> u32 u32", lambda a, b, c: (a - b, c - (a < b))),
        case(
            "add.cc.u64 {d}, {a}, {b}; addc.u64 {e}, {c}, 1",
            "u64 u64 u64 -> u64 u64",
            lambda a, b, c: (a + b, c + 1 + (a + b >> 64)),
        ),
        case(
            "mad.lo.cc.u32 {d}, {a}, {b}, {c}; madc.hi.u32 {e}, {a}, {b}, 0",
            "u32 u32 u32 -> u32 u32",
            lambda a, b, c: (a * b + c, (a * b >> 32) + ((a * b & M32) + c >> 32)),
        ),
        case("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "u32 u32 u32 -> u32", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
        case("shf.r.wrap.b32 {d}, {a}, {b}, {c}", "u32 u32 u32 -> u32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
        case("shf.l.clamp.b32 {d}, {a}, {b}, {c}", "u32 u32 u32 -> u32", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32),
        case("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "u32 u32 u32 -> u32", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
        case("prmt.b32 {d}, {a}, {b}, {c}", "u32 u32 u32 -> u32", permute),
        case(
            "dp4a.u32.u32 {d}, {a}, {b}, {c}",
            "u32 u32 u32 -> u32",
            lambda a, b, c: c + sum((a >> s & 255) * (b >> s & 255) for s in (0, 8, 16, 24)),
        ),
        case(
            "dp4a.s32.s32 {d}, {a}, {b}, {c}",
            "u32 u32 u32 -> u32",
            lambda a, b, c: c + sum(TYPES["s8"].decode(a >> s & 255) * TYPES["s8"].decode(b >> s & 255) for s in (0, 8, 16, 24)),
        ),
        case(
            "selp.b32 {d}, {a}, {b}, %p1".join(["setp.ne.u32 %p1, {c}, 3; ", ""]),
            "u32 u32 u32 -> u32",
            lambda a, b, c: a if c != 3 else b,
        ),
        case(
            "setp.ge.and.s32 %p1|%p2, {a}, {b}, %p3; selp.u32 {d}, 1, 0, %p1".join(["setp.ne.u32 %p3, {c}, 0; ", ""]),
            "s32 s32 u32 -> u32",
            lambda a, b, c: int(a >= b and c != 0),
        ),
        case("slct.u32.s32 {d}, {a}, {b}, {c}", "u32 u32 s32 -> u32", lambda a, b, c: a if c >= 0 else b),
    ]
    for imm in (0x80, 0xE8, 0x96, 0xCA, 0x1B):
        cases.append(
            case(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {imm}", "u32 u32 u32 -> u32", lambda a, b, c, i=imm: logic(a, b, c, i))
        )
    for op, fn in COMPARISONS.items():
        for t in ("s16", "u16", "s32", "u32", "s64", "u64"):
            if t[0] == "s" and op in ("lo", "ls", "hi", "hs"):
                continue
            cases.append(
                case(
                    f"setp.{op}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1",
                    f"{t} {t} -> u32",
                    lambda a, b, fn=fn: int(fn(a, b)),
                )
            )
    return cases


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lo": lambda a, b: a < b, "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b, "hs": lambda a, b: a >= b,
}  # fmt: skip


def bit_field(kind: str, a: int, position: int, length: int) -> int:
    bits = TYPES[kind].bits
    position, length = position & 255, length & 255
    raw = TYPES[kind].encode(a)
    fill = TYPES[kind].signed and length > 0 and raw >> min(position + length - 1, bits - 1) & 1
    value = raw >> position & ((1 << length) - 1) if position < bits else 0
    present = max(0, min(length, bits - position))
    return value | (-1 << present if fill else 0)


def find_bit(a: int) -> int:
    return (~a if a < 0 else a).bit_length() - 1


def permute(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def logic(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


# -- floating point


def minimum(a: float, b: float, least: bool = True) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b:
        return math.copysign(a, math.copysign(1, a) + math.copysign(1, b) - (1 if least else -1))
    return min(a, b) if least else max(a, b)


def with_nan(fn):
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else fn(a, b)


def maximum(a: float, b: float) -> float:
    return minimum(a, b, least=False)


def ops(kind, mode: str, name: str):
    return lambda *x: Raw(arithmetic(kind, mode, name, *x))


def ftz(fn):
    def flushed(*x):
        result = F32.decode(int(fn(*(flush(v, F32) for v in x))))
        return flush(result, F32)

    return flushed


def saturated(fn):
    def clamp(*x):
        value = F32.decode(int(fn(*x)))
        return 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0) + 0.0

    return clamp


def float_cases() -> list:
    cases = []
    for t, kind in (("f32", F32), ("f64", F64)):
        for mode in ("rn", "rz", "rm", "rp"):
            cases += [
                case(f"add.{mode}.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, mode, "add")),
                case(f"mul.{mode}.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, mode, "mul")),
                case(f"fma.{mode}.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {t} -> {t}", ops(kind, mode, "fma")),
            ]
        cases += [
            case(f"sub.rn.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, "rn", "sub")),
            case(f"div.rn.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, "rn", "div")),
            case(f"sqrt.rn.{t} {{d}}, {{a}}", f"{t} -> {t}", ops(kind, "rn", "sqrt")),
            case(f"rcp.rn.{t} {{d}}, {{a}}", f"{t} -> {t}", lambda a, k=kind: Raw(arithmetic(k, "rn", "div", 1.0, a))),
            case(f"min.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", minimum),
            case(f"max.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", maximum),
            case(f"abs.{t} {{d}}, {{a}}", f"{t} -> {t}", abs),
            case(f"neg.{t} {{d}}, {{a}}", f"{t} -> {t}", lambda a: -a),
            case(f"copysign.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", lambda a, b: math.copysign(b, a)),
        ]
        for op, fn in list(COMPARISONS.items())[:6]:
            ordered = lambda a, b, fn=fn: int(fn(a, b) and not (math.isnan(a) or math.isnan(b)))  # noqa: E731
            unordered = lambda a, b, fn=fn: int(fn(a, b) or math.isnan(a) or math.isnan(b))  # noqa: E731
            cases.append(case(f"setp.{op}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1", f"{t} {t} -> u32", ordered))
            cases.append(case(f"setp.{op}u.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1", f"{t} {t} -> u32", unordered))
        cases.append(
            case(
                f"setp.nan.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1",
                f"{t} {t} -> u32",
                lambda a, b: int(math.isnan(a) or math.isnan(b)),
            )
        )
        for test, fn in (("finite", math.isfinite), ("infinite", math.isinf), ("notanumber", math.isnan)):
            cases.append(
                case(f"testp.{test}.{t} %p1, {{a}}; selp.u32 {{d}}, 1, 0, %p1", f"{t} -> u32", lambda a, fn=fn: int(fn(a)))
            )
    cases += [
        case("add.ftz.f32 {d}, {a}, {b}", "f32 f32 -> f32", ftz(ops(F32, "rn", "add"))),
        case("mul.ftz.f32 {d}, {a}, {b}", "f32 f32 -> f32", ftz(ops(F32, "rn", "mul"))),
        case("fma.rn.ftz.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 -> f32", ftz(ops(F32, "rn", "fma"))),
        case("add.sat.f32 {d}, {a}, {b}", "f32 f32 -> f32", saturated(ops(F32, "rn", "add"))),
        case("fma.rn.sat.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 -> f32", saturated(ops(F32, "rn", "fma"))),
        case("min.NaN.f32 {d}, {a}, {b}", "f32 f32 -> f32", with_nan(minimum)),
        case("max.NaN.f32 {d}, {a}, {b}", "f32 f32 -> f32", with_nan(maximum)),
        case("max.ftz.f32 {d}, {a}, {b}", "f32 f32 -> f32", lambda a, b: maximum(flush(a, F32), flush(b, F32))),
    ]
    for t, kind in (("f16", F16), ("bf16", BF16)):
        x2 = t + "x2"
        cases += [
            case(f"add.rn.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, "rn", "add")),
            case(f"sub.rn.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, "rn", "sub")),
            case(f"mul.rn.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", ops(kind, "rn", "mul")),
            case(f"fma.rn.{t} {{d}}, {{a}}, {{b}}, {{c}}", f"{t} {t} {t} -> {t}", ops(kind, "rn", "fma")),
            case(f"min.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", minimum),
            case(f"max.NaN.{t} {{d}}, {{a}}, {{b}}", f"{t} {t} -> {t}", with_nan(maximum)),
            case(f"abs.{t} {{d}}, {{a}}", f"{t} -> {t}", abs),
            case(f"neg.{t} {{d}}, {{a}}", f"{t} -> {t}", lambda a: -a),
            case(f"add.rn.{x2} {{d}}, {{a}}, {{b}}", f"{x2} {x2} -> {x2}", pairwise(ops(kind, "rn", "add"))),
            case(f"mul.rn.{x2} {{d}}, {{a}}, {{b}}", f"{x2} {x2} -> {x2}", pairwise(ops(kind, "rn", "mul"))),
            case(f"fma.rn.{x2} {{d}}, {{a}}, {{b}}, {{c}}", f"{x2} {x2} {x2} -> {x2}", pairwise(ops(kind, "rn", "fma"))),
            case(
                f"fma.rn.relu.{x2} {{d}}, {{a}}, {{b}}, {{c}}",
                f"{x2} {x2} {x2} -> {x2}",
                pairwise(relu(kind, ops(kind, "rn", "fma"))),
            ),
            case(f"max.{x2} {{d}}, {{a}}, {{b}}", f"{x2} {x2} -> {x2}", pairwise(maximum)),
            case(f"neg.{x2} {{d}}, {{a}}", f"{x2} -> {x2}", pairwise(lambda a: -a)),
            case(f"setp.lt.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1", f"{t} {t} -> u32", lambda a, b: int(a < b)),
        ]
    return cases


def relu(kind, fn):
    def clamp(*x):
        value = kind.decode(int(fn(*x)))
        return value if math.isnan(value) or value > 0 else 0.0

    return clamp


def pairwise(fn):
    return lambda *x: tuple(fn(*column) for column in zip(*x, strict=True))


# -- approximations: the error bounds of the PTX manual


def safe(fn):
    def guarded(*x):
        try:
            return fn(*x)
        except (ValueError, OverflowError, ZeroDivisionError):
            return math.nan

    return guarded


def exp2(a: float) -> float:
    if math.isnan(a):
        return math.nan
    return math.inf if a >= 1024 else 0.0 if a < -1100 else 2.0**a


def log2(a: float) -> float:
    return math.nan if math.isnan(a) or a < 0 else -math.inf if a == 0 else math.log2(a) if a < math.inf else math.inf


def reciprocal(a: float) -> float:
    return math.copysign(math.inf, a) if a == 0 else 1 / a


def rsqrt(a: float) -> float:
    if a == 0:
        return math.copysign(math.inf, a)
    return math.nan if math.isnan(a) or a < 0 else 1 / math.sqrt(a)


def near(absolute: float = 0.0, relative: float = 0.0):
    def check(got: float, want: float, *_: float) -> bool:
        if math.isnan(want) or math.isnan(got):
            return math.isnan(want) and math.isnan(got)
        if math.isinf(want) or abs(want) > F32.decode(F32.largest):
            return math.isinf(got) and (got > 0) == (want > 0)
        return abs(got - want) <= absolute + relative * abs(want) + 2.0**-126

    return check


def approximate_cases() -> list:
    moderate = {"limit": lambda a, *r: (F32.encode(math.remainder(F32.decode(a), 2.0)) if math.isfinite(F32.decode(a)) else a, *r)}
    return [
        case("ex2.approx.f32 {d}, {a}", "f32 -> f32", exp2, check=near(relative=2**-22)),
        case("ex2.approx.ftz.f32 {d}, {a}", "f32 -> f32", lambda a: flush(exp2(flush(a, F32)), F32), check=near(relative=2**-22)),
        case("lg2.approx.f32 {d}, {a}", "f32 -> f32", log2, check=near(absolute=2**-22, relative=2**-22)),
        case("rcp.approx.ftz.f32 {d}, {a}", "f32 -> f32", lambda a: reciprocal(flush(a, F32)), check=near(relative=2**-23)),
        case("rsqrt.approx.f32 {d}, {a}", "f32 -> f32", rsqrt, check=near(relative=2**-22.4)),
        case("sqrt.approx.f32 {d}, {a}", "f32 -> f32", safe(lambda a: math.sqrt(a)), check=near(relative=2**-22)),
        case(
            "div.full.f32 {d}, {a}, {b}",
            "f32 f32 -> f32",
            lambda a, b: a / b,
            check=near(relative=2**-21),
            limit=lambda a, b: (F32.encode(1.5 + a % 7), F32.encode(0.25 + b % 5)),
        ),
        case("tanh.approx.f32 {d}, {a}", "f32 -> f32", math.tanh, check=near(absolute=2**-11, relative=2**-10)),
        case("sin.approx.f32 {d}, {a}", "f32 -> f32", safe(math.sin), check=near(absolute=2**-20), **moderate),
        case("cos.approx.f32 {d}, {a}", "f32 -> f32", safe(math.cos), check=near(absolute=2**-20), **moderate),
        case("ex2.approx.f16x2 {d}, {a}", "f16x2 -> f16x2", pairwise(lambda a: Raw(F16.encode(exp2(a)))), max_ulps=2),
        case(
            "ex2.approx.ftz.bf16x2 {d}, {a}",
            "bf16x2 -> bf16x2",
            pairwise(lambda a: Raw(BF16.encode(flush(exp2(a), F32)))),
            max_ulps=2,
        ),
        case("tanh.approx.bf16x2 {d}, {a}", "bf16x2 -> bf16x2", pairwise(math.tanh), max_ulps=1),
    ]


# -- conversions


def to_integer(kind: str, mode: str):
    rounding = {"rni": lambda v: int(np.rint(v)), "rzi": int, "rmi": math.floor, "rpi": math.ceil}[mode]

    def convert(a: float) -> int:
        if math.isnan(a):
            return 0
        return TYPES[kind].clamp(rounding(a)) if math.isfinite(a) else TYPES[kind].low if a < 0 else TYPES[kind].high

    return convert


def pack_pair(kind, bits: int, **more):
    return lambda a, b: Raw(kind.encode(a, **more) << bits | kind.encode(b, **more))


def whole(mode: str):
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    return lambda a: float(rounding(a))


def conversion_cases() -> list:
    cases = []
    for source in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        for target in ("s16", "u32", "s32", "s64", "u64"):
            wider = "u32" if target == "u32" else target
            cases.append(case(f"cvt.{target}.{source} {{d}}, {{a}}", f"{source} -> {wider}", lambda a: a))
        cases.append(case(f"cvt.rn.f32.{source} {{d}}, {{a}}", f"{source} -> f32", lambda a: Raw(F32.encode(a + F32_ZERO))))
        cases.append(case(f"cvt.rz.f32.{source} {{d}}, {{a}}", f"{source} -> f32", lambda a: Raw(F32.encode(a + F32_ZERO, "rz"))))
        cases.append(case(f"cvt.rn.f64.{source} {{d}}, {{a}}", f"{source} -> f64", lambda a: Raw(F64.encode(a + F32_ZERO))))
    for target in ("u8", "s16", "u32", "s32"):
        register = {"u8": "u16"}.get(target, target)
        cases.append(case(f"cvt.sat.{target}.s64 {{d}}, {{a}}", f"s64 -> {register}", lambda a, t=target: TYPES[t].clamp(a)))
    for mode in ("rni", "rzi", "rmi", "rpi"):
        for target in ("s32", "u32", "s64", "u64"):
            no_nan = {} if target.endswith("32") else {"limit": lambda a: (a if not math.isnan(F32.decode(a)) else 0,)}
            cases.append(case(f"cvt.{mode}.{target}.f32 {{d}}, {{a}}", f"f32 -> {target}", to_integer(target, mode), **no_nan))
        cases.append(case(f"cvt.{mode}.f32.f32 {{d}}, {{a}}", "f32 -> f32", whole(mode)))
    for mode in ("rn", "rz"):
        cases += [
            case(f"cvt.{mode}.f16.f32 {{d}}, {{a}}", "f32 -> f16", lambda a, m=mode: Raw(F16.encode(a, m))),
            case(f"cvt.{mode}.bf16.f32 {{d}}, {{a}}", "f32 -> bf16", lambda a, m=mode: Raw(BF16.encode(a, m))),
            case(f"cvt.{mode}.f32.f64 {{d}}, {{a}}", "f64 -> f32", lambda a, m=mode: Raw(F32.encode(a, m))),
            case(
                f"cvt.{mode}.f16x2.f32 {{d}}, {{a}}, {{b}}",
                "f32 f32 -> f16x2",
                lambda a, b, m=mode: (Raw(F16.encode(b, m)), Raw(F16.encode(a, m))),
            ),
            case(
                f"cvt.{mode}.bf16x2.f32 {{d}}, {{a}}, {{b}}",
                "f32 f32 -> bf16x2",
                lambda a, b, m=mode: (Raw(BF16.encode(b, m)), Raw(BF16.encode(a, m))),
            ),
        ]
    cases += [
        case("cvt.f32.f16 {d}, {a}", "f16 -> f32", lambda a: a),
        case("cvt.f32.bf16 {d}, {a}", "bf16 -> f32", lambda a: a),
        case("cvt.f64.f32 {d}, {a}", "f32 -> f64", lambda a: a),
        case(
            "cvt.rn.relu.f16x2.f32 {d}, {a}, {b}",
            "f32 f32 -> f16x2",
            lambda a, b: tuple(v if math.isnan(v) else max(v, 0.0) for v in (b, a)),
        ),
        case("cvt.rn.f16.s32 {d}, {a}", "s32 -> f16", lambda a: Raw(F16.encode(a + F32_ZERO))),
        case("cvt.rzi.s32.f16 {d}, {a}", "f16 -> s32", to_integer("s32", "rzi")),
        case(
            "cvt.rna.tf32.f32 {d}, {a}", "f32 -> f32", lambda a: a if not math.isfinite(a) else TF32.decode(TF32.encode(a, "rna"))
        ),
        case("cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b}", "f32 f32 -> u16", pack_pair(E4M3, 8, saturate=True)),
        case("cvt.rn.satfinite.e5m2x2.f32 {d}, {a}, {b}", "f32 f32 -> u16", pack_pair(E5M2, 8, saturate=True)),
        case("cvt.rn.f16x2.e4m3x2 {d}, {a}", "u16 -> f16x2", lambda a: (E4M3.decode(a & 255), E4M3.decode(a >> 8))),
        case("cvt.rn.f16x2.e5m2x2 {d}, {a}", "u16 -> f16x2", lambda a: (E5M2.decode(a & 255), E5M2.decode(a >> 8))),
        case("cvt.rn.satfinite.e4m3x2.f16x2 {d}, {a}", "f16x2 -> u16", lambda a: pack_pair(E4M3, 8, saturate=True)(a[1], a[0])),
    ]
    return cases


F32_ZERO = __import__("fractions").Fraction(0)
CASES = [*integer_cases(), *float_cases(), *approximate_cases(), *conversion_cases()]


@pytest.fixture(scope="module")
def text():
    return module_ptx(CASES)


@pytest.fixture(scope="module")
def module(text):
    return harness.emulator().Module(text, "alu")


@pytest.mark.parametrize("index", range(len(CASES)), ids=[c.name for c in CASES])
def test_instruction(module, index, rng):
    run_case(module, f"k{index}", CASES[index], rng)


def test_ptxas_accepts_the_cases(text, tmp_path):
    """The cases are PTX as the assembler knows it, not as we imagine it."""
    (tmp_path / "cases.ptx").write_text(text)
    build.run([build.cuda().nvcc, "-arch=sm_90a", "-cubin", "-o", tmp_path / "cases.cubin", tmp_path / "cases.ptx"])
