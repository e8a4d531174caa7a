"""Packed sequences on a GPU: no synchronisation, lengths that change in a CUDA graph, validate, lengths without sense."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import ops

pytestmark = pytest.mark.gpu
OPS = torch.ops.flash_ext
needs_kernels = pytest.mark.skipif(ops.library_error is not None, reason=f"no compiled kernels: {ops.library_error}")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """A fallback is no failure: which calls have kernels differs from GPU to GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flash_ext.FallbackWarning)
        yield


def packed(lengths: list[tuple[int, int]], beyond: int = 0, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    totals = [sum(pair[side] for pair in lengths) + beyond for side in (0, 1)]
    shapes = ((totals[0], 8, 64), (totals[1], 2, 64), (totals[1], 2, 64))
    inputs = [torch.randn(s, generator=generator).bfloat16().cuda() for s in shapes]
    ends = {f"cu_seqlens_{side}": torch.tensor([0, *(p["qk".index(side)] for p in lengths)]).cumsum(0).int() for side in "qk"}
    return inputs, {name: t.cuda() for name, t in ends.items()}


def needs_a_kernel(*inputs: Tensor, **options: Any) -> None:
    if flash_ext.explain(*inputs, **options).backend == "reference":
        pytest.skip("no kernel for this GPU yet")


LENGTHS = [(300, 400), (0, 50), (129, 128), (1, 700), (70, 0)]


@needs_kernels
def test_no_synchronisation() -> None:
    """Lengths stay on the device, max_seqlen too: torch's own detector must stay silent, with gradients that kernels compute."""
    inputs, ends = packed(LENGTHS)
    options = {**ends, "causal": True, "max_seqlen_q": torch.tensor(300, device="cuda"), "max_seqlen_k": 700}
    needs_a_kernel(*inputs, **options)
    expected = flash_ext.attention_varlen(*inputs, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = flash_ext.attention_varlen(*inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@needs_kernels
def test_lengths_change_inside_a_cuda_graph() -> None:
    inputs, ends = packed(LENGTHS, beyond=100)
    needs_a_kernel(*inputs, **ends)
    flash_ext.attention_varlen(*inputs, **ends, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_ext.attention_varlen(*inputs, **ends, causal=True, return_lse=True)
    for lengths in ([(64, 64)] * 5, [(0, 9), (500, 900), (0, 0), (3, 2), (40, 300)], LENGTHS):
        _, others = packed(lengths)
        for name, tensor in ends.items():
            tensor.copy_(others[name])
        graph.replay()
        expected = flash_ext.attention_varlen(*inputs, **others, causal=True, return_lse=True)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("backend", (None, "reference"))
def test_values_are_checked_on_request(backend: str | None) -> None:
    inputs, ends = packed(LENGTHS)
    ends["cu_seqlens_k"][0] = 4
    rules = ["cu_seqlens_k must start at 0, got 4", "max_seqlen_q must be at least the longest sequence, got 7 and 300 at 0"]
    with pytest.raises(ValueError) as info:
        flash_ext.attention_varlen(*inputs, **ends, max_seqlen_q=7, validate=True, backend=backend)
    assert all(rule in str(info.value) for rule in rules)
    out = flash_ext.attention_varlen(*inputs, **ends, max_seqlen_q=7, backend=backend)  # not read, not refused
    assert out.isfinite().all()


GARBAGE = (
    [0, 300, 5, 90], [-7, 30, 100, 12], [200, 100, 50, 0], [0, 2**31 - 1, -(2**31), 4], [-(2**31), -1, 0, 2**31 - 1],
    [0, 1, 2**30, 2**31 - 1],
)  # fmt: skip


@pytest.mark.parametrize("numbers", GARBAGE, ids=str)
def test_garbage_stays_inside_the_tensors(numbers: list[int]) -> None:
    """Neighbours of the tensors in one allocation keep their bits, and nothing faults."""
    buffer = torch.full((3, 640, 4, 64), 7.0, dtype=torch.bfloat16, device="cuda")
    q, k, v = buffer[:, 200:440]
    before = buffer.clone()
    lengths = torch.tensor(numbers, dtype=torch.int32, device="cuda")
    extra = torch.tensor([-5, 2**31 - 1, 3], dtype=torch.int32, device="cuda")
    for used, pad in ((None, None), (extra, None), (None, extra), (extra, extra.flip(0))):
        arguments = (lengths, lengths.flip(0), used, used, pad, pad, None, None, None, 0.125, True, -1, -1, 0.0, ())
        out, lse, _ = OPS.fwd(q, k, v, *arguments, False, False, None)
        OPS.bwd(torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, *arguments, False, 7, None)
    torch.cuda.synchronize()
    assert torch.equal(buffer, before)


def test_a_sequence_never_changes_another() -> None:
    inputs, ends = packed(LENGTHS, beyond=9)
    expected = flash_ext.attention_varlen(*inputs, **ends, causal=True, return_lse=True)
    rows, keys = ends["cu_seqlens_q"].tolist(), ends["cu_seqlens_k"].tolist()
    for b in range(len(LENGTHS)):
        changed = [t.clone() for t in inputs]
        for tensor, where in zip(changed, (rows, keys, keys), strict=True):
            tensor[where[b] : where[b + 1]] = torch.nan
            tensor[where[-1] :] = torch.inf
        out, lse = flash_ext.attention_varlen(*changed, **ends, causal=True, return_lse=True)
        others = torch.ones(len(out), dtype=torch.bool)
        others[rows[b] : rows[b + 1]] = False
        assert torch.equal(out[others], expected[0][others]) and torch.equal(lse[:, others], expected[1][:, others])
