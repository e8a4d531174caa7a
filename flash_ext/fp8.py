"""FP8 calls: what flash_ext.attention and its relatives do with float8_e4m3fn q, k and v; training through them.

| op | implemented by |
|---|---|
| flash_ext::fwd_fp8 | CUDA: _C (launches, or calls the reference op with the reasons); elsewhere the reference |
| flash_ext::reference_fwd_fp8 | here: q, k and v times their scales, in float32, through flash_ext::reference_fwd |

Forward only. The scales are those of flash_ext.quantize_fp8 (shapes there); the reference rounds nothing but its result,
a kernel also rounds the weights to e4m3 and sums as the tensor cores do (docs/numerics.md, "FP8").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import env, ops
from .call import Call, Inputs
from .quantize import BLOCK_ROWS, num_packed_blocks, quantize_fp8, sequence_of_rows

FP8 = torch.float8_e4m3fn
OUT_DTYPES = (torch.bfloat16, torch.float16)
DEFAULT_FLUSH = -1  # flush_every=None: what the kernel's table says

_library = torch.library.Library("flash_ext", "FRAGMENT")
_SCALES = "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, ScalarType out_dtype, int flush_every, bool return_max_logit"
for _name, _last in (("fwd_fp8", "str? backend"), ("reference_fwd_fp8", "str reason")):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor v, {ops._REST}, {_SCALES}, {_last}) -> (Tensor out, Tensor lse, Tensor max_logit)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


# --- argument checks (flash_ext/arguments.py calls them) ---


def type_violations(call: Call) -> list[str]:
    """Wrong Python types among the arguments that only FP8 calls have."""
    found = []
    for name in ("q_descale", "k_descale", "v_descale"):
        value = getattr(call, name)
        if value is not None and not isinstance(value, Tensor):
            found.append(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    if call.out_dtype is not None and not isinstance(call.out_dtype, torch.dtype):
        found.append(f"out_dtype must be a torch.dtype or None, got {type(call.out_dtype).__name__}")
    flush = call.flush_every
    if flush is not None and (not isinstance(flush, int) or isinstance(flush, bool)):
        found.append(f"flush_every must be an int or None, got {type(flush).__name__}")
    return found


def violations(call: Call, sized: bool) -> list[str]:
    """What is wrong with these arguments. sized: the shapes of q, k and v are right."""
    given = [n for n in ("q_descale", "k_descale", "v_descale", "out_dtype", "flush_every") if getattr(call, n) is not None]
    if call.q.dtype != FP8:
        return [
            f"{', '.join(given)}: only for float8_e4m3fn q, k and v (flash_ext.quantize_fp8 makes them), got {call.q.dtype}"
        ] * (len(given) > 0)
    found = []
    if call.block_mask is not None:
        found.append(
            "block_mask is not supported with float8_e4m3fn q, k and v: give them in 16 bits, or the mask as causal, window_size "
            "or sequences of attention_varlen"
        )
    if call.out_dtype is not None and call.out_dtype not in OUT_DTYPES:
        found.append(f"out_dtype must be bfloat16 or float16, got {call.out_dtype}")
    if call.flush_every is not None and call.flush_every < 0:
        found.append(f"flush_every must be at least 0 (0: never), got {call.flush_every}")
    for name in ("q_descale", "k_descale", "v_descale"):
        descale = getattr(call, name)
        if descale is not None:
            found += _scale_violations(call, name, descale, sized)
    return found


def _scale_violations(call: Call, name: str, descale: Tensor, sized: bool) -> list[str]:
    x = call.q if name == "q_descale" else call.k
    found = []
    if descale.dtype != torch.float32:
        found.append(f"{name}.dtype must be float32, got {descale.dtype}")
    if descale.device != call.q.device:
        found.append(f"{name}.device must equal q.device, got {descale.device} and {call.q.device}")
    if sized:
        heads, heads_kv = x.shape[-2], call.k.shape[-2]
        if call.cu_seqlens_q is not None:
            cu_seqlens = call.cu_seqlens_q if name == "q_descale" else call.cu_seqlens_k
            batch = cu_seqlens.shape[0] - 1 if cu_seqlens.dim() == 1 else 0
            block = (1, heads, num_packed_blocks(x.shape[0], batch))
        else:
            batch = x.shape[0]
            block = (batch, heads, (x.shape[1] + BLOCK_ROWS - 1) // BLOCK_ROWS)
        allowed = [(), (1,), (batch, heads), block]
        if name == "q_descale" and heads != heads_kv:
            allowed.append((batch, heads_kv))
        if all(len(shape) != descale.dim() or any(a != b for a, b in zip(shape, descale.shape, strict=True)) for shape in allowed):
            shapes = " or ".join(str(tuple(shape)) for shape in allowed)
            found.append(f"{name} must have shape {shapes} (tensor, head or block of 64 rows), got {tuple(descale.shape)}")
    readable = descale.device.type == "cpu" or (call.validate and descale.device.type != "meta")
    readable = readable and not torch.compiler.is_compiling() and not isinstance(descale, FakeTensor)
    if not found and readable and not bool((torch.isfinite(descale) & (descale > 0)).all()):
        found.append(f"{name} must be positive and finite")
    return found


# --- the reference ---


def dequantise(x8: Tensor, descale: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x8 times its scales, float32. x8 (batch, seqlen, heads, dim), or packed with cu_seqlens; descale as quantize_fp8's, also
    for groups of neighbouring heads; None: 1."""
    x = x8.float()
    if descale is None:
        return x
    heads = x.shape[-2]
    if descale.dim() < 2:
        return x * descale.reshape(())
    group = heads // descale.shape[1]
    if cu_seqlens is None:
        if descale.dim() == 2:
            return x * descale.repeat_interleave(group, 1)[:, None, :, None]
        return x * descale.repeat_interleave(BLOCK_ROWS, 2)[:, :, : x.shape[1]].transpose(1, 2)[..., None]
    sequence, row, _ = sequence_of_rows(cu_seqlens, x.shape[0])
    if descale.dim() == 2:
        if descale.shape[0] == 0:
            return x
        return x * descale.repeat_interleave(group, 1)[sequence][..., None]
    if descale.shape[2] == 0:
        return x
    first = cu_seqlens.long().clamp(0, x.shape[0]) // BLOCK_ROWS
    place = (first[sequence] + sequence + row // BLOCK_ROWS).clamp(0, descale.shape[2] - 1)
    return x * descale[0].transpose(0, 1)[place][..., None]


_NUM_INPUTS = len(Inputs._fields)


def _reference_fwd_fp8(*arguments):
    inputs = Inputs(*arguments[:_NUM_INPUTS])
    q_descale, k_descale, v_descale, out_dtype, _flush_every, return_max_logit, reason = arguments[_NUM_INPUTS:]
    if reason:
        env.warn_of_fallback("attention (FP8 forward)", reason)
    inputs = inputs._replace(
        q=dequantise(inputs.q, q_descale, inputs.cu_seqlens_q),
        k=dequantise(inputs.k, k_descale, inputs.cu_seqlens_k),
        v=dequantise(inputs.v, v_descale, inputs.cu_seqlens_k),
    )
    out, lse, max_logit = torch.ops.flash_ext.reference_fwd(*inputs, return_max_logit, "")
    return out.to(out_dtype), lse, max_logit


def _fwd_fp8(*arguments):
    *rest, backend = arguments
    if backend not in (None, "reference"):
        why = "FP8 kernels need a GPU of compute capability 8.9 or later"
        raise ValueError(f"attention: backend '{backend}' cannot run this FP8 call; {why}")
    return _reference_fwd_fp8(*rest, ops._reason_without_kernels(arguments[0], backend))


def _fake(*arguments):
    inputs = Inputs(*arguments[:_NUM_INPUTS])
    out_dtype, _flush_every, return_max_logit = arguments[_NUM_INPUTS + 3 : _NUM_INPUTS + 6]
    q = inputs.q
    return (
        q.new_empty(inputs.out_shape, dtype=out_dtype),
        q.new_empty(inputs.lse_shape, dtype=torch.float32),
        q.new_empty(q.shape[-2] if return_max_logit else 0, dtype=torch.float32),
    )


def _no_backward(ctx, *_):
    raise NotImplementedError(
        "attention: FP8 calls have no backward; flash_ext.attention_fp8_straight_through trains with an FP8 forward and a "
        "16-bit backward"
    )


for _name, _implementation in (("fwd_fp8", _fwd_fp8), ("reference_fwd_fp8", ops._kept(_reference_fwd_fp8))):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"flash_ext::{_name}", _no_backward, lib=_library)


