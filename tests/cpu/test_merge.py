"""Parts of the keys and their merge: equal to the whole, differentiable, without NaN where parts see nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import attention, attention_partials, attention_varlen, merge_attention


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(dtype: torch.dtype = torch.float64, seqlen_q: int = 9, seqlen_k: int = 30) -> list[Tensor]:
    shapes = ((2, seqlen_q, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 5))
    return [normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def loss(out: Tensor, lse: Tensor) -> Tensor:
    return out.double().square().sum() + lse.masked_fill(lse.isinf(), 0.0).double().sin().sum()


OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"causal": True}, {"window_size": (4, 2)}, {"softcap": 1.5, "softmax_scale": 0.7, "causal": True},
    {"alibi_slopes": normal(2, 4, seed=5).abs(), "causal": True}, {"k_bias": normal(2, 2, 30, seed=6)},
)  # fmt: skip


@pytest.mark.parametrize("with_sinks", (False, True), ids=("", "sinks"))
@pytest.mark.parametrize("boundaries", ((0, 30), (0, 13, 30), (0, 0, 7, 8, 8, 30, 30)), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(o) or "full")
def test_merged_parts_are_the_whole(options: dict, boundaries: tuple, with_sinks: bool) -> None:
    whole, parts = qkv(), qkv()
    sinks = [normal(4, seed=3).requires_grad_() for _ in range(2)] if with_sinks else [None] * 2
    expected = attention(*whole, **options, sinks=sinks[0], return_lse=True)
    outs, lses = attention_partials(*parts, split_boundaries=boundaries, **options)
    n = len(boundaries) - 1
    assert outs.shape == (n, 2, 9, 4, 5) and lses.shape == (n, 2, 4, 9) and lses.dtype == torch.float64
    got = merge_attention(outs, lses, sinks[1])
    torch.testing.assert_close(got, expected)
    loss(*expected).backward()
    loss(*got).backward()
    for a, b in zip((*whole, sinks[0]), (*parts, sinks[1]), strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_a_part_is_attention_to_its_keys() -> None:
    q, k, v = qkv()
    outs, lses = attention_partials(q, k, v, split_boundaries=(0, 11, 30))
    for part, keys in enumerate((slice(0, 11), slice(11, 30))):
        torch.testing.assert_close((outs[part], lses[part]), attention(q, k[:, keys], v[:, keys], return_lse=True))


def test_parts_may_come_from_anywhere() -> None:
    """A ring or a cascade: separate calls, a sequence of results, dense or packed, 16 bits."""
    q, k, v = (t.detach().bfloat16() for t in qkv())
    parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 12), slice(12, 17), slice(17, 30))]
    out, lse = merge_attention([p[0] for p in parts], [p[1] for p in parts])
    expected = attention(q, k, v, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected[1])
    lengths = {f"cu_seqlens_{side}": torch.tensor([0, n, 2 * n], dtype=torch.int32) for side, n in (("q", 9), ("k", 30))}
    half = {"seqused_k": torch.tensor([12, 20], dtype=torch.int32)}, {"leftpad_k": torch.tensor([12, 20], dtype=torch.int32)}
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    both = [attention_varlen(*flat, **lengths, **h, return_lse=True) for h in half]
    packed_out, packed_lse = merge_attention(tuple(p[0] for p in both), tuple(p[1] for p in both))
    torch.testing.assert_close(packed_out, expected[0].flatten(0, 1), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(packed_lse, expected[1].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("with_sinks", (False, True), ids=("", "sinks"))
def test_parts_that_see_nothing(with_sinks: bool) -> None:
    """lse = -inf in some parts, in all parts: exact zeros, the sink, and no NaN in any gradient, whatever such an out holds."""
    outs = normal(3, 1, 4, 2, 5).requires_grad_()
    lses = normal(3, 1, 2, 4, seed=1)
    lses[0] = lses[:, :, :, 1] = lses[2, :, :, 2] = -torch.inf
    lses.requires_grad_()
    sinks = normal(2, seed=2).requires_grad_() if with_sinks else None
    with torch.no_grad():
        outs[0, 0, 0] = torch.nan
    out, lse = merge_attention(outs, lses, sinks)
    assert not out[:, 1].any() and out.isfinite().all()
    if with_sinks:
        assert torch.equal(lse[0, :, 1], sinks)
    else:
        assert (lse[:, :, 1] == -torch.inf).all()
        torch.testing.assert_close(out[:, 2], outs[1, :, 2])  # one part alone
    (out.square().sum() + lse.sum()).backward()
    assert all(t.grad.isfinite().all() for t in (outs, lses, *([sinks] if with_sinks else [])))
    assert not outs.grad[0].any() and not lses.grad[0].any() and not lses.grad[:, :, :, 1].any()


def test_gradcheck() -> None:
    outs, lses, sinks = normal(3, 2, 4, 2, 3), normal(3, 2, 2, 4, seed=1), normal(2, seed=2)
    with torch.no_grad():
        lses[1, 0] = -torch.inf
    inputs = [t.requires_grad_() for t in (outs, lses, sinks)]
    finite = torch.ones_like(lses, dtype=torch.bool)
    finite[1, 0] = False

    def call(outs: Tensor, moved: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(outs, torch.where(finite, moved, -torch.inf), sinks)

    inputs[1] = torch.where(finite, lses, 0.0).detach().requires_grad_()
    assert torch.autograd.gradcheck(call, inputs)


def test_large_and_small_lses() -> None:
    """No overflow: weights come from differences."""
    outs = torch.stack([torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 3)])
    for base in (1e4, -1e4, 1e30):
        lses = torch.full((2, 1, 1, 2), base)
        out, lse = merge_attention(outs, lses)
        torch.testing.assert_close(out, torch.full((1, 2, 1, 3), 0.5))
        torch.testing.assert_close(lse, torch.full((1, 1, 2), base) + 0.6931472)


def test_compiled() -> None:
    torch.compiler.reset()

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(*attention_partials(q, k, v, split_boundaries=(0, 13, 30), causal=True))

    eager, traced = qkv(), qkv()
    loss(*both(*eager)).backward()
    loss(*torch.compile(both, backend="aot_eager", fullgraph=True)(*traced)).backward()
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


BAD = {
    "list_of_nothing": (([], []), {}, ValueError, "outs must hold at least one part, got 0"),
    "type": (("x", torch.zeros(1)), {}, TypeError, "outs must be a torch.Tensor or a sequence of them, got str"),
    "shapes": (
        ([torch.zeros(1, 2, 1, 3), torch.zeros(1, 3, 1, 3)], torch.zeros(2, 1, 1, 2)), {}, ValueError,
        "outs must have one shape, dtype and device, got (1, 2, 1, 3) torch.float32 cpu, (1, 3, 1, 3) torch.float32 cpu",
    ),
    "lses": (
        (torch.zeros(2, 1, 5, 3, 4), torch.zeros(2, 1, 5, 3)), {}, ValueError,
        "lses must have shape (2, 1, 3, 5) beside outs (2, 1, 5, 3, 4), got (2, 1, 5, 3)",
    ),
    "dims": ((torch.zeros(5, 3, 4), torch.zeros(5, 3)), {}, ValueError, "got shape (5, 3, 4)"),
    "sinks": (
        (torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 5)), {"sinks": torch.zeros(5)}, ValueError,
        "sinks must have shape (3,), got (5,)",
    ),
    "dtype": (
        (torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 5, dtype=torch.int32)), {}, ValueError,
        "lses.dtype must be a floating type, got torch.int32",
    ),
    "no_parts": ((torch.zeros(0, 5, 3, 4), torch.zeros(0, 3, 5)), {}, ValueError, "outs must hold at least one part, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name: str) -> None:
    arguments, options, exception, words = BAD[name]
    with pytest.raises(exception, match=re.escape(words)) as info:
        merge_attention(*arguments, **options)
    assert str(info.value).startswith("merge_attention: ")


def test_supported_and_explain_take_boundaries() -> None:
    q, k, v = (t.detach() for t in qkv())
    assert flash_ext.supported(q, k, v, split_boundaries=(0, 13, 30))["reference"] == []
    assert flash_ext.explain(q, k, v, split_boundaries=(0, 13, 30)).backend == "reference"
    with pytest.raises(ValueError, match=r"attention_partials: split_boundaries must end at k\.seqlen, got 29 and 30"):
        flash_ext.explain(q, k, v, split_boundaries=(0, 13, 29))
