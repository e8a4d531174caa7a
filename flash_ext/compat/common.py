"""What the interfaces of other libraries share: refusals, and arguments in the form that flash_ext takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse(function: str, **unsupported: Any) -> None:
    """Raise NotImplementedError that names each of these arguments and its value; None and False stand for 'not given'."""
    given = [f"{name}={describe(value)}" for name, value in unsupported.items() if value is not None and value is not False]
    if given:
        raise NotImplementedError(f"{function}: not supported by flash_ext: {', '.join(given)}")


def describe(value: Any) -> str:
    """A value as an error message shows it: a tensor by its dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return repr(value)


def split(function: str, name: str, tensor: Tensor, dim: int, parts: int) -> tuple[Tensor, ...]:
    """The tensors that a packed one holds along dim, as views."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dim + 3 or tensor.shape[dim] != parts:
        shape = ("(batch, seqlen, " if dim == 2 else "(total, ") + f"{parts}, nheads, headdim)"
        raise ValueError(f"{function}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    return tensor.unbind(dim)


def refuse_fp8(function: str, **tensors: Tensor) -> None:
    """NotImplementedError for 8-bit floats, which flash-attn 2 does not take either; FlashAttention-3's functions do."""
    refuse(function, **{name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.dtype.itemsize == 1})


def rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with a contiguous last dimension, copied only if it has none; anything else as it is."""
    return tensor if not isinstance(tensor, Tensor) or tensor.stride(-1) == 1 else tensor.contiguous()


def window(window_size: tuple[int, int]) -> tuple[int, int]:
    """flash-attn takes any negative number for 'unbounded', flash_ext -1."""
    left, right = window_size
    return (-1 if left < 0 else left, -1 if right < 0 else right)


def offsets(batch: int, seqlen: int, device: torch.device) -> Tensor:
    """cu_seqlens (batch + 1) int32 of equally long sequences, made on the device without synchronising."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
