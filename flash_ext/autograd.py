"""Gradients of the ops, registered with the dispatcher: eager mode, torch.compile and direct calls all take them.

The backward (FlashAttention, Dao et al. 2022, algorithm 4) needs the inputs, out and lse; lse has a gradient of its own.
"""

from __future__ import annotations

import torch

from . import ops
from .call import TENSORS, WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV, Inputs

# Position among the ops' arguments -> bit of `wanted`, in the order of the backward's results.
_DIFFERENTIABLE = {
    Inputs._fields.index(name): bit
    for name, bit in {"q": WANT_DQ, "k": WANT_DK, "v": WANT_DV, "sinks": WANT_DSINKS, "k_bias": WANT_DK_BIAS}.items()
}
_ALIBI_SLOPES = Inputs._fields.index("alibi_slopes")


def _save_for_backward(ctx, inputs, output) -> None:
    out, lse, max_logit = output
    ctx.save_for_backward(*inputs[:TENSORS], out, lse)
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)


def _gradients(ctx, bwd, dout, dlse, options, deterministic, chosen):
    """A gradient, or None, for each input of the forward; bwd's last argument is `chosen` (backend or reason)."""
    if ctx.needs_input_grad[_ALIBI_SLOPES]:
        raise NotImplementedError("attention: alibi_slopes have no gradient; detach them")
    wanted = sum(bit for position, bit in _DIFFERENTIABLE.items() if ctx.needs_input_grad[position])
    q, k, v, *rest, out, lse = ctx.saved_tensors
    computed = ops.call(bwd, dout, dlse, q, k, v, out, lse, *rest, *options, deterministic, wanted, chosen)
    gradients = [None] * (TENSORS + len(ctx.options))
    for (position, bit), gradient in zip(_DIFFERENTIABLE.items(), computed, strict=True):
        gradients[position] = gradient if wanted & bit else None
    return tuple(gradients)


def _fwd_backward(ctx, dout, dlse, _):
    *options, _return_max_logit, deterministic, backend = ctx.options
    return _gradients(ctx, torch.ops.flash_ext.bwd, dout, dlse, options, deterministic, backend)


def _reference_fwd_backward(ctx, dout, dlse, _):
    *options, _return_max_logit, reason = ctx.options
    return _gradients(ctx, torch.ops.flash_ext.reference_bwd, dout, dlse, options, True, reason)


def _no_double_backward(ctx, *_):
    raise NotImplementedError(
        "attention: double backward is not supported; torch.nn.functional.scaled_dot_product_attention with the MATH "
        "backend has one"
    )


def _no_gradient_of_statistics(ctx, *_):
    raise NotImplementedError("bwd_preprocess has no gradient; differentiate flash_ext.attention")


for _name, _backward, _setup in (
    ("fwd", _fwd_backward, _save_for_backward),
    ("reference_fwd", _reference_fwd_backward, _save_for_backward),
    ("bwd", _no_double_backward, None),
    ("reference_bwd", _no_double_backward, None),
    ("bwd_preprocess", _no_gradient_of_statistics, None),
):
    torch.library.register_autograd(f"flash_ext::{_name}", _backward, setup_context=_setup, lib=ops._library)
