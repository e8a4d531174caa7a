"""The oracle: attention by its definition, dense and differentiable, and the rule by which a result passes.

It shares no code with flash_ext. Computed in float64 it is the truth; computed in the dtype under test it is "plain
PyTorch", whose error the rule allows twice.
"""

from __future__ import annotations

import itertools
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
    """Everything that one call computes, forward and backward; None where the call has no such thing."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None
    dk_bias: Tensor | None = None
    max_logit: Tensor | None = None


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


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_bias: Tensor | None = None,
    part: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit) of q (batch, seqlen_q, num_heads, head_dim); part: the keys (begin, end) that take part."""
    group = q.shape[2] // k.shape[2]
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    (batch, heads, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
    scores = (q @ k.mT) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    keep = visible_keys(seqlen_q, seqlen_k, causal, window_size, q.device)
    j = torch.arange(seqlen_k, device=q.device)
    if alibi_slopes is not None:
        level = torch.arange(seqlen_q, device=q.device) + (seqlen_k - seqlen_q)
        slopes = alibi_slopes.to(q.dtype).expand(batch, heads)[:, :, None, None]
        scores = scores - slopes * (level[:, None] - j).abs().to(q.dtype)
    if k_bias is not None:
        bias = k_bias.to(q.dtype).repeat_interleave(group, dim=1)[:, :, None]
        scores = scores + bias.masked_fill(bias == -math.inf, 0.0)
        keep = keep & (bias != -math.inf)
    if part is not None:
        keep = keep & (j >= part[0]) & (j < part[1])
    keep = keep.expand(batch, heads, seqlen_q, seqlen_k)
    visible = scores.detach().masked_fill(~keep, -math.inf)
    empty = visible.new_full((heads, 1), -math.inf)
    max_logit = torch.cat([visible.transpose(0, 1).flatten(1), empty], 1).amax(1)
    sees = keep.any(-1)
    # A row without keys is computed as if it saw them all and discarded, which keeps NaN out of its gradients.
    scores = scores.masked_fill(~keep & sees[..., None], -math.inf)
    if sinks is None:
        out = torch.where(sees[..., None], torch.softmax(scores, -1) @ v, 0.0)
        return out.transpose(1, 2), torch.logsumexp(scores, -1).masked_fill(~sees, -math.inf), max_logit
    sink = sinks.to(q.dtype)[:, None].expand(batch, heads, seqlen_q)
    with_sink = torch.cat([scores, sink[..., None]], -1)
    out = torch.where(sees[..., None], torch.softmax(with_sink, -1)[..., :-1] @ v, 0.0)
    return out.transpose(1, 2), torch.where(sees, torch.logsumexp(with_sink, -1), sink), max_logit


def dense_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) in the inputs' dtype, with the whole matrix of scores in memory; options as flash_ext.attention."""
    return _dense(q, k, v, **options)[:2]


def shown_rows(cu_seqlens: Any, seqused: Any, leftpad: Any, b: int) -> slice:
    """The rows that sequence b of a packed tensor shows."""
    begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
    last = end if seqused is None else begin + int(seqused[b])
    first = begin if leftpad is None else begin + int(leftpad[b])
    return slice(first, max(first, last))


def _packed(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, leftpad_q: Tensor | None = None, leftpad_k: Tensor | None = None,
    k_bias: Tensor | None = None, alibi_slopes: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """_dense of each sequence, laid where it came from."""
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf)
    max_logit = q.new_full((q.shape[1],), -math.inf)
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = shown_rows(cu_seqlens_q, seqused_q, leftpad_q, b), shown_rows(cu_seqlens_k, seqused_k, leftpad_k, b)
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b]
        if k_bias is not None:
            options["k_bias"] = k_bias[None, :, keys]
        of_sequence = _dense(q[None, rows], k[None, keys], v[None, keys], **options)
        out[rows], lse[:, rows] = of_sequence[0][0], of_sequence[1][0]
        max_logit = torch.maximum(max_logit, of_sequence[2])
    return out, lse, max_logit


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit) of any call; options: those of attention, attention_varlen or attention_partials."""
    boundaries = options.pop("split_boundaries", None)
    if boundaries is not None:
        parts = [_dense(q, k, v, **options, part=part) for part in itertools.pairwise(boundaries)]
        out, lse, max_logit = (torch.stack(results) for results in zip(*parts, strict=True))
        return out, lse, max_logit
    return (_packed if "cu_seqlens_q" in options else _dense)(q, k, v, **options)


def dense_results(
    inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor | None, dlse: Tensor | None, dtype: torch.dtype, options: dict[str, Any]
) -> Results:
    """The oracle's results and gradients for dout and dlse (None: no gradient flows into that result), computed in dtype."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in zip("qkv", inputs, strict=True)}
    learnt = {name: options[name] for name in ("sinks", "k_bias") if options.get(name) is not None}
    leaves |= {name: t.detach().to(dtype).requires_grad_() for name, t in learnt.items()}
    out, lse, max_logit = _attention(**{**options, **leaves})
    total = out.new_zeros(())
    for result, gradient in ((out, dout), (lse.masked_fill(lse.isinf(), 0.0), dlse)):
        if gradient is not None:
            total = total + (result * gradient.to(dtype)).sum()
    gradients = [None] * len(leaves)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    filled = {
        f"d{name}": torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }
    return Results(out.detach(), lse.detach(), max_logit=max_logit, **filled)


