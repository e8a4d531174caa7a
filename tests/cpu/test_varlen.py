"""Packed sequences: equal to a loop, independent of each other, safe whatever cu_seqlens hold; max_seqlen, validate."""

from __future__ import annotations

from typing import Any

import cases
import oracle
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_ext

OPS = torch.ops.flash_ext
LENGTHS = ((5, 9), (0, 4), (7, 7), (3, 0), (1, 12), (0, 0), (6, 2))
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "softcap": {"softcap": 2.0, "causal": True},
    "scores": {"causal": True, "sinks": True, "alibi_slopes": True, "k_bias": True, "return_max_logit": True},
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cu(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=device)


def packed(
    dtype: torch.dtype = torch.float32, lengths: tuple = LENGTHS, beyond: int = 0, requires_grad: bool = False
) -> list[Tensor]:
    total_q, total_k = (sum(pair[side] for pair in lengths) + beyond for side in (0, 1))
    shapes = ((total_q, 4, 16), (total_k, 2, 16), (total_k, 2, 24))
    return [normal(*s, seed=i, dtype=dtype).requires_grad_(requires_grad) for i, s in enumerate(shapes)]


def lengths_of(lengths: tuple = LENGTHS) -> dict[str, Tensor]:
    return {f"cu_seqlens_{side}": cu([pair["qk".index(side)] for pair in lengths]) for side in "qk"}


