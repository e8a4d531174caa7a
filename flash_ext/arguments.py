"""VALIDATE: every argument is checked here, once, for eager mode, fake tensors and every backend.

All violated rules come in one message. Nothing here reads data, so nothing synchronises (the values of sequence lengths:
sequences.py); sizes may be symbolic, and a rule that a symbolic size neither fulfils nor violates for certain is left to
the op.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from . import sequences
from .block_mask import BlockMask
from .call import Call

BACKENDS = ("sm90", "sm80", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_SPLITS = 64  # parts of a call with split_boundaries


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


# --- Python types ---


def _type_violations(call: Call) -> list[str]:
    found = []

    def wrong(name: str, wanted: str, value: Any) -> None:
        found.append(f"{name} must be {wanted}, got {type(value).__name__}")

    def optional_tensors(*names: str) -> None:
        for name in names:
            tensor = getattr(call, name)
            if tensor is not None and not isinstance(tensor, torch.Tensor):
                wrong(name, "a torch.Tensor or None", tensor)

    packed = call.function == "attention_varlen"
    for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k") if packed else ("q", "k", "v"):
        tensor = getattr(call, name)
        if not isinstance(tensor, torch.Tensor):
            wrong(name, "a torch.Tensor", tensor)
    if packed:
        optional_tensors("seqused_q", "seqused_k", "leftpad_q", "leftpad_k")
        for name in ("max_seqlen_q", "max_seqlen_k"):
            value = getattr(call, name)
            if value is not None and not _is_int(value) and not isinstance(value, torch.Tensor):
                wrong(name, "an int, a torch.Tensor or None", value)
    if call.sinks is not None or call.alibi_slopes is not None or call.k_bias is not None:
        optional_tensors("sinks", "alibi_slopes", "k_bias")
    for name in ("causal", "return_lse", "return_max_logit", "validate"):
        flag = getattr(call, name)
        if not isinstance(flag, bool):
            wrong(name, "a bool", flag)
    if call.softmax_scale is not None and not _is_number(call.softmax_scale):
        wrong("softmax_scale", "a number or None", call.softmax_scale)
    if not _is_number(call.softcap):
        wrong("softcap", "a number", call.softcap)
    if not isinstance(call.window_size, (tuple, list)):
        wrong("window_size", "a pair (left, right) of ints", call.window_size)
    else:
        for side in call.window_size:
            if not _is_int(side):
                wrong("window_size", "a pair (left, right) of ints", side)
                break
    if call.function == "attention_partials":
        if not isinstance(call.split_boundaries, Sequence) or isinstance(call.split_boundaries, str):
            wrong("split_boundaries", "a sequence of ints", call.split_boundaries)
        else:
            for boundary in call.split_boundaries:
                if not _is_int(boundary):
                    wrong("split_boundaries", "a sequence of ints", boundary)
                    break
    if call.block_mask is not None and not isinstance(call.block_mask, BlockMask):
        wrong("block_mask", "a flash_ext.BlockMask or None", call.block_mask)
    if call.deterministic is not None and not isinstance(call.deterministic, bool):
        wrong("deterministic", "a bool or None", call.deterministic)
    if call.backend is not None and not isinstance(call.backend, str):
        wrong("backend", "a str or None", call.backend)
    return found


# --- tensors ---


def _layout_violation(name: str, tensor: torch.Tensor) -> str | None:
    if tensor.is_nested:
        return f"{name} must be a dense (strided) tensor, got a nested tensor"
    return None if tensor.layout == torch.strided else f"{name} must be a dense (strided) tensor, got layout {tensor.layout}"


def _qkv_violations(call: Call, packed: bool) -> tuple[list[str], bool]:
    """What is wrong with q, k and v, and whether their sizes mean something."""
    q, k, v = call.q, call.k, call.v
    found = []
    tensors = (("q", q), ("k", k), ("v", v))
    dims = 3 if packed else 4
    for name, tensor in tensors:
        why = _layout_violation(name, tensor)
        if why is not None:
            found.append(why)
        if not tensor.is_nested and tensor.dim() != dims:
            rows = f"total_{'q' if name == 'q' else 'k'}" if packed else "batch, seqlen"
            found.append(f"{name} must have {dims} dimensions ({rows}, num_heads, head_dim), got {tensor.dim()}")
    wrong_kind = len(found) > 0
    if q.dtype not in (*DTYPES, torch.float8_e4m3fn):
        found.append(f"q.dtype must be bfloat16, float16, float32 or float64 (or float8_e4m3fn, forward only), got {q.dtype}")
    for name, tensor in tensors[1:]:
        if tensor.dtype != q.dtype:
            found.append(f"{name}.dtype must equal q.dtype, got {tensor.dtype} and {q.dtype}")
        if tensor.device != q.device:
            found.append(f"{name}.device must equal q.device, got {tensor.device} and {q.device}")
    if wrong_kind:
        return found, False

    q_sizes, k_sizes, v_sizes = q.shape, k.shape, v.shape  # once: a shape is made anew at each access

    def must_equal(left: str, a: Any, right: str, b: Any) -> None:
        if _certain(a != b):
            found.append(f"{left} must equal {right}, got {a} and {b}")

    if packed:
        must_equal("v.total_k", v_sizes[0], "k.total_k", k_sizes[0])
    else:
        must_equal("k.batch", k_sizes[0], "q.batch", q_sizes[0])
        must_equal("v.batch", v_sizes[0], "q.batch", q_sizes[0])
        must_equal("v.seqlen", v_sizes[1], "k.seqlen", k_sizes[1])
    must_equal("v.num_heads", v_sizes[-2], "k.num_heads", k_sizes[-2])
    must_equal("k.head_dim", k_sizes[-1], "q.head_dim", q_sizes[-1])
    for (name, tensor), sizes in zip(tensors, (q_sizes, k_sizes, v_sizes), strict=True):
        heads, head_dim = sizes[-2], sizes[-1]
        if _certain(heads < 1):
            found.append(f"{name}.num_heads must be at least 1, got {heads}")
        if name != "k" and (_certain(head_dim < 1) or _certain(head_dim > MAX_HEAD_DIM)):
            found.append(f"{name}.head_dim must lie in [1, {MAX_HEAD_DIM}], got {head_dim}")
        if _certain(head_dim > 1) and _certain(tensor.stride(-1) != 1):
            found.append(f"{name}'s last dimension must be contiguous (stride 1), got stride {tensor.stride(-1)}")
    if _certain(k_sizes[-2] >= 1) and _certain(q_sizes[-2] % k_sizes[-2] != 0):
        found.append(f"q.num_heads must be a multiple of k.num_heads, got {q_sizes[-2]} and {k_sizes[-2]}")
    return found, True


def _side_violations(
    name: str, tensor: torch.Tensor, q: torch.Tensor, dtypes: tuple[torch.dtype, ...], shapes: dict[str, tuple]
) -> list[str]:
    """What is wrong with a tensor beside q, k and v. shapes: the allowed ones, with their names; none where sizes mean nothing."""
    why = _layout_violation(name, tensor)
    if why is not None:
        return [why]
    found = []
    if tensor.dtype not in dtypes:
        found.append(f"{name}.dtype must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if tensor.device != q.device:
        found.append(f"{name}.device must equal q.device, got {tensor.device} and {q.device}")

    def differs(shape: tuple) -> bool:
        return len(shape) != tensor.dim() or any(_certain(a != b) for a, b in zip(shape, tensor.shape, strict=True))

    if shapes and all(differs(shape) for shape in shapes.values()):
        wanted = " or ".join(f"{dims} = ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for dims, shape in shapes.items())
        found.append(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    elif tensor.dim() > 0 and _certain(tensor.shape[-1] > 1) and _certain(tensor.stride(-1) != 1):
        found.append(f"{name}'s last dimension must be contiguous (stride 1), got stride {tensor.stride(-1)}")
    return found


def _score_violations(call: Call, packed: bool, sized: bool) -> list[str]:
    """sinks, alibi_slopes, k_bias. sized: the shapes of q and k are right."""
    found = []
    q, k = call.q, call.k
    dtypes = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    sinks, slopes, k_bias = call.sinks, call.alibi_slopes, call.k_bias
    if sinks is not None:
        found += _side_violations("sinks", sinks, q, dtypes, {"(num_heads)": (q.shape[-2],)} if sized else {})
    if slopes is not None:
        shapes = {}
        if sized:
            shapes["(num_heads)"] = (q.shape[-2],)
            if not packed:
                shapes["(batch, num_heads)"] = (q.shape[0], q.shape[-2])
            elif call.cu_seqlens_q.dim() == 1:
                shapes["(batch, num_heads)"] = (call.cu_seqlens_q.shape[0] - 1, q.shape[-2])
        found += _side_violations("alibi_slopes", slopes, q, dtypes, shapes)
        if slopes.requires_grad and torch.is_grad_enabled():
            found.append("alibi_slopes must not require a gradient (there is none for it): pass alibi_slopes.detach()")
    if k_bias is not None:
        shapes = {}
        if sized and packed:
            shapes["(num_heads_kv, total_k)"] = (k.shape[1], k.shape[0])
        elif sized:
            shapes["(batch, num_heads_kv, seqlen_k)"] = (k.shape[0], k.shape[2], k.shape[1])
        found += _side_violations("k_bias", k_bias, q, dtypes, shapes)
    return found


def _sequence_violations(call: Call, sized: bool) -> list[str]:
    """cu_seqlens, seqused, leftpad, max_seqlen of a packed call; their values too, where those may be read."""
    found = []
    int32 = (torch.int32,)
    cu_q, cu_k = call.cu_seqlens_q, call.cu_seqlens_k
    for name, tensor in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        found += _side_violations(name, tensor, call.q, int32, {})
        if tensor.dim() != 1:
            found.append(f"{name} must have 1 dimension (batch + 1), got {tensor.dim()}")
        elif _certain(tensor.shape[0] < 1):
            found.append(f"{name} must have at least 1 element, got 0")
    if cu_q.dim() == 1 and cu_k.dim() == 1 and _certain(cu_q.shape[0] != cu_k.shape[0]):
        found.append(f"cu_seqlens_k must be as long as cu_seqlens_q, got {cu_k.shape[0]} and {cu_q.shape[0]} elements")
    batch = {"(batch)": (cu_q.shape[0] - 1,)} if cu_q.dim() == 1 else {}
    for name in ("seqused_q", "seqused_k", "leftpad_q", "leftpad_k"):
        tensor = getattr(call, name)
        if tensor is not None:
            found += _side_violations(name, tensor, call.q, int32, batch)
    for name in ("max_seqlen_q", "max_seqlen_k"):
        value = getattr(call, name)
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or _certain(value.numel() != 1):
                found.append(f"{name} must hold one integer, got shape {tuple(value.shape)} and dtype {value.dtype}")
        elif value is not None and _certain(value < 0):
            found.append(f"{name} must be at least 0, got {value}")
    return sequences.violations(call) if sized and not found else found


def _split_violations(call: Call, sized: bool) -> list[str]:
    found = []
    boundaries = call.split_boundaries
    if not 2 <= len(boundaries) <= MAX_SPLITS + 1:
        return [f"split_boundaries must hold 2 to {MAX_SPLITS + 1} numbers, got {len(boundaries)}"]
    if _certain(boundaries[0] != 0):
        found.append(f"split_boundaries must start at 0, got {boundaries[0]}")
    if sized and _certain(boundaries[-1] != call.k.shape[1]):
        found.append(f"split_boundaries must end at k.seqlen, got {boundaries[-1]} and {call.k.shape[1]}")
    for begin, end in itertools.pairwise(boundaries):
        if _certain(end < begin):
            found.append(f"split_boundaries must not decrease, got {begin} before {end}")
    return found


# --- options ---


def _option_violations(call: Call) -> list[str]:
    found = []
    scale, softcap, dtype = call.softmax_scale, call.softcap, call.q.dtype
    if scale is not None and not _is_finite(scale, dtype):
        found.append(f"softmax_scale must be finite, got {scale}")
    if len(call.window_size) != 2:
        found.append(f"window_size must be a pair (left, right), got {len(call.window_size)} values")
    else:
        for side, value in zip(("left", "right"), call.window_size, strict=True):
            if _certain(value < -1):
                found.append(f"window_size {side} must be -1 (unbounded) or at least 0, got {value}")
            elif _certain(value >= 2**63):
                found.append(f"window_size {side} must be below 2**63, got {value}")
    if not _is_finite(softcap, dtype) or _certain(softcap < 0):
        found.append(f"softcap must be finite and at least 0 (0: off), got {softcap}")
    if call.backend is not None and call.backend not in BACKENDS:
        found.append(
            f"backend must be one of {', '.join(BACKENDS)} or None, got '{call.backend}' "
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


def check_arguments(call: Call) -> None:
    """Raise TypeError (a wrong Python type) or ValueError (everything else) that lists every violated rule."""
    from . import fp8  # it builds on the ops, which build on this file

    violations = _type_violations(call) + fp8.type_violations(call)
    if violations:
        raise TypeError(f"{call.function}: " + "; ".join(violations))
    packed = call.function == "attention_varlen"
    violations, sized = _qkv_violations(call, packed)
    if call.sinks is not None or call.alibi_slopes is not None or call.k_bias is not None:
        violations += _score_violations(call, packed, sized)
    if packed:
        violations += _sequence_violations(call, sized)
    if call.function == "attention_partials":
        violations += _split_violations(call, sized)
    if call.block_mask is not None and call.function != "attention":
        violations.append("block_mask is an option of attention alone (packed sequences: flash_ext.document_mask)")
    elif call.block_mask is not None and sized:
        batch, seqlen_q, num_heads, _ = call.q.shape
        violations += call.block_mask.violations(batch, num_heads, seqlen_q, call.k.shape[1], call.q.device)
    violations += _option_violations(call)
    violations += fp8.violations(call, sized)
    if violations:
        raise ValueError(f"{call.function}: " + "; ".join(violations))
