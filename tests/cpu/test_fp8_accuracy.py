"""The accuracy of FP8 attention, emulated in float64: what scales, rotation and flushing are worth, held to bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import fp8_accuracy as study


@pytest.mark.parametrize("head_dim", (128, 256))
def test_the_rotation_beats_one_scale_where_outliers_are_everywhere(head_dim: int) -> None:
    """The claim of the FlashAttention-3 paper, on its inputs; scales of blocks alone add little here."""
    errors = study.pooled_rmse(study.outliers_everywhere, range(16), 2048, head_dim, ("tensor", "hadamard"))
    assert errors["tensor"] >= 1.6 * errors["hadamard"]


def test_every_mode_where_outliers_are_everywhere() -> None:
    errors = study.pooled_rmse(study.outliers_everywhere, range(4), 1024, 128)
    assert errors["hadamard"] < min(errors["tensor"], errors["head"], errors["block"])
    assert errors["block + hadamard"] <= 1.1 * errors["hadamard"]
    assert max(errors.values()) < 0.03


def test_scales_of_blocks_where_outliers_are_in_some_rows() -> None:
    """Rows that never see the large ones keep their precision only with scales of their own."""
    errors = study.pooled_rmse(study.outliers_in_some_rows, range(4), 512, 128)
    assert errors["head"] >= 4 * errors["block"]
    assert errors["hadamard"] >= 4 * errors["block"]
    assert errors["block + hadamard"] <= 1.1 * errors["block"]


@pytest.mark.parametrize("depth", (0.0, 0.5, 1.0))
def test_a_needle_among_131072_keys(depth: float) -> None:
    """Flushed after every tile the error does not grow with the length, never flushed it does."""
    flushed = [study.needle_error(n, depth, 1) for n in (1024, 16384, 131072)]
    assert max(flushed) < 3e-3
    assert flushed[-1] < 2 * flushed[0]
    unflushed = [study.needle_error(n, depth, 0) for n in (1024, 131072)]
    assert unflushed[-1] > 0.1 and unflushed[-1] > 10 * unflushed[0]
    assert unflushed[-1] > 100 * flushed[-1]


def test_flushing_less_often_lies_between() -> None:
    errors = [study.needle_error(16384, 0.0, n) for n in (1, 4, 16, 0)]
    assert errors == sorted(errors)


def test_the_sum_is_that_of_the_accumulator_model() -> None:
    """Against a plain spelling of one instruction: 32 products and the accumulator, aligned, truncated, added."""
    generator = np.random.default_rng(0)
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    weights, values = (table[generator.integers(0, 127, shape)] for shape in (64, (64, 3)))
    for column in range(3):
        accumulator = 0.0
        for first in (0, 32):
            terms = [
                (w * v, exponent(w, -6) + exponent(v, -6)) for w, v in zip(weights[first:], values[first:, column], strict=True)
            ]
            terms = [*terms[:32], (accumulator, exponent(accumulator, -126))]
            unit = 2.0 ** (max(e for _, e in terms) - 13)
            total = sum(np.trunc(x / unit) for x, _ in terms) * unit
            unit = 2.0 ** (exponent(total, -126) - 13)
            accumulator = np.trunc(total / unit) * unit
        assert study.hopper_sum(weights, values, 0)[column] == accumulator
    assert np.allclose(study.hopper_sum(weights, values, 0), weights @ values, rtol=1e-2)


def exponent(x: float, smallest: int) -> int:
    return -126 if x == 0 else max(int(np.floor(np.log2(abs(x)))), smallest)


def test_the_picture_can_be_drawn(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "pooled_rmse", lambda *_: dict.fromkeys(study.MODES, 1.0))
    monkeypatch.setattr(study, "needle_error", lambda n, depth, flush: n * (depth + flush + 1))
    study.plot(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
