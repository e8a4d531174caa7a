"""What the GPU reports about itself while it works: energy, power, SM clock, reasons for throttling.

The readings come from a Provider, so that tests put a fake in NVML's place. Nothing here changes a setting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

SAMPLE_INTERVAL_S = 0.04  # 25 a second
# NVML's clock event reasons that slow work down; idleness and clocks set by the owner are not among them.
THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


class Provider(Protocol):
    """One GPU's readings. A reading that the GPU does not have raises Unavailable."""

    def describe(self) -> dict[str, Any]: ...
    def energy_mj(self) -> int: ...
    def power_w(self) -> float: ...
    def sm_clock_mhz(self) -> int: ...
    def throttle_bits(self) -> int: ...


class Unavailable(RuntimeError):
    """NVML, or one of its readings, is not to be had here; the message says why."""


class NvmlProvider:
    """The GPU that torch uses as cuda:0, through nvidia-ml-py."""

    def __init__(self, pci_bus_id: str | None = None) -> None:
        try:
            import pynvml
        except ImportError:
            raise Unavailable("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id) if pci_bus_id else pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from None

    def _read(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(self._gpu, *arguments)
        except self._nvml.NVMLError as error:
            raise Unavailable(f"NVML: {error}") from None

    def describe(self) -> dict[str, Any]:
        nvml, found = self._nvml, {}
        readings: dict[str, Callable[[], Any]] = {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "power_limit_w": lambda: self._read(nvml.nvmlDeviceGetEnforcedPowerLimit) / 1000,
            "max_sm_clock_mhz": lambda: self._read(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: self._read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: self._read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        }
        for name, read in readings.items():
            try:
                value = read()
            except (Unavailable, nvml.NVMLError):
                value = None
            found[name] = value.decode() if isinstance(value, bytes) else value
        return found

    def energy_mj(self) -> int:
        return self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def power_w(self) -> float:
        return self._read(self._nvml.nvmlDeviceGetPowerUsage) / 1000

    def sm_clock_mhz(self) -> int:
        return self._read(self._nvml.nvmlDeviceGetClockInfo, self._nvml.NVML_CLOCK_SM)

    def throttle_bits(self) -> int:
        name = "nvmlDeviceGetCurrentClocksEventReasons"
        return self._read(getattr(self._nvml, name, None) or self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)


@dataclass
class Conditions:
    """Readings over a stretch of work: (seconds, watts), clocks in MHz, every throttle bit seen."""

    power: list[tuple[float, float]] = field(default_factory=list)
    clocks: list[int] = field(default_factory=list)
    throttle_bits: int = 0

    def summary(self) -> dict[str, Any]:
        watts = [w for _, w in self.power]
        return {
            "power_w": sum(watts) / len(watts) if watts else None,
            "sm_clock_mhz": sum(self.clocks) / len(self.clocks) if self.clocks else None,
            "throttled": [reason for bit, reason in THROTTLE_REASONS.items() if self.throttle_bits & bit],
        }


class Sampler:
    """Samples a provider from a thread of its own for as long as the context is open; without a provider, nothing."""

    def __init__(self, provider: Provider | None, interval_s: float = SAMPLE_INTERVAL_S) -> None:
        self._provider, self._interval = provider, interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.conditions = Conditions()

    def sample(self) -> None:
        seen, provider = self.conditions, self._provider
        for read in (
            lambda: seen.power.append((time.perf_counter(), provider.power_w())),
            lambda: seen.clocks.append(provider.sm_clock_mhz()),
            lambda: setattr(seen, "throttle_bits", seen.throttle_bits | provider.throttle_bits()),
        ):
            try:
                read()
            except Unavailable:
                continue

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()

    def __enter__(self) -> Sampler:
        if self._provider is not None:
            self.sample()
            self._thread = threading.Thread(target=self._loop, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self.sample()
