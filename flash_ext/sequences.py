"""The values of cu_seqlens, seqused, leftpad and max_seqlen of a packed call: checked where reading them costs nothing.

That is where they lie on the host, or where the caller asked for it (validate=True: one copy from the device, which
waits for it). Otherwise kernels and the reference clamp them, so that no value can read or write outside the tensors.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .call import Call

_NAMES = ("cu_seqlens", "seqused", "leftpad", "max_seqlen")


def readable(call: Call) -> bool:
    """Whether values of a packed call's lengths may be read: on the host, or where the caller asked for it."""
    offsets = call.cu_seqlens_q
    return not torch.compiler.is_compiling() and _has_values(offsets) and (call.validate or offsets.device.type == "cpu")


def _has_values(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def violations(call: Call) -> list[str]:
    """What is wrong with the values, which are of the right type, shape and dtype; nothing where none may be read."""
    if torch.compiler.is_compiling():
        return ["validate=True reads values from the device and cannot be compiled"] if call.validate else []
    if not readable(call):
        return []
    found = []
    values = _read(call)
    for side, tensor in (("q", call.q), ("k", call.k)):
        found += _of_side(side, tensor.shape[0], *(values.get(f"{name}_{side}") for name in _NAMES))
    return found


def _read(call: Call) -> dict[str, Any]:
    """Name -> list of ints (max_seqlen: an int); all from the device in one copy."""
    given = {name: getattr(call, name) for side in "qk" for name in (f"{n}_{side}" for n in _NAMES)}
    tensors = {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) and _has_values(value) and (call.validate or value.device.type == "cpu")
    }
    # One device: a max_seqlen may lie on the host while the rest does not, and the other way round.
    device = call.cu_seqlens_q.device
    sizes = [value.numel() for value in tensors.values()]
    together = torch.cat([value.detach().reshape(-1).to(device, torch.int64) for value in tensors.values()]).tolist()
    values: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, int)}
    begin = 0
    for name, size in zip(tensors, sizes, strict=True):
        numbers = together[begin : begin + size]
        values[name] = numbers[0] if name.startswith("max_seqlen") else numbers
        begin += size
    return values


def _of_side(
    side: str, total: int, cu_seqlens: list[int], seqused: list[int] | None, leftpad: list[int] | None, max_seqlen: int | None
) -> list[str]:
    found = []
    if cu_seqlens[0] != 0:
        found.append(f"cu_seqlens_{side} must start at 0, got {cu_seqlens[0]}")
    if cu_seqlens[-1] > total:
        found.append(f"cu_seqlens_{side} must end at {side}.total_{side} or before, got {cu_seqlens[-1]} and {total}")
    longest, where = 0, 0
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        owned = end - begin
        if owned < 0:
            found.append(f"cu_seqlens_{side} must not decrease, got {begin} and {end} at {b} and {b + 1}")
            return found  # once is enough, and the lengths mean nothing
        for name, values in (("seqused", seqused), ("leftpad", leftpad)):
            if values is not None and not 0 <= values[b] <= owned:
                found.append(f"{name}_{side} must lie between 0 and the sequence's length, got {values[b]} and {owned} at {b}")
                return found
        length = (owned if seqused is None else seqused[b]) - (0 if leftpad is None else leftpad[b])
        if length > longest:
            longest, where = length, b
    if max_seqlen is not None and max_seqlen < longest:
        found.append(f"max_seqlen_{side} must be at least the longest sequence, got {max_seqlen} and {longest} at {where}")
    return found
