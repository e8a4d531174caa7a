"""The ops: schemas, fake kernels, gradients, and the loading of the compiled library.

| op | implemented by |
|---|---|
| flash_ext::fwd, flash_ext::bwd | CUDA: _C (launches, or calls the reference op with the reasons); elsewhere the reference |
| flash_ext::reference_fwd, flash_ext::reference_bwd | flash_ext/reference.py on any device |
| flash_ext::bwd_preprocess | CUDA: _C; elsewhere flash_ext/reference.py |

The schemas stand here and not in the library, because the ops exist without it: an install without nvcc runs every
call on the reference. An op called directly gives the same gradients as flash_ext.attention.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from . import env, reference
from .arguments import DTYPES

STATS_ROW_ALIGNMENT = 128  # kStatsRowAlignment of csrc/common/params.h

_SCORING = "float softmax_scale, bool causal, int window_left, int window_right, float softcap"
_library = torch.library.Library("flash_ext", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    f"fwd(Tensor q, Tensor k, Tensor v, {_SCORING}, bool deterministic, str? backend) -> (Tensor out, Tensor lse)",
    tags=_tags,
)
_library.define(
    f"bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SCORING}, bool deterministic, "
    "str? backend) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_tags,
)
_library.define(f"reference_fwd(Tensor q, Tensor k, Tensor v, {_SCORING}, str reason) -> (Tensor out, Tensor lse)", tags=_tags)
_library.define(
    f"reference_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SCORING}, "
    "bool deterministic, str reason) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_tags,
)
_library.define("bwd_preprocess(Tensor out, Tensor dout, Tensor lse, Tensor? dlse) -> (Tensor delta, Tensor lse_log2)", tags=_tags)


# --- the reference ops ---


def _scoring(softmax_scale: float, causal: bool, window_left: int, window_right: int, softcap: float) -> reference.Scoring:
    return reference.Scoring(softmax_scale, window_left, 0 if causal else window_right, softcap)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """For ops that are called directly: attention has checked far more."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[2] == 0 or q.shape[2] % k.shape[2] or q.dtype not in DTYPES:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, v))
        raise ValueError(f"flash_ext: q, k, v must be (batch, seqlen, heads, head_dim), q heads a multiple of k's, got {shapes}")


def _reference_fwd(q, k, v, softmax_scale, causal, window_left, window_right, softcap, reason):
    _check_shapes(q, k, v)
    if reason:
        env.warn_of_fallback("attention (forward)", reason)
    with torch.autocast(q.device.type, enabled=False):  # else autocast would run the float32 arithmetic in 16 bits
        return reference.forward(q, k, v, _scoring(softmax_scale, causal, window_left, window_right, softcap))


def _reference_bwd(
    dout, dlse, q, k, v, out, lse, softmax_scale, causal, window_left, window_right, softcap, deterministic, reason
):  # fmt: skip
    if reason:
        env.warn_of_fallback("attention (backward)", reason)
    scoring = _scoring(softmax_scale, causal, window_left, window_right, softcap)
    with torch.autocast(q.device.type, enabled=False):
        return reference.backward(dout, dlse, q, k, v, out, lse, scoring)


# --- fwd, bwd and bwd_preprocess where the compiled library does not serve the device ---


def _reason_without_kernels(tensor: Tensor, backend: str | None) -> str:
    if backend == "reference" or tensor.device.type != "cuda":
        return ""
    return f"the compiled kernels are not available: {library_error}"


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"attention: backend '{backend}' cannot run this call; flash_ext.supported(...) lists the reasons")


def _fwd(q, k, v, softmax_scale, causal, window_left, window_right, softcap, deterministic, backend):
    _check_backend(backend)
    reason = _reason_without_kernels(q, backend)
    return _reference_fwd(q, k, v, softmax_scale, causal, window_left, window_right, softcap, reason)


def _bwd(
    dout, dlse, q, k, v, out, lse, softmax_scale, causal, window_left, window_right, softcap, deterministic, backend
):  # fmt: skip
    reason = _reason_without_kernels(q, backend)
    return _reference_bwd(
        dout, dlse, q, k, v, out, lse, softmax_scale, causal, window_left, window_right, softcap, deterministic, reason
    )  # fmt: skip


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


def _fake_fwd(q, k, v, *_):
    out = q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=reference.accumulation_dtype(q.dtype))


def _fake_bwd(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
