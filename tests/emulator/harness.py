"""Unit kernels on numpy arrays: compile a .cu file to PTX (cached), launch it in the emulator.

    kernels = Kernels("alu.cu")
    report = kernels.launch("add_u32", 1, 32, Out(sums), In(a), In(b), 7, seed=3)

Arrays become pointers, with what the kernel may do to them: In, Out, InOut, Workspace (a bare array
is InOut). Python numbers take the size of the parameter; bytes fill a struct parameter.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import build

ROOT = Path(__file__).resolve().parent


def out_dir() -> Path:
    """Where builds are cached: FLASH_EXT_EMULATOR_OUT, else build/emulator in the checkout."""
    given = os.environ.get("FLASH_EXT_EMULATOR_OUT")
    return Path(given).resolve() if given else ROOT.parents[1] / "build" / "emulator"


@functools.cache
def emulator() -> Any:
    """The `_emulator` module, built from the present sources."""
    path = build.build_binding(out_dir())
    spec = importlib.util.spec_from_file_location("_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Buffer:
    array: np.ndarray
    role: str
    name: str = ""


def In(array: np.ndarray, name: str = "in") -> Buffer:
    return Buffer(array, "in", name)


def Out(array: np.ndarray, name: str = "out") -> Buffer:
    return Buffer(array, "out", name)


def InOut(array: np.ndarray, name: str = "inout") -> Buffer:
    return Buffer(array, "inout", name)


def Workspace(array: np.ndarray, name: str = "workspace") -> Buffer:
    return Buffer(array, "workspace", name)


def triple(value: int | tuple[int, ...]) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return (*given, *(1,) * (3 - len(given)))


def make_options(**changes: Any) -> Any:
    """Options from the environment with changes: sm, sms, seed, schedule, checks, profile, threads."""
    options = emulator().Options()
    for name, value in changes.items():
        setattr(options, name, value)
    return options


def pack(value: Any, size: int) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        data = bytes(value)
    elif isinstance(value, np.generic):
        data = value.tobytes()
    elif isinstance(value, float):
        data = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
    else:
        data = int(value).to_bytes(size, "little", signed=value < 0)
    if len(data) != size:
        raise ValueError(f"argument of {len(data)} bytes for a parameter of {size}")
    return data


def launch(
    module: Any,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    *args: Any,
    shared: int = 0,
    cluster: int | tuple[int, ...] = 1,
    touches: tuple[Buffer, ...] = (),
    **options: Any,
) -> Any:
    """Launches a kernel of an emulator Module; `touches` lists memory that no argument points to
    (that a tensor map names, say)."""
    info = module.kernel(kernel)
    if len(args) != len(info["params"]):
        raise TypeError(f"{kernel} takes {len(info['params'])} arguments, got {len(args)}")
    params = bytearray(info["param_bytes"])
    buffers = list(touches)
    for value, (_, offset, size, _) in zip(args, info["params"], strict=True):
        if isinstance(value, np.ndarray):
            value = InOut(value)
        if isinstance(value, Buffer):
            buffers.append(value)
            value = value.array.ctypes.data
        params[offset : offset + size] = pack(value, size)
    memory = [(b.array.ctypes.data, extent(b.array), b.role, b.name) for b in buffers]
    return emulator().launch(
        module, kernel, triple(grid), triple(block), bytes(params), memory,
        shared=shared, cluster=triple(cluster), options=make_options(**options),
    )  # fmt: skip


def extent(array: np.ndarray) -> int:
    """Bytes from the first element to the end of the last."""
    if array.size == 0:
        return 0
    return sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize


class Kernels:
    """The kernels of one .cu file in kernels/, or of PTX text."""

    def __init__(self, source: str, arch: str | None = None, flags: tuple[str, ...] = (), ptx: str | None = None):
        self.path = ROOT / "kernels" / source
        self.arch = arch or (build.arch_of(self.path) if ptx is None else "sm_90a")
        self.flags = flags
        self.given = ptx

    @functools.cached_property
    def ptx(self) -> str:
        if self.given is not None:
            return self.given
        return build.compile_ptx(self.path, out_dir(), self.arch, self.flags).read_text()

    @functools.cached_property
    def module(self) -> Any:
        return emulator().Module(self.ptx, self.path.name)

    def launch(self, kernel: str, grid: Any, block: Any, *args: Any, **more: Any) -> Any:
        if self.arch.startswith("sm_8"):
            more.setdefault("sm", 80)
        return launch(self.module, kernel, grid, block, *args, **more)


def extension(source: Path, **how: Any) -> ctypes.CDLL:
    """A .cu file with host launchers, on the emulator's runtime; call its extern "C" functions."""
    emulator()  # one copy of the library, and its options, for the process
    return ctypes.CDLL(str(build.compile_extension(source, out_dir(), **how)))


@contextlib.contextmanager
def call(*buffers: Buffer, **options: Any) -> Iterator[None]:
    """Around a call into an extension: registers memory, sets options, restores them."""
    before = emulator().get_options()
    emulator().set_options(make_options(**options))
    try:
        for b in buffers:
            emulator().register_memory(b.array.ctypes.data, extent(b.array), b.role, b.name)
        yield
    finally:
        emulator().clear_memory()
        emulator().set_options(before)


def check(code: int) -> None:
    """Raises what stands behind a cudaError that an extension returned."""
    if error := emulator().take_diagnostic():
        raise error
    if code:
        raise RuntimeError(f"error {code}: {emulator().last_message()}")


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def aligned(shape: Any, dtype: Any, fill: Any = None, alignment: int = 128) -> np.ndarray:
    """An array whose base address is a multiple of `alignment`; NaN or -1 unless told."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    raw = np.empty(count * dtype.itemsize + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    array = raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
    array.view(np.uint8)[...] = 0xFF
    if fill is not None:
        array[...] = fill
    return array


def to_bf16(values: Any) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(values, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)
