"""attention_with_kvcache on a GPU: every case, and graphs replayed with lengths that grow."""

from __future__ import annotations

import kvcache_cases
import pytest
import torch
from kvcache_cases import CASES, Case

import flash_ext

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    kvcache_cases.check_case(CASES[name], "cuda", dtype)


@pytest.mark.parametrize("name", CASES)
def test_case_on_the_reference(name: str) -> None:
    kvcache_cases.check_case(CASES[name], "cuda", torch.bfloat16, backend="reference")


@pytest.mark.filterwarnings("ignore::flash_ext.FallbackWarning")
@pytest.mark.parametrize("page_size", (None, 3, 16, 256))
def test_a_graph_is_replayed_with_lengths_that_grow(page_size: int | None) -> None:
    """Nothing synchronises, and nothing about the lengths is frozen at capture."""
    case = Case("graph", (14, 0, 700), seqlen_new=1, num_heads=8, head_dim=128, page_size=page_size, capacity=1500, rotary="halves")
    made, eager = (kvcache_cases.build(case, "cuda", torch.bfloat16) for _ in range(2))
    before = {name: made[name].clone() for name in ("k_cache", "v_cache")}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        flash_ext.attention_with_kvcache(**made)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_ext.attention_with_kvcache(**made, return_lse=True)
    for name, value in before.items():
        made[name].copy_(value)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for name in ("q", "k", "v"):
            made[name].copy_(torch.randn(made[name].shape, generator=generator))
            eager[name].copy_(made[name])
        graph.replay()
        expected, expected_lse = flash_ext.attention_with_kvcache(**eager, return_lse=True)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        for tensors in (made, eager):
            tensors["cache_seqlens"] += 13


def test_validate_refuses_on_the_device() -> None:
    made = kvcache_cases.build(Case("checked", (8, 5), seqlen_new=2, page_size=16), "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match="must not exceed the capacity"):
        flash_ext.attention_with_kvcache(**{**made, "cache_seqlens": made["cache_seqlens"] + 99}, validate=True)


@pytest.mark.filterwarnings("ignore::flash_ext.FallbackWarning")
def test_values_nobody_checked_stay_inside() -> None:
    made = kvcache_cases.build(Case("garbage", (150, 40), seqlen_new=2, page_size=16, head_dim=64), "cuda", torch.bfloat16)
    for name in ("cache_seqlens", "page_table"):
        for value in (2**31 - 1, -(2**31), 10**6):
            flash_ext.attention_with_kvcache(**{**made, name: torch.full_like(made[name], value)})
    torch.cuda.synchronize()
