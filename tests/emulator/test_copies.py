"""Bulk copies and reductions between global memory and the CTAs of a cluster; cp.async."""

from __future__ import annotations

import numpy as np
import pytest
from harness import In, InOut, Kernels, Out, emulator
from test_tma import TYPES, combine, small_values

bulk = Kernels("bulk.cu")
cp_async = Kernels("cp_async.cu")


def random_bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [16, 48, 4096, 20000])
@pytest.mark.parametrize("kernel", ["bulk_load", "bulk_store"])
def test_bulk(kernel, size, mode, rng):
    data = random_bytes(rng, size)
    out = np.zeros(size, np.uint8)
    bulk.launch(kernel, 1, 96, Out(out), In(data), size, shared=128 + size, **mode)
    np.testing.assert_array_equal(out, data)


def test_to_peer(mode, rng):
    data = random_bytes(rng, 2, 1024)
    out = np.zeros_like(data)
    bulk.launch("bulk_to_peer", 2, 64, Out(out), In(data), 1024, shared=128 + 1024, cluster=2, **mode)
    np.testing.assert_array_equal(out, data[[0, 0]])


def test_multicast(mode, rng):
    data = random_bytes(rng, 2048)
    out = np.zeros((2, 2048), np.uint8)
    bulk.launch("bulk_multicast", 2, 64, Out(out), In(data), 2048, shared=128 + 2048, cluster=2, **mode)
    np.testing.assert_array_equal(out, np.stack([data, data]))


def test_reduction_into_shared_memory_is_refused():
    """Not emulated: the launch stops with the instruction's text and place, other kernels of the file run."""
    data = np.zeros((2, 256), np.uint32)
    with pytest.raises(emulator().LoadError, match=r"bulk\.cu:\d+.*cp\.reduce\.async\.bulk\.shared::cluster"):
        bulk.launch("reduce_to_peer", 2, 64, Out(data[0].copy()), In(data), 1024, shared=128 + 2048, cluster=2)


REDUCTIONS = ["add_f32", "add_f64", "add_f16", "add_bf16", "min_f16", "add_u32", "add_s32", "add_u64", "min_s32",
              "max_u32", "min_s64", "max_u64", "inc_u32", "dec_u32", "and_b32", "or_b64", "xor_b32"]  # fmt: skip


@pytest.mark.parametrize("kernel", REDUCTIONS)
def test_reduce(kernel, mode, rng):
    op, kind = kernel.split("_")
    kind = kind.replace("b32", "u32").replace("b64", "u64")
    count = 1024 // np.dtype(TYPES[kind][1]).itemsize
    data, total = small_values(kind, count, rng), small_values(kind, count, rng)
    want = combine(op, kind, total, data)
    bulk.launch(kernel, 1, 64, InOut(total), In(data), 1024, shared=128 + 1024, **mode)
    np.testing.assert_array_equal(total, want)


def test_bulk_prefetch(rng):
    bulk.launch("bulk_prefetch", 1, 32, In(random_bytes(rng, 256)), 256, checks=True)


@pytest.mark.parametrize("kernel", ["copy_4", "copy_8", "copy_16", "copy_16_cg", "copy_16_l2"])
def test_cp_async(kernel, mode, rng):
    size = int(kernel.split("_")[1])
    data = random_bytes(rng, 64, size)
    out = np.zeros_like(data)
    cp_async.launch(kernel, 1, 64, Out(out), In(data), shared=data.nbytes, **mode)
    np.testing.assert_array_equal(out, data[::-1])


def test_cp_async_zero_fill(mode, rng):
    data = random_bytes(rng, 64, 16)
    sizes = rng.integers(0, 17, 64).astype(np.int32)
    out = np.ones_like(data)
    cp_async.launch("zero_fill", 1, 64, Out(out), In(data), In(sizes), shared=data.nbytes, **mode)
    np.testing.assert_array_equal(out, np.where(np.arange(16) < sizes[:, None], data, 0))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_cp_async_groups(steps, mode, rng):
    data = rng.integers(0, 1 << 31, (steps, 64), dtype=np.uint32)
    out = np.zeros_like(data)
    cp_async.launch("pipeline", 1, 64, Out(out), In(data), steps, shared=3 * 256, **mode)
    np.testing.assert_array_equal(out, data[:, np.arange(64) ^ 33] + 1)


def test_cp_async_mbarrier(mode, rng):
    data = rng.integers(0, 1 << 31, 64, dtype=np.uint32)
    out = np.zeros_like(data)
    cp_async.launch("arrive", 1, 64, Out(out), In(data), shared=16 + 256, **mode)
    np.testing.assert_array_equal(out, data[::-1])
