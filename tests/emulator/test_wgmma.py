"""wgmma: every operand format, source, layout and swizzle; every N from generated PTX."""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
from formats import BYTES, Coded, check_product, pack_a, pack_accumulator, random_matrix, unpack_accumulator
from harness import In, InOut, Kernels, Out

MODES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
SPANS = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
kernels = Kernels("wgmma.cu")


def swizzle_address(swizzle: str, address: np.ndarray) -> np.ndarray:
    return address ^ (address >> 7 & SPANS[swizzle] // 16 - 1) << 4


class Layout:
    """A tile of `rows` x `blocks` wgmma steps of k in one of the eight canonical layouts, densely packed."""

    def __init__(self, rows: int, bytes: int, swizzle: str, mn_major: bool):
        span = SPANS[swizzle]
        self.rows, self.bytes, self.swizzle, self.mn_major = rows, bytes, swizzle, mn_major
        self.step = 32 // bytes  # elements of k in one wgmma
        if not mn_major:
            self.blocks = max(1, span // 32) if swizzle != "none" else 3
            self.lbo, self.sbo = (16 * rows, 128) if swizzle == "none" else (16, 8 * span)
            self.size = rows * 32 * self.blocks
        else:
            self.blocks = 3
            groups = 2 * self.blocks  # of 8 k
            if swizzle == "none":
                self.sbo, self.lbo = 128, 16 * rows
            else:
                self.sbo, self.lbo = 8 * span, 8 * span * groups
            self.size = -(-rows * 2 // span) * span * 8 * groups

    def element(self, row: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Byte offset before the swizzle."""
        span = SPANS[self.swizzle]
        if not self.mn_major:
            byte = k * self.bytes
            chunk = byte // 16 * self.lbo + byte % 16 if self.swizzle == "none" else byte
            return row // 8 * self.sbo + row % 8 * span + chunk
        byte = row * self.bytes
        if self.swizzle == "none":
            return byte // 16 * self.sbo + byte % 16 + k % 8 * 16 + k // 8 * self.lbo
        return byte % span + byte // span * self.lbo + k % 8 * span + k // 8 * self.sbo

    def block_offset(self, block: int) -> int:
        return int(self.element(np.array(0), np.array(block * self.step)))

    def descriptor(self, base_offset: int = 0) -> int:
        return self.lbo >> 4 << 16 | self.sbo >> 4 << 32 | base_offset << 49 | MODES[self.swizzle] << 62

    def write(self, image: np.ndarray, at: int, block: int, codes: np.ndarray, skew: int) -> None:
        """Codes (rows, k) as block `block`; `skew` is the shared address of the image modulo 1024."""
        row, k = np.indices(codes.shape)
        offset = at + self.element(row, block * self.step + k)
        address = swizzle_address(self.swizzle, offset + skew) - skew
        view = codes.view(np.uint8).reshape(*codes.shape, self.bytes)
        for i in range(self.bytes):
            image[address + i] = view[..., i]


def run(kernel: str, d: str, a: Coded, b: Coded, c: Coded, layouts, mode, *, skew=0, block=0, scale_d=True, repeat=1):
    """One launch; returns D's codes. Whatever is not an operand is NaN."""
    half = d == "f16"
    layout_a, layout_b = layouts
    a_bytes = layout_a.size if layout_a else 0
    b_at = -(-a_bytes // 1024) * 1024
    image = np.full(-(-(b_at + layout_b.size) // 16) * 16, 0x7F, np.uint8)
    a_block = block % layout_a.blocks if layout_a else 0
    b_block = block % layout_b.blocks
    if layout_a:
        layout_a.write(image, 0, a_block, a.codes, skew)
    layout_b.write(image, b_at, b_block, b.codes, skew)
    operands = struct.pack(
        "<QQIIIIII",
        layout_a.descriptor() if layout_a else 0,
        layout_b.descriptor(),
        layout_a.block_offset(a_block) if layout_a else 0,
        b_at + layout_b.block_offset(b_block),
        len(image), skew, int(scale_d), repeat,
    )  # fmt: skip
    d_in = pack_accumulator(c.codes, half)
    if not scale_d:
        d_in[...] = 0x7FFF7FFF  # NaN: must not be looked at
    out = np.zeros_like(d_in)
    registers = [] if layout_a else [In(pack_a(a.codes), "a")]
    kernels.launch(
        kernel, 1, 128, Out(out, "d"), In(d_in, "d_in"), In(image, "image"), *registers, operands,
        shared=len(image) + skew, **mode,
    )  # fmt: skip
    return unpack_accumulator(out, c.codes.shape, half)


class Case:
    def __init__(self, kernel: str, a: str, b: str, d: str, n: int = 64):
        words = kernel.split("_")
        self.kernel, self.a, self.b, self.d, self.n = kernel, a, b, d, n
        self.registers = "rs" in words
        self.mn_a, self.mn_b = "ta" in words, "tb" in words
        self.sign = -1 if ("na" in words) != ("nb" in words) else 1


CASES = [
    *(Case(name, "bf16", "bf16", "f32") for name in (
        "bf16_ss", "bf16_ss_tb", "bf16_ss_ta", "bf16_ss_ta_tb", "bf16_ss_na", "bf16_ss_na_nb",
        "bf16_rs", "bf16_rs_tb", "bf16_rs_nb")),
    Case("bf16_ss_n8", "bf16", "bf16", "f32", 8),
    *(Case(name, "f16", "f16", "f32") for name in ("f16_ss", "f16_ss_ta_tb", "f16_rs_tb")),
    *(Case(name, "f16", "f16", "f16") for name in ("f16_f16_ss", "f16_f16_rs")),
    Case("e4m3_ss", "e4m3", "e4m3", "f32"),
    Case("e4m3_e5m2_ss", "e4m3", "e5m2", "f32"),
    Case("e5m2_ss_na", "e5m2", "e5m2", "f32"),
    Case("e4m3_rs", "e4m3", "e4m3", "f32"),
    Case("e5m2_e4m3_rs", "e5m2", "e4m3", "f32"),
    Case("e4m3_f16_ss", "e4m3", "e4m3", "f16"),
    Case("tf32_ss", "tf32", "tf32", "f32"),
    Case("tf32_rs", "tf32", "tf32", "f32"),
    Case("s8_ss", "s8", "s8", "s32"),
    Case("u8_s8_ss", "u8", "s8", "s32"),
    Case("s8_rs", "s8", "s8", "s32"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_wgmma(case: Case, mode, rng):
    """Every pair of swizzles; blocks of k inside the swizzle atom; bases off the atom's alignment."""
    k = 32 // BYTES[case.a]
    for turn, (swizzle_a, swizzle_b) in enumerate((x, y) for x in SPANS for y in SPANS):
        if case.registers and swizzle_a != swizzle_b:
            continue
        exact = turn % 4 != 3 or case.d == "s32"
        scale_d = turn % 3 != 1
        # A second wgmma on packed f16 would round twice.
        repeat = 1 if case.d == "f16" and not exact else 1 + turn % 2
        a = random_matrix(case.a, (64, k), rng, exact)
        b = random_matrix(case.b, (case.n, k), rng, exact)
        c = random_matrix(case.d, (64, case.n), rng, exact)
        layout_a = None if case.registers else Layout(64, BYTES[case.a], swizzle_a, case.mn_a)
        layout_b = Layout(case.n, BYTES[case.b], swizzle_b, case.mn_b)
        if case.n * 2 < SPANS[swizzle_b] and case.mn_b:
            continue
        got = run(
            case.kernel, case.d, a, b, c, (layout_a, layout_b), mode,
            skew=128 * (turn % 8), block=turn, scale_d=scale_d, repeat=repeat,
        )  # fmt: skip
        a_all = np.concatenate([case.sign * a.values] * repeat, axis=1)
        b_all = np.concatenate([b.values] * repeat, axis=1)
        check_product(case.d, got, a_all, b_all, c.values if scale_d else 0 * c.values, exact)


# ---- every N -----------------------------------------------------------------------------------

SWEEP = {"bf16": ("f32", ", 1, 1, 0, 0"), "f16": ("f16", ", 1, 1, 0, 0"), "e4m3": ("f32", ", 1, 1"),
         "tf32": ("f32", ", 1, 1"), "s8": ("s32", "")}  # fmt: skip


def sizes(kind: str) -> list[int]:
    return [n for n in range(8, 257, 8) if kind != "s8" or n <= 32 or n % 16 == 0]


@functools.cache
def sweep_module(kind: str) -> Kernels:
    """One kernel per N: image to shared memory, D in, one wgmma of K-major 32-byte-swizzled operands, D out."""
    d_kind, flags = SWEEP[kind]
    text = [".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 image[];\n"]
    for n in sizes(kind):
        count = n // 4 if d_kind == "f16" else n // 2
        d = ", ".join(f"%d{i}" for i in range(count))
        loads = "\n".join(f"ld.global.b32 %d{i}, [%at + {512 * i}];" for i in range(count))
        stores = "\n".join(f"st.global.b32 [%at + {512 * i}], %d{i};" for i in range(count))
        shape = f"m64n{n}k{32 // BYTES[kind]}.{d_kind}.{kind}.{kind}"
        text.append(f"""
.visible .entry n{n}(.param .u64 d_pointer, .param .u64 image_pointer, .param .u32 bytes, .param .u64 a, .param .u64 b)
{{
.reg .pred %p, %scale;
.reg .b32 %d<{count}>, %thread, %i, %end, %shared, %x<4>;
.reg .b64 %at, %from, %wide, %a, %b, %start;
mov.u32 %thread, %tid.x;
ld.param.u64 %from, [image_pointer];
ld.param.u32 %end, [bytes];
ld.param.u64 %a, [a];
ld.param.u64 %b, [b];
mov.u32 %shared, image;
shl.b32 %i, %thread, 4;
copy:
setp.ge.u32 %p, %i, %end;
@%p bra copied;
cvt.u64.u32 %wide, %i;
add.s64 %at, %from, %wide;
ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%at];
mov.u32 %shared, image;
add.s32 %shared, %shared, %i;
st.shared.v4.b32 [%shared], {{%x0, %x1, %x2, %x3}};
add.s32 %i, %i, 2048;
bra copy;
copied:
fence.proxy.async.shared::cta;
bar.sync 0;
mov.u32 %shared, image;
shr.u32 %shared, %shared, 4;
cvt.u64.u32 %start, %shared;
add.s64 %a, %a, %start;
add.s64 %b, %b, %start;
ld.param.u64 %at, [d_pointer];
mul.wide.u32 %wide, %thread, 4;
add.s64 %at, %at, %wide;
{loads}
setp.eq.u32 %scale, %end, %end;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.{shape} {{{d}}}, %a, %b, %scale{flags};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
{stores}
ret;
}}""")
    return Kernels(f"every N, {kind}", ptx="\n".join(text))


@pytest.mark.parametrize("kind", SWEEP)
def test_every_n(kind, rng):
    d_kind = SWEEP[kind][0]
    half = d_kind == "f16"
    k = 32 // BYTES[kind]
    for n in sizes(kind):
        layouts = [Layout(rows, BYTES[kind], "32B", False) for rows in (64, n)]
        a, b = (random_matrix(kind, (rows, k), rng) for rows in (64, n))
        c = random_matrix(d_kind, (64, n), rng)
        image = np.full(layouts[0].size + layouts[1].size, 0x7F, np.uint8)
        layouts[0].write(image, 0, 0, a.codes, 0)
        layouts[1].write(image, layouts[0].size, 0, b.codes, 0)
        d = pack_accumulator(c.codes, half)
        sweep_module(kind).launch(
            f"n{n}", 1, 128, InOut(d, "d"), In(image, "image"), len(image), layouts[0].descriptor(),
            layouts[1].descriptor() + (layouts[0].size >> 4), shared=len(image), checks=True,
        )  # fmt: skip
        check_product(d_kind, unpack_accumulator(d, c.codes.shape, half), a.values, b.values, c.values, True)
