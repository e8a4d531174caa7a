"""The oracle: attention by its definition, dense and differentiable, and the rule by which a result passes.

It shares no code with flash_ext. Computed in float64 it is the truth; computed in the dtype under test it is "plain
PyTorch", whose error the rule allows twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative error in the Frobenius norm. 16-bit: the rounding of P, dS and the results; wider: of the accumulation.
FROBENIUS_BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6, torch.float64: 1e-14}
# Where the true value vanishes by cancellation, errors are relative to the terms that cancel: this many roundings.
CANCELLATION_ROUNDINGS = 16


@dataclass(frozen=True)
class Results:
    """Everything that one call computes, forward and backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible_keys(seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int], device: Any = "cpu") -> Tensor:
    """(seqlen_q, seqlen_k) bool: the key that stands below row i in the bottom-right aligned square is i + seqlen_k - seqlen_q."""
    left, right = window_size
    distance = torch.arange(seqlen_k, device=device)[None] - torch.arange(seqlen_q, device=device)[:, None] - (seqlen_k - seqlen_q)
    keep = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if causal:
        keep &= distance <= 0
    elif right >= 0:
        keep &= distance <= right
    if left >= 0:
        keep &= distance >= -left
    return keep


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the inputs' dtype, with the whole matrix of scores in memory."""
    group = q.shape[2] // k.shape[2]
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    keep = visible_keys(q.shape[2], k.shape[2], causal, window_size, q.device)
    sees = keep.any(-1)
    # A row without keys is computed as if it saw them all and discarded, which keeps NaN out of its gradients.
    scores = scores.masked_fill(~keep & sees[:, None], -math.inf)
    out = torch.where(sees[:, None], torch.softmax(scores, -1) @ v, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~sees, -math.inf)
    return out.transpose(1, 2), lse


def dense_results(
    inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor | None, dlse: Tensor | None, dtype: torch.dtype, options: dict[str, Any]
) -> Results:
    """dense_attention and its gradients for dout and dlse (None: no gradient flows into that result), computed in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out, lse = dense_attention(*leaves, **options)
    total = out.new_zeros(())
    for result, gradient in ((out, dout), (lse.masked_fill(lse.isinf(), 0.0), dlse)):
        if gradient is not None:
            total = total + (result * gradient.to(dtype)).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else (None,) * 3
    filled = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return Results(out.detach(), lse.detach(), *filled)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def compare(
    name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, plain: Tensor, inherent: Tensor, magnitude: float
) -> str | None:
    """What is wrong with `got`, or None. dtype is the one it was rounded to.

    (a) largest error at most twice plain PyTorch's, or twice the one inherent in the algorithm, plus two units in the last
    place of the largest value; (b) Frobenius error, relative to the truth, within the dtype's bound. Both allow what
    remains of a sum of terms of this magnitude that cancel.
    """
    if got.shape != expected.shape:
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double().cpu(), expected.double().cpu()
    if got.isnan().any() or not torch.equal(got.isinf(), expected.isinf()):
        at = (got.isnan() | (got.isinf() != expected.isinf())).nonzero()[0].tolist()
        return f"{name}: {got[tuple(at)]} at {at}, expected {expected[tuple(at)]}"
    if got.numel() == 0:
        return None
    finite = expected.isfinite()
    got, truth, plain, inherent = (t.double().cpu().where(finite, 0.0) for t in (got, expected, plain, inherent))
    error = (got - truth).abs()
    floor = CANCELLATION_ROUNDINGS * torch.finfo(accumulation_dtype(dtype)).eps * magnitude
    model_error = max(_largest(plain - truth), _largest(inherent - truth))
    allowed = 2 * model_error + 2 * torch.finfo(dtype).eps * _largest(truth) + floor
    norm_allowed = (
        FROBENIUS_BOUND[dtype] * truth.norm().item() + 2 * (inherent - truth).norm().item() + floor * math.sqrt(got.numel())
    )
    if error.max().item() <= allowed and error.norm().item() <= norm_allowed:
        return None
    at = tuple((error == error.max()).nonzero()[0].tolist())
    bad = 100.0 * (error > allowed).double().mean().item()
    return (
        f"{name}: {got[at]:.8g} at {list(at)}, expected {truth[at]:.8g}; largest error {error.max():.3g}, allowed {allowed:.3g} "
        f"({bad:.2g} % of the elements beyond it); Frobenius error {error.norm():.3g}, allowed {norm_allowed:.3g}"
    )


def _with_rounded_out(
    truth: Results, inputs: tuple, dout: Tensor | None, dlse: Tensor | None, options: dict, dtype: torch.dtype
) -> Results:
    """The truth but for one thing: the backward takes delta = rowsum(dout * out) from the rounded out, as the algorithm
    does. A shift of delta acts like a gradient of lse."""
    if dout is None:
        return truth
    shift = (dout.double() * (truth.out.to(dtype).double() - truth.out)).sum(-1).transpose(1, 2)
    return dense_results(inputs, dout, -shift if dlse is None else dlse.double() - shift, torch.float64, options)


def check_results(
    got: Results,
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    options: dict[str, Any],
) -> None:
    """AssertionError with one line for each of out, lse, dq, dk, dv that breaks the rule."""
    dtype = inputs[0].dtype
    wide = accumulation_dtype(dtype)
    cpu = tuple(t.detach().cpu() for t in inputs)
    on_cpu = [None if t is None else t.detach().cpu() for t in (dout, dlse)]
    truth = dense_results(cpu, *on_cpu, torch.float64, options)
    inherent = _with_rounded_out(truth, cpu, *on_cpu, options, dtype)
    plain = vars(dense_results(inputs, dout, dlse, dtype, options))
    plain["lse"] = dense_results(inputs, None, None, wide, options).lse

    scale = 1.0 / math.sqrt(cpu[0].shape[3]) if options.get("softmax_scale") is None else abs(options["softmax_scale"])
    q_size, k_size, v_size = (_largest(t) for t in cpu)
    dout_size, dlse_size = (0.0 if t is None else _largest(t) for t in on_cpu)
    score = scale * q_size * k_size * cpu[0].shape[3] ** 0.5
    ds = dout_size * v_size * cpu[2].shape[3] ** 0.5 + dlse_size
    magnitudes = {"out": v_size, "lse": 1.0 + score, "dq": scale * ds * k_size, "dk": scale * ds * q_size, "dv": dout_size}
    if dtype == torch.float64:  # "plain PyTorch" is the truth itself, without the error that exp gives every P
        magnitudes |= {name: (1.0 + score) * magnitude for name, magnitude in magnitudes.items() if name != "lse"}
    problems = []
    for name, magnitude in magnitudes.items():
        result, rounded_to = getattr(got, name), wide if name == "lse" else dtype
        problems.append(
            f"{name}: dtype {result.dtype}, expected {rounded_to}" if result.dtype != rounded_to
            else compare(name, result, getattr(truth, name), rounded_to, plain[name], getattr(inherent, name), magnitude)
        )  # fmt: skip
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)
