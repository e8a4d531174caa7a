"""Times of several candidates, fairly: warmed up, in turn within one run, from a cold L2, median with p20 and p80."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

FLUSH_BYTES = 2**28  # several times the L2 of any GPU
ASSUMED_CLOCK_HZ = 2e9  # only to turn a wait into cycles; a slower clock waits longer


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float
    count: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def percentile(samples: list[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(samples: list[float]) -> Spread:
    return Spread(percentile(samples, 0.5), percentile(samples, 0.2), percentile(samples, 0.8), len(samples))


class Stopwatch(Protocol):
    def host_and_total(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until the call returned, and until its work was done. For warm-up."""

    def start(self, call: Callable[[], Any], host_s: float) -> Any:
        """Run a call, to be asked for with seconds() once finish() has been called. host_s: what it costs the host."""

    def finish(self) -> None: ...

    def seconds(self, started: Any) -> float: ...


class CpuStopwatch:
    def host_and_total(self, call: Callable[[], Any]) -> tuple[float, float]:
        begin = time.perf_counter()
        call()
        return 0.0, time.perf_counter() - begin

    def start(self, call: Callable[[], Any], host_s: float) -> float:
        return self.host_and_total(call)[1]

    def finish(self) -> None:
        pass

    def seconds(self, started: float) -> float:
        return started


class CudaStopwatch:
    """CUDA events. Before each call the L2 is overwritten, and the GPU is held until the host can have queued the call:
    otherwise a short kernel's time would be the time of its launch."""

    def __init__(self, flush_bytes: int = FLUSH_BYTES, device: str = "cuda") -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def host_and_total(self, call: Callable[[], Any]) -> tuple[float, float]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        return host, time.perf_counter() - begin

    def start(self, call: Callable[[], Any], host_s: float) -> tuple[Any, Any]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(int(1.5 * host_s * ASSUMED_CLOCK_HZ))
        begin.record()
        call()
        end.record()
        return begin, end

    def finish(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, started: tuple[Any, Any]) -> float:
        return started[0].elapsed_time(started[1]) / 1000


def stopwatch_of(device: str) -> Stopwatch:
    return CudaStopwatch() if device == "cuda" else CpuStopwatch()


def time_interleaved(
    calls: dict[str, Callable[[], Any]], stopwatch: Stopwatch, *, seconds: float, least: int, most: int, warm_up: int = 2
) -> dict[str, Spread]:
    """Times of every call, taken in turn (each round starts with another one) for about `seconds` in all."""
    host: dict[str, float] = {}
    total: dict[str, float] = {}
    for name, call in calls.items():
        tries = [stopwatch.host_and_total(call) for _ in range(warm_up)]
        host[name], total[name] = (min(times) for times in zip(*tries, strict=True))
    rounds = max(least, min(most, int(seconds / max(sum(total.values()), 1e-6))))
    names, started = list(calls), {name: [] for name in calls}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started[name].append(stopwatch.start(calls[name], host[name]))
    stopwatch.finish()
    return {name: spread([stopwatch.seconds(s) for s in runs]) for name, runs in started.items()}
