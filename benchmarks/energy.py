"""Energy of a call: joules and picojoules a floating-point operation, net of what the idle GPU draws.

A region of at least two seconds is read from NVML's energy counter at both ends (the counter moves every 20 to 100 ms);
where a GPU has no counter, the power samples are integrated. E_net = E - P_idle * t.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .nvml import Provider, Sampler, Unavailable

REGION_S = 2.0
REGIONS = 3
COUNTER_WIDTHS = (32, 64)  # bits: a counter that went backwards has wrapped at the narrower width that explains it


def counter_difference_mj(before: int, after: int) -> int:
    if after >= before:
        return after - before
    width = next(bits for bits in COUNTER_WIDTHS if before < 2**bits)
    return after - before + 2**width


def trapezoid_j(power: list[tuple[float, float]], begin: float, end: float) -> float:
    """Integral of the samples (seconds, watts) from begin to end; the first and last sample hold to the ends."""
    if not power:
        raise Unavailable("neither an energy counter nor power samples")
    inside = [(min(max(t, begin), end), w) for t, w in power]
    points = [(begin, inside[0][1]), *inside, (end, inside[-1][1])]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(points))


@dataclass(frozen=True)
class Reading:
    joules: float
    seconds: float
    source: str  # "counter" or "power samples"


class EnergyMeter:
    """with EnergyMeter(provider, synchronize) as meter: ...  and then meter.reading."""

    def __init__(self, provider: Provider, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._provider, self._synchronize, self._clock = provider, synchronize, clock
        self._sampler = Sampler(provider)
        self.reading: Reading | None = None

    def _counter(self) -> int | None:
        try:
            return self._provider.energy_mj()
        except Unavailable:
            return None

    def __enter__(self) -> EnergyMeter:
        self._synchronize()
        self._sampler.__enter__()
        self._begin, self._before = self._clock(), self._counter()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._synchronize()
        after, end = self._counter(), self._clock()
        self._sampler.__exit__()
        if kind is not None:
            return
        if self._before is not None and after is not None:
            joules, source = counter_difference_mj(self._before, after) / 1000, "counter"
        else:
            joules, source = trapezoid_j(self._sampler.conditions.power, self._begin, end), "power samples"
        self.reading = Reading(joules, end - self._begin, source)


@dataclass(frozen=True)
class Energy:
    """Of one call: median over the regions, and the spread of the regions relative to it."""

    joules: float  # net of idle
    joules_gross: float
    pj_per_flop: float  # of the net joules
    watts: float
    idle_watts: float
    spread: float
    calls: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def idle_watts(
    provider: Provider, synchronize: Callable[[], None], region_s: float = REGION_S,
    sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    with EnergyMeter(provider, synchronize, clock) as meter:
        sleep(region_s)
    return meter.reading.joules / meter.reading.seconds


def energy_of(
    call: Callable[[], Any], seconds: float, flops: float, idle_w: float, provider: Provider, synchronize: Callable[[], None],
    region_s: float = REGION_S, regions: int = REGIONS, clock: Callable[[], float] = time.perf_counter,
) -> Energy:  # fmt: skip
    """Energy of a call that takes about `seconds`, from regions of at least region_s each."""
    readings, calls = [], max(1, round(1.1 * region_s / seconds))
    while len(readings) < regions:
        with EnergyMeter(provider, synchronize, clock) as meter:
            for _ in range(calls):
                call()
        if meter.reading.seconds < region_s:
            calls = max(calls + 1, round(1.1 * calls * region_s / max(meter.reading.seconds, 1e-6)))
            continue
        readings.append((meter.reading, calls))
    gross = [r.joules / n for r, n in readings]
    net = [(r.joules - idle_w * r.seconds) / n for r, n in readings]
    joules = statistics.median(net)
    return Energy(
        joules=joules,
        joules_gross=statistics.median(gross),
        pj_per_flop=joules / flops * 1e12,
        watts=statistics.median(r.joules / r.seconds for r, _ in readings),
        idle_watts=idle_w,
        spread=(max(net) - min(net)) / abs(joules) if joules else 0.0,
        calls=sum(n for _, n in readings),
        source=readings[0][0].source,
    )
