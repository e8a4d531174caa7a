"""Which backend runs a call, and why not the others: questions to the planner in csrc/host/plan.cpp, without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import env, fp8, ops, reference
from .arguments import BACKENDS, autocast, check_arguments
from .call import OPTIONS, VARLEN_OPTIONS, WANT_DK, WANT_DK_BIAS, WANT_DQ, WANT_DSINKS, WANT_DV, Call

DEVICES = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


@dataclass(frozen=True)
class Backward:
    """What the gradients of a call would run: backend, variant, tile and rejected as in Explanation.

    wanted: names of the inputs whose gradients are formed. workspace_bytes: device memory of the row statistics (float32, two a
    row and query head), of the float32 sum of dq, of its turns if deterministic, and of copies of q, k and v; linear in seqlen.
    Copies of incoming gradients, whose strides are not known yet, are not counted.
    """

    backend: str
    variant: str
    tile: tuple[int, int]
    wanted: tuple[str, ...]
    workspace_bytes: int
    rejected: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Explanation:
    """What one call of flash_ext.attention would do.

    backend: 'sm90', 'sm80' or 'reference'. variant: the kernel's name (also in profiles), or 'reference_fwd'.
    tile: (rows of queries, rows of keys) of a tile; heads_per_tile query heads of a key head share its rows of queries.
    grid: CTAs in x, y, z; for the reference (row blocks, heads, batch). num_splits: parts of the key sequence that different
    CTAs work on. workspace_bytes: device memory beside inputs and results. copies: tensors copied first because of their
    strides or alignment. rejected: for every other backend the reasons why it was not taken. backward: of the inputs that
    require a gradient, or of all where none does; None for FP8 calls, which have no backward.
    """

    backend: str
    variant: str
    tile: tuple[int, int]
    heads_per_tile: int
    grid: tuple[int, int, int]
    num_splits: int
    workspace_bytes: int
    copies: tuple[str, ...]
    rejected: dict[str, tuple[str, ...]]
    backward: Backward | None

    def __str__(self) -> str:
        lines = [
            f"backend    {self.backend}",
            f"variant    {self.variant}",
            f"tile       {self.tile[0]} x {self.tile[1]} (queries x keys)",
            f"heads      {self.heads_per_tile} query head{'s' * (self.heads_per_tile > 1)} in a tile",
            f"grid       {' x '.join(map(str, self.grid))}",
            f"splits     {self.num_splits}",
            f"workspace  {self.workspace_bytes} bytes",
            f"copies     {', '.join(self.copies) or 'none'}",
        ]
        lines += [f"not {name}:  {reason}" for name, reasons in self.rejected.items() for reason in reasons]
        if self.backward is not None:
            lines.append(f"backward   {self.backward.variant}, workspace {self.backward.workspace_bytes} bytes")
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


def _plan(device: str, call: Call, backend: str | None) -> dict[str, Any]:
    if call.q.dtype == fp8.FP8:
        return fp8.plan(_host(), device, call, backend, _layout)
    return _planned(_host().plan_fwd, device, call, backend)


def _planned(planner: Any, device: str, call: Call, backend: str | None, **of_backward: Any) -> dict[str, Any]:
    q = call.q
    plan = planner(
        device=device,
        dtype=str(q.dtype).removeprefix("torch."),
        q=_layout(q),
        k=_layout(call.k),
        v=_layout(call.v),
        softmax_scale=q.shape[-1] ** -0.5 if call.softmax_scale is None else float(call.softmax_scale),
        causal=call.causal,
        window_left=call.window_size[0],
        window_right=call.window_size[1],
        softcap=float(call.softcap),
        backend=backend or "",
        num_sequences=-1 if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1,
        num_parts=0 if call.split_boundaries is None else len(call.split_boundaries) - 1,
        sinks=call.sinks is not None,
        alibi=call.alibi_slopes is not None,
        k_bias=call.k_bias is not None,
        block_mask=call.block_mask is not None,
        **of_backward,
    )
    if device == "cpu" and q.device.type == "cuda" and ops.library_error is not None:
        why = f"the compiled kernels are not available: {ops.library_error}"
        plan["rejected"] = {name: [why] for name in plan["rejected"]}
    return plan


def _checked(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Call:
    """The call that attention, attention_varlen or attention_partials would make of these options; checked."""
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; attention takes {', '.join(OPTIONS)}")
    function = "attention"
    if any(name in options for name in VARLEN_OPTIONS):
        function = "attention_varlen"
    elif options.get("split_boundaries") is not None:
        function = "attention_partials"
    call = Call(*autocast(q, k, v), **options, function=function)
    check_arguments(call)
    return call


def supported(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, list[str]]:
    """Each backend with the reasons why it cannot run attention(q, k, v, **options); an empty list where it can.

    Takes and checks the arguments of flash_ext.attention, with cu_seqlens_q and cu_seqlens_k those of attention_varlen,
    with split_boundaries those of attention_partials; reads no data, and works on meta tensors.
    """
    return _supported(_checked(q, k, v, options))


def _supported(call: Call) -> dict[str, list[str]]:
    device, reasons = device_name(call.q), {}
    for backend in BACKENDS:
        plan = _plan(device, call, backend)
        reasons[backend] = [] if plan["backend"] == backend else list(plan["rejected"][backend])
    return reasons


def require_backend(call: Call) -> None:
    """ValueError with every backend's reasons unless the one that the call names can run it."""
    reasons = _supported(call)
    if reasons[call.backend]:
        able = ", ".join(name for name, why in reasons.items() if not why)
        whys = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items() if why)
        raise ValueError(f"{call.function}: backend '{call.backend}' cannot run this call; these can: {able}; {whys}")


