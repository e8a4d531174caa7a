"""Hypothesis: shapes, strides and options that nobody thought of, small, against the oracle; and laws of attention."""

from __future__ import annotations

import os

import cases
import oracle
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flash_ext

settings.register_profile("default", deadline=None, max_examples=40, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")
quick = settings(suppress_health_check=[HealthCheck.too_slow])

sides = st.one_of(st.just(-1), st.integers(0, 20))
finite = st.floats(-2.0, 2.0, width=16)


@st.composite
def small_cases(draw: st.DrawFn) -> cases.Case:
    num_heads_kv = draw(st.integers(1, 3))
    return cases.Case(
        "drawn",
        draw(st.integers(0, 20)),
        draw(st.integers(0, 20)),
        batch=draw(st.integers(0, 2)),
        num_heads=num_heads_kv * draw(st.integers(1, 3)),
        num_heads_kv=num_heads_kv,
        head_dim=draw(st.integers(1, 20)),
        head_dim_v=draw(st.integers(1, 20)),
        causal=draw(st.booleans()),
        softmax_scale=draw(st.one_of(st.none(), finite)),
        window_size=(draw(sides), draw(sides)),
        softcap=draw(st.sampled_from((0.0, 0.5, 3.0, 50.0))),
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        gradients=draw(st.sampled_from(("both", "out", "lse", "sum"))),
    )


@quick
@given(small_cases(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_any_small_case(case: cases.Case, dtype: torch.dtype) -> None:
    cases.check_case(case, "cpu", dtype)


@st.composite
def strided(draw: st.DrawFn, batch: int, seqlen: int, heads: int, dim: int) -> torch.Tensor:
    """A view of any permutation, step, offset and expansion of the outer dimensions."""
    order = draw(st.permutations(range(3)))
    steps = [draw(st.integers(1, 3)) for _ in range(3)]
    expanded = draw(st.sampled_from((None, 0, 1, 2)))
    sizes = [batch, seqlen, heads]
    if expanded is not None:
        sizes[expanded] = 1
    buffer = torch.full([sizes[d] * steps[d] for d in order] + [dim + draw(st.integers(0, 5))], torch.nan, dtype=torch.float64)
    inverse = [order.index(d) for d in range(3)]
    view = buffer[..., :dim].permute(*inverse, 3)[:: steps[0], :: steps[1], :: steps[2]]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64)).expand(batch, seqlen, heads, dim)


@quick
@given(st.data())
def test_strides_do_not_change_results(data: st.DataObject) -> None:
    q, k, v = (data.draw(strided(2, n, h, d)) for n, h, d in ((6, 4, 5), (7, 2, 5), (7, 2, 3)))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    dense = [t.contiguous().requires_grad_() for t in (q, k, v)]
    for tensors in (leaves, dense):
        out, lse = flash_ext.attention(*tensors, causal=True, return_lse=True)
        (out.square().sum() + lse.sum()).backward()
    expected, _ = oracle.dense_attention(*dense, causal=True)
    torch.testing.assert_close(out, expected)
    for a, b in zip(leaves, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@quick
@given(st.integers(1, 30), st.integers(2, 40), st.data())
def test_keys_in_two_parts_merge_by_lse(seqlen_q: int, seqlen_k: int, data: st.DataObject) -> None:
    """What return_lse is for: attention over disjoint sets of keys adds up with weights exp(lse)."""
    cut = data.draw(st.integers(1, seqlen_k - 1))
    generator = torch.Generator().manual_seed(cut)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k))
    whole, lse = flash_ext.attention(q, k, v, return_lse=True)
    parts = [flash_ext.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, cut), slice(cut, None))]
    lses = torch.stack([part[1] for part in parts])
    weights = torch.softmax(lses, 0).transpose(2, 3)[..., None]
    torch.testing.assert_close(torch.logsumexp(lses, 0), lse)
    torch.testing.assert_close((weights * torch.stack([part[0] for part in parts])).sum(0), whole)


@quick
@given(st.permutations(range(9)))
def test_the_order_of_keys_does_not_matter(order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(flash_ext.attention(q, k[:, order], v[:, order]), flash_ext.attention(q, k, v))


@quick
@given(st.integers(1, 12), st.integers(1, 12), sides, sides)
def test_causal_is_a_window(seqlen_q: int, seqlen_k: int, left: int, right: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 4, generator=generator, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k))
    causal = flash_ext.attention(q, k, v, causal=True, window_size=(left, right), return_lse=True)
    assert all(
        torch.equal(a, b) for a, b in zip(causal, flash_ext.attention(q, k, v, window_size=(left, 0), return_lse=True), strict=True)
    )
