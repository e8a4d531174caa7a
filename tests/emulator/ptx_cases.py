"""One-instruction kernels: PTX text for a case, launched on arrays, compared lane by lane.

A case is the instruction with {d} {e} for results and {a} {b} {c} for operands, their types, and a
function of exact scalars (see scalars.py) that returns the value, or raw bits wrapped in `Raw`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import harness
import numpy as np
from scalars import TYPES, Float, Int, lanes, packed, ulps

COUNT = 256
REGISTER = {8: "b16", 16: "b16", 32: "b32", 64: "b64"}
PACKED = re.compile(r"^(bf16|f16)x2$")


class Raw(int):
    """A result given as its bits."""


@dataclass(frozen=True)
class Case:
    ptx: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., Any] = field(repr=False)
    max_ulps: float = 0.0
    check: Callable[..., bool] | None = field(default=None, repr=False)  # instead of ulps
    limit: Callable[..., Any] | None = field(default=None, repr=False)  # adjusts raw operands

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.ptx.replace("{", "").replace("}", "")).strip("_")[:70]


def case(ptx: str, types: str, reference: Callable[..., Any], **more: Any) -> Case:
    ins, outs = types.split("->")
    return Case(ptx, tuple(ins.split()), tuple(outs.split()), reference, **more)


def bits_of(kind: str) -> int:
    return 32 if PACKED.match(kind) else TYPES[kind].bits


def dtype_of(kind: str) -> np.dtype:
    return np.dtype(f"u{bits_of(kind) // 8}")


def kernel_ptx(case: Case, name: str) -> str:
    ports = [*case.outputs, *case.inputs]
    letters = ["d", "e", "f", "g"][: len(case.outputs)] + ["a", "b", "c"][: len(case.inputs)]
    lines = [".visible .entry " + name + "(" + ", ".join(f".param .u64 p{i}" for i in range(len(ports))) + ")", "{"]
    lines += [".reg .b32 %i, %n, %cta, %t<8>;", ".reg .b64 %at, %base, %u<8>;", ".reg .b16 %h<8>;", ".reg .pred %p<8>;"]
    lines += [f".reg .{REGISTER[bits_of(kind)]} %{letter};" for letter, kind in zip(letters, ports, strict=True)]
    lines += ["mov.u32 %i, %tid.x;", "mov.u32 %n, %ntid.x;", "mov.u32 %cta, %ctaid.x;", "mad.lo.s32 %i, %cta, %n, %i;"]
    for i, (letter, kind) in enumerate(zip(letters, ports, strict=True)):
        if i < len(case.outputs):
            continue
        lines += address(i, kind)
        lines.append(f"ld.global.{'u8' if bits_of(kind) == 8 else 'b' + str(bits_of(kind))} %{letter}, [%at];")
    names = {letter: "%" + letter for letter in letters}
    lines.append(re.sub(r"\{([a-g])\}", lambda m: names[m[1]], case.ptx).rstrip(";") + ";")
    for i, kind in enumerate(case.outputs):
        lines += address(i, kind)
        lines.append(f"st.global.{'u8' if bits_of(kind) == 8 else 'b' + str(bits_of(kind))} [%at], %{letters[i]};")
    return "\n".join([*lines, "ret;", "}", ""])


def address(parameter: int, kind: str) -> list[str]:
    return [
        f"ld.param.u64 %base, [p{parameter}];",
        "cvta.to.global.u64 %base, %base;",
        f"mad.wide.u32 %at, %i, {bits_of(kind) // 8}, %base;",
    ]


def module_ptx(cases: list[Case], target: str = "sm_90a") -> str:
    head = f".version 8.6\n.target {target}\n.address_size 64\n"
    return head + "".join(kernel_ptx(c, f"k{i}") for i, c in enumerate(cases))


def samples(kind: str, rng: np.random.Generator) -> list[int]:
    if match := PACKED.match(kind):
        low, high = (TYPES[match[1]].samples(rng, COUNT) for _ in range(2))
        return [packed(x, y, 16) for x, y in zip(low, high, strict=True)]
    return TYPES[kind].samples(rng, COUNT)


def decode(kind: str, raw: int) -> Any:
    if match := PACKED.match(kind):
        return tuple(TYPES[match[1]].decode(part) for part in lanes(raw, 16))
    return TYPES[kind].decode(raw)


def encode(kind: str, value: Any) -> int:
    if isinstance(value, Raw):
        return int(value)
    if match := PACKED.match(kind):
        return packed(*(encode(match[1], part) for part in value), 16)
    return TYPES[kind].encode(value)


def agrees(case: Case, kind: str, got: int, want: int) -> bool:
    if match := PACKED.match(kind):
        return all(ulps(TYPES[match[1]], x, y) <= case.max_ulps for x, y in zip(lanes(got, 16), lanes(want, 16), strict=True))
    number = TYPES[kind]
    if isinstance(number, Float):
        same_sign = got >> (number.bits - 1) == want >> (number.bits - 1)
        distance = ulps(number, got, want)
        is_zero = number.decode(got) == 0 and number.decode(want) == 0
        return distance <= case.max_ulps and (same_sign or not is_zero or case.max_ulps > 0)
    assert isinstance(number, Int)
    return got == want


def run_case(module: Any, name: str, case: Case, rng: np.random.Generator, **options: Any) -> None:
    """Launches one case on fresh samples; raises AssertionError naming the first wrong lane."""
    raw = [samples(kind, rng) for kind in case.inputs]
    if case.limit:
        raw = [list(column) for column in zip(*(case.limit(*row) for row in zip(*raw, strict=True)), strict=True)]
    ins = [
        harness.aligned(COUNT, dtype_of(k), np.array(r, np.uint64).astype(dtype_of(k)))
        for k, r in zip(case.inputs, raw, strict=True)
    ]
    outs = [harness.aligned(COUNT, dtype_of(k)) for k in case.outputs]
    harness.launch(module, name, 2, COUNT // 2, *map(harness.Out, outs), *map(harness.In, ins), **options)
    for i in range(COUNT):
        operands = [decode(kind, column[i]) for kind, column in zip(case.inputs, raw, strict=True)]
        wanted = case.reference(*operands)
        if not isinstance(wanted, tuple) or (PACKED.match(case.outputs[0]) and len(case.outputs) == 1):
            wanted = (wanted,)
        for kind, column, value in zip(case.outputs, outs, wanted, strict=True):
            got = int(column[i])
            good = case.check(decode(kind, got), value, *operands) if case.check else agrees(case, kind, got, encode(kind, value))
            assert good, (
                f"{case.ptx}: operands {operands} (bits {[hex(column[i]) for column in raw]}): got {hex(got)} = "
                f"{decode(kind, got)}, expected {value}"
            )
