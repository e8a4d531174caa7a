"""VALIDATE for attention_with_kvcache: shapes and types without reading data, and one pass over the values.

check_arguments reads no data and serves eager mode and tracing alike. check_values reads lengths, page table and indices:
on CPU tensors at every call, on a GPU under validate=True, where it costs one synchronisation. Where nobody checks, every
implementation clamps: see Cache in reference_kvcache.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import BACKENDS, DTYPES, _certain, _is_finite, _is_int, _is_number

NAME = "attention_with_kvcache"
MAX_SPLITS = 256
MAX_HEAD_DIM = 576  # absorbed multi-head latent attention: 512 shared with the values, 64 with positions
_INDEX_TENSORS = ("cache_seqlens", "cache_batch_idx", "leftpad_k", "page_table")


def _type_violations(tensors: dict[str, Any], optional: dict[str, Any], options: dict[str, Any]) -> list[str]:
    found = []

    def wrong(name: str, wanted: str, value: Any) -> None:
        found.append(f"{name} must be {wanted}, got {type(value).__name__}")

    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            wrong(name, "a torch.Tensor", tensor)
    for name, tensor in optional.items():
        if name == "cache_seqlens":
            if not isinstance(tensor, Tensor) and not _is_int(tensor):
                wrong(name, "an int or a torch.Tensor", tensor)
        elif tensor is not None and not isinstance(tensor, Tensor):
            wrong(name, "a torch.Tensor or None", tensor)
    for name in ("rotary_interleaved", "causal", "return_lse", "validate"):
        if not isinstance(options[name], bool):
            wrong(name, "a bool", options[name])
    if options["softmax_scale"] is not None and not _is_number(options["softmax_scale"]):
        wrong("softmax_scale", "a number or None", options["softmax_scale"])
    if not _is_number(options["softcap"]):
        wrong("softcap", "a number", options["softcap"])
    if not _is_int(options["num_splits"]):
        wrong("num_splits", "an int", options["num_splits"])
    window = options["window_size"]
    if not isinstance(window, (tuple, list)) or not all(_is_int(side) for side in window):
        wrong("window_size", "a pair (left, right) of ints", window)
    if options["backend"] is not None and not isinstance(options["backend"], str):
        wrong("backend", "a str or None", options["backend"])
    return found


class _Shapes:
    """Collects what is wrong with shapes, dtypes, devices and strides."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def equal(self, left: str, a: Any, right: str, b: Any) -> None:
        if _certain(a != b):
            self.found.append(f"{left} must equal {right}, got {a} and {b}")

    def rows(self, name: str, tensor: Tensor, what: str) -> bool:
        """Four dimensions, the last contiguous."""
        if tensor.is_nested or tensor.layout != torch.strided:
            self.found.append(
                f"{name} must be a dense (strided) tensor, got {'a nested tensor' if tensor.is_nested else tensor.layout}"
            )
            return False
        if tensor.dim() != 4:
            self.found.append(f"{name} must have 4 dimensions {what}, got {tensor.dim()}")
            return False
        if _certain(tensor.shape[3] > 1) and _certain(tensor.stride(3) != 1):
            self.found.append(f"{name}'s last dimension must be contiguous (stride 1), got stride {tensor.stride(3)}")
        return True

    def alike(self, name: str, tensor: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.found.append(f"{name}.dtype must be {wanted}, got {tensor.dtype}")
        if tensor.device != q.device:
            self.found.append(f"{name}.device must equal q.device, got {tensor.device} and {q.device}")

    def vector(self, name: str, tensor: Tensor, shape: tuple[Any, ...], text: str) -> None:
        if tensor.dim() != len(shape) or any(_certain(a != b) for a, b in zip(tensor.shape, shape, strict=True) if b is not None):
            self.found.append(f"{name} must have shape {text}, got {tuple(tensor.shape)}")


def shares_rows(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether v_cache is k_cache[..., :head_dim_v]: the first columns of its rows, in its memory. Not known while compiling."""
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:3] != v_cache.shape[:3] or v_cache.shape[3] > k_cache.shape[3]:
        return False
    strides = all(size <= 1 or a == b for size, a, b in zip(k_cache.shape[:3], k_cache.stride(), v_cache.stride(), strict=False))
    if not strides or k_cache.storage_offset() != v_cache.storage_offset():
        return False
    return torch._C._is_alias_of(k_cache, v_cache)


_VALUES_NEEDED = "k and v must be given together, unless v_cache is k_cache[..., :head_dim_v] and k brings v along"


def require_values(k_cache: Tensor, v_cache: Tensor, v: Tensor | None) -> None:
    """The rule about v that cannot be checked while compiling."""
    if v is None and not shares_rows(k_cache, v_cache):
        raise ValueError(f"{NAME}: {_VALUES_NEEDED}")


def check_arguments(
    q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, optional: dict[str, Any], options: dict[str, Any], scales: dict[str, Any]
) -> None:
    """Raise TypeError (a wrong Python type) or ValueError (everything else) that lists every violated rule.

    optional: cache_seqlens, cache_batch_idx, leftpad_k, page_table, rotary_cos, rotary_sin, sinks, alibi_slopes.
    options: every other keyword argument of attention_with_kvcache. scales: those of FP8 calls alone (kvcache_fp8.NAMES).
    """
    from . import kvcache_fp8  # it builds on the ops, as fp8.py

    found = _type_violations(
        {"q": q, "k_cache": k_cache, "v_cache": v_cache}, {"k": k, "v": v, **optional}, options
    ) + kvcache_fp8.type_violations(scales)  # fmt: skip
    if found:
        raise TypeError(f"{NAME}: " + "; ".join(found))
    found = _tensor_violations(q, k_cache, v_cache, k, v, optional)
    sized = not found
    found += _option_violations(q, options) + kvcache_fp8.violations(
        q, k_cache, optional["rotary_cos"], optional["page_table"] is not None, scales, options["validate"], sized
    )
    if found:
        raise ValueError(f"{NAME}: " + "; ".join(found))


def _tensor_violations(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, optional: dict[str, Any]
) -> list[str]:
    shapes = _Shapes()
    paged = optional["page_table"] is not None
    cache_shape = f"({'num_pages, page_size' if paged else 'batch, seqlen'}, num_heads_kv, head_dim)"
    row_shape = "(batch, seqlen, num_heads, head_dim)"
    given = [("q", q, row_shape), ("k_cache", k_cache, cache_shape), ("v_cache", v_cache, cache_shape)]
    given += [(name, tensor, row_shape) for name, tensor in (("k", k), ("v", v)) if tensor is not None]
    well_formed = all([shapes.rows(*each) for each in given])
    if q.dtype not in DTYPES and q.dtype != torch.float8_e4m3fn:
        shapes.found.append(f"q.dtype must be bfloat16, float16, float32, float64 or float8_e4m3fn, got {q.dtype}")
    for name, tensor, _ in given[1:]:
        if tensor.dtype != q.dtype:
            shapes.found.append(f"{name}.dtype must equal q.dtype, got {tensor.dtype} and {q.dtype}")
        if tensor.device != q.device:
            shapes.found.append(f"{name}.device must equal q.device, got {tensor.device} and {q.device}")
    if (k is None) != (v is None) and (k is None or not (torch.compiler.is_compiling() or shares_rows(k_cache, v_cache))):
        shapes.found.append(_VALUES_NEEDED)
    for name in _INDEX_TENSORS:
        if isinstance(optional[name], Tensor):
            shapes.alike(name, optional[name], q, (torch.int32,))
    if paged and optional["cache_batch_idx"] is not None:
        shapes.found.append("cache_batch_idx must be None with a page_table, whose rows choose the pages")
    if not well_formed:
        return shapes.found

    batch, num_heads = q.shape[0], q.shape[2]
    shapes.equal("k_cache.head_dim", k_cache.shape[3], "q.head_dim", q.shape[3])
    for dim, what in enumerate(("num_pages", "page_size", "num_heads_kv") if paged else ("batch", "seqlen", "num_heads_kv")):
        shapes.equal(f"v_cache.{what}", v_cache.shape[dim], f"k_cache.{what}", k_cache.shape[dim])
    if not paged and optional["cache_batch_idx"] is None:
        shapes.equal("k_cache.batch", k_cache.shape[0], "q.batch", batch)
    if paged and _certain(k_cache.shape[1] < 1):
        shapes.found.append(f"k_cache.page_size must be at least 1, got {k_cache.shape[1]}")
    for name, tensor in (("q", q), ("v_cache", v_cache)):
        if _certain(tensor.shape[3] < 1) or _certain(tensor.shape[3] > MAX_HEAD_DIM):
            shapes.found.append(f"{name}.head_dim must lie in [1, {MAX_HEAD_DIM}], got {tensor.shape[3]}")
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if _certain(tensor.shape[2] < 1):
            shapes.found.append(f"{name}.num_heads must be at least 1, got {tensor.shape[2]}")
    if _certain(k_cache.shape[2] >= 1) and _certain(num_heads % k_cache.shape[2] != 0):
        shapes.found.append(f"q.num_heads must be a multiple of k_cache.num_heads_kv, got {num_heads} and {k_cache.shape[2]}")
    if k is not None:
        for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if new is None:
                continue
            shapes.equal(f"{name}.batch", new.shape[0], "q.batch", batch)
            shapes.equal(f"{name}.num_heads", new.shape[2], f"{name}_cache.num_heads_kv", cache.shape[2])
            shapes.equal(f"{name}.head_dim", new.shape[3], f"{name}_cache.head_dim", cache.shape[3])
        if v is not None:
            shapes.equal("v.seqlen", v.shape[1], "k.seqlen", k.shape[1])

    for name in ("cache_seqlens", "cache_batch_idx", "leftpad_k"):
        if isinstance(optional[name], Tensor):
            shapes.vector(name, optional[name], (batch,), f"(batch,) = ({batch},)")
    if paged:
        shapes.vector("page_table", optional["page_table"], (batch, None), f"(batch, pages) = ({batch}, ...)")
    _rotary_violations(shapes, q, k, v, optional["rotary_cos"], optional["rotary_sin"])
    sinks, slopes = optional["sinks"], optional["alibi_slopes"]
    if sinks is not None:
        shapes.alike("sinks", sinks, q, (torch.float32,))
        shapes.vector("sinks", sinks, (num_heads,), f"(num_heads,) = ({num_heads},)")
    if slopes is not None:
        shapes.alike("alibi_slopes", slopes, q, (torch.float32,))
        text = f"(num_heads,) or (batch, num_heads) = ({batch}, {num_heads})"
        shapes.vector("alibi_slopes", slopes, (batch, num_heads) if slopes.dim() == 2 else (num_heads,), text)
    return shapes.found


def _rotary_violations(
    shapes: _Shapes, q: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    if (cos is None) != (sin is None):
        shapes.found.append("rotary_cos and rotary_sin must be given together")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table is None:
            continue
        dtypes = (q.dtype,) if q.dtype in (torch.float32, torch.float64) else (q.dtype, torch.float32)
        shapes.alike(name, table, q, dtypes)
        if table.dim() != 2:
            shapes.found.append(f"{name} must have 2 dimensions (seqlen_rotary, rotary_dim / 2), got {table.dim()}")
            continue
        if _certain(table.shape[1] < 1) or _certain(2 * table.shape[1] > q.shape[3]):
            shapes.found.append(f"{name}.shape[1] must lie in [1, head_dim / 2], got {table.shape[1]} and head_dim {q.shape[3]}")
        if _certain(table.shape[0] < 1):
            shapes.found.append(f"{name} must have at least 1 row, got {table.shape[0]}")
    if cos is not None and sin is not None:
        if cos.dim() == sin.dim() == 2 and any(_certain(a != b) for a, b in zip(cos.shape, sin.shape, strict=True)):
            shapes.found.append(f"rotary_sin.shape must equal rotary_cos.shape, got {tuple(sin.shape)} and {tuple(cos.shape)}")
        if cos.dtype != sin.dtype:
            shapes.found.append(f"rotary_sin.dtype must equal rotary_cos.dtype, got {sin.dtype} and {cos.dtype}")
    if (cos is not None or sin is not None) and k is None:
        shapes.found.append("rotary_cos and rotary_sin need k and v: keys in the cache are rotated already")
    elif (cos is not None or sin is not None) and v is None:
        shapes.found.append("rotary_cos and rotary_sin need v: without it they would turn the values, the first columns of k")


def _option_violations(q: Tensor, options: dict[str, Any]) -> list[str]:
    found = []
    scale, softcap, window = options["softmax_scale"], options["softcap"], options["window_size"]
    if scale is not None and not _is_finite(scale, q.dtype):
        found.append(f"softmax_scale must be finite, got {scale}")
    if len(window) != 2:
        found.append(f"window_size must be a pair (left, right), got {len(window)} values")
    else:
        for side, value in zip(("left", "right"), window, strict=True):
            if _certain(value < -1) or _certain(value >= 2**31):
                found.append(f"window_size {side} must be -1 (unbounded) or lie in [0, 2**31), got {value}")
    if not _is_finite(softcap, q.dtype) or _certain(softcap < 0):
        found.append(f"softcap must be finite and at least 0 (0: off), got {softcap}")
    if _certain(options["num_splits"] < 0) or _certain(options["num_splits"] > MAX_SPLITS):
        found.append(f"num_splits must lie in [0, {MAX_SPLITS}] (0: chosen on the device), got {options['num_splits']}")
    if options["backend"] is not None and options["backend"] not in BACKENDS:
        found.append(f"backend must be one of {', '.join(BACKENDS)} or None, got '{options['backend']}'")
    return found


def check_values(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    page_table: Tensor | None,
    rotary_cos: Tensor | None,
    positions_move: bool,
) -> None:
    """Raise ValueError that lists every length, index and page-table entry out of range.

    Everything is reduced on the tensors' device to a dozen numbers, which cross to the host in one copy: on a GPU the one
    synchronisation of validate=True. positions_move: q's rows are rotated by a position each (causal, or a window).
    """
    if q.shape[0] == 0:
        return
    paged = page_table is not None
    seqlen_new = 0 if k is None else k.shape[1]
    page_size = k_cache.shape[1]
    capacity = page_table.shape[1] * page_size if paged else page_size
    lengths = cache_seqlens.long()
    totals = lengths + seqlen_new
    numbers: dict[str, Tensor] = {"length": torch.stack(lengths.aminmax())}
    if leftpad_k is not None:
        numbers["leftpad"] = torch.stack((leftpad_k.long().amin(), (leftpad_k.long() - totals).amax()))
    if cache_batch_idx is not None:
        numbers["batch_idx"] = torch.stack(cache_batch_idx.long().aminmax())
    if paged and page_table.shape[1] > 0:
        used = torch.arange(page_table.shape[1], device=q.device) * page_size < totals[:, None]
        entries = page_table.long()
        numbers["page"] = torch.stack((entries.where(used, 0).amin(), entries.where(used, 0).amax()))
    if seqlen_new > 0 and capacity > 0:
        row = (lengths[:, None] + torch.arange(seqlen_new, device=q.device)).clamp(0, capacity - 1)
        if paged:
            slot = page_table.long().gather(1, row // page_size) * page_size + row % page_size
        else:
            owner = torch.arange(q.shape[0], device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
            slot = owner[:, None] * page_size + row
        # Rows of one sequence differ, unless they were clamped: that is another violation.
        ordered = slot.amin(1).sort().values if seqlen_new == 1 else slot.flatten().sort().values
        numbers["shared"] = (ordered[1:] == ordered[:-1]).sum()[None]
    flat = torch.cat([value.flatten() for value in numbers.values()]).tolist()
    got: dict[str, list[int]] = {}
    for name, value in numbers.items():
        got[name], flat = flat[: value.numel()], flat[value.numel() :]

    found = []
    smallest, largest = got["length"]
    appended = f" with {seqlen_new} new rows" if seqlen_new else ""
    if smallest < 0:
        found.append(f"cache_seqlens must be at least 0, got {smallest}")
    if largest + seqlen_new > capacity:
        where = f"{page_table.shape[1]} pages of {page_size} rows" if paged else "the cache's seqlen"
        found.append(f"cache_seqlens{appended} must not exceed the capacity {capacity} ({where}), got {largest}")
    if "leftpad" in got and got["leftpad"][0] < 0:
        found.append(f"leftpad_k must be at least 0, got {got['leftpad'][0]}")
    if "leftpad" in got and got["leftpad"][1] > 0:
        found.append(f"leftpad_k must not exceed its sequence's length{appended}, got {got['leftpad'][1]} more")
    for name, text, bound in (
        ("batch_idx", "cache_batch_idx must lie in [0, k_cache.batch)", k_cache.shape[0]),
        ("page", "page_table entries of pages in use must lie in [0, num_pages)", k_cache.shape[0]),
    ):
        if name in got and (got[name][0] < 0 or got[name][1] >= bound):
            found.append(f"{text} = [0, {bound}), got {got[name][0]} to {got[name][1]}")
    if got.get("shared", [0])[0] > 0 and not found:
        found.append(f"k and v must go to rows of the cache that no other new row goes to, {got['shared'][0]} go to the same")
    if rotary_cos is not None:
        last = largest + max(seqlen_new, q.shape[1] if positions_move else 1) - 1
        if last >= rotary_cos.shape[0]:
            found.append(f"rotary_cos must have a row for every position, got {rotary_cos.shape[0]} rows and position {last}")
    if found:
        raise ValueError(f"{NAME}: " + "; ".join(found))