# --- the public side ---


def run(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit) of a checked FP8 call."""
    return ops.call(
        torch.ops.flash_ext.fwd_fp8, *call.inputs(), call.q_descale, call.k_descale, call.v_descale,
        call.out_dtype or torch.bfloat16, DEFAULT_FLUSH if call.flush_every is None else call.flush_every,
        call.return_max_logit, call.backend,
    )  # fmt: skip


def plan(host: Any, device: str, call: Call, backend: str | None, layout: Any) -> dict[str, Any]:
    """_host's plan of an FP8 call; layout: of a tensor, as _host takes it."""
    scales = (call.q_descale, call.k_descale, call.v_descale)
    blocks = [s is not None and s.dim() == 3 for s in scales]
    leftpad = call.leftpad_q is not None or call.leftpad_k is not None
    return host.plan_fwd_fp8(
        device=device, q=layout(call.q), k=layout(call.k), v=layout(call.v), causal=call.causal,
        window_left=call.window_size[0], window_right=call.window_size[1], softcap=float(call.softcap), backend=backend or "",
        num_sequences=-1 if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1,
        num_parts=0 if call.split_boundaries is None else len(call.split_boundaries) - 1,
        alibi=call.alibi_slopes is not None, k_bias=call.k_bias is not None, leftpad=leftpad,
        block_scales=blocks[1] or blocks[2] or (blocks[0] and leftpad), flushes=call.flush_every != 0,
        whole_blocks=all(b % BLOCK_ROWS == 0 or b == call.k.shape[1] for b in call.split_boundaries or ()),
        shared_q_scale=scales[0] is None or scales[0].dim() < 2 or (not blocks[0] and scales[0].shape[1] == call.k.shape[-2]),
    )  # fmt: skip


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, scale, hadamard, deterministic, q, k, v, sinks, k_bias):
        q8, q_descale = quantize_fp8(q, scale, hadamard, cu_seqlens=call.cu_seqlens_q)
        k8, k_descale = quantize_fp8(k, scale, hadamard, cu_seqlens=call.cu_seqlens_k)
        v8, v_descale = quantize_fp8(v, scale, cu_seqlens=call.cu_seqlens_k)
        out, lse, _ = run(
            call._replace(
                q=q8, k=k8, v=v8, sinks=sinks, k_bias=k_bias, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
                out_dtype=q.dtype,
            )
        )  # fmt: skip
        ctx.call, ctx.deterministic = call, deterministic
        ctx.save_for_backward(q, k, v, out, lse, sinks, k_bias)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, sinks, k_bias = ctx.saved_tensors
        inputs = ctx.call._replace(q=q, k=k, v=v, sinks=sinks, k_bias=k_bias).inputs()
        needed = ctx.needs_input_grad[4:]
        wanted = sum(bit for bit, need in zip((1, 2, 4, 8, 16), needed, strict=True) if need)
        gradients = ops.call(
            torch.ops.flash_ext.bwd, dout, dlse, q, k, v, out, lse, *inputs[3:], ctx.deterministic, wanted, ctx.call.backend
        )
        return None, None, None, None, *(g if need else None for g, need in zip(gradients, needed, strict=True))


