"""VALIDATE: every argument is checked here, once, for eager mode, fake tensors and every backend.

All violated rules come in one message. Nothing here reads data, so nothing synchronises; sizes may be symbolic, and a
rule that a symbolic size neither fulfils nor violates for certain is left to the op.
"""

from __future__ import annotations

from typing import Any

import torch

BACKENDS = ("sm90", "sm80", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def _certain(condition: Any) -> bool:
    """Whether a condition on sizes holds for certain; an undecidable symbolic condition does not."""
    if isinstance(condition, bool):
        return condition
    if not isinstance(condition, torch.SymBool):
        return bool(condition)  # numpy's scalars compare to a bool of their own
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _is_finite(value: Any, dtype: torch.dtype) -> bool:
    """Whether a number is finite in the dtype that it is used in."""
    # By comparisons, because math.isfinite takes no symbolic float.
    largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    return not (_certain(value != value) or _certain(value > largest) or _certain(value < -largest))


def _type_violations(
    tensors: dict[str, Any], causal: Any, softmax_scale: Any, window_size: Any, softcap: Any, flags: dict[str, Any],
    deterministic: Any, backend: Any,
) -> list[str]:  # fmt: skip
    found = []

    def wrong(name: str, wanted: str, value: Any) -> None:
        found.append(f"{name} must be {wanted}, got {type(value).__name__}")

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            wrong(name, "a torch.Tensor", tensor)
    for name, flag in {"causal": causal, **flags}.items():
        if not isinstance(flag, bool):
            wrong(name, "a bool", flag)
    if softmax_scale is not None and not _is_number(softmax_scale):
        wrong("softmax_scale", "a number or None", softmax_scale)
    if not _is_number(softcap):
        wrong("softcap", "a number", softcap)
    if not isinstance(window_size, (tuple, list)):
        wrong("window_size", "a pair (left, right) of ints", window_size)
    else:
        for side in window_size:
            if not _is_int(side):
                wrong("window_size", "a pair (left, right) of ints", side)
                break
    if deterministic is not None and not isinstance(deterministic, bool):
        wrong("deterministic", "a bool or None", deterministic)
    if backend is not None and not isinstance(backend, str):
        wrong("backend", "a str or None", backend)
    return found


def _tensor_violations(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    found = []
    tensors = (("q", q), ("k", k), ("v", v))
    for name, tensor in tensors:
        if tensor.is_nested:
            found.append(f"{name} must be a dense (strided) tensor, got a nested tensor")
            continue
        if tensor.layout != torch.strided:
            found.append(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.dim() != 4:
            found.append(f"{name} must have 4 dimensions (batch, seqlen, num_heads, head_dim), got {tensor.dim()}")
    wrong_kind = len(found) > 0
    if q.dtype not in DTYPES:
        found.append(f"q.dtype must be bfloat16, float16, float32 or float64, got {q.dtype}")
    for name, tensor in tensors[1:]:
        if tensor.dtype != q.dtype:
            found.append(f"{name}.dtype must equal q.dtype, got {tensor.dtype} and {q.dtype}")
        if tensor.device != q.device:
            found.append(f"{name}.device must equal q.device, got {tensor.device} and {q.device}")
    if wrong_kind:  # sizes mean nothing then
        return found

    def must_equal(left: str, a: Any, right: str, b: Any) -> None:
        if _certain(a != b):
            found.append(f"{left} must equal {right}, got {a} and {b}")

    must_equal("k.batch", k.shape[0], "q.batch", q.shape[0])
    must_equal("v.batch", v.shape[0], "q.batch", q.shape[0])
    must_equal("v.seqlen", v.shape[1], "k.seqlen", k.shape[1])
    must_equal("v.num_heads", v.shape[2], "k.num_heads", k.shape[2])
    must_equal("k.head_dim", k.shape[3], "q.head_dim", q.shape[3])
    for name, tensor in tensors:
        if _certain(tensor.shape[2] < 1):
            found.append(f"{name}.num_heads must be at least 1, got {tensor.shape[2]}")
        if name != "k" and (_certain(tensor.shape[3] < 1) or _certain(tensor.shape[3] > MAX_HEAD_DIM)):
            found.append(f"{name}.head_dim must lie in [1, {MAX_HEAD_DIM}], got {tensor.shape[3]}")
        if _certain(tensor.shape[3] > 1) and _certain(tensor.stride(3) != 1):
            found.append(f"{name}'s last dimension must be contiguous (stride 1), got stride {tensor.stride(3)}")
    if _certain(k.shape[2] >= 1) and _certain(q.shape[2] % k.shape[2] != 0):
        found.append(f"q.num_heads must be a multiple of k.num_heads, got {q.shape[2]} and {k.shape[2]}")
    return found


def _option_violations(dtype: torch.dtype, softmax_scale: Any, window_size: Any, softcap: Any, backend: str | None) -> list[str]:
    found = []
    if softmax_scale is not None and not _is_finite(softmax_scale, dtype):
        found.append(f"softmax_scale must be finite, got {softmax_scale}")
    if len(window_size) != 2:
        found.append(f"window_size must be a pair (left, right), got {len(window_size)} values")
    else:
        for side, value in zip(("left", "right"), window_size, strict=True):
            if _certain(value < -1):
                found.append(f"window_size {side} must be -1 (unbounded) or at least 0, got {value}")
            elif _certain(value >= 2**63):
                found.append(f"window_size {side} must be below 2**63, got {value}")
    if not _is_finite(softcap, dtype) or _certain(softcap < 0):
        found.append(f"softcap must be finite and at least 0 (0: off), got {softcap}")
    if backend is not None and backend not in BACKENDS:
        found.append(
            f"backend must be one of {', '.join(BACKENDS)} or None, got '{backend}' "
            "(flash_ext.supported(q, k, v) says why each cannot run)"
        )
    return found


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, cast as scaled_dot_product_attention does: everything but float64 to the autocast dtype."""
    if not all(isinstance(t, torch.Tensor) for t in tensors):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t.dtype in castable and t.device.type == device else t for t in tensors)


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    return_lse: bool,
    deterministic: bool | None,
    backend: str | None,
) -> None:
    """Raise TypeError (a wrong Python type) or ValueError (everything else) that lists every violated rule."""
    violations = _type_violations(
        {"q": q, "k": k, "v": v}, causal, softmax_scale, window_size, softcap, {"return_lse": return_lse},
        deterministic, backend,
    )  # fmt: skip
    if violations:
        raise TypeError("attention: " + "; ".join(violations))
    violations = _tensor_violations(q, k, v) + _option_violations(q.dtype, softmax_scale, window_size, softcap, backend)
    if violations:
        raise ValueError("attention: " + "; ".join(violations))
