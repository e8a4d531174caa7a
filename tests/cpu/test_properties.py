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


lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5)


@st.composite
def small_cases(draw: st.DrawFn) -> cases.Case:
    num_heads_kv = draw(st.integers(1, 3))
    fields = {
        "num_heads": num_heads_kv * draw(st.integers(1, 3)), "num_heads_kv": num_heads_kv,
        "head_dim": draw(st.integers(1, 20)), "head_dim_v": draw(st.integers(1, 20)), "causal": draw(st.booleans()),
        "softmax_scale": draw(st.one_of(st.none(), finite)), "window_size": (draw(sides), draw(sides)),
        "softcap": draw(st.sampled_from((0.0, 0.5, 3.0, 50.0))), "sinks": draw(st.booleans()),
        "alibi": draw(st.sampled_from(("", "heads", "batch"))),
        "k_bias": draw(st.sampled_from(("", "normal", "hidden", "nothing"))), "max_logit": draw(st.booleans()),
        "layout": draw(st.sampled_from(cases.LAYOUTS)), "gradients": draw(st.sampled_from(("both", "out", "lse", "sum"))),
    }  # fmt: skip
    kind = draw(st.sampled_from(("dense", "packed", "split")))
    if kind == "packed":
        pairs = draw(lengths)
        for side in (0, 1):
            for name in (("seqused_q", "seqused_k")[side], ("leftpad_q", "leftpad_k")[side]):
                if draw(st.booleans()):
                    fields[name] = tuple(draw(st.integers(0, pair[side])) for pair in pairs)
        return cases.packed("drawn", pairs, beyond=(draw(st.integers(0, 3)), draw(st.integers(0, 3))), **fields)
    seqlen_k = draw(st.integers(0, 20))
    if kind == "split":
        cuts = sorted(draw(st.lists(st.integers(0, seqlen_k), max_size=3)))
        fields |= {"splits": (0, *cuts, seqlen_k), "sinks": False, "max_logit": False}
    return cases.Case("drawn", draw(st.integers(0, 20)), seqlen_k, batch=draw(st.integers(0, 2)), **fields)


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
@given(st.integers(1, 30), st.integers(2, 40), st.booleans(), st.data())
def test_keys_in_two_parts_merge_by_lse(seqlen_q: int, seqlen_k: int, sinks: bool, data: st.DataObject) -> None:
    """What return_lse is for: attention over disjoint sets of keys adds up with weights exp(lse), and so does the sink."""
    cut = data.draw(st.integers(0, seqlen_k))
    generator = torch.Generator().manual_seed(cut)
    q, k, v = (torch.randn(1, n, 2, 8, generator=generator, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k))
    sink = torch.randn(2, generator=generator, dtype=torch.float64) if sinks else None
    expected = flash_ext.attention(q, k, v, sinks=sink, return_lse=True)
    parts = [flash_ext.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(flash_ext.merge_attention([p[0] for p in parts], [p[1] for p in parts], sink), expected)
    together = flash_ext.attention_partials(q, k, v, split_boundaries=(0, cut, seqlen_k))
    torch.testing.assert_close(flash_ext.merge_attention(*together, sink), expected)


@quick
@given(lengths, st.booleans())
def test_packing_is_a_loop(pairs: list[tuple[int, int]], causal: bool) -> None:
    generator = torch.Generator().manual_seed(len(pairs))
    ends = [torch.tensor([0, *(pair[side] for pair in pairs)]).cumsum(0).int() for side in (0, 1)]
    q, k, v = (torch.randn(int(ends[side][-1]), 2, 4, generator=generator, dtype=torch.float64) for side in (0, 1, 1))
    options = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "causal": causal}
    out = flash_ext.attention_varlen(q, k, v, **options)
    for b in range(len(pairs)):
        rows, keys = (slice(int(e[b]), int(e[b + 1])) for e in ends)
        assert torch.equal(out[rows], flash_ext.attention(q[None, rows], k[None, keys], v[None, keys], causal=causal)[0])


@quick
@given(st.floats(-20, 20), st.integers(1, 12), st.integers(1, 12))
def test_a_constant_bias_only_moves_lse(shift: float, seqlen_q: int, seqlen_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 4, generator=generator, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k))
    k_bias = torch.full((1, 2, seqlen_k), shift, dtype=torch.float64)
    out, lse, largest = flash_ext.attention(q, k, v, k_bias=k_bias, return_lse=True, return_max_logit=True)
    expected = flash_ext.attention(q, k, v, return_lse=True, return_max_logit=True)
    torch.testing.assert_close((out, lse - shift, largest - shift), expected)


@quick
@given(st.integers(1, 12), st.lists(st.booleans(), min_size=2, max_size=12).filter(any))
def test_a_hidden_key_is_an_absent_key(seqlen_q: int, shown: list[bool]) -> None:
    """k_bias = -inf takes the key out, whatever its k holds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 4, generator=generator, dtype=torch.float64) for n in (seqlen_q, len(shown), len(shown)))
    keep = torch.tensor(shown)
    expected = flash_ext.attention(q, k[:, keep], v[:, keep], return_lse=True)
    k[:, ~keep] = torch.nan
    k_bias = torch.zeros(1, 2, len(shown), dtype=torch.float64).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(flash_ext.attention(q, k, v, k_bias=k_bias, return_lse=True), expected)


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
