"""Loads and stores of every width, address spaces, variables, arguments and index registers."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from harness import In, InOut, Kernels, Out, aligned

memory = Kernels("memory.cu")


def test_structs_with_every_member_size(mode, rng):
    layout = np.dtype(
        {"names": ["bytes", "half", "word", "real", "big"], "formats": ["3u1", "i2", "i4", "f8", "u8"],
         "offsets": [0, 4, 8, 16, 24], "itemsize": 32}
    )  # fmt: skip
    given, out = aligned(64, layout), aligned(64, layout)
    given["bytes"], given["half"] = rng.integers(0, 256, (64, 3)), rng.integers(-9999, 9999, 64)
    given["word"], given["real"] = rng.integers(-(2**31), 2**31, 64), rng.normal(size=64)
    given["big"] = rng.integers(0, 2**64, 64, dtype=np.uint64)
    memory.launch("copy_mixed", 2, 32, Out(out), In(given), **mode)
    assert (out["bytes"][:, 1] == given["bytes"][:, 1] + np.uint8(1)).all()
    assert (out["half"] == -given["half"]).all()
    assert (out["word"] == given["word"] ^ given["bytes"][:, 0]).all()
    assert (out["real"] == 2 * given["real"]).all()
    assert (out["big"] == given["big"] + out["word"].astype(np.int64).astype(np.uint64)).all()


@pytest.mark.parametrize("name,size", [("u8", 1), ("u16", 2), ("u64", 8), ("int2", 8), ("int4", 16)])
def test_copies_by_every_width(mode, rng, name, size):
    n = 77
    source, out = aligned(n * size, np.uint8), aligned(n * size, np.uint8)
    source[:] = rng.integers(0, 256, n * size)
    memory.launch(f"copy_{name}", 1, 32, Out(out), In(source), n, **mode)
    np.testing.assert_array_equal(out, source)


def test_narrow_loads_extend(mode):
    values = np.arange(32) * 3001 - 40000
    narrow = [aligned(32, t, values.astype(t)) for t in (np.int8, np.uint8, np.int16, np.uint16)]
    out = aligned((32, 4), np.int64)
    memory.launch("widen", 1, 32, Out(out), *map(In, narrow), **mode)
    np.testing.assert_array_equal(out, np.stack([a.astype(np.int64) for a in narrow], axis=1))


def test_static_and_dynamic_shared_memory(mode, rng):
    source, out = aligned((32, 32), np.float32, rng.normal(size=(32, 32))), aligned((32, 32), np.float32)
    memory.launch("transpose", 1, (32, 8), Out(out), In(source), shared=4096, **mode)
    np.testing.assert_array_equal(out, source.T)


def test_local_arrays(mode, rng):
    order = rng.permutation(16).astype(np.int32)
    out = aligned(64, np.int32)
    memory.launch("local_array", 1, 64, Out(out), In(order), **mode)
    for thread in range(64):
        values = [i * i + thread for i in range(16)]
        for i in order:
            values[i] += values[(i + 1) % 16]
        hashed = 0
        for v in values:
            hashed = (hashed * 31 + v) & 0xFFFFFFFF
        assert int(out[thread]) & 0xFFFFFFFF == hashed


def test_one_pointer_into_three_spaces(mode):
    out, data = aligned(32, np.int32), aligned(32, np.int32, np.arange(32) * 11)
    memory.launch("generic", 1, 32, Out(out), InOut(data), **mode)

    def expected(i: int) -> int:
        before, kind = ((i * 11, 200000), (i * 7, 100000), (i * 3, 300000))[i % 3]
        return before * 1000 + before + 1 + kind

    assert out.tolist() == [expected(i) for i in range(32)]


def test_module_variables_keep_their_values(mode):
    kernels = Kernels("memory.cu")  # a module of its own: its variables start afresh
    table, counter = aligned(32, np.float32), aligned(2, np.int32)
    for launch in range(2):
        kernels.launch("variables", 1, 32, Out(table), Out(counter), **mode)
        assert counter.tolist() == [41 + launch, 42 + launch]
    np.testing.assert_array_equal(table, np.tile(np.float32([0.5, -2.0, 8.0, 1e-3]), 8))
    assert struct.unpack("<i", kernels.module.symbol("device_counter"))[0] == 43


def test_struct_arguments(mode, rng):
    data = aligned(32, np.float32, rng.normal(size=32))
    out = aligned(32, np.float32)
    params = struct.pack("<iiifQ", 10, -20, 30, 0.25, data.ctypes.data)
    memory.launch("struct_argument", 1, 32, Out(out), params, -3, touches=(In(data),), **mode)
    want = data * np.float32(0.25) + np.float32([(10, -20, 30)[i % 3] for i in range(32)]) + np.float32(-3)
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_cache_hints_change_nothing(mode, rng):
    source = aligned(32, np.float32, rng.integers(0, 100, 32))
    out = aligned(32, np.float32)
    memory.launch("hints", 1, 32, Out(out), In(source), **mode)
    np.testing.assert_array_equal(out, 7 * source)


def test_narrow_stores_into_shared_words(mode):
    out = aligned(32, np.uint32)
    memory.launch("narrow_shared", 1, 32, Out(out), **mode)
    want = np.full(128, 0xFF, np.uint8)
    want[np.arange(32) * 3 % 128] = np.arange(32)
    np.testing.assert_array_equal(out, want.view(np.uint32))


def test_indices_of_a_grid_in_three_dimensions(mode):
    out = aligned((24, 96, 4), np.int32)
    memory.launch("indices", (2, 3, 4), (8, 4, 3), Out(out), shared=512, **mode)
    blocks, threads = np.meshgrid(np.arange(24), np.arange(96), indexing="ij")
    np.testing.assert_array_equal(out[..., 0], blocks)
    np.testing.assert_array_equal(out[..., 1], threads)
    np.testing.assert_array_equal(out[..., 2], threads % 32)
    assert (out[..., 3] == 512).all()


def test_clocks_run(mode):
    out = aligned(64, np.int32)
    memory.launch("clocks", 1, 64, Out(out), **mode)
    assert (out == 1).all()
