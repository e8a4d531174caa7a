"""The ops of attention with a BlockMask: schemas, fake kernels, gradients.

| op | implemented by |
|---|---|
| flash_ext::fwd_block_mask, bwd_block_mask | CUDA: _C (launches, or calls the reference op with the reasons); else reference |
| flash_ext::reference_fwd_block_mask, reference_bwd_block_mask | flash_ext/reference_block_mask.py on any device |
| flash_ext::mask_blocks | CUDA: _C; elsewhere flash_ext/block_mask.py |

The ten tensors of a BlockMask are arguments like any other, so that compiled code and CUDA graphs see plain tensors.
"""

from __future__ import annotations

import torch

from . import env, op_gradients, ops, reference_block_mask
from .block_mask import BLOCK, WORDS, mask_blocks, num_blocks
from .call import BLOCK_MASK_TENSORS
from .call import BlockMaskInputs as Inputs
from .reference import accumulation_dtype

_QKV = "Tensor q, Tensor k, Tensor v"
_REST = (
    "Tensor row_offsets, Tensor row_partial, Tensor row_entries, Tensor column_offsets, Tensor column_partial, "
    "Tensor column_entries, Tensor bits, Tensor turns, Tensor row_order, Tensor column_order, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? k_bias, float softmax_scale, float softcap"
)
_RESULTS = "(Tensor out, Tensor lse, Tensor max_logit)"
_SAVED = f"Tensor? dout, Tensor? dlse, {_QKV}, Tensor out, Tensor lse"
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dk_bias)"
for _schema in (
    f"fwd_block_mask({_QKV}, {_REST}, bool return_max_logit, bool deterministic, str? backend) -> {_RESULTS}",
    f"bwd_block_mask({_SAVED}, {_REST}, bool deterministic, int wanted, str? backend) -> {_GRADIENTS}",
    f"reference_fwd_block_mask({_QKV}, {_REST}, bool return_max_logit, str reason) -> {_RESULTS}",
    f"reference_bwd_block_mask({_SAVED}, {_REST}, bool deterministic, int wanted, str reason) -> {_GRADIENTS}",
    "mask_blocks(Tensor mask) -> (Tensor kinds, Tensor bits)",
):
    ops._library.define(_schema, tags=ops._tags)


# --- the reference ops, and the ops where the compiled library does not serve the device ---


def _check(inputs: Inputs) -> None:
    """For ops that are called directly: what keeps the lists within the tensors as far as shapes tell."""
    q, k, v = inputs[:3]
    found = []
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        found.append("q, k, v must be (batch, seqlen, heads, head_dim), q heads a multiple of k's")
    else:
        for side, partial, offsets, seqlen in (
            ("row", inputs.row_partial, inputs.row_offsets, q.shape[1]),
            ("column", inputs.column_partial, inputs.column_offsets, k.shape[1]),
        ):
            fits = partial.dim() == 3 and partial.shape[0] in (1, q.shape[0]) and partial.shape[1] in (1, q.shape[2])
            if not fits or partial.shape[2] != num_blocks(seqlen) or offsets.shape != (partial.numel() + 1,):
                found.append(f"{side}_partial and {side}_offsets are lists of other lengths")
    if found:
        raise ValueError("fwd_block_mask: " + "; ".join(found))


def _reference_fwd(*arguments):
    *given, return_max_logit, reason = arguments
    inputs = Inputs(*given)
    _check(inputs)
    if reason:
        env.warn_of_fallback("attention with a block_mask (forward)", reason)
    with torch.autocast(inputs.q.device.type, enabled=False):  # else autocast would run the float32 arithmetic in 16 bits
        out, lse, max_logit = reference_block_mask.forward(inputs)
    return out, lse, max_logit if return_max_logit else max_logit.new_empty(0)


def _split_saved(arguments) -> tuple[tuple, Inputs]:
    """(dout, dlse, out, lse) and the inputs of a backward op's leading arguments."""
    dout, dlse, q, k, v, out, lse, *rest = arguments
    return (dout, dlse, out, lse), Inputs(q, k, v, *rest)


def _reference_bwd(*arguments):
    *given, _deterministic, wanted, reason = arguments
    (dout, dlse, out, lse), inputs = _split_saved(given)
    _check(inputs)
    if reason:
        env.warn_of_fallback("attention with a block_mask (backward)", reason)
    with torch.autocast(inputs.q.device.type, enabled=False):
        return reference_block_mask.backward(dout, dlse, inputs, out, lse, wanted)


def _fwd(*arguments):
    *given, _deterministic, backend = arguments
    if backend not in (None, "reference"):
        raise ValueError(f"attention: backend '{backend}' cannot run this call; flash_ext.supported(...) lists the reasons")
    return _reference_fwd(*given, ops._reason_without_kernels(given[0], backend))


def _bwd(*arguments):
    *given, backend = arguments
    return _reference_bwd(*given, ops._reason_without_kernels(given[2], backend))


for _name, _implementation in (
    ("fwd_block_mask", _fwd),
    ("bwd_block_mask", _bwd),
    ("reference_fwd_block_mask", ops._kept(_reference_fwd)),
    ("reference_bwd_block_mask", ops._kept(_reference_bwd)),
    ("mask_blocks", mask_blocks),
):
    ops._library.impl(_name, _implementation, "CompositeExplicitAutograd")


# --- fake kernels ---


def _fake_fwd(*arguments):
    inputs = Inputs(*arguments[: len(Inputs._fields)])
    return_max_logit = arguments[len(Inputs._fields)]
    q, v = inputs.q, inputs.v
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype))
    max_logit = lse.new_empty(q.shape[2] if return_max_logit else 0)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, max_logit


def _fake_bwd(*arguments):
    *given, _deterministic, wanted, _chosen = arguments
    _, inputs = _split_saved(given)
    gradients = []
    for position, bit in op_gradients.differentiable(Inputs).items():
        like = inputs[position]
        if like is None:
            gradients.append(inputs.q.new_empty(0, dtype=torch.float32))
        else:
            gradients.append(like.new_empty(like.shape if wanted & bit else 0))
    return tuple(gradients)


def _fake_mask_blocks(mask):
    rows, columns = num_blocks(mask.shape[1]), num_blocks(mask.shape[2])
    kinds = mask.new_empty(mask.shape[0], rows, columns, dtype=torch.uint8)
    return kinds, mask.new_empty(*kinds.shape, 2, BLOCK, WORDS, dtype=torch.int32)


for _name, _fake in (
    ("fwd_block_mask", _fake_fwd),
    ("reference_fwd_block_mask", _fake_fwd),
    ("bwd_block_mask", _fake_bwd),
    ("reference_bwd_block_mask", _fake_bwd),
    ("mask_blocks", _fake_mask_blocks),
):
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=ops._library)


op_gradients.register(Inputs, BLOCK_MASK_TENSORS, "_block_mask")