def _largest(tensor: Tensor | None) -> float:
    """The largest finite magnitude; rows that no sequence shows may hold anything."""
    if tensor is None or tensor.numel() == 0:
        return 0.0
    return tensor.double().abs().where(tensor.isfinite(), 0.0).max().item()


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
    shift = (dout.double() * (truth.out.to(dtype).double() - truth.out)).sum(-1).mT
    return dense_results(inputs, dout, -shift if dlse is None else dlse.double() - shift, torch.float64, options)


def _magnitudes(inputs: tuple, dout: Tensor | None, dlse: Tensor | None, options: dict, truth: Results) -> dict[str, float]:
    """The size of the terms that each result sums, so that what cancels can be judged."""
    q, k, v = inputs
    scale = 1.0 / math.sqrt(q.shape[-1]) if options.get("softmax_scale") is None else abs(options["softmax_scale"])
    q_size, k_size, v_size, dout_size, dlse_size = (_largest(t) for t in (q, k, v, dout, dlse))
    score = scale * q_size * k_size * q.shape[-1] ** 0.5
    if options.get("alibi_slopes") is not None:
        score += _largest(options["alibi_slopes"]) * max(q.shape[-3], k.shape[-3])
    score += _largest(options.get("k_bias")) + _largest(options.get("sinks"))
    ds = dout_size * v_size * v.shape[-1] ** 0.5 + dlse_size
    rows = (q.numel() / max(1, q.shape[-1])) ** 0.5
    magnitudes = {
        "out": v_size, "lse": 1.0 + score, "dq": scale * ds * k_size, "dk": scale * ds * q_size, "dv": dout_size,
        "dsinks": ds * rows, "dk_bias": ds * rows, "max_logit": score,
    }  # fmt: skip
    if q.dtype == torch.float64:  # "plain PyTorch" is the truth itself, without the error that exp gives every P
        magnitudes |= {name: (1.0 + score) * size for name, size in magnitudes.items() if name not in ("lse", "max_logit")}
    return {name: size for name, size in magnitudes.items() if getattr(truth, name) is not None}


def check_results(
    got: Results,
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor | None,
    dlse: Tensor | None,
    options: dict[str, Any],
) -> None:
    """AssertionError with one line for each result that breaks the rule. options: everything else that the call was given;
    a max_logit that is None was not asked for."""
    dtype = inputs[0].dtype
    wide = accumulation_dtype(dtype)

    def on_cpu(value: Any) -> Any:
        return value.detach().cpu() if isinstance(value, Tensor) else value

    cpu, cpu_options = tuple(on_cpu(t) for t in inputs), {name: on_cpu(value) for name, value in options.items()}
    gradients = on_cpu(dout), on_cpu(dlse)
    truth = dense_results(cpu, *gradients, torch.float64, cpu_options)
    inherent = _with_rounded_out(truth, cpu, *gradients, cpu_options, dtype)
    plain = vars(dense_results(inputs, dout, dlse, dtype, options))
    in_wide = dense_results(inputs, None, None, wide, options)
    plain |= {"lse": in_wide.lse, "max_logit": in_wide.max_logit}
    problems = []
    for name, magnitude in _magnitudes(cpu, *gradients, cpu_options, truth).items():
        result = getattr(got, name)
        if name == "max_logit" and result is None:
            continue
        # dsinks and dk_bias are wide sums of terms as precise as the inputs.
        held_in = dtype if name in ("out", "dq", "dk", "dv") else wide
        judged_as = wide if name in ("lse", "max_logit") else dtype
        if result is None or result.dtype != held_in:
            problems.append(f"{name}: {'absent' if result is None else f'dtype {result.dtype}'}, expected {held_in}")
        else:
            expected, unavoidable = getattr(truth, name), getattr(inherent, name)
            problems.append(compare(name, result, expected, judged_as, plain[name], unavoidable, magnitude))
    problems = [problem for problem in problems if problem]
    assert not problems, "\n".join(problems)
