"""What attention, attention_varlen and attention_partials have in common: check a Call, run the op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import fp8, ops
from .arguments import autocast, check_arguments
from .call import Call
from .jagged_groups import JaggedGroups


def run(call: Call, groups: JaggedGroups | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, max_logit) of the op, differentiable. groups: of a packed call, short sequences that share tiles.

    Raises what the public functions document.
    """
    q, k, v = autocast(call.q, call.k, call.v)
    if q is not call.q or k is not call.k or v is not call.v:
        call = call._replace(q=q, k=k, v=v)
    check_arguments(call)
    tracing = torch.compiler.is_compiling()
    if not tracing:
        _check_eager(call)
    deterministic = call.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if call.q.dtype == fp8.FP8:
        return fp8.run(call)
    if groups is not None:
        inputs, fwd = groups.inputs(call), torch.ops.flash_ext.fwd_jagged
    elif call.block_mask is None:
        inputs, fwd = call.inputs(), torch.ops.flash_ext.fwd
    else:
        inputs, fwd = call.inputs_with_block_mask(), torch.ops.flash_ext.fwd_block_mask
    if tracing:
        return fwd(*inputs, call.return_max_logit, deterministic, call.backend)
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or (call.sinks is not None and call.sinks.requires_grad)
        or (call.k_bias is not None and call.k_bias.requires_grad)
    ):  # fmt: skip
        return ops.call(fwd, *inputs, call.return_max_logit, deterministic, call.backend)
    # Nothing to differentiate: the Python layer of the op's autograd registration costs a third of a call.
    with torch._C._AutoDispatchBelowAutograd():
        return ops.call(fwd, *inputs, call.return_max_logit, deterministic, call.backend)


def results(call: Call, groups: JaggedGroups | None = None) -> Tensor | tuple[Tensor, ...]:
    """run(call, groups), as return_lse and return_max_logit ask for it."""
    out, lse, max_logit = run(call, groups)
    if call.return_lse:
        return (out, lse, max_logit) if call.return_max_logit else (out, lse)
    return (out, max_logit) if call.return_max_logit else out


def _check_eager(call: Call) -> None:
    """What a trace cannot ask: the active torch.func transforms, and the planner about a backend asked for by name."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{call.function}: torch.func transforms (grad, vmap, jvp, ...) are not supported; use torch.autograd, or batch "
            "through the batch dimension"
        )
    if forward_ad._current_level >= 0:
        tensors = (t for t in call if isinstance(t, Tensor))
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{call.function}: forward-mode differentiation is not supported; use torch.autograd")
    if call.backend is not None and call.backend != "reference":
        from .dispatch import require_backend

        require_backend(call)
