"""TMA tensor copies and reductions against element-by-element indexing."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from formats import decode
from harness import In, InOut, Kernels, Out, aligned, emulator

kernels = Kernels("tma.cu")
BOX_OFFSET = 1024  # of the box in shared memory, as in tma.cu
TYPES = {  # enumerators of CUtensorMapDataType
    "u8": (0, np.uint8), "u16": (1, np.uint16), "u32": (2, np.uint32), "s32": (3, np.int32), "u64": (4, np.uint64),
    "s64": (5, np.int64), "f16": (6, np.float16), "f32": (7, np.float32), "f64": (8, np.float64), "bf16": (9, np.uint16),
}  # fmt: skip
SPANS = (16, 32, 64, 128)  # of the swizzle modes 0 to 3


@dataclass
class Map:
    """A tensor in a buffer with padded rows, its tensor map, and what a box holds. Innermost first."""

    kind: str
    dims: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] = ()
    oob_fill: int = 0

    def __post_init__(self):
        code, dtype = TYPES[self.kind]
        self.itemsize = np.dtype(dtype).itemsize
        self.element_strides = self.element_strides or (1,) * len(self.dims)
        row = -(-self.dims[0] * self.itemsize // 16) * 16 + 16  # a padded row
        shape = (*reversed(self.dims[1:]), row // self.itemsize)
        self.buffer = aligned(shape, dtype)
        self.tensor = self.buffer[..., : self.dims[0]]
        strides = [s for s in reversed(self.buffer.strides[:-1])]
        self.encoded = emulator().encode_tensor_map(
            code, self.buffer.ctypes.data, list(self.dims), strides, list(self.box), list(self.element_strides),
            swizzle=self.swizzle, oob_fill=self.oob_fill,
        )  # fmt: skip
        self.counts = [self.box[0]] + [-(-b // s) for b, s in zip(self.box[1:], self.element_strides[1:], strict=True)]
        self.bytes = int(np.prod(self.counts)) * self.itemsize

    def indices(self, coords: tuple[int, ...]) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Indices of the box's elements into the tensor (outermost first), and which are inside."""
        steps = (1, *self.element_strides[1:])
        axes = [c + s * np.arange(n) for c, s, n in zip(coords, steps, self.counts, strict=True)]
        grids = np.meshgrid(*reversed(axes), indexing="ij")
        inside = np.ones(grids[0].shape, bool)
        for grid, size in zip(grids, reversed(self.dims), strict=True):
            inside &= (grid >= 0) & (grid < size)
        return tuple(np.where(inside, grid, 0) for grid in grids), inside

    def gather(self, coords: tuple[int, ...]) -> np.ndarray:
        index, inside = self.indices(coords)
        fill = np.zeros((), self.tensor.dtype)
        if self.oob_fill:
            fill = np.array((1 << 8 * self.itemsize - 1) - 1, f"u{self.itemsize}").view(self.tensor.dtype)
        return np.where(inside, self.tensor[index], fill)

    def shared_bytes(self, skew: int) -> np.ndarray:
        """Offset from the box area's start of each byte of the dense box."""
        address = BOX_OFFSET + skew + np.arange(self.bytes)
        return (address ^ (address >> 7 & SPANS[self.swizzle] // 16 - 1) << 4) - BOX_OFFSET

    def fill(self, rng: np.random.Generator) -> None:
        self.buffer.view(np.uint8)[...] = rng.integers(0, 256, self.buffer.nbytes, dtype=np.uint8).reshape(
            self.buffer.view(np.uint8).shape
        )


def coords_struct(coords: tuple[int, ...]) -> bytes:
    return struct.pack("<5i", *coords, *(0,) * (5 - len(coords)))


BOXES = {1: (64,), 2: (32, 9), 3: (16, 4, 3), 4: (16, 3, 2, 2), 5: (32, 2, 2, 3, 2)}
DIMS = {1: (150,), 2: (75, 21), 3: (40, 7, 5), 4: (30, 5, 4, 3), 5: (40, 3, 4, 5, 3)}


def cases(rng: np.random.Generator, rank: int):
    """Swizzles, types, strides and corners in turn, inside and across every edge."""
    for turn in range(12):
        kind = ("bf16", "f32", "u8", "f16", "s32", "f64")[turn % 6]
        itemsize = np.dtype(TYPES[kind][1]).itemsize
        swizzle = turn % 4
        inner = BOXES[rank][0] * 2 // itemsize
        if swizzle:
            inner = SPANS[swizzle] // itemsize
        steps = tuple(int(rng.integers(1, 4)) if turn % 3 == 2 else 1 for _ in range(rank))
        fill = turn // 6 if kind in ("bf16", "f32", "f16", "f64") else 0
        box = Map(kind, DIMS[rank], (inner, *BOXES[rank][1:]), swizzle, steps, fill)
        low = [-b // 2 if turn % 2 else 0 for b in box.box]
        coords = tuple(int(rng.integers(lo, d)) for lo, d in zip(low, box.dims, strict=True))
        yield box, coords, 128 * (turn % 5)


@pytest.mark.parametrize("rank", range(1, 6))
def test_load(rank, mode, rng):
    for box, coords, skew in cases(rng, rank):
        box.fill(rng)
        area = -(-(box.bytes + skew) // 128) * 128 + 128
        out = np.zeros(area, np.uint8)
        kernels.launch(
            f"load_{rank}d", 1, 64, Out(out), box.encoded, coords_struct(coords), area, box.bytes, skew,
            shared=BOX_OFFSET + area, touches=(In(box.buffer, "tensor"),), **mode,
        )  # fmt: skip
        want = np.full(area, 0xCD, np.uint8)
        want[box.shared_bytes(skew)] = box.gather(coords).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(out, want, err_msg=f"{box.kind} swizzle {box.swizzle} at {coords}")


@pytest.mark.parametrize("rank", range(1, 6))
def test_store(rank, mode, rng):
    """Clipped at the edges; the source is overwritten after wait_group.read."""
    for box, coords, skew in cases(rng, rank):
        if any(s > 1 for s in box.element_strides):
            continue
        box.fill(rng)
        want = box.buffer.copy()
        area = -(-(box.bytes + skew) // 128) * 128
        image = rng.integers(0, 256, area, dtype=np.uint8)
        kernels.launch(
            f"store_{rank}d", 1, 64, box.encoded, In(image), coords_struct(coords), area, skew,
            shared=BOX_OFFSET + area, touches=(InOut(box.buffer, "tensor"),), **mode,
        )  # fmt: skip
        index, inside = box.indices(coords)
        values = image[box.shared_bytes(skew)].view(box.tensor.dtype).reshape(inside.shape)
        target = want[..., : box.dims[0]]
        target[tuple(i[inside] for i in index)] = values[inside]
        np.testing.assert_array_equal(
            box.buffer.view(np.uint8), want.view(np.uint8), err_msg=f"{box.kind} swizzle {box.swizzle} at {coords}"
        )


def combine(op: str, kind: str, old: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Bits after one reduction; floats are chosen so that sums are exact."""
    if kind == "bf16":
        total = decode("bf16", old) + decode("bf16", value)
        return (total.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return {
            "add": lambda: old + value, "min": lambda: np.minimum(old, value), "max": lambda: np.maximum(old, value),
            "inc": lambda: np.where(old >= value, 0, old + 1), "and": lambda: old & value, "or": lambda: old | value,
            "dec": lambda: np.where((old == 0) | (old > value), value, old - 1), "xor": lambda: old ^ value,
        }[op]().astype(old.dtype)  # fmt: skip


REDUCTIONS = [
    *((f"add_{rank}d", kind) for rank in range(1, 6) for kind in ("f32", "u32")),
    *(("add_2d", kind) for kind in ("f16", "bf16", "s32", "u64", "f64")),
    *((f"{op}_2d", kind) for op in ("min", "max") for kind in ("u32", "s32", "s64", "f16")),
    *((f"{op}_2d", "u32") for op in ("inc", "dec")),
    *((f"{op}_2d", kind) for op in ("and", "or", "xor") for kind in ("u32", "u64")),
]  # fmt: skip


def small_values(kind: str, shape, rng: np.random.Generator) -> np.ndarray:
    values = rng.integers(0 if kind[0] == "u" else -8, 9, shape)
    if kind == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(TYPES[kind][1])


@pytest.mark.parametrize("kernel, kind", REDUCTIONS)
def test_reduce(kernel, kind, rng):
    op, rank = kernel.split("_")[0], int(kernel[-2])
    for turn, mode in enumerate(({"checks": True}, {"schedule": "late"}, {"schedule": "adversarial", "seed": 5})):
        itemsize = np.dtype(TYPES[kind][1]).itemsize
        box = Map(kind, DIMS[rank], (SPANS[turn + 1] // itemsize, *BOXES[rank][1:]), turn + 1)
        box.buffer[...] = small_values(kind, box.buffer.shape, rng)
        want = box.buffer.copy()
        coords = tuple(int(rng.integers(-2, d)) for d in box.dims)
        area = -(-box.bytes // 128) * 128
        image = small_values(kind, area // itemsize, rng)
        kernels.launch(
            kernel, 1, 64, box.encoded, In(image), coords_struct(coords), area, 0,
            shared=BOX_OFFSET + area, touches=(InOut(box.buffer, "tensor"),), **mode,
        )  # fmt: skip
        index, inside = box.indices(coords)
        values = image.view(np.uint8)[box.shared_bytes(0)].view(image.dtype).reshape(inside.shape)
        at = tuple(i[inside] for i in index)
        target = want[..., : box.dims[0]]
        target[at] = combine(op, kind, target[at], values[inside])
        np.testing.assert_array_equal(box.buffer, want)


def test_hint_and_prefetch(rng):
    box = Map("bf16", DIMS[2], (32, 9), 2)
    box.fill(rng)
    area = -(-box.bytes // 128) * 128
    out = np.zeros(area, np.uint8)
    tensor = (In(box.buffer, "tensor"),)
    kernels.launch(
        "load_2d_hint", 1, 64, Out(out), box.encoded, coords_struct((3, -2)), area, box.bytes, 0,
        shared=BOX_OFFSET + area, touches=tensor, checks=True,
    )  # fmt: skip
    np.testing.assert_array_equal(out[box.shared_bytes(0)], box.gather((3, -2)).reshape(-1).view(np.uint8))
    kernels.launch("prefetch_2d", 1, 32, box.encoded, coords_struct((3, -2)), touches=tensor, checks=True)


def test_phases(mode, rng):
    box = Map("f32", (32, 40), (32, 2), 3)
    box.fill(rng)
    rounds = 5
    out = np.zeros((2 * rounds, box.bytes), np.uint8)
    kernels.launch(
        "load_2d_phases", 1, 64, Out(out), box.encoded, coords_struct((0, 7)), box.bytes, rounds,
        shared=BOX_OFFSET + 2 * box.bytes, touches=(In(box.buffer, "tensor"),), **mode,
    )  # fmt: skip
    for i in range(2 * rounds):
        at = box.shared_bytes(i % 2 * box.bytes) - i % 2 * box.bytes
        np.testing.assert_array_equal(out[i][at], box.gather((0, 7 + i)).reshape(-1).view(np.uint8), err_msg=str(i))


def test_multicast(mode, rng):
    box = Map("f32", (32, 40), (32, 8), 3)
    box.fill(rng)
    out = np.zeros((2, 2, box.bytes), np.uint8)
    kernels.launch(
        "load_2d_multicast", 2, 64, Out(out), box.encoded, coords_struct((0, 38)), box.bytes,
        shared=BOX_OFFSET + 2 * box.bytes, cluster=2, touches=(In(box.buffer, "tensor"),), **mode,
    )  # fmt: skip
    for half in range(2):
        want = box.gather((0, 38 + half)).reshape(-1).view(np.uint8)
        for rank in range(2):
            np.testing.assert_array_equal(out[rank, half][box.shared_bytes(0)], want)


def test_refusals():
    tensor = aligned((8, 64), np.uint16)
    good = dict(type=9, address=tensor.ctypes.data, dims=[64, 8], strides=[128], box=[32, 4], element_strides=[1, 1])
    emulator().encode_tensor_map(**good)
    for change, word in (
        ({"strides": [120]}, "globalStrides"), ({"box": [32, 300]}, "boxDim"), ({"swizzle": 1}, "swizzle"),
        ({"address": tensor.ctypes.data + 8}, "aligned"), ({"dims": [64, 0]}, "globalDim"), ({"box": [4, 4]}, "16"),
        ({"interleave": 1}, "interleave"), ({"element_strides": [1, 9]}, "elementStrides"), ({"type": 14}, "type"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            emulator().encode_tensor_map(**{**good, **change})
