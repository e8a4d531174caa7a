"""Gradients of a family of ops, registered with the dispatcher: eager mode, torch.compile and direct calls all take them.

A family is fwd<suffix>, bwd<suffix>, reference_fwd<suffix> and reference_bwd<suffix> over one kind of inputs. The backward
(FlashAttention, Dao et al. 2022, algorithm 4) needs the inputs, out and lse; lse has a gradient of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from . import ops
from .call import WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV


def differentiable(kind: Any) -> dict[int, int]:
    """Position among the fields of `kind` (a NamedTuple's class) -> bit of `wanted`, in the order of the backward's results."""
    bits = {"q": WANT_DQ, "k": WANT_DK, "v": WANT_DV, "sinks": WANT_DSINKS, "k_bias": WANT_DK_BIAS}
    return {kind._fields.index(name): bit for name, bit in bits.items()}


def no_gradient(message: str) -> Any:
    """What an op registers that has no gradient: raises NotImplementedError with this message."""

    def refuse(ctx, *_):
        raise NotImplementedError(message)

    return refuse


def register(kind: Any, num_tensors: int, suffix: str = "") -> None:
    """Registers the gradients of the ops fwd<suffix>, bwd<suffix>, reference_fwd<suffix> and reference_bwd<suffix>.

    kind: the NamedTuple of their leading arguments, the first num_tensors of them tensors or None; the forwards take, after
    these, return_max_logit, deterministic and backend, the reference return_max_logit and reason.
    """
    wanted_bits = differentiable(kind)
    alibi_slopes = kind._fields.index("alibi_slopes")

    def save(ctx, inputs, output) -> None:
        out, lse, max_logit = output
        ctx.save_for_backward(*inputs[:num_tensors], out, lse)
        ctx.options = inputs[num_tensors:]
        ctx.mark_non_differentiable(max_logit)
        ctx.set_materialize_grads(False)

    def gradients(ctx, bwd, dout, dlse, options, deterministic, chosen):
        """A gradient, or None, for each input of the forward; bwd's last argument is `chosen` (backend or reason)."""
        if ctx.needs_input_grad[alibi_slopes]:
            raise NotImplementedError("attention: alibi_slopes have no gradient; detach them")
        wanted = sum(bit for position, bit in wanted_bits.items() if ctx.needs_input_grad[position])
        q, k, v, *rest, out, lse = ctx.saved_tensors
        computed = ops.call(bwd, dout, dlse, q, k, v, out, lse, *rest, *options, deterministic, wanted, chosen)
        results = [None] * (num_tensors + len(ctx.options))
        for (position, bit), gradient in zip(wanted_bits.items(), computed, strict=True):
            results[position] = gradient if wanted & bit else None
        return tuple(results)

    def fwd_backward(ctx, dout, dlse, _):
        *options, _return_max_logit, deterministic, backend = ctx.options
        bwd = getattr(torch.ops.flash_ext, f"bwd{suffix}")
        return gradients(ctx, bwd, dout, dlse, options, deterministic, backend)

    def reference_fwd_backward(ctx, dout, dlse, _):
        *options, _return_max_logit, reason = ctx.options
        bwd = getattr(torch.ops.flash_ext, f"reference_bwd{suffix}")
        return gradients(ctx, bwd, dout, dlse, options, True, reason)

    no_double_backward = no_gradient(
        "attention: double backward is not supported; torch.nn.functional.scaled_dot_product_attention with the MATH "
        "backend has one"
    )
    for name, backward, setup in (
        ("fwd", fwd_backward, save),
        ("reference_fwd", reference_fwd_backward, save),
        ("bwd", no_double_backward, None),
        ("reference_bwd", no_double_backward, None),
    ):
        torch.library.register_autograd(f"flash_ext::{name}{suffix}", backward, setup_context=setup, lib=ops._library)