def learnt(options: dict[str, Any], total_k: int) -> dict[str, Any]:
    made = {"sinks": normal(4, seed=7), "alibi_slopes": normal(len(LENGTHS), 4, seed=8).abs(), "k_bias": normal(2, total_k, seed=9)}
    return {name: made[name] if value is True and name in made else value for name, value in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_a_loop_over_sequences(name: str) -> None:
    """Bit for bit: each sequence is one dense call of batch 1, forward and backward."""
    together, alone = packed(requires_grad=True), packed(requires_grad=True)
    options = learnt(OPTIONS[name], together[1].shape[0])
    results = flash_ext.attention_varlen(*together, **lengths_of(), **options, return_lse=True)
    out, lse = results[:2]
    max_logit = torch.full((4,), -torch.inf)
    loss = torch.zeros(())
    q_end = k_end = 0
    for b, (n_q, n_k) in enumerate(LENGTHS):
        rows, keys = slice(q_end, q_end + n_q), slice(k_end, k_end + n_k)
        q_end, k_end = rows.stop, keys.stop
        own = dict(options)
        if "k_bias" in own:
            own |= {"k_bias": own["k_bias"][None, :, keys], "alibi_slopes": own["alibi_slopes"][b]}
        q, k, v = alone[0][rows][None], alone[1][keys][None], alone[2][keys][None]
        expected = flash_ext.attention(q, k, v, **own, return_lse=True)
        assert torch.equal(out[rows], expected[0][0]) and torch.equal(lse[:, rows], expected[1][0])
        if name == "scores":
            max_logit = torch.maximum(max_logit, expected[2])
        loss = loss + expected[0].square().sum() + expected[1].masked_fill(expected[1].isinf(), 0.0).sin().sum()
    if name == "scores":
        assert torch.equal(results[2], max_logit)
    loss.backward()
    (out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()).backward()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", (torch.nan, torch.inf, "other"), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_never_changes_another(name: str, poison: Any) -> None:
    """Whatever stands in one sequence, every other keeps its bits, in results and gradients."""
    options = learnt(OPTIONS[name], 34)
    options.pop("return_max_logit", None)  # over all sequences
    sequences = {**lengths_of(), "leftpad_k": torch.tensor([2, 0, 1, 0, 3, 0, 0], dtype=torch.int32)}
    dout = normal(22, 4, 24, seed=5)

    def run(inputs: list[Tensor], options: dict[str, Any], dout: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out, lse = flash_ext.attention_varlen(*leaves, **sequences, **options, return_lse=True)
        return [out.detach(), lse.T.detach(), *torch.autograd.grad(out, leaves, dout)]

    expected = run(packed(), options, dout)
    rows, keys = sequences["cu_seqlens_q"].tolist(), sequences["cu_seqlens_k"].tolist()
    for b in range(len(LENGTHS)):
        inputs = packed()
        changed, changed_dout = dict(options), dout.clone()
        mine = [slice(ends[b], ends[b + 1]) for ends in (rows, keys)]
        everything = [(inputs[0], mine[0]), (inputs[1], mine[1]), (inputs[2], mine[1]), (changed_dout, mine[0])]
        if "k_bias" in changed:
            changed["k_bias"] = changed["k_bias"].clone()
            everything.append((changed["k_bias"].T, mine[1]))
        for tensor, part in everything:
            tensor[part] = normal(*tensor[part].shape, seed=11) if poison == "other" else poison
        for got, want, part in zip(run(inputs, changed, changed_dout), expected, (0, 0, 0, 1, 1), strict=True):
            others = torch.ones(len(want), dtype=torch.bool)
            others[mine[part]] = False
            assert torch.equal(got[others], want[others])


def test_rows_that_no_sequence_shows() -> None:
    """Beyond the last sequence, before the left padding and after seqused: out 0, lse -inf, no gradient, not read."""
    lengths = ((6, 8), (5, 5))
    sequences = {
        **lengths_of(lengths), "seqused_q": torch.tensor([4, 5], dtype=torch.int32),
        "leftpad_q": torch.tensor([1, 0], dtype=torch.int32), "seqused_k": torch.tensor([7, 4], dtype=torch.int32),
        "leftpad_k": torch.tensor([0, 2], dtype=torch.int32),
    }  # fmt: skip
    q, k, v = packed(lengths=lengths, beyond=3)
    shown_q = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    shown_k = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    q[~shown_q], k[~shown_k], v[~shown_k] = (torch.nan,) * 3
    leaves = [t.requires_grad_() for t in (q, k, v)]
    sinks = torch.zeros(4, requires_grad=True)
    out, lse = flash_ext.attention_varlen(*leaves, **sequences, sinks=sinks, causal=True, return_lse=True)
    assert not out[~shown_q].any() and (lse[:, ~shown_q] == -torch.inf).all() and lse[:, shown_q].isfinite().all()
    upstream = [torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)]
    upstream[0][shown_q], upstream[1][:, shown_q] = 1.0, 1.0
    torch.autograd.backward([out, lse], upstream)
    for tensor, shown in zip(leaves, (shown_q, shown_k, shown_k), strict=True):
        assert not tensor.grad[~shown].any() and tensor.grad.isfinite().all() and tensor.grad[shown].any()
    assert sinks.grad.isfinite().all()


def test_positions_count_within_the_shown_rows() -> None:
    """A left-padded sequence equals the same sequence without its padding."""
    q, k, v = packed(lengths=((4, 6),))
    causal = {"causal": True, "window_size": (2, -1), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    expected = flash_ext.attention(q[None, 1:], k[None, 2:5], v[None, 2:5], **causal)[0]
    pad = {f"leftpad_{side}": torch.tensor([n], dtype=torch.int32) for side, n in (("q", 1), ("k", 2))}
    used = {"seqused_k": torch.tensor([5], dtype=torch.int32)}
    out = flash_ext.attention_varlen(q, k, v, **lengths_of(((4, 6),)), **pad, **used, **causal)
    assert torch.equal(out[1:], expected) and not out[0].any()


@pytest.mark.parametrize("options", ({}, {"causal": True, "softcap": 1.5}), ids=str)
def test_gradcheck(options: dict) -> None:
    """Finite differences for q, k, v, sinks and k_bias, of out and of lse."""
    lengths = ((3, 4), (0, 1), (2, 2))
    inputs = [normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(((6, 2, 3), (8, 1, 3), (8, 1, 2), (2,), (1, 8)))]
    sequences = {**lengths_of(lengths), "leftpad_k": torch.tensor([1, 0, 0], dtype=torch.int32)}

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, sinks, k_bias = tensors
        out, lse = flash_ext.attention_varlen(q, k, v, **sequences, sinks=sinks, k_bias=k_bias, return_lse=True, **options)
        return out, lse[:, :5]  # finite differences cannot subtract -inf from itself

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


# --- lengths that make no sense ---

GARBAGE = (
    [0, 100, 5, 20], [-7, 3, 10, 12], [-7, 3, 10, 900], [20, 10, 5, 0], [0, 2**31 - 1, -(2**31), 4], [5, 5, 5, 5],
    [-(2**31), -1, 0, 2**31 - 1],
)  # fmt: skip


@pytest.mark.parametrize("numbers", GARBAGE, ids=str)
def test_garbage_stays_inside_the_tensors(numbers: list[int]) -> None:
    """The op is given what attention_varlen would refuse here, and a GPU would not see: results are zeros or attention."""
    buffer = torch.full((3, 40, 4, 16), torch.nan)
    q, k, v = buffer[:, 10:30]
    q[:], k[:], v[:] = normal(3, 20, 4, 16)
    lengths = torch.tensor(numbers, dtype=torch.int32)
    extra = torch.tensor([-5, 2**31 - 1, 3], dtype=torch.int32)
    for used, pad in ((None, None), (extra, None), (None, extra), (extra, extra.flip(0))):
        arguments = (lengths, lengths, used, used, pad, pad, None, None, None, 0.25, True, -1, -1, 0.0, ())
        out, lse, _ = OPS.fwd(q, k, v, *arguments, False, False, None)
        gradients = OPS.bwd(torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, *arguments, False, 7, None)
        assert all(t.isfinite().all() for t in (out, *gradients[:3])) and not lse.isnan().any()
        if numbers == sorted(numbers):  # no overlap: attention of what is inside
            clamped = lengths.clamp(0, 20)
            expected = OPS.fwd(q, k, v, clamped, clamped, *arguments[2:], False, False, None)
            assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert buffer[:, :10].isnan().all() and buffer[:, 30:].isnan().all()


# --- max_seqlen and validate ---


def test_max_seqlen_in_every_form_changes_nothing() -> None:
    inputs = packed()
    expected = flash_ext.attention_varlen(*inputs, **lengths_of())
    for value in (
        7,
        1000,
        torch.tensor(7),
        torch.tensor([9], dtype=torch.int32),
        torch.empty((), dtype=torch.int64, device="meta"),
    ):
        out = flash_ext.attention_varlen(*inputs, **lengths_of(), max_seqlen_q=value, validate=True)
        assert torch.equal(out, expected)
    assert torch.equal(flash_ext.attention_varlen(*inputs, **lengths_of(), max_seqlen_q=7, max_seqlen_k=torch.tensor(12)), expected)


def test_a_call_on_fake_tensors_reads_nothing() -> None:
    sequences = lengths_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(t) for t in packed()]
        fake = {name: mode.from_tensor(t) for name, t in sequences.items()}
        out, lse = flash_ext.attention_varlen(*inputs, **fake, max_seqlen_q=0, validate=True, return_lse=True)
    assert out.shape == (22, 4, 24) and lse.shape == (4, 22)


# --- the whole ---


@pytest.mark.parametrize("name", [n for n, c in cases.CASES.items() if c.sequences and not c.seqused_q and not c.leftpad_q][:6])
def test_the_oracle_is_a_loop_too(name: str) -> None:
    """The oracle's packed results against its dense ones, sequence by sequence."""
    case = cases.CASES[name]
    made = cases.build(case, "cpu", torch.float64)
    truth = oracle.dense_results((made.q, made.k, made.v), None, None, torch.float64, {**case.options, **made.side})
    for b, (rows, keys) in enumerate(zip(case.shown("q"), case.shown("k"), strict=True)):
        own = {name: made.side[name] for name in ("sinks", "alibi_slopes") if name in made.side}
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        if "k_bias" in made.side:
            own["k_bias"] = made.side["k_bias"][None, :, keys]
        out, lse = oracle.dense_attention(made.q[None, rows], made.k[None, keys], made.v[None, keys], **case.options, **own)
        torch.testing.assert_close(truth.out[rows], out[0])
        torch.testing.assert_close(truth.lse[:, rows], lse[0])
