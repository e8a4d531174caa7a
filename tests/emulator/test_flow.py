"""Control flow: divergence, reconvergence, calls, lanes and warps that wait for one another."""

from __future__ import annotations

import numpy as np
import pytest
from harness import In, InOut, Kernels, Out, aligned, emulator

flow = Kernels("flow.cu")
LANES = np.arange(32)


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (3 * n + 1 if n % 2 else n // 2), steps + 1
    return steps


def test_lanes_loop_for_different_times(mode, rng):
    start = rng.integers(1, 2000, 128).astype(np.uint32)
    steps = aligned(128, np.uint32)
    flow.launch("collatz", 2, 64, Out(steps), In(start), **mode)
    assert steps.tolist() == [collatz(int(n)) for n in start]


def nested(x: int) -> int:
    total = 0
    for a in range(x % 7):
        if a == x % 3:
            continue
        for b in range(x % 5):
            if a * b > 6:
                break
            total += a ^ b
            if total > 40:
                return total
        total += 1000
    return total


def test_nested_loops_with_break_continue_and_goto(mode, rng):
    values = rng.integers(0, 1000, 256).astype(np.int32)
    out = aligned(256, np.int32)
    flow.launch("nested", 2, 128, Out(out), In(values), **mode)
    assert out.tolist() == [nested(int(x)) for x in values]


def test_switch_with_fall_through_and_return(mode):
    values = (np.arange(96) * 7 % 11).astype(np.int32)
    out = aligned(96, np.int32)
    flow.launch("cases", 1, 96, Out(out), In(values), **mode)

    def expected(i: int, y: int) -> int:
        table = {0: 11, 1: 7 * i + 5, 2: 7, 3: -1, 4: i.bit_count(), 5: ~i, 6: i << 3}
        return table.get(y, y * y)

    assert out.tolist() == [expected(i, int(y)) for i, y in enumerate(values)]


def test_branches_part_lanes_and_join_them(mode):
    out = aligned(96, np.uint32, 0)
    flow.launch("masks", 1, 32, InOut(out), **mode)
    low, odd = (1 << 10) - 1, sum(1 << i for i in range(1, 10, 2))
    assert out[:10].tolist() == [low] * 10
    assert out[10:32].tolist() == [0xFFFFFFFF ^ low] * 22
    assert out[33:42:2].tolist() == [odd] * 5
    assert out[64:].tolist() == [sum(1 << i for i in range(0, 32, 3))] * 32


def test_lanes_that_left_do_not_vote(mode):
    out = aligned(20, np.uint32)
    flow.launch("early_exit", 1, 32, Out(out), **mode)
    assert out.tolist() == [3 * (19 - i) for i in range(20)]


@pytest.mark.parametrize("kernel,arguments", [("calls", 2), ("recursion", 1), ("indirect", 2)])
def test_calls_are_refused_with_their_place(kernel, arguments):
    """Our kernels have none: everything is inlined. The refusal names the instruction and its line."""
    with pytest.raises(emulator().EmulatorError, match=r"call.*|call") as caught:
        flow.launch(kernel, 1, 32, *[aligned(128, np.int32, 0)] * arguments)
    assert kernel in str(caught.value) and "flow.cu" in str(caught.value)


def test_a_lane_may_wait_for_another_lane(mode):
    out = aligned(2, np.int32)
    flow.launch("lane_waits_for_lane", 1, 32, Out(out), **mode)
    assert out.tolist() == [1, 2]


@pytest.mark.parametrize("sms", [1, 4])
def test_a_lock_taken_by_every_thread(mode, sms):
    lock, counter = aligned(1, np.int32, 0), aligned(1, np.int32, 0)
    flow.launch("spin_lock", 3, 64, InOut(lock), InOut(counter), sms=sms, **mode)
    assert counter[0] == 192 and lock[0] == 0


def test_lanes_leave_a_loop_that_synchronises(mode):
    out = aligned(32, np.int32)
    flow.launch("loop_with_sync", 1, 32, Out(out), **mode)
    assert out.tolist() == [sum(i + min(lane + 1, 31) for i in range(lane)) for lane in range(32)]