def attention_fp8_straight_through(
    q: Tensor, k: Tensor, v: Tensor, *, scale: str = "block", hadamard: bool = True, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention for training with an FP8 forward and a 16-bit backward (a straight-through estimator, Bengio et al. 2013).

    The forward quantises q, k and v (flash_ext.quantize_fp8) and runs the FP8 attention; the backward is that of
    flash_ext.attention at the 16-bit q, k and v, with the forward's out and lse, as if nothing had been rounded.

    Args:
        q, k, v: as flash_ext.attention, or packed as flash_ext.attention_varlen with cu_seqlens_q and cu_seqlens_k among the
            options; bfloat16 or float16.
        scale: 'block', 'head' or 'tensor', of all three.
        hadamard: rotate q and k before they are rounded.
        options: those of flash_ext.attention or attention_varlen, without return_max_logit.

    Returns:
        out, or (out, lse) with return_lse=True: shapes of flash_ext.attention, out in q's dtype. Both have gradients.

    Raises: as flash_ext.attention.
    """
    from .arguments import autocast, check_arguments

    if options.pop("return_max_logit", False):
        raise ValueError("attention_fp8_straight_through: return_max_logit is not supported; attention with FP8 tensors has it")
    q, k, v = autocast(q, k, v)
    function = "attention_varlen" if options.get("cu_seqlens_q") is not None else "attention"
    call = Call(q, k, v, **options, function=function)
    check_arguments(call)
    if q.dtype not in OUT_DTYPES:
        raise ValueError(f"attention_fp8_straight_through: q.dtype must be bfloat16 or float16, got {q.dtype}")
    deterministic = call.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    plain = call._replace(q=None, k=None, v=None, sinks=None, k_bias=None)
    out, lse = _StraightThrough.apply(plain, scale, hadamard, deterministic, q, k, v, call.sinks, call.k_bias)
    return (out, lse) if call.return_lse else out
