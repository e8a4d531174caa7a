"""Gradients of the ops, registered with the dispatcher: eager mode, torch.compile and direct calls all take them.

The backward (FlashAttention, Dao et al. 2022, algorithm 4) needs q, k, v, out and lse; lse has a gradient of its own.
"""

from __future__ import annotations

import torch

from . import ops


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _fwd_backward(ctx, dout, dlse):
    *scoring, deterministic, backend = ctx.options
    gradients = ops.call(torch.ops.flash_ext.bwd, dout, dlse, *ctx.saved_tensors, *scoring, deterministic, backend)
    return *gradients, *(None for _ in ctx.options)


def _reference_fwd_backward(ctx, dout, dlse):
    *scoring, reason = ctx.options
    gradients = torch.ops.flash_ext.reference_bwd(dout, dlse, *ctx.saved_tensors, *scoring, True, reason)
    return *gradients, *(None for _ in ctx.options)


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
