"""Jagged tensors: each row as a call of its own, nested tensors and (values, offsets), and a bias for each pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import attention_dense_jagged, attention_jagged, jagged_groups

LENGTHS = {"plain": (3, 0, 130, 7), "empty_ends": (0, 5, 0), "none": (0, 0), "huge_and_tiny": (300, *(1 for _ in range(20)))}


def offsets_of(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(dtype)


def values(total: int, heads: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(total, heads, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dim", (16, 32))
@pytest.mark.parametrize("name", LENGTHS)
def test_as_single_rows(name: str, dim: int) -> None:
    lengths = LENGTHS[name]
    total = sum(lengths)
    q, k, v = (values(total, heads, dim, seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    dout, edges = values(total, 4, dim, 9), offsets_of(lengths)
    wanted = q.new_empty(0, 4, dim)
    for begin, end in itertools.pairwise(edges):
        alone = flash_ext.attention(q[None, begin:end], k[None, begin:end], v[None, begin:end], causal=True)
        wanted = torch.cat([wanted, alone[0]])
    gradients = torch.autograd.grad((wanted * dout).sum(), (q, k, v))
    for offsets in (edges, edges.int()):
        out = attention_jagged(q, k, v, offsets, causal=True)
        torch.testing.assert_close(out, wanted)
        for got, expected in zip(torch.autograd.grad((out * dout).sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(got, expected)


def test_nested_tensors() -> None:
    edges_q, edges_k = offsets_of(LENGTHS["plain"]), offsets_of((2, 4, 1, 0))
    q, k, v = values(140, 4, 16, 0), values(7, 2, 16, 1), values(7, 2, 24, 2)
    nest = torch.nested.nested_tensor_from_jagged
    nested = [nest(q, edges_q).requires_grad_(), nest(k, edges_k), nest(v, edges_k)]
    out, lse = attention_jagged(*nested, return_lse=True)
    wanted, wanted_lse = attention_jagged(q, k, v, edges_q, edges_k, return_lse=True)
    assert out.is_nested and out.shape == (4, nested[0].shape[1], 4, 24)  # jagged as q: they can be added
    torch.testing.assert_close(out.values(), wanted)
    torch.testing.assert_close(lse, wanted_lse)
    out.values().sum().backward()
    assert nested[0].grad.is_nested and nested[0].grad.values().abs().sum() > 0


def test_rows_that_do_not_fill_what_they_own() -> None:
    edges, lengths = offsets_of((4, 6, 5)), torch.tensor([4, 2, 0])
    q, k, v = (values(15, 2, 16, seed) for seed in range(3))
    narrow = [torch.nested.nested_tensor_from_jagged(t, edges, lengths) for t in (q, k, v)]
    out = attention_jagged(*narrow)
    expected = attention_jagged(q[:6], k[:6], v[:6], offsets_of((4, 2, 0)))
    torch.testing.assert_close(out.values()[:6], expected)
    assert (out.values()[6:] == 0).all()


def test_sixteen_bits() -> None:
    lengths = LENGTHS["plain"]
    q, k, v = (values(sum(lengths), 2, 32, seed, torch.bfloat16) for seed in range(3))
    out = attention_jagged(q, k, v, offsets_of(lengths))
    exact = attention_jagged(q.double(), k.double(), v.double(), offsets_of(lengths))
    assert (out.double() - exact).norm() <= 8e-3 * exact.norm()


def dense_jagged(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """By definition, row by row."""
    group = q.shape[2] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    outs = []
    for b, (begin, end) in enumerate(itertools.pairwise(edges)):
        scores = torch.einsum("thd,nhd->htn", q[b], k[begin:end]) * scale
        if bias is not None:
            scores = scores + bias[begin:end].permute(1, 2, 0)
        outs.append(torch.einsum("htn,nhd->thd", torch.softmax(scores, -1), v[begin:end]))
    return torch.stack(outs)


@pytest.mark.parametrize("bias_heads", (None, 1, 4))
@pytest.mark.parametrize("queries", (1, 5, 300))
def test_dense_queries(queries: int, bias_heads: int | None) -> None:
    lengths = (3, 0, 90, 7)
    edges = offsets_of(lengths)
    leaves = [values(4, queries * 4, 16, 0).view(4, queries, 4, 16), values(100, 2, 16, 1), values(100, 2, 8, 2)]
    if bias_heads is not None:
        leaves.append(values(100, bias_heads, queries, 3))
    leaves = [t.requires_grad_() for t in leaves]
    dout = torch.randn(4, queries, 4, 8, dtype=torch.float64)
    bias = leaves[3] if bias_heads is not None else None
    out = attention_dense_jagged(*leaves[:3], edges, bias=bias, softmax_scale=-0.4)
    wanted = dense_jagged(*leaves[:3], edges, bias, -0.4)
    torch.testing.assert_close(out, wanted)
    gradients = zip(*(torch.autograd.grad((t * dout).sum(), leaves) for t in (out, wanted)), strict=True)
    for got, expected in gradients:
        torch.testing.assert_close(got, expected)


def test_bias_in_sixteen_bits() -> None:
    edges = offsets_of((60, 40))
    q, k, v = (values(100, 2, 16, seed, torch.bfloat16) for seed in range(3))
    bias = (values(100, 2, 5, 4) * 10).float().requires_grad_()
    queries = q[:10].view(2, 5, 2, 16)
    out = attention_dense_jagged(queries, k, v, edges, bias=bias)
    exact_bias = bias.detach().double().requires_grad_()
    wanted = dense_jagged(queries.double(), k.double(), v.double(), edges, exact_bias, 0.25)
    assert (out.double() - wanted).norm() <= 5e-3 * wanted.norm()
    out.sum().backward()
    wanted.sum().backward()
    assert (bias.grad - exact_bias.grad).norm() <= 2e-2 * exact_bias.grad.norm()


def test_nested_keys_of_dense_queries() -> None:
    edges = offsets_of((2, 3))
    q, k, v = values(2, 4, 16, 0).view(2, 2, 2, 16), values(5, 2, 16, 1), values(5, 2, 16, 2)
    nested = [torch.nested.nested_tensor_from_jagged(t, edges) for t in (k, v)]
    torch.testing.assert_close(attention_dense_jagged(q, *nested), dense_jagged(q, k, v, edges, None, 1 / math.sqrt(16)))


VALUES = torch.zeros(5, 2, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: attention_jagged(VALUES, VALUES, VALUES), ValueError, "q is no nested tensor, so its offsets are needed"),
        (lambda: attention_jagged([1], VALUES, VALUES, offsets_of((5,))), TypeError, "q must be a torch.Tensor, got list"),
        (lambda: attention_jagged(VALUES, VALUES, VALUES, [0, 5]), TypeError, "offsets must be a torch.Tensor, got list"),
        (lambda: attention_jagged(VALUES, VALUES, VALUES, torch.zeros(2)), ValueError, r"int32 or int64 of shape \(batch"),
        (lambda: attention_jagged(VALUES, VALUES, VALUES, torch.tensor([1, 5])), ValueError, "must start at 0, got 1"),
        (lambda: attention_jagged(VALUES, VALUES, VALUES, torch.tensor([0, 4, 3])), ValueError, "must not decrease, got 4 and 3"),
        (lambda: attention_jagged(VALUES, VALUES, VALUES, torch.tensor([0, 6])), ValueError, "must end at"),
        (
            lambda: attention_jagged(*[torch.nested.nested_tensor([VALUES], layout=torch.jagged).transpose(1, 2)] * 3),
            ValueError, r"nested tensor \(batch, jagged, heads, head_dim\), got one of 4 dimensions whose dimension 2 is jagged",
        ),
        (lambda: attention_dense_jagged(VALUES, VALUES, VALUES, offsets_of((5,))), ValueError, r"q must be \(batch, queries"),
        (lambda: attention_dense_jagged(VALUES[None], VALUES, VALUES, offsets_of((5, 0))), ValueError, "q.batch rows, got 2 and 1"),
        (
            lambda: attention_dense_jagged(VALUES[None], VALUES, VALUES, offsets_of((5,)), bias=torch.zeros(5, 3, 5)),
            ValueError, r"bias must be \(total, num_heads or 1, queries\) = \(5, 2 or 1, 5\), got \(5, 3, 5\)",
        ),
        (
            lambda: attention_dense_jagged(VALUES[None], VALUES, VALUES, offsets_of((5,)), bias=VALUES[..., :5], softmax_scale=0),
            ValueError, "softmax_scale must not be 0 with a bias",
        ),
    ),
)  # fmt: skip
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


GROUPED = {
    **LENGTHS,
    "short": (20,) * 40,
    "exact": (128, 1, 127, 0, 0, 1, 64, 64, 65, 63, 300, 5),
    "single_tokens": (1,) * 300,
}


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("unlike", (False, True))
@pytest.mark.parametrize("name", GROUPED)
def test_groups(name: str, unlike: bool, causal: bool) -> None:
    """Greedy, by its definition; tables by theirs; and the call is the same with and without."""
    lengths = GROUPED[name]
    lengths_k = tuple(max(0, (n * 7 + 3) % 90) for n in lengths) if unlike else lengths
    edges, edges_k = offsets_of(lengths), offsets_of(lengths_k)
    total, total_k = sum(lengths), sum(lengths_k)
    groups = jagged_groups(edges, edges_k, total_q=total, total_k=total_k, causal=causal)
    begins, i = [0], 0
    while i < len(lengths):
        j = i + 1
        while j < len(lengths) and edges[j + 1] - edges[i] <= 128 and edges_k[j + 1] - edges_k[i] <= 128:
            j += 1
        begins.append(i := j)
    for found, of in ((groups.groups_q, edges), (groups.groups_k, edges_k)):
        wanted = [of[i].item() for i in begins]
        assert found.dtype == torch.int32 and found.tolist() == wanted + [of[-1].item()] * (len(found) - len(wanted))
    for b, (n, n_k) in enumerate(zip(lengths, lengths_k, strict=True)):
        keep = torch.ones(n, n_k, dtype=torch.bool).tril(n_k - n if causal else n_k)
        for t in range(n):
            begin, end = (groups.keys_of[edges[b] + t] - edges_k[b]).tolist()
            assert torch.equal(keep[t].nonzero()[:, 0], torch.arange(begin, end)) and 0 <= begin <= end <= n_k
        for t in range(n_k):
            begin, end = (groups.queries_of[edges_k[b] + t] - edges[b]).tolist()
            assert torch.equal(keep[:, t].nonzero()[:, 0], torch.arange(begin, end)) and 0 <= begin <= end <= n
    q, k, v = values(total, 4, 16, 0).requires_grad_(), values(total_k, 2, 16, 1), values(total_k, 2, 24, 2)
    out, lse = attention_jagged(q, k, v, edges, edges_k, causal=causal, groups=groups, return_lse=True)
    plain, plain_lse = attention_jagged(q, k, v, edges, edges_k, causal=causal, return_lse=True)
    assert torch.equal(out, plain) and torch.equal(lse, plain_lse)
    assert torch.equal(*(torch.autograd.grad(o.sum(), q)[0] for o in (out, plain)))


def test_groups_under_compile() -> None:
    edges = offsets_of(GROUPED["short"])
    q, k, v = (values(800, 2, 16, seed) for seed in range(3))
    groups = jagged_groups(edges, total_q=800)
    compiled = torch.compile(lambda *t: attention_jagged(*t, edges, groups=groups), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention_jagged(q, k, v, edges))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    (
        (lambda: jagged_groups([0, 5], total_q=5), TypeError, "offsets_q must be a torch.Tensor, got list"),
        (lambda: jagged_groups(torch.zeros(2), total_q=5), ValueError, r"offsets_q must be int32 or int64 of shape \(batch \+ 1\)"),
        (lambda: jagged_groups(offsets_of((5,)), total_q=5.0), TypeError, "total_q must be an int, got float"),
        (lambda: jagged_groups(offsets_of((5,)), total_q=-1), ValueError, "total_q must be at least 0, got -1"),
        (lambda: jagged_groups(offsets_of((5,)), offsets_of((5, 2)), total_q=5, total_k=7), ValueError, "one shape and device"),
    ),
)
def test_wrong_arguments_of_groups(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_groups_of_another_call() -> None:
    edges = offsets_of((3, 4))
    q, k, v = (values(7, 2, 16, seed) for seed in range(3))
    groups = jagged_groups(edges, total_q=7)
    with pytest.raises(ValueError, match="causal must be what groups were made for, got True and False"):
        attention_jagged(q, k, v, edges, groups=groups, causal=True)
    with pytest.raises(ValueError, match="groups were made for 7 rows of q in 2 sequences, got 7 in 1"):
        attention_jagged(q, k, v, offsets_of((7,)), groups=groups)
    with pytest.raises(ValueError, match="offsets_q must be those that groups were made for, got 2 and 3 at 1"):
        attention_jagged(q, k, v, offsets_of((2, 5)), groups=groups)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0, got 1"):
        attention_jagged(q, k, v, torch.tensor([1, 3, 7]), groups=groups)
    with pytest.raises(ValueError, match=r"window_size must be \(-1, -1\) with groups, got \(3, 0\)"):
        attention_jagged(q, k, v, edges, groups=groups, window_size=(3, 0))
    with pytest.raises(TypeError, match=r"groups must be made by flash_ext\.jagged_groups, got int"):
        attention_jagged(q, k, v, edges, groups=5)
