"""No result, no time: a case is timed only after its result stood beside the definition in float64.

Two heads (the first of the first sequence, the last of the last), 256 rows of each including first and last: out, dq for
those rows of queries, dk and dv for those rows of keys. The rule is the one of tests/oracle.py; the truth is computed
here in chunks of rows, on the device, so that 16k tokens take a fraction of a second and no dense matrix.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .presets import DTYPES, Case, Tensors

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import oracle

ROWS = 256
CHUNK_ELEMENTS = 2**25  # scores computed at once
FP8_BOUND = 6e-2  # relative Frobenius error: P is rounded to e4m3 (unit roundoff 2^-4), the sums average it


@dataclass(frozen=True)
class Sample:
    """One head of one sequence: the rows of the result, of dq and of dk, dv that are looked at."""

    batch: int
    head: int
    rows: Tensor
    keys: Tensor


def samples(case: Case, device: torch.device) -> list[Sample]:
    def spread(length: int) -> Tensor:
        return torch.linspace(0, length - 1, min(ROWS, length), device=device, dtype=torch.float64).round().long()

    rows, keys = spread(case.seqlen_q), spread(case.seqlen_k)
    chosen = dict.fromkeys(((0, 0), (case.batch - 1, case.heads - 1)))
    return [Sample(batch, head, rows, keys) for batch, head in chosen]


def _by_definition(case: Case, tensors: Tensors, sample: Sample, dtype: torch.dtype, shift: bool) -> dict[str, Tensor]:
    """out, dq at the sample's rows, dk and dv at its keys, computed in dtype (sums over chunks in float32 at least).

    shift: take delta = rowsum(dout * out) from the out rounded to the result's dtype, as the algorithm does.
    """
    group = case.heads // case.heads_kv
    kv_head, scale, backward = sample.head // group, case.head_dim**-0.5, case.direction != "fwd"
    wide = torch.promote_types(dtype, torch.float32)
    sinks = case.sink_logits(tensors.q.device)
    k, v = (case.keys_of(t, sample.batch, kv_head).to(dtype) for t in (tensors.k, tensors.v))
    found = {"out": k.new_zeros(len(sample.rows), case.head_dim_v, dtype=dtype)}
    if backward:
        found["dq"] = k.new_zeros(len(sample.rows), case.head_dim, dtype=dtype)
        found["dk"] = k.new_zeros(len(sample.keys), case.head_dim, dtype=wide)
        found["dv"] = k.new_zeros(len(sample.keys), case.head_dim_v, dtype=wide)
    all_rows = torch.arange(case.seqlen_q, device=k.device) if backward else sample.rows
    # dk and dv sum over every query head of the key head; out and dq belong to the sample's own head.
    for head in range(kv_head * group, (kv_head + 1) * group) if backward else [sample.head]:
        all_q = tensors.q[sample.batch, :, head].to(dtype)
        for rows in all_rows.split(max(1, CHUNK_ELEMENTS // case.seqlen_k)):
            q = all_q[rows]
            keep = case.visible(rows)
            scores = q @ k.T * scale
            slope = 1.0
            if case.softcap > 0:
                tanh = torch.tanh(scores / case.softcap)
                scores, slope = case.softcap * tanh, 1 - tanh.square()
            p = _weights(scores.masked_fill_(~keep, -math.inf), None if sinks is None else sinks[head])
            out = p @ v
            mine = torch.isin(sample.rows, rows) if head == sample.head else torch.zeros_like(sample.rows, dtype=torch.bool)
            local = torch.searchsorted(rows, sample.rows[mine])
            found["out"][mine] = out[local]
            if not backward:
                continue
            dout = tensors.dout[sample.batch, rows, head].to(dtype)
            delta = (dout * (out.to(tensors.dout.dtype).to(dtype) if shift else out)).sum(-1, keepdim=True)
            ds = p * (dout @ v.T - delta) * slope * scale
            found["dq"][mine] = (ds @ k)[local]
            found["dk"] += (ds[:, sample.keys].T @ q).to(wide)
            found["dv"] += (p[:, sample.keys].T @ dout).to(wide)
    return found


def _weights(scores: Tensor, sink: Tensor | None) -> Tensor:
    """softmax, with the sink in its denominator; rows that see nothing give zeros."""
    if sink is None:
        return torch.softmax(scores, -1).nan_to_num_(0.0)
    column = sink.to(scores.dtype).expand(len(scores), 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[:, :-1]


@dataclass(frozen=True)
class Truth:
    """What the results of one case are compared with, for each sample."""

    case: Case
    samples: list[Sample]
    expected: list[dict[str, Tensor]]
    inherent: list[dict[str, Tensor]]
    plain: list[dict[str, Tensor]]
    magnitudes: dict[str, float]


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, without a copy of a cache that fills half of the memory."""
    if tensor.dtype.itemsize == 1:  # no reduction takes it
        tensor = tensor.float()
    return max(abs(bound.item()) for bound in tensor.aminmax())


def truth_of(case: Case, tensors: Tensors) -> Truth:
    chosen = samples(case, tensors.q.device)
    dtype = tensors.dout.dtype

    def run(dtype: torch.dtype, shift: bool) -> list[dict[str, Tensor]]:
        return [_by_definition(case, tensors, sample, dtype, shift) for sample in chosen]

    expected = run(torch.float64, False)
    inherent = run(torch.float64, True) if case.direction != "fwd" else expected
    q, k, v, dout = (_largest(t) for t in (tensors.q, tensors.k, tensors.v, tensors.dout))
    scale = case.head_dim**-0.5
    ds = dout * v * case.head_dim_v**0.5
    magnitudes = {"out": v, "dq": scale * ds * k, "dk": scale * ds * q, "dv": dout}
    return Truth(case, chosen, expected, inherent, run(dtype, False), magnitudes)


def problems_of(truth: Truth, results: dict[str, Tensor]) -> list[str]:
    """One line for each of the results (out, dq, dk, dv as whole tensors) that breaks the rule; empty when all pass."""
    case, found = truth.case, []
    group = case.heads // case.heads_kv
    for sample, expected, inherent, plain in zip(truth.samples, truth.expected, truth.inherent, truth.plain, strict=True):
        for name, tensor in results.items():
            head, rows = (sample.head, sample.rows) if name in ("out", "dq") else (sample.head // group, sample.keys)
            got = tensor[sample.batch, rows, head]
            if DTYPES[case.dtype].itemsize == 1:
                problem = _fp8_problem(name, got, expected[name])
            else:
                problem = oracle.compare(
                    name, got, expected[name], got.dtype, plain[name].to(got.dtype), inherent[name], truth.magnitudes[name]
                )
            if problem:
                found.append(f"sequence {sample.batch}, head {sample.head}: {problem}")
    return found


def _fp8_problem(name: str, got: Tensor, expected: Tensor) -> str | None:
    error = ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if error <= FP8_BOUND:  # False for NaN
        return None
    return f"{name}: Frobenius error {error:.3g} of the truth, allowed {FP8_BOUND}"