def check_device_info(device_info: Any) -> None:
    """ValueError unless it is None or names a device of DEVICES; the planner checks what follows the name."""
    if device_info is not None and (not isinstance(device_info, str) or device_info.split(":")[0] not in DEVICES):
        raise ValueError(f"device_info must be one of {', '.join(DEVICES)}, optionally followed by ':SMS', got {device_info!r}")


def _explain_backward(device: str, call: Call) -> Backward:
    bits = {"q": WANT_DQ, "k": WANT_DK, "v": WANT_DV, "sinks": WANT_DSINKS, "k_bias": WANT_DK_BIAS}
    given = {name: getattr(call, name) for name in bits if getattr(call, name) is not None}
    wanted = tuple(name for name, tensor in given.items() if tensor.requires_grad) or tuple(given)
    deterministic = torch.are_deterministic_algorithms_enabled() if call.deterministic is None else call.deterministic
    plan = _planned(
        _host().plan_bwd, device, call, call.backend, deterministic=deterministic, wanted=sum(bits[name] for name in wanted),
        pairs=env.bwd_pairs(),
    )  # fmt: skip
    is_kernel = bool(plan["variant"])  # a backend that has a forward alone leaves the gradients to the reference
    return Backward(
        backend=plan["backend"] if is_kernel else "reference",
        variant=plan["variant"] if is_kernel else "reference_bwd",
        tile=tuple(plan["tile"]) if is_kernel else reference.tile_shape(call.q.shape[-3], call.k.shape[-3], 1),
        wanted=wanted,
        workspace_bytes=plan["workspace_bytes"],
        rejected={name: tuple(why) for name, why in plan["rejected"].items()},
    )


def explain(q: Tensor, k: Tensor, v: Tensor, *, device_info: str | None = None, **options: Any) -> Explanation:
    """What attention(q, k, v, **options) would run, where it is, or on the GPU that device_info imagines.

    Args:
        q, k, v, options: as flash_ext.attention; with cu_seqlens_q and cu_seqlens_k as flash_ext.attention_varlen, with
            split_boundaries as flash_ext.attention_partials. Meta tensors do: no data is read, and no GPU is needed.
        device_info: 'sm80', 'sm86', 'sm89', 'sm90', 'sm100' or 'sm120' (a well-known card of that architecture), with its
            number of SMs changed by ':SMS', such as 'sm90:78'.

    Raises:
        TypeError, ValueError: as flash_ext.attention; also for an unknown device_info.
    """
    call = _checked(q, k, v, options)
    check_device_info(device_info)
    device = device_info or device_name(call.q)
    plan = _plan(device, call, call.backend)
    if plan["backend"] == "":
        raise ValueError(f"{call.function}: backend '{call.backend}' cannot run this call; {plan['rejections_as_text']}")
    backend, variant, tile, grid = plan["backend"], plan["variant"], plan["tile"], plan["grid"]
    heads = plan["heads_per_tile"]
    if backend == "reference":
        rows, keys, heads = call.q.shape[-3], call.k.shape[-3], call.q.shape[-2] // call.k.shape[-2]
        variant, tile = "reference_fwd", reference.tile_shape(rows, keys, heads)
        grid = (math.ceil(rows / tile[0]), call.q.shape[-2], call.q.shape[0] if call.q.dim() == 4 else 1)
    return Explanation(
        backend=backend,
        variant=variant,
        tile=tuple(tile),
        heads_per_tile=heads,
        grid=tuple(grid),
        num_splits=plan["num_splits"],
        workspace_bytes=plan["workspace_bytes"],
        copies=tuple(plan["copies"]),
        rejected={name: tuple(why) for name, why in plan["rejected"].items()},
        backward=None if call.q.dtype == fp8.FP8 else _explain_backward(device, call),
    )
