"""Which backend runs a call, and why not the others: questions to the planner in csrc/host/plan.cpp, without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import env, ops, reference
from .arguments import BACKENDS, autocast, check_arguments

DEVICES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


@dataclass(frozen=True)
class Explanation:
    """What one call of flash_ext.attention would do.

    backend: 'sm90', 'sm80' or 'reference'. variant: the kernel's name (also in profiles), or 'reference_fwd'.
    tile: (rows of queries, rows of keys) of a tile. grid: CTAs in x, y, z; for the reference (row blocks, heads, batch).
    num_splits: parts of the key sequence worked on by different CTAs and combined. workspace_bytes: device memory beside
    inputs and results. copies: tensors copied first because of their strides or alignment. rejected: for every other
    backend the reasons why it was not taken.
    """

    backend: str
    variant: str
    tile: tuple[int, int]
    grid: tuple[int, int, int]
    num_splits: int
    workspace_bytes: int
    copies: tuple[str, ...]
    rejected: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [
            f"backend    {self.backend}",
            f"variant    {self.variant}",
            f"tile       {self.tile[0]} x {self.tile[1]} (queries x keys)",
            f"grid       {' x '.join(map(str, self.grid))}",
            f"splits     {self.num_splits}",
            f"workspace  {self.workspace_bytes} bytes",
            f"copies     {', '.join(self.copies) or 'none'}",
        ]
        lines += [f"not {name}:  {reason}" for name, reasons in self.rejected.items() for reason in reasons]
        return "\n".join(lines)


def _host() -> Any:
    try:
        from . import _host
    except ImportError as error:
        raise RuntimeError(f"flash_ext._host is not built ({error}); {ops.how_to_install()}") from None
    return _host


def device_name(tensor: Tensor) -> str:
    """The planner's name of the device that a tensor is on."""
    if env.EMULATE and tensor.device.type == "cpu":
        return f"{env.EMULATE}:{env.EMULATE_SMS}"
    if tensor.device.type != "cuda" or ops.library_error is not None or not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(tensor.device)
    return f"sm{properties.major}{properties.minor}:{properties.multi_processor_count}:{properties.shared_memory_per_block_optin}"


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    # Meta and fake tensors have no address; allocators align every storage, so there the offset decides.
    has_address = tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)
    address = tensor.data_ptr() if has_address else tensor.storage_offset() * tensor.element_size()
    return tuple(tensor.shape), tuple(tensor.stride()), address % 16 == 0


def _plan(device: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    scale = options["softmax_scale"]
    plan = _host().plan_fwd(
        device=device,
        dtype=str(q.dtype).removeprefix("torch."),
        q=_layout(q),
        k=_layout(k),
        v=_layout(v),
        softmax_scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=options["causal"],
        window_left=options["window_size"][0],
        window_right=options["window_size"][1],
        softcap=float(options["softcap"]),
        backend=options["backend"] or "",
    )
    if device == "cpu" and q.device.type == "cuda" and ops.library_error is not None:
        why = f"the compiled kernels are not available: {ops.library_error}"
        plan["rejected"] = {name: [why] for name in plan["rejected"]}
    return plan


def _options(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The tensors as attention would take them (autocast), and every option with its default; checked."""
    options = {
        "causal": False, "softmax_scale": None, "window_size": (-1, -1), "softcap": 0.0, "return_lse": False,
        "deterministic": None, "backend": None,
    }  # fmt: skip
    unknown = set(given) - set(options)
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; attention takes {', '.join(options)}")
    options.update(given)
    q, k, v = autocast(q, k, v)
    check_arguments(q, k, v, **options)
    return q, k, v, options


def supported(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, list[str]]:
    """Each backend with the reasons why it cannot run attention(q, k, v, **options); an empty list where it can.

    Takes and checks the arguments of flash_ext.attention; reads no data, and works on meta tensors.
    """
    q, k, v, options = _options(q, k, v, options)
    device, reasons = device_name(q), {}
    for backend in BACKENDS:
        plan = _plan(device, q, k, v, {**options, "backend": backend})
        reasons[backend] = [] if plan["backend"] == backend else list(plan["rejected"][backend])
    return reasons


def require_backend(backend: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """ValueError with every backend's reasons unless this one can run the call."""
    reasons = supported(q, k, v, **options)
    if reasons[backend]:
        able = ", ".join(name for name, why in reasons.items() if not why)
        whys = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items() if why)
        raise ValueError(f"attention: backend '{backend}' cannot run this call; these can: {able}; {whys}")


def explain(q: Tensor, k: Tensor, v: Tensor, *, device_info: str | None = None, **options: Any) -> Explanation:
    """What attention(q, k, v, **options) would run, where it is, or on the GPU that device_info imagines.

    Args:
        q, k, v, options: as flash_ext.attention. Meta tensors do: no data is read, and no GPU is needed.
        device_info: 'sm80', 'sm86', 'sm89', 'sm90', 'sm100' or 'sm120' (a well-known card of that architecture), with its
            number of SMs changed by ':SMS', such as 'sm90:78'.

    Raises:
        TypeError, ValueError: as flash_ext.attention; also for an unknown device_info.
    """
    q, k, v, options = _options(q, k, v, options)
    if device_info is not None and (not isinstance(device_info, str) or device_info.split(":")[0] not in DEVICES):
        raise ValueError(f"device_info must be one of {', '.join(DEVICES)}, optionally followed by ':SMS', got {device_info!r}")
    plan = _plan(device_info or device_name(q), q, k, v, options)
    if plan["backend"] == "":
        raise ValueError(f"attention: backend '{options['backend']}' cannot run this call; {plan['rejections_as_text']}")
    backend, variant, tile, grid = plan["backend"], plan["variant"], plan["tile"], plan["grid"]
    if backend == "reference":
        group = q.shape[2] // k.shape[2]
        variant, tile = "reference_fwd", reference.tile_shape(q.shape[1], k.shape[1], group)
        grid = (math.ceil(q.shape[1] / tile[0]), q.shape[2], q.shape[0])
    return Explanation(
        backend=backend,
        variant=variant,
        tile=tuple(tile),
        grid=tuple(grid),
        num_splits=plan["num_splits"],
        workspace_bytes=plan["workspace_bytes"],
        copies=tuple(plan["copies"]),
        rejected={name: tuple(why) for name, why in plan["rejected"].items()},
    )
