"""One case, all implementations: bind, check against the oracle, measure memory, time in turn, read the energy."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import flash_ext

from . import check, energy, memory
from .ceilings import Ceilings
from .nvml import Provider, Sampler
from .presets import Case, Tensors
from .registry import Attend, Implementation, NotCovered
from .timing import Spread, Stopwatch, time_interleaved

HEAVY_S = 0.5  # after a case that kept the GPU busy this long, a pause lets it cool

# How an implementation fared with a case.
TIMED, ABSENT, NOT_COVERED, WRONG, FAILED = "timed", "absent", "not covered", "wrong", "failed"


class DeviceLost(RuntimeError):
    """The GPU's context is broken: nothing can be measured in this process any more."""


@dataclass(frozen=True)
class Session:
    """What all cases of a run share. idle_w: None where energy is not measured."""

    device: str
    stopwatch: Stopwatch
    ceilings: Ceilings
    provider: Provider | None
    seconds: float  # to spend on timing a case
    least: int
    most: int
    pause_s: float
    idle_w: float | None = None
    region_s: float = energy.REGION_S


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _outcome(status: str, reason: str = "", **measured: Any) -> dict[str, Any]:
    return {"status": status, "reason": reason, **measured}


def _gpu_answers() -> bool:
    """A launch that was refused leaves the GPU usable; a fault in a kernel makes every later call fail."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _outcome_of(error: Exception) -> dict[str, Any]:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, (NotCovered, flash_ext.FallbackWarning)):
        return _outcome(NOT_COVERED, text.removesuffix(" (an error because FLASH_EXT_STRICT=1)"))
    if "flash_ext::reference_" in text:  # the fallback's own exception does not cross the C++ op that called the reference
        return _outcome(NOT_COVERED, "no kernel: the op falls back to the reference")
    if isinstance(error, torch.OutOfMemoryError):
        return _outcome(FAILED, "out of memory")
    if "No available kernel" in text:
        return _outcome(NOT_COVERED, "torch: no kernel of this backend takes it")
    if "CUDA error" in str(error) and "out of memory" not in str(error) and not _gpu_answers():
        raise DeviceLost(text) from error
    return _outcome(FAILED, f"{type(error).__name__}: {text}")


def _leaves(tensors: Tensors) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (tensors.q, tensors.k, tensors.v)]


def results_of(case: Case, attend: Attend, tensors: Tensors) -> dict[str, Tensor]:
    """What the case computes, to be held against the oracle."""
    if case.direction == "fwd":
        with torch.no_grad():
            out = attend(tensors.q, tensors.k, tensors.v)
            return {"out": getattr(attend, "finish", lambda result: result)(out)}
    leaves = _leaves(tensors)
    out = attend(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, tensors.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def call_of(case: Case, attend: Attend, tensors: Tensors) -> Callable[[], Any]:
    """What is timed. A backward is autograd.grad over a retained graph, for every implementation."""
    if case.direction == "fwd":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(tensors.q, tensors.k, tensors.v)

        return forward
    leaves = _leaves(tensors)
    if case.direction == "bwd":
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)
    return lambda: torch.autograd.grad(attend(*leaves), leaves, tensors.dout)


def _prepare(
    case: Case, chosen: dict[str, Implementation], tensors: Tensors, session: Session
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[], Any]]]:
    """Each implementation's outcome so far, and the calls of those that may be timed."""
    outcomes, calls, truth = {}, {}, None
    for name, implementation in chosen.items():
        reason = implementation.absent(session.device)
        if reason is not None:
            outcomes[name] = _outcome(ABSENT, reason)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                attend = implementation.bind(case, session.device)
                results = results_of(case, attend, tensors)
                truth = truth or check.truth_of(case, tensors)
                problems = check.problems_of(truth, results)
                del results
                if problems:
                    outcomes[name] = _outcome(WRONG, "; ".join(problems))
                    continue
                call = call_of(case, attend, tensors)
                call()
                outcomes[name] = _outcome(TIMED, extra_bytes=memory.peak_extra_bytes(call, session.device))
                calls[name] = call
        except Exception as error:
            outcomes[name] = _outcome_of(error)
    return outcomes, calls


def _rate(case: Case, seconds: float, session: Session) -> dict[str, Any]:
    least = session.ceilings.seconds(case)
    return {
        "tflops": case.flops() / seconds / 1e12,
        "gb_s": case.bytes_moved() / seconds / 1e9,
        "ceiling_share": None if least is None else least / seconds,
    }


def _add_ratios(outcomes: dict[str, dict[str, Any]], chosen: dict[str, Implementation]) -> None:
    """ratio: speed over that of the fastest peer; None where no peer but the implementation itself was timed."""
    medians = {name: o["seconds"]["median"] for name, o in outcomes.items() if o["status"] == TIMED}
    for name, median in medians.items():
        others = [m for other, m in medians.items() if chosen[other].peer and other != name]
        outcomes[name]["ratio"] = min(others) / median if others else None


def measure_case(case: Case, chosen: dict[str, Implementation], session: Session) -> dict[str, Any]:
    """The case's row: its description, each implementation's outcome, and the conditions while it was timed."""
    begin = time.perf_counter()
    try:
        tensors = case.build(session.device)
    except torch.OutOfMemoryError:  # no implementation's fault
        tensors, calls = None, {}
        outcomes = dict.fromkeys(chosen, _outcome(NOT_COVERED, "the case does not fit this GPU's memory"))
    else:
        outcomes, calls = _prepare(case, chosen, tensors, session)
    conditions: dict[str, Any] = {}
    times: dict[str, Spread] = {}
    if calls:
        with Sampler(session.provider) as sampler:
            limits = {"seconds": session.seconds, "least": session.least, "most": session.most}
            try:
                times = time_interleaved(calls, session.stopwatch, **limits)
            except Exception as error:  # such as memory that sufficed for each, but not for all together
                outcomes |= dict.fromkeys(calls, _outcome_of(error))
        conditions = sampler.conditions.summary() if session.provider else {}
        for name, measured in times.items():
            outcomes[name] |= {"seconds": measured.as_dict(), **_rate(case, measured.median, session)}
            if session.idle_w is not None:
                outcomes[name]["energy"] = energy.energy_of(
                    calls[name], measured.median, case.flops(), session.idle_w, session.provider,
                    lambda: _synchronize(session.device), session.region_s,
                ).as_dict()  # fmt: skip
        _add_ratios(outcomes, chosen)
        busy = sum(t.median * t.count for t in times.values())
        if busy > HEAVY_S:
            time.sleep(session.pause_s)
    calls.clear()
    del tensors
    gc.collect()
    if session.device == "cuda":
        torch.cuda.empty_cache()
    return {
        "name": case.name,
        "case": asdict(case) | {"mask": case.mask},
        "flops": case.flops(),
        "bytes": case.bytes_moved(),
        "limit": session.ceilings.limit(case),
        "implementations": outcomes,
        "conditions": conditions,
        "wall_s": time.perf_counter() - begin,
    }
