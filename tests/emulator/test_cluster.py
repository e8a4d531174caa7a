"""Clusters: ranks, remote shared memory, remote mbarriers, copies between CTAs."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from harness import Kernels, Out, aligned

cluster = Kernels("cluster.cu")
SIZES = [1, 2, 4, 8]


@pytest.mark.parametrize("size", SIZES)
def test_ranks(mode, size):
    out = aligned((8, 4), np.int32)
    cluster.launch("ranks", 8, 32, Out(out), cluster=size, **mode)
    block = np.arange(8)
    np.testing.assert_array_equal(out, np.stack([block % size, np.full(8, size), block // size, block % size], axis=1))


@pytest.mark.parametrize("size", SIZES)
def test_reads_and_adds_in_a_neighbours_memory(mode, size):
    out = aligned((8, 2, 32), np.int32)
    cluster.launch("neighbours", 8, 32, Out(out), cluster=size, **mode)
    for block in range(8):
        first, rank = block // size * size, block % size
        right, left = first + (rank + 1) % size, (rank + 1) % size
        want = right * 100 + np.arange(32)
        assert (out[block, 0] == want).all()
        assert (out[block, 1] == left + 1).all()


@pytest.mark.parametrize("size", SIZES)
def test_generic_pointers_to_remote_memory(mode, size):
    out = aligned((8, 32), np.int32)
    cluster.launch("generic_pointers", 8, 32, Out(out), cluster=size, **mode)
    for block in range(8):
        owner = (block % size + 1) % size
        assert (out[block] == (10 * owner + np.arange(32)) * 10 + owner).all()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_token_goes_round(mode, size, rounds):
    out = aligned(8, np.int32)
    cluster.launch("ring", 8, 32, Out(out), rounds, cluster=size, **mode)
    # Rank 0 was handed the token last; rank r holds what it got in the last round.
    want = [rounds * size if rank == 0 else (rounds - 1) * size + rank for rank in range(size)]
    assert out.tolist() == want * (8 // size)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_asynchronous_remote_stores(mode, size):
    out = aligned((8, 32), np.int32)
    cluster.launch("async_store", 8, 32, Out(out), cluster=size, **mode)
    for block in range(8):
        assert (out[block] == 1000 * ((block - 1) % size) + np.arange(32)).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bulk_copies_to_a_peer(mode, size):
    out = aligned((4, 64), np.int32)
    cluster.launch("bulk_to_peer", 4, 32, Out(out), cluster=size, **mode)
    for block in range(4):
        assert (out[block] == 500 * ((block - 1) % size) + np.arange(64)).all()


def test_a_cluster_size_fixed_by_the_kernel(mode):
    out = aligned(4, np.int32)
    cluster.launch("fixed_cluster", 4, 32, Out(out), **mode)
    assert out.tolist() == [20, 21, 20, 21]
    with pytest.raises(harness.emulator().LaunchError, match="compiled for"):
        cluster.launch("fixed_cluster", 4, 32, Out(out), cluster=4)
