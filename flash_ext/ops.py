"""The ops: schemas, fake kernels, gradients, and the loading of the compiled library.

| op | implemented by |
|---|---|
| flash_ext::fwd, flash_ext::bwd | CUDA: _C (launches, or calls the reference op with the reasons); elsewhere the reference |
| flash_ext::reference_fwd, flash_ext::reference_bwd | flash_ext/reference.py on any device |
| flash_ext::bwd_preprocess | CUDA: _C; elsewhere flash_ext/reference.py |

The schemas stand here and not in the library, because the ops exist without it: an install without nvcc runs every
call on the reference. An op called directly gives the same gradients as flash_ext.attention. max_logit has no gradient,
alibi_slopes gets none; `wanted` tells the backward which of its results to compute, the others have shape (0).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from . import env, reference
from .arguments import DTYPES
from .call import WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV, Inputs

STATS_ROW_ALIGNMENT = 128  # kStatsRowAlignment of csrc/common/params.h

_QKV = "Tensor q, Tensor k, Tensor v"
# The fields of Inputs after q, k and v.
_REST = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, Tensor? leftpad_q, Tensor? leftpad_k, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? k_bias, "
    "float softmax_scale, bool causal, int window_left, int window_right, float softcap, int[] split_boundaries"
)
_RESULTS = "(Tensor out, Tensor lse, Tensor max_logit)"
_SAVED = f"Tensor? dout, Tensor? dlse, {_QKV}, Tensor out, Tensor lse"
_GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks, Tensor dk_bias)"
_library = torch.library.Library("flash_ext", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
for _schema in (
    f"fwd({_QKV}, {_REST}, bool return_max_logit, bool deterministic, str? backend) -> {_RESULTS}",
    f"bwd({_SAVED}, {_REST}, bool deterministic, int wanted, str? backend) -> {_GRADIENTS}",
    f"reference_fwd({_QKV}, {_REST}, bool return_max_logit, str reason) -> {_RESULTS}",
    f"reference_bwd({_SAVED}, {_REST}, bool deterministic, int wanted, str reason) -> {_GRADIENTS}",
    "bwd_preprocess(Tensor out, Tensor dout, Tensor lse, Tensor? dlse) -> (Tensor delta, Tensor lse_log2)",
):
    _library.define(_schema, tags=_tags)


# --- the reference ops ---


def _check(inputs: Inputs) -> None:
    """For ops that are called directly: attention has checked far more."""
    q, k, v = inputs[:3]
    dims = 3 if inputs.packed else 4
    heads = "" if q.dim() != dims or k.dim() != dims else (q.shape[-2], k.shape[-2])
    if heads == "" or v.dim() != dims or heads[1] == 0 or heads[0] % heads[1] or q.dtype not in DTYPES:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        layout = "(total, heads, head_dim)" if inputs.packed else "(batch, seqlen, heads, head_dim)"
        raise ValueError(f"flash_ext: q, k, v must be {layout}, q heads a multiple of k's, got {shapes}")
    sequences = (inputs.seqused_q, inputs.seqused_k, inputs.leftpad_q, inputs.leftpad_k)
    if (inputs.cu_seqlens_k is not None) != inputs.packed or (not inputs.packed and sequences != (None,) * 4):
        raise ValueError("flash_ext: cu_seqlens_q and cu_seqlens_k come together, and seqused and leftpad with them")
    if inputs.split_boundaries and (inputs.packed or inputs.sinks is not None):
        raise ValueError("flash_ext: split_boundaries are for dense calls without sinks")


_NOTHING = contextlib.nullcontext()


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would run the float32 arithmetic in 16 bits. Where it is off, this costs a tenth of torch.autocast."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return _NOTHING
    return torch.autocast(device, enabled=False)


def _reference_fwd(*arguments):
    *inputs, return_max_logit, reason = arguments
    inputs = Inputs(*inputs)
    _check(inputs)
    if reason:
        env.warn_of_fallback("attention (forward)", reason)
    with _without_autocast(inputs.q):
        return reference.forward(inputs, return_max_logit)


def _reference_bwd(dout, dlse, q, k, v, out, lse, *arguments):
    *rest, _deterministic, wanted, reason = arguments
    if reason:
        env.warn_of_fallback("attention (backward)", reason)
    with _without_autocast(q):
        return reference.backward(dout, dlse, Inputs(q, k, v, *rest), out, lse, wanted)


# --- fwd, bwd and bwd_preprocess where the compiled library does not serve the device ---


def _reason_without_kernels(tensor: Tensor, backend: str | None) -> str:
    if backend == "reference" or tensor.device.type != "cuda":
        return ""
    return f"the compiled kernels are not available: {library_error}"


def _fwd(*arguments):
    *inputs, return_max_logit, _deterministic, backend = arguments
    if backend not in (None, "reference"):
        raise ValueError(f"attention: backend '{backend}' cannot run this call; flash_ext.supported(...) lists the reasons")
    return _reference_fwd(*inputs, return_max_logit, _reason_without_kernels(inputs[0], backend))


def _bwd(*arguments):
    *saved, backend = arguments
    return _reference_bwd(*saved, _reason_without_kernels(saved[2], backend))


def _bwd_preprocess(out, dout, lse, dlse):
    return reference.bwd_preprocess(out, dout, lse, dlse, STATS_ROW_ALIGNMENT)


# A compiled op that calls the reference op loses its exception: between the two Python frames lies a C interface that
# turns it into a RuntimeError without its type and text. So the reference op keeps it, and call() raises it again.
_lost = threading.local()


def _kept(implementation):
    @functools.wraps(implementation)
    def keeping(*arguments):
        try:
            return implementation(*arguments)
        except Exception as error:
            _lost.error = error
            raise

    return keeping


def call(op, *arguments):
    """op(*arguments); what the reference raised below a compiled op comes out as it was raised."""
    _lost.error = None
    try:
        return op(*arguments)
    except RuntimeError:
        if _lost.error is None:
            raise
        raise _lost.error from None
    finally:
        _lost.error = None  # its traceback holds the frames' tensors


for _name, _implementation in (
    ("fwd", _fwd),
    ("bwd", _bwd),
    ("reference_fwd", _kept(_reference_fwd)),
    ("reference_bwd", _kept(_reference_bwd)),
    ("bwd_preprocess", _bwd_preprocess),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


# --- fake kernels: shapes, dtypes and strides of the results ---


def _fake_fwd(*arguments):
    inputs, return_max_logit = Inputs(*arguments[: len(Inputs._fields)]), arguments[len(Inputs._fields)]
    q, dtype = inputs.q, reference.accumulation_dtype(inputs.q.dtype)
    max_logit = q.new_empty(q.shape[-2] if return_max_logit else 0, dtype=dtype)
    return q.new_empty(inputs.out_shape), q.new_empty(inputs.lse_shape, dtype=dtype), max_logit


def _fake_bwd(dout, dlse, q, k, v, out, lse, *arguments):
    *rest, _deterministic, wanted, _ = arguments
    inputs = Inputs(q, k, v, *rest)
    results = ((q, WANT_DQ), (k, WANT_DK), (v, WANT_DV), (inputs.sinks, WANT_DSINKS), (inputs.k_bias, WANT_DK_BIAS))
    return tuple(lse.new_empty(0) if t is None else t.new_empty(t.shape if wanted & bit else 0) for t, bit in results)


def _fake_bwd_preprocess(out, dout, lse, dlse):
    rows = (out.shape[1] + STATS_ROW_ALIGNMENT - 1) // STATS_ROW_ALIGNMENT * STATS_ROW_ALIGNMENT
    shape = (out.shape[0], out.shape[2], rows)
    return lse.new_empty(shape), lse.new_empty(shape)


for _name, _fake in (
    ("fwd", _fake_fwd),
    ("reference_fwd", _fake_fwd),
    ("bwd", _fake_bwd),
    ("reference_bwd", _fake_bwd),
    ("bwd_preprocess", _fake_bwd_preprocess),
):
    torch.library.register_fake(f"flash_ext::{_name}", _fake, lib=_library)


# --- the compiled library ---


def how_to_install() -> str:
    """One sentence; a checkout's own folder hides an installed package from a Python started there."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").exists():
        return f"this is the checkout at {checkout}: pip install --no-build-isolation -e {checkout}, or start Python elsewhere"
    return "install flash_ext again from its checkout: pip install --no-build-isolation ."


def _load_library() -> str | None:
    """Load _C; the reason why not, or None. Registers kernels with the CUDA runtime but does not initialise CUDA.

    Under FLASH_EXT_EMULATE the same objects linked against the emulator, _C_emulated, serve CPU tensors instead.
    """
    path = Path(__file__).with_name("_C_emulated.abi3.so" if env.EMULATE else "_C.abi3.so")
    if env.EMULATE and not path.exists():
        raise ImportError(f"FLASH_EXT_EMULATE={env.EMULATE}: {path} is not built; in a checkout, make emulator builds it")
    if not path.exists():
        return "flash_ext was installed without an nvcc (python -m flash_ext says how to get the kernels)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error.__cause__ or error}"  # the cause names what dlopen missed
    return None


library_error = _load_library()
