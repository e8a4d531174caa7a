"""Atomics and reductions: results, the values before, vector forms, and what they order."""

from __future__ import annotations

import numpy as np
import pytest
from harness import In, InOut, Kernels, Out, aligned, from_bf16

atomics = Kernels("atomics.cu")
BLOCKS, THREADS = 3, 64
COUNT = BLOCKS * THREADS


def wrap(dtype, value):
    info = np.iinfo(dtype)
    span = int(info.max) - int(info.min) + 1
    return (int(value) - int(info.min)) % span + int(info.min)


OPERATIONS = {
    "add_s32": (np.int32, lambda a, v: a + v),
    "add_u64": (np.uint64, lambda a, v: a + v),
    "sub_s32": (np.int32, lambda a, v: a - v),
    "min_s32": (np.int32, min),
    "max_u32": (np.uint32, max),
    "min_s64": (np.int64, min),
    "max_u64": (np.uint64, max),
    "and_u32": (np.uint32, lambda a, v: a & v),
    "or_u32": (np.uint32, lambda a, v: a | v),
    "xor_u64": (np.uint64, lambda a, v: a ^ v),
    "inc_u32": (np.uint32, lambda a, v: 0 if a >= 9 else a + 1),
    "dec_u32": (np.uint32, lambda a, v: 9 if a == 0 or a > 9 else a - 1),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_integer_atomics(mode, rng, name, space):
    dtype, operation = OPERATIONS[name]
    info = np.iinfo(dtype)
    blocks = BLOCKS if space == "global" else 1
    count = blocks * THREADS
    values = aligned(count, dtype, rng.integers(info.min, info.max, count, dtype=dtype))
    cells = aligned(4, dtype, rng.integers(info.min, info.max, 4, dtype=dtype))
    start, before = cells.copy(), aligned(count, dtype)
    atomics.launch(f"{space}_{name}", blocks, THREADS, InOut(cells), Out(before), In(values), **mode)
    for cell in range(4):
        # Any order is right; the values before must form a chain from the start to the end.
        lanes = list(range(cell, count, 4))
        state, final = int(start[cell]), int(cells[cell])
        if name.startswith(("add", "sub", "xor", "inc", "dec")):
            for lane in lanes:
                state = wrap(dtype, operation(state, int(values[lane])))
            assert state == final
        else:
            for lane in lanes:
                state = operation(state, int(values[lane]))
            assert state == final
        remaining = {lane: int(before[lane]) for lane in lanes}
        state = int(start[cell])
        seen = sorted(remaining.values())
        assert int(start[cell]) in seen
        if name.startswith(("add", "sub", "xor")):
            steps = [wrap(dtype, operation(old, int(values[lane]))) for lane, old in remaining.items()]
            assert sorted([*seen, final]) == sorted([*steps, int(start[cell])])


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name,dtype", [("add_f32", np.float32), ("add_f64", np.float64)])
def test_float_atomics(mode, rng, name, dtype, space):
    blocks = BLOCKS if space == "global" else 1
    values = aligned(blocks * THREADS, dtype, rng.integers(-50, 50, blocks * THREADS))  # exact in any order
    cells, before = aligned(4, dtype, 0.5), aligned(blocks * THREADS, dtype)
    atomics.launch(f"{space}_{name}", blocks, THREADS, InOut(cells), Out(before), In(values), **mode)
    np.testing.assert_array_equal(cells, 0.5 + values.reshape(-1, 4).sum(axis=0))


@pytest.mark.parametrize("space", ["global", "shared"])
def test_exchange_keeps_every_value(mode, space):
    values = aligned(THREADS, np.uint32, np.arange(THREADS) + 100)
    cells, before = aligned(4, np.uint32, [1, 2, 3, 4]), aligned(THREADS, np.uint32)
    atomics.launch(f"{space}_exch_u32", 1, THREADS, InOut(cells), Out(before), In(values), **mode)
    assert sorted([*before, *cells]) == sorted([*values, 1, 2, 3, 4])


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name,dtype", [("cas_u32", np.uint32), ("cas_u64", np.uint64), ("cas_u16", np.uint16)])
def test_compare_and_swap(mode, name, dtype, space):
    # Thread i expects i // 4: each cell climbs as far as the order lets it, and never skips.
    values = aligned(THREADS, dtype, np.arange(THREADS) // 4)
    cells, before = aligned(4, dtype, 0), aligned(THREADS, dtype)
    atomics.launch(f"{space}_{name}", 1, THREADS, InOut(cells), Out(before), In(values), **mode)
    for cell in range(4):
        successes = [int(v) for v, b in zip(values[cell::4], before[cell::4], strict=True) if v == b]
        assert sorted(successes) == list(range(int(cells[cell]))) and cells[cell] >= 1


def test_adds_of_half_precision_pairs(mode):
    halves, brains, single = aligned(2, np.float16, 0), aligned(2, np.uint16, 0), aligned(2, np.float16, 0)
    atomics.launch("add_halves", 2, 32, InOut(halves), InOut(brains), InOut(single), **mode)
    assert halves.tolist() == [64.0, 16.0]
    assert from_bf16(brains).tolist() == [32.0, 128.0]
    assert single.tolist() == [32.0, 0.0]


def test_reductions_without_result(mode):
    f, u, packed = aligned(16, np.float32, 0), aligned(4, np.uint32, 0), aligned(8, np.uint16, 0)
    atomics.launch("reductions", 1, 32, InOut(f), InOut(u), InOut(packed), **mode)
    total = 31 * 32 / 2
    assert f.tolist() == [total, 0, 0, 0, total, 2 * total, 32, -total, total, total, *[0] * 6]
    assert u.tolist() == [36 if any(i * 5 % 37 == 36 for i in range(32)) else max(i * 5 % 37 for i in range(32)), 96, 0, 0]
    assert from_bf16(packed).tolist() == [32.0] * 8


def test_vector_atomics_return_the_old_vector(mode):
    f, before = aligned(4, np.float32, 0), aligned((32, 4), np.float32)
    atomics.launch("vector_atomic", 1, 32, InOut(f), Out(before), **mode)
    assert f.tolist() == [32.0, 64.0, 96.0, 128.0]
    for column in range(4):  # vector atomics are atomic per element
        assert sorted(before[:, column]) == [(column + 1) * i for i in range(32)]


@pytest.mark.parametrize("sms", [1, 2, 4])
def test_the_last_block_sees_what_all_wrote(mode, sms):
    total, partial, ticket = aligned(1, np.int32, 0), aligned(5 * 64, np.int32), aligned(1, np.uint32, 0)
    atomics.launch("last_block", 5, 64, InOut(total), Out(partial), InOut(ticket), sms=sms, **mode)
    assert total[0] == sum(b + t for b in range(5) for t in range(64))


@pytest.mark.parametrize("sms", [1, 4])
def test_blocks_wait_for_their_predecessors(mode, sms):
    values, flags = aligned(8, np.int32), aligned(8, np.int32, 0)
    atomics.launch("chain", 8, 32, Out(values), InOut(flags), sms=sms, **mode)
    assert values.tolist() == [2 ** (i + 1) - 1 for i in range(8)]
