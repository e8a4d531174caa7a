"""Shuffles, votes, matches, reductions and elections within a warp."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from harness import In, Kernels, Out, aligned

warp = Kernels("warp.cu")
LANES = np.arange(32)


def source_lane(name: str, lane: int, by: int, width: int = 32) -> int:
    first = lane // width * width
    target = {"up": lane - by, "down": lane + by, "xor": lane ^ by, "idx": first + by % width}[name]
    lowest = 0 if name == "xor" else first  # a butterfly may reach into earlier segments
    return target if lowest <= target < first + width else lane


@pytest.mark.parametrize("by", [0, 1, 5, 8, 31])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("name", ["up", "down", "xor", "idx"])
def test_shuffle(rng, name, width, by):
    values, out = aligned(32, np.int32, rng.integers(0, 1000, 32)), aligned(32, np.int32)
    warp.launch(f"shuffle_{name}{8 if width == 8 else ''}", 1, 32, Out(out), In(values), by)
    assert out.tolist() == [values[source_lane(name, lane, by, width)] for lane in range(32)]


def test_shuffle_from_a_lane_that_differs_per_lane(mode, rng):
    values, out = aligned(32, np.int32, rng.integers(0, 1000, 32)), aligned(32, np.int32)
    warp.launch("shuffle_varying", 1, 32, Out(out), In(values), 7, **mode)
    assert out.tolist() == values[LANES * 7 % 32].tolist()


def test_shuffle_says_whether_the_source_was_in_range(mode):
    values, out = aligned(32, np.int32, LANES), aligned(32, np.int32)
    warp.launch("shuffle_predicate", 1, 32, Out(out), In(values), **mode)
    assert out.tolist() == [i + 5 if i + 5 < 32 else -1 - i for i in range(32)]


def test_shuffle_of_doubles(mode, rng):
    values, out = aligned(32, np.float64, rng.normal(size=32)), aligned(32, np.float64)
    warp.launch("shuffle_double", 1, 32, Out(out), In(values), **mode)
    assert out.tolist() == values[LANES ^ 3].tolist()


def test_shuffle_of_each_half(mode):
    values, out = aligned(32, np.int32, LANES * 10), aligned(32, np.int32)
    warp.launch("shuffle_halves", 1, 32, Out(out), In(values), **mode)
    assert out.tolist() == [10 * (i ^ 1) if i < 16 else 10 * (i ^ 2) + 1000 for i in range(32)]


@pytest.mark.parametrize("special", [99, 60, -1])
def test_votes(mode, rng, special):
    values = aligned(32, np.int32, rng.integers(0, 98, 32))
    values[13] = special
    out = aligned((3, 32), np.uint32)
    warp.launch("votes", 1, 32, Out(out), In(values), **mode)
    above = values > 50
    assert (out[0] == sum(1 << int(i) for i in np.flatnonzero(above))).all()
    assert (out[1] == int((values == 99).any()) + 2 * int((values >= 0).all())).all()
    assert (out[2] == int(above.all() or not above.any())).all()


def test_vote_uniform(mode):
    out = aligned((3, 32), np.uint32)
    warp.launch("votes", 1, 32, Out(out), In(aligned(32, np.int32, 60)), **mode)
    assert (out[2] == 1).all()


@pytest.mark.parametrize("equal", [False, True])
def test_matches(mode, rng, equal):
    values = aligned(32, np.int32, rng.integers(0, 5, 32))
    if not equal:
        values[31] += 1 << 10
    out = aligned((4, 32), np.uint32)
    warp.launch("matches", 1, 32, Out(out), In(values), **mode)
    same = [sum(1 << j for j in range(32) if values[j] == values[i]) for i in range(32)]
    assert out[0].tolist() == same
    assert out[3].tolist() == same
    assert (out[1] == (0xFFFFFFFF if equal else 0)).all()
    assert (out[2] == int(equal)).all()


def test_reductions(mode, rng):
    values = aligned(32, np.uint32, rng.integers(0, 2**32, 32))
    out = aligned((8, 32), np.uint32)
    warp.launch("reductions", 1, 32, Out(out), In(values), **mode)
    v = [int(x) for x in values]
    signed = values.view(np.int32)
    expected = [
        sum(v) & 0xFFFFFFFF, min(v), max(v), reduce(lambda a, b: a & b, v), reduce(lambda a, b: a | b, v),
        reduce(lambda a, b: a ^ b, v), int(signed.min()) & 0xFFFFFFFF,
    ]  # fmt: skip
    assert out[:7, 0].tolist() == expected and (out[:7] == out[:7, :1]).all()
    assert (out[7, :16] == sum(v[:16]) & 0xFFFFFFFF).all() and (out[7, 16:] == max(v[16:])).all()


def test_elect_chooses_one_lane(mode):
    out = aligned(64, np.uint32, 0)
    warp.launch("elect", 1, 32, Out(out), **mode)
    elected, leader = out >> 8, out & 255
    assert elected[:32].sum() == 1 and elected[32 + 12 :].sum() == 1
    assert (leader[:32] == np.flatnonzero(elected[:32])[0]).all()
    assert (leader[32 + 12 :] == np.flatnonzero(elected[32:])[0]).all()


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_scan_over_a_cta(mode, rng, threads):
    values, out = aligned(threads, np.int32, rng.integers(-9, 9, threads)), aligned(threads, np.int32)
    warp.launch("scan", 1, threads, Out(out), In(values), **mode)
    np.testing.assert_array_equal(out, np.cumsum(values))
