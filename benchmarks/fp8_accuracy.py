"""How accurate FP8 attention is, on a CPU: scales and rotation against outliers, and sums of 14 bits against long rows.

    python -m benchmarks.fp8_accuracy docs/fp8_accuracy.svg

draws the picture of docs/numerics.md; tests/cpu/test_fp8_accuracy.py holds the numbers to their bounds. The arithmetic of
the kernel is emulated in float64: operands as flash_ext.quantize_fp8 makes them, weights rounded to e4m3 in [0, 256], and,
for long rows, the accumulator of Hopper's FP8 tensor cores (tests/emulator/src/fp8_accumulator.h says where that is from).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flash_ext import quantize_fp8
from flash_ext.fp8 import dequantise
from flash_ext.quantize import to_e4m3

MODES = {
    "tensor": ("tensor", False),
    "head": ("head", False),
    "block": ("block", False),
    "hadamard": ("tensor", True),
    "block + hadamard": ("block", True),
}
FRACTION_BITS = 13
KEYS_PER_INSTRUCTION = 32
TILE = 128  # keys between two flushes, as in most rows of the kernel


def outliers_everywhere(seqlen: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001), (1, seqlen, 1, head_dim) float32 (FlashAttention-3, Shah et al. 2024, 4.3)."""
    shape = (1, seqlen, 1, head_dim)
    plain = torch.randn(shape, generator=generator)
    large = 10 * torch.randn(shape, generator=generator)
    return plain + large * (torch.rand(shape, generator=generator) < 0.001)


def outliers_in_some_rows(seqlen: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """N(0, 1), and 2^16 times that in the last 64 rows: rows before them, in a causal call, never see such a one."""
    x = torch.randn(1, seqlen, 1, head_dim, generator=generator)
    return x * torch.where(torch.arange(seqlen) < seqlen - 64, 1.0, 2.0**16)[None, :, None, None]


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    scores = q @ k.T * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1 + len(k) - len(q)), -torch.inf)
    return scores


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One head, (seqlen, head_dim), float64."""
    return torch.softmax(_scores(q.double(), k.double(), causal), -1) @ v.double()


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, scale: str, hadamard: bool, causal: bool, rows: slice) -> Tensor:
    """Some rows of one head as the kernel computes them, with exact sums."""
    q8, k8 = (dequantise(*quantize_fp8(x, scale, hadamard), None)[0, :, 0].double() for x in (q, k))
    v8 = dequantise(*quantize_fp8(v, scale), None)[0, :, 0].double()
    scores = _scores(q8, k8, causal)[rows] if causal else _scores(q8[rows], k8, False)
    weights = 256 * torch.exp(scores - scores.amax(-1, keepdim=True))
    return to_e4m3(weights.float()).double() @ v8 / weights.sum(-1, keepdim=True)


def pooled_rmse(
    inputs: Callable[[int, int, torch.Generator], Tensor], seeds: Iterable[int], seqlen: int, head_dim: int,
    modes: Iterable[str] = MODES,
) -> dict[str, float]:  # fmt: skip
    """Root of the mean squared error of each mode over all seeds; of a quarter of the rows, and with outliers in some rows
    of those before them."""
    causal = inputs is outliers_in_some_rows
    rows = slice(0, seqlen - 64, 4) if causal else slice(0, seqlen, 4)
    squares: dict[str, list[float]] = {mode: [] for mode in modes}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (inputs(seqlen, head_dim, generator) for _ in range(3))
        wanted, queries = (rows, slice(None)) if causal else (slice(None), rows)
        exact = attention(q[0, queries, 0], k[0, :, 0], v[0, :, 0], causal)[wanted]
        for mode in squares:
            error = fp8_attention(q, k, v, *MODES[mode], causal, rows) - exact
            squares[mode].append(error.square().mean().item())
    return {mode: math.sqrt(sum(found) / len(found)) for mode, found in squares.items()}


# --- the tensor cores' sums ---


def _exponents(x: np.ndarray, smallest: int) -> np.ndarray:
    return np.where(x == 0, -126, np.maximum(np.frexp(x)[1] - 1, smallest))


def hopper_sum(weights: np.ndarray, values: np.ndarray, flush_every: int) -> np.ndarray:
    """weights (n) @ values (n, d), both e4m3 numbers as float64, 32 keys an instruction. Each term and the accumulator are
    truncated to a multiple of 2^(largest exponent - 13), then the sum to 13 fraction bits. flush_every: after so many tiles
    the accumulator is added to a float32 sum and starts anew; 0: never."""
    columns = values.shape[1]
    accumulator, total = np.zeros(columns), np.zeros(columns, np.float32)
    for first in range(0, len(weights), KEYS_PER_INSTRUCTION):
        if flush_every and first and first % (flush_every * TILE) == 0:
            total += accumulator.astype(np.float32)
            accumulator = np.zeros(columns)
        w, v = weights[first : first + KEYS_PER_INSTRUCTION, None], values[first : first + KEYS_PER_INSTRUCTION]
        largest = np.maximum((_exponents(w, -6) + _exponents(v, -6)).max(0), _exponents(accumulator, -126))
        unit = np.ldexp(1.0, np.maximum(largest, -100) - FRACTION_BITS)
        summed = (np.trunc(w * v / unit).sum(0) + np.trunc(accumulator / unit)) * unit
        unit = np.ldexp(1.0, np.maximum(_exponents(summed, -126), -100) - FRACTION_BITS)
        accumulator = np.trunc(summed / unit) * unit
    return total.astype(np.float64) + accumulator


def needle_error(seqlen: int, depth: float, flush_every: int, seed: int = 0) -> float:
    """Largest error relative to the values' RMS when one key has as much weight as 1 / 4 of all others together. Weights are
    exact in e4m3, so that what is seen is the sums' doing; values have a mean that is not zero, as those of models do.
    depth: where the key stands in the order of the sum, 0 first (which hides most of what follows), 1 last."""
    generator = np.random.default_rng(seed)
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    values = table[generator.integers(80, 127, (seqlen, 16))]
    weights = np.full(seqlen, 2.0 ** round(math.log2(1024 / seqlen)))
    weights[min(seqlen - 1, int(depth * seqlen))] = 256.0
    exact = weights @ values
    error = np.abs(hopper_sum(weights, values, flush_every) - exact).max()
    return float(error / weights.sum() / np.sqrt(np.mean(values**2)))


# --- the picture ---


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "flash_ext"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for n, (inputs, label) in enumerate(
        ((outliers_everywhere, "outliers everywhere"), (outliers_in_some_rows, "in the last rows"))
    ):
        errors = pooled_rmse(inputs, range(4), 1024, 128)
        left.bar([i + 0.4 * n for i in range(len(MODES))], errors.values(), 0.4, label=label)
    left.set_xticks([i + 0.2 for i in range(len(MODES))], [mode.replace(" ", "\n") for mode in MODES])
    left.set_ylabel("RMS error of out, head_dim 128")
    left.set_yscale("log")
    left.legend()
    lengths = [2**n for n in range(10, 18)]
    for flush_every, label in ((0, "never flushed"), (16, "every 16 tiles"), (4, "every 4 tiles"), (1, "every tile")):
        right.plot(lengths, [max(needle_error(n, 0.0, flush_every), 1e-8) for n in lengths], marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="keys", ylabel="largest error / RMS of the values")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the accuracy of FP8 attention, emulated on the CPU")
    parser.add_argument("path", type=Path)
    plot(parser.parse_args().path)


if __name__ == "__main__":
    main()
