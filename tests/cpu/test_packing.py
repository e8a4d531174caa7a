"""Packed examples: boundaries from position ids, attention within them, and the collator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import PackingCollator, cu_seqlens_from_position_ids

LENGTHS = (1, 2, 127, 128, 129, 40)


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def tokens(heads: int, seed: int, rows: tuple[int, ...] = (sum(LENGTHS),)) -> Tensor:
    return torch.randn(*rows, heads, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounds(lengths: tuple[int, ...]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_boundaries(dtype: torch.dtype) -> None:
    ids = positions(LENGTHS).to(dtype)
    wanted, total = bounds(LENGTHS), len(ids)
    for most in (None, len(LENGTHS), 50):
        found = cu_seqlens_from_position_ids(ids, max_sequences=most)
        assert found.dtype == torch.int32 and len(found) == (total if most is None else most) + 1
        assert found.tolist() == wanted + [total] * (len(found) - len(wanted))


@pytest.mark.parametrize(
    ("ids", "wanted"),
    (
        ([], [0]),
        ([5], [0, 1]),
        ([7, 8, 9, 3, 4], [0, 3, 5]),  # an example need not start at 0
        ([0, 1, 2, 0, 0, 0], [0, 3, 4, 5, 6]),  # padding is told by its positions too
        ([[0, 1, 2], [3, 4, 5]], [0, 3, 6]),  # rows are apart
    ),
)
def test_boundaries_of_other_positions(ids: list, wanted: list[int]) -> None:
    found = cu_seqlens_from_position_ids(torch.tensor(ids, dtype=torch.int64))
    assert found[: len(wanted)].tolist() == wanted and (found[len(wanted) :] == wanted[-1]).all()


def test_more_examples_than_promised() -> None:
    ids = positions(LENGTHS)
    with pytest.raises(ValueError, match="must be at least the 6 examples, got 5"):
        cu_seqlens_from_position_ids(ids, max_sequences=5)
    # Where nobody may look, as on a GPU: the first five, and tokens of no sequence behind them.
    compiled = torch.compile(cu_seqlens_from_position_ids, fullgraph=True, backend="aot_eager")
    assert compiled(ids, max_sequences=5).tolist() == bounds(LENGTHS)[:6]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        (([0, 1],), TypeError, "position_ids must be a torch.Tensor, got list"),
        ((torch.zeros(3, 1, 4).long(),), ValueError, r"\(total\) or \(batch, seqlen\), got torch.int64 \(3, 1, 4"),
        ((torch.zeros(3),), ValueError, "got torch.float32"),
        ((torch.zeros(3).long(), -1), ValueError, "max_sequences must be at least 0, got -1"),
        ((torch.zeros(3).long(), 2.0), TypeError, "max_sequences must be an int or None, got float"),
    ),
)  # fmt: skip
def test_bad_positions(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cu_seqlens_from_position_ids(arguments[0], max_sequences=arguments[1] if len(arguments) > 1 else None)


def test_as_single_examples() -> None:
    """Forward and backward with grouped heads, packed as one row of a batch and without a batch."""
    q, k, v, dout = (tokens(heads, seed).requires_grad_(seed < 3) for seed, heads in enumerate((4, 2, 2, 4)))
    ids, edges = positions(LENGTHS), bounds(LENGTHS)
    wanted, wanted_lse = [], []
    for begin, end in itertools.pairwise(edges):
        out, lse = flash_ext.attention(q[None, begin:end], k[None, begin:end], v[None, begin:end], causal=True, return_lse=True)
        wanted.append(out[0])
        wanted_lse.append(lse[0])
    wanted, wanted_lse = torch.cat(wanted), torch.cat(wanted_lse, 1)
    gradients = torch.autograd.grad((wanted * dout).sum(), (q, k, v))
    for shape in (lambda t: t, lambda t: t[None]):
        out, lse = flash_ext.attention_packed(shape(q), shape(k), shape(v), shape(ids), return_lse=True, max_sequences=8)
        torch.testing.assert_close(out, shape(wanted))
        torch.testing.assert_close(lse, shape(wanted_lse))
        found = torch.autograd.grad((out * shape(dout)).sum(), (q, k, v))
        for got, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(got, expected)
    both = flash_ext.attention_packed(q, k, v, ids, causal=False, max_sequences=6)
    assert not torch.allclose(both, wanted)


def test_one_example_never_changes_another() -> None:
    q, k, v = (tokens(2, seed) for seed in range(3))
    ids = positions(LENGTHS)
    before = flash_ext.attention_packed(q, k, v, ids, max_sequences=6)
    begin, end = bounds(LENGTHS)[2:4]
    for tensor in (q, k, v):
        tensor[begin:end] = torch.nan
    after = flash_ext.attention_packed(q, k, v, ids, max_sequences=6)
    assert torch.equal(before[:begin], after[:begin]) and torch.equal(before[end:], after[end:])


def test_rows_of_a_batch() -> None:
    q, k, v = (tokens(2, seed, (2, 10)) for seed in range(3))
    ids = torch.stack([positions((4, 6)), positions((10,))])
    out, lse, top = flash_ext.attention_packed(q, k, v, ids, return_lse=True, return_max_logit=True)
    alone, alone_lse = flash_ext.attention(q[1:], k[1:], v[1:], causal=True, return_lse=True)
    torch.testing.assert_close(out[1:], alone)
    torch.testing.assert_close(lse[1:], alone_lse)
    assert out.shape == q.shape and lse.shape == (2, 2, 10) and top.shape == (2,)
    with pytest.raises(ValueError, match=r"a number for each token of q, got \(2, 10\) and \(1, 10, 2, 16\)"):
        flash_ext.attention_packed(q[:1], k, v, ids)
    with pytest.raises(ValueError, match=r"k must be \(batch, seqlen, heads, head_dim\) or"):
        flash_ext.attention_packed(q, k[0], v, ids)


EXAMPLES = [
    {"input_ids": [11, 12, 13], "attention_mask": [1, 1, 1], "labels": [-100, 12, 13], "weight": [1, 2, 3]},
    {"input_ids": torch.tensor([21]), "weight": [4], "name": "b"},
    {"input_ids": [31, 32], "labels": torch.tensor([31, 32]), "weight": [5, 6]},
]


def test_collator_packs_one_row() -> None:
    made = PackingCollator()(EXAMPLES)
    assert made["input_ids"].tolist() == [[11, 12, 13, 21, 31, 32]]
    assert made["labels"].tolist() == [[-100, 12, 13, -100, -100, 32]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert made["weight"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert made["cu_seq_lens_q"].tolist() == made["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert made["max_length_q"] == made["max_length_k"] == 3 and "attention_mask" not in made and "name" not in made
    assert cu_seqlens_from_position_ids(made["position_ids"], max_sequences=3).tolist() == [0, 3, 4, 6]


def test_collator_packs_rows_of_one_length() -> None:
    examples = [{"input_ids": list(range(n))} for n in (4, 1, 3, 5, 2)]
    made = PackingCollator(max_tokens=6, pad_token_id=99, separator_label=-7)(examples)
    assert made["input_ids"].tolist() == [[0, 1, 2, 3, 0, 99], [0, 1, 2, 0, 1, 99], [0, 1, 2, 3, 4, 99]]
    assert made["labels"].tolist()[0] == [-7, 1, 2, 3, -7, -7]
    assert made["cu_seq_lens_q"].tolist() == [0, 4, 5, 6, 9, 11, 12, 17, 18]
    found = cu_seqlens_from_position_ids(made["position_ids"], max_sequences=8)
    assert found.tolist() == made["cu_seq_lens_q"].tolist()
    tight = PackingCollator(max_tokens=8, sort="ffd")(examples)
    assert tight["input_ids"].shape == (2, 8) and tight["cu_seq_lens_q"].tolist() == [0, 5, 8, 12, 14, 15, 16]


def test_collator_of_nothing() -> None:
    made = PackingCollator()([])
    assert made["input_ids"].shape == (1, 0) and made["cu_seq_lens_q"].tolist() == [0] and made["max_length_q"] == 0
    assert "cu_seq_lens_q" not in PackingCollator(return_cu_seqlens=False)(EXAMPLES)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: PackingCollator(max_tokens=0), "max_tokens must be at least 1 or None, got 0"),
        (lambda: PackingCollator(sort="longest"), "sort must be 'none' or 'ffd', got 'longest'"),
        (lambda: PackingCollator(max_tokens=2)(EXAMPLES), "at most max_tokens = 2 tokens, got 3 in example 0"),
        (lambda: PackingCollator()([{"labels": [1]}]), "example 0 has no input_ids, but labels"),
        (lambda: PackingCollator()([{"input_ids": [1, 2], "labels": [1]}]), "example 0 has 2 input_ids and 1 labels"),
    ),
)
def test_bad_examples(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
