"""CTA barriers and mbarriers, with the bulk copies that they count. Other copies: test_copies.py."""

from __future__ import annotations

import numpy as np
import pytest
from harness import In, Kernels, Out, aligned

barriers, mbarrier = Kernels("barriers.cu"), Kernels("mbarrier.cu")


@pytest.mark.parametrize("threads", [32, 48, 256, 1024])
def test_every_thread_waits(mode, threads):
    out = aligned(threads, np.int32)
    barriers.launch("rotate", 1, threads, Out(out), 5, shared=4 * threads, **mode)
    np.testing.assert_array_equal(out, (np.arange(threads) + 5) % threads)


@pytest.mark.parametrize("low", [0, -1])
def test_barriers_that_count(mode, low):
    values = aligned(96, np.int32, np.arange(96) % 8)
    values[50] = low
    out = aligned(96, np.int32)
    barriers.launch("counts", 1, 96, Out(out), In(values), **mode)
    assert (out == (values > 3).sum() * 100 + 10 * (values == 7).any() + (values >= 0).all()).all()


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_arrival_without_waiting(mode, rounds):
    out = aligned((2, 32), np.int32)
    barriers.launch("producer_consumer", 1, 96, Out(out), rounds, **mode)
    sums = sum(r * 100 + 31 - np.arange(32) for r in range(rounds))
    np.testing.assert_array_equal(out, [sums, 2 * sums])


def test_barriers_of_pairs_are_independent(mode):
    out = aligned((4, 32), np.int32)
    barriers.launch("two_pairs", 1, 128, Out(out), **mode)
    for pair, rounds in enumerate((3, 7)):
        a, b = 2 * pair, 2 * pair + 1
        for _ in range(rounds):
            a, b = a + b, a + b
        assert (out[2 * pair] == a).all() and (out[2 * pair + 1] == b).all()


def test_warps_that_left_have_arrived(mode):
    out = aligned(64, np.int32)
    barriers.launch("some_leave", 1, 128, Out(out), **mode)
    np.testing.assert_array_equal(out, 63 - np.arange(64))


def test_barrier_with_reduction(mode):
    values, out = aligned(64, np.int32, np.arange(64) % 9), aligned(64, np.int32)
    barriers.launch("barrier_reduce", 1, 64, Out(out), In(values), **mode)
    assert (out == (values > 3).sum()).all()


def test_phases_of_an_mbarrier():
    out = aligned(8, np.int32)
    mbarrier.launch("phases", 1, 32, Out(out))
    # parity 1 and 0 before any arrival, after one, after both (0 and 1), pending arrivals, token
    assert out.tolist() == [1, 0, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("threads,rounds", [(32, 3), (128, 4), (256, 1)])
def test_an_mbarrier_as_cta_barrier(mode, threads, rounds):
    out = aligned(threads, np.int32)
    mbarrier.launch("as_barrier", 1, threads, Out(out), rounds, shared=4 * threads, **mode)
    np.testing.assert_array_equal(out, (np.arange(threads) + 33 * rounds) % threads)


@pytest.mark.parametrize("chunks", [1, 3, 4, 11])
def test_bulk_loads_through_a_ring_of_stages(mode, rng, chunks):
    source, out = aligned(chunks * 128, np.int32, rng.integers(0, 1000, chunks * 128)), aligned(chunks * 128, np.int32)
    mbarrier.launch("pipeline", 1, 160, Out(out), In(source), chunks, **mode)
    np.testing.assert_array_equal(out, 2 * source)


@pytest.mark.parametrize("chunks", [1, 5])
def test_bulk_stores(mode, chunks):
    out = aligned((chunks, 256), np.int32)
    mbarrier.launch("bulk_store", 1, 256, Out(out), chunks, **mode)
    np.testing.assert_array_equal(out, np.arange(chunks)[:, None] * 1000 + np.arange(256))


def test_transactions_expected_late_and_in_parts(mode):
    source, out = aligned(64, np.int32, np.arange(64) * 3), aligned(64, np.int32)
    mbarrier.launch("transactions", 1, 64, Out(out), In(source), **mode)
    np.testing.assert_array_equal(out, source + 1)
