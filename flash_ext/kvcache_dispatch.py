"""Which kernels a call of attention_with_kvcache runs, and why not others: questions to csrc/host/plan_kvcache.cpp."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import dispatch, kvcache_fp8, reference_kvcache
from .arguments import BACKENDS
from .kvcache import attention_with_kvcache
from .kvcache_arguments import NAME, check_arguments, shares_rows

_OPTIONAL = (
    "cache_seqlens", "cache_batch_idx", "leftpad_k", "page_table", "rotary_cos", "rotary_sin", "sinks", "alibi_slopes",
)  # fmt: skip
_TENSORS = ("q", "k_cache", "v_cache", "k", "v")


@dataclass(frozen=True)
class CacheExplanation:
    """What one call of flash_ext.attention_with_kvcache would do.

    backend: 'sm90', 'sm80' or 'reference'. variant: the kernel that attends (also in profiles), or 'reference_kvcache'.
    kernels: all that are launched, in order. keys_by: how keys reach shared memory, 'tma' (boxes of a page or of a tile) or
    'gather' (16 bytes a thread, any page size); '' for the reference. tile, heads_per_tile, grid: as in Explanation.
    num_splits: parts of each sequence's keys: 1: whole, 0: decided on the device from the lengths, else as asked (a sequence
    of fewer tiles has fewer). max_parts: of all sequences together there is room for so many, 0 where nothing is split.
    workspace_bytes: device memory beside inputs and results, at the peak. copies: tensors copied first because of their strides or
    alignment; caches never are. rejected: for every other backend the reasons why it was not taken.
    """

    backend: str
    variant: str
    kernels: tuple[str, ...]
    keys_by: str
    tile: tuple[int, int]
    heads_per_tile: int
    grid: tuple[int, int, int]
    num_splits: int
    max_parts: int
    workspace_bytes: int
    copies: tuple[str, ...]
    rejected: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        splits = str(self.num_splits) if self.num_splits else "decided on the device"
        room = f", room for {self.max_parts} parts" if self.max_parts else ""
        lines = [
            f"backend    {self.backend}",
            f"variant    {self.variant}",
            f"kernels    {', '.join(self.kernels)}",
            f"keys by    {self.keys_by or 'the reference'}",
            f"tile       {self.tile[0]} x {self.tile[1]} (queries x keys)",
            f"heads      {self.heads_per_tile} query head{'s' * (self.heads_per_tile > 1)} in a tile",
            f"grid       {' x '.join(map(str, self.grid))}",
            f"splits     {splits}{room}",
            f"workspace  {self.workspace_bytes} bytes",
            f"copies     {', '.join(self.copies) or 'none'}",
        ]
        lines += [f"not {name}:  {reason}" for name, reasons in self.rejected.items() for reason in reasons]
        return "\n".join(lines)


def _checked(arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the call by name, defaults filled in; checked as attention_with_kvcache checks them."""
    bound = inspect.signature(attention_with_kvcache).bind(*arguments, **options)
    bound.apply_defaults()
    call = dict(bound.arguments)
    optional, scales = ({name: call[name] for name in names} for names in (_OPTIONAL, kvcache_fp8.NAMES))
    others = {name: value for name, value in call.items() if name not in (*_TENSORS, *optional, *scales)}
    check_arguments(*(call[name] for name in _TENSORS), optional, others, scales)
    return call


def _plan(device: str, call: dict[str, Any], backend: str) -> dict[str, Any]:
    """What the planner makes of the call where only this backend's kernels may run it."""

    def layout(tensor: Tensor | None) -> Any:
        return None if tensor is None else dispatch._layout(tensor)

    q, table, cos = call["q"], call["page_table"], call["rotary_cos"]
    out_dtype = kvcache_fp8.out_dtype(q, call["out_dtype"])
    return dispatch._host().plan_kvcache(
        device=device,
        dtype=str(q.dtype).removeprefix("torch."),
        **{name: layout(call[name]) for name in _TENSORS},
        pages=-1 if table is None else table.shape[1],
        leftpad=call["leftpad_k"] is not None,
        shared_values=shares_rows(call["k_cache"], call["v_cache"]),
        rotary_dim=0 if cos is None else 2 * cos.shape[1],
        causal=call["causal"],
        window_left=call["window_size"][0],
        window_right=call["window_size"][1],
        modified_score=call["softcap"] > 0 or call["alibi_slopes"] is not None,
        softmax_scale=q.shape[-1] ** -0.5 if call["softmax_scale"] is None else call["softmax_scale"],
        num_splits=call["num_splits"],
        backend=backend,
        out_dtype=str(out_dtype).removeprefix("torch."),
        block_scales=any(call[name] is not None and call[name].dim() == 3 for name in ("k_descale", "v_descale")),
    )


def _plans(device: str, call: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Each backend of kernels with its plan, and each backend with what keeps it from running the call."""
    plans = {backend: _plan(device, call, backend) for backend in BACKENDS if backend != "reference"}
    return plans, {backend: list(plans[backend]["reasons"]) if backend in plans else [] for backend in BACKENDS}


def supported_with_kvcache(*arguments: Any, **options: Any) -> dict[str, list[str]]:
    """Each backend with the reasons why it cannot run attention_with_kvcache(...); an empty list where it can.

    Takes and checks the arguments of flash_ext.attention_with_kvcache; reads no data, and works on meta tensors.
    """
    call = _checked(arguments, options)
    return _plans(dispatch.device_name(call["q"]), call)[1]


def explain_with_kvcache(*arguments: Any, device_info: str | None = None, **options: Any) -> CacheExplanation:
    """What attention_with_kvcache(...) would run, where it is, or on the GPU that device_info imagines.

    Args:
        arguments, options: as flash_ext.attention_with_kvcache. Meta tensors do: no data is read, and no GPU is needed.
        device_info: as flash_ext.explain, such as 'sm90' or 'sm90:78'.

    Raises:
        TypeError, ValueError: as flash_ext.attention_with_kvcache; also for an unknown device_info.
    """
    call = _checked(arguments, options)
    dispatch.check_device_info(device_info)
    plans, reasons = _plans(device_info or dispatch.device_name(call["q"]), call)
    asked, q = call["backend"], call["q"]
    backend = next(name for name in BACKENDS if not reasons[name]) if asked is None else asked
    if reasons[backend]:
        raise ValueError(f"{NAME}: backend '{asked}' cannot run this call; {asked}: {', '.join(reasons[backend])}")
    preferred = [f"{backend} is preferred" if asked is None else f"backend '{asked}' was asked for"]
    rejected = {name: tuple(why or preferred) for name, why in reasons.items() if name != backend}
    if backend == "reference":
        group = q.shape[2] // call["k_cache"].shape[2]
        rows = max(1, min(q.shape[1], 256 // group))
        return CacheExplanation(
            backend, "reference_kvcache", ("reference_kvcache",), "", (rows, reference_kvcache.KEY_BLOCK), group,
            (math.ceil(q.shape[1] / rows), q.shape[2], q.shape[0]), 1, 0, 0, (), rejected,
        )  # fmt: skip
    plan = plans[backend]
    return CacheExplanation(
        backend=backend,
        variant=plan["variant"],
        kernels=tuple(plan["kernels"]),
        keys_by=plan["keys_by"],
        tile=tuple(plan["tile"]),
        heads_per_tile=plan["heads_per_tile"],
        grid=tuple(plan["grid"]),
        num_splits=call["num_splits"] if plan["max_parts"] else 1,
        max_parts=plan["max_parts"],
        workspace_bytes=plan["workspace_bytes"],
        copies=tuple(plan["copies"]),
        rejected=rejected,
    )
