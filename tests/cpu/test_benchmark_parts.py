"""The parts of benchmarks/: arithmetic of the cases, the oracle check, clocks, energy, peers through stand-ins."""

from __future__ import annotations

import ctypes
import lzma
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import dense_attention, dense_results

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import ceilings, check, energy, nvml, presets, registry, report, runner, timing  # noqa: E402
from benchmarks.presets import Case, cases_of  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- cases ---


def test_work_is_counted_as_published() -> None:
    """FlashAttention-3: 4 * seqlen^2 * head_dim * heads * batch, half of it when causal, 2.5 times for the backward."""
    case = Case("x", 2, 8192, 8192, 16, 16, 128, 128)
    full = 4 * 8192**2 * 128 * 16 * 2
    assert case.flops() == full and replace(case, causal=True).flops() == full / 2
    assert replace(case, direction="bwd").flops() == 2.5 * full
    assert replace(case, direction="fwd+bwd").flops() == 3.5 * full
    # 192/128: 2 * (192 + 128) a pair forward, 2 * (3 * 192 + 2 * 128) backward. Grouped heads count the query's heads.
    unequal = Case("x", 1, 100, 100, 8, 2, 192, 128)
    assert unequal.flops() == 640 * 100 * 100 * 8 and replace(unequal, direction="bwd").flops() == 1664 * 100 * 100 * 8
    # One row of queries sees every key but those beyond its own.
    assert Case("x", 1, 1, 512, 1, 1, 64, 64, causal=True).pairs() == (511 + 512) / 2


@pytest.mark.parametrize(
    "case",
    [
        Case("x", 2, 64, 64, 3, 3, 8, 8),
        Case("x", 1, 40, 60, 1, 1, 8, 8, causal=True, window=(7, 0)),
        Case("x", 1, 60, 40, 1, 1, 8, 8, window=(7, 3)),
        Case("x", 1, 50, 50, 1, 1, 8, 8, window=(-1, 4)),
        Case("x", 1, 50, 50, 1, 1, 8, 8, lengths=(20, 1, 29)),
    ],
)
def test_pairs_are_those_that_see_each_other(case: Case) -> None:
    seen = case.visible(torch.arange(case.seqlen_q)).sum().item()
    assert case.pairs() == seen * case.heads * case.batch


@pytest.mark.parametrize("options", [{}, {"lengths": (30, 34)}, {"prefix": 16}])
def test_a_causal_half_is_within_the_diagonal_of_the_exact_count(options: dict[str, Any]) -> None:
    case = Case("x", 1, 64, 64, 1, 1, 8, 8, causal=True, **options)
    seen = case.visible(torch.arange(64)).sum().item()
    assert abs(case.pairs() - seen) <= 64 / 2


def test_bytes_count_each_tensor_once() -> None:
    case = Case("x", 1, 1, 1000, 8, 2, 128, 64)
    tensors = 8 * 128 + 1000 * 2 * 128 + 1000 * 2 * 64 + 8 * 64
    assert case.bytes_moved() == 2 * tensors + 4 * 8
    gradients = tensors + 8 * 64 + 8 * 128 + 1000 * 2 * 128 + 1000 * 2 * 64
    assert replace(case, direction="bwd").bytes_moved() == 2 * gradients + 4 * 8


def test_the_published_protocols() -> None:
    paper = cases_of("paper", True, ["fwd"], ["bf16"])
    tokens = [c for c in paper if c.family == "16k tokens"]
    assert {c.batch * c.seqlen_q for c in tokens} == {16384} and {c.heads * c.head_dim for c in tokens} == {2048}
    assert {(c.head_dim, c.seqlen_q, c.causal) for c in tokens} == {
        (d, s, m) for d in (64, 128, 256) for s in (512, 1024, 2048, 4096, 8192, 16384) for m in (False, True)
    }
    assert {(c.heads, c.heads_kv, c.batch) for c in paper if "GQA" in c.family} == {(64, 8, 1)}
    assert {(c.head_dim, c.head_dim_v, c.causal) for c in paper if c.family == "192/128"} == {(192, 128, True)}
    assert {c.direction for c in cases_of("decode", True, ["fwd", "bwd"], ["bf16"])} == {"fwd"}
    for preset in presets.PRESETS:
        for gpu in (True, False):
            names = [case.name for case in cases_of(preset, gpu, presets.PASSES, ["bf16", "fp16"])]
            assert names and len(set(names)) == len(names)


def test_packed_lengths_fill_the_tokens_and_stay_in_range() -> None:
    lengths = presets.packed_lengths(32768, 64, 8192)
    assert sum(lengths) == 32768 and all(64 <= n <= 8192 for n in lengths[:-1]) and len(set(lengths)) > 5
    assert lengths == presets.packed_lengths(32768, 64, 8192)


def test_tensors_of_a_case_are_its_own_and_repeatable() -> None:
    case = Case("x", 1, 8, 8, 2, 1, 16, 8)
    first, again, other = case.build("cpu"), case.build("cpu"), replace(case, causal=True).build("cpu")
    assert torch.equal(first.q, again.q) and not torch.equal(first.q, other.q)
    eighth = replace(case, dtype="fp8").build("cpu")
    assert eighth.q.dtype == torch.float8_e4m3fn and eighth.dout.dtype == torch.bfloat16


# --- the oracle check ---

CHECKED = [
    Case("x", 2, 300, 300, 4, 2, 16, 16, causal=True, direction="bwd"),
    Case("x", 1, 40, 300, 2, 2, 32, 16, direction="bwd", dtype="fp16"),
    Case("x", 1, 300, 40, 2, 1, 16, 16, causal=True, direction="bwd"),  # rows that see no key
    Case("x", 2, 50, 50, 2, 2, 16, 16, causal=True, window=(9, 0), direction="bwd", dtype="fp32"),
]


@pytest.mark.parametrize("case", CHECKED, ids=lambda c: c.name)
def test_the_truth_is_the_definition(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks and by rows, what the dense definition gives as a whole; and it passes its own rule, which can fail."""
    monkeypatch.setattr(check, "CHUNK_ELEMENTS", 37 * case.seqlen_k)
    tensors = case.build("cpu")
    inputs, options = (tensors.q, tensors.k, tensors.v), {"causal": case.causal, "window_size": case.window}
    whole = dense_results(inputs, tensors.dout, None, torch.float64, options)
    truth = check.truth_of(case, tensors)
    assert [(s.batch, s.head) for s in truth.samples] == [(0, 0), (case.batch - 1, case.heads - 1)]
    for sample, expected in zip(truth.samples, truth.expected, strict=True):
        assert {0, case.seqlen_q - 1} <= set(sample.rows.tolist()) and len(sample.rows) == min(256, case.seqlen_q)
        for name in ("out", "dq", "dk", "dv"):
            head, rows = (
                (sample.head, sample.rows) if name in ("out", "dq") else (sample.head * case.heads_kv // case.heads, sample.keys)
            )
            exact = getattr(whole, name)[sample.batch, rows, head]
            torch.testing.assert_close(expected[name].double(), exact, rtol=2e-6, atol=2e-6)
    rounded = {name: getattr(whole, name).to(tensors.dout.dtype) for name in ("out", "dq", "dk", "dv")}
    assert check.problems_of(truth, rounded) == []
    for name in rounded:
        spoiled = dict(rounded)
        spoiled[name] = rounded[name].clone()
        spoiled[name][-1, 0, -1, 0] += 0.3 * rounded[name].abs().max()
        assert [p for p in check.problems_of(truth, spoiled) if f" {name}: " in p], name


def test_fp8_results_are_held_to_a_bound_of_their_own() -> None:
    case = Case("x", 1, 64, 64, 2, 2, 32, 32, dtype="fp8")
    tensors = case.build("cpu")
    out, _ = dense_attention(*(t.float() for t in (tensors.q, tensors.k, tensors.v)))
    truth = check.truth_of(case, tensors)
    assert check.problems_of(truth, {"out": out.to(torch.bfloat16)}) == []
    assert "Frobenius" in check.problems_of(truth, {"out": 1.1 * out})[0]
    assert check.problems_of(truth, {"out": out * torch.nan})


# --- clocks ---


class _Stopwatch:
    """Time that is counted, not taken: a call costs what it says."""

    def __init__(self) -> None:
        self.log: list[tuple[str, float]] = []

    def host_and_total(self, call: Any) -> tuple[float, float]:
        name, seconds = call()
        self.log.append((name, 0.0))
        return seconds / 10, seconds

    def start(self, call: Any, host_s: float) -> float:
        name, seconds = call()
        self.log.append((name, host_s))
        return seconds

    def finish(self) -> None:
        self.log.append(("finish", 0.0))

    def seconds(self, started: float) -> float:
        return started


def test_candidates_take_turns() -> None:
    watch = _Stopwatch()
    times = timing.time_interleaved({"a": lambda: ("a", 1.0), "b": lambda: ("b", 3.0)}, watch, seconds=12, least=2, most=9)
    assert [name for name, _ in watch.log] == [*"aabb", *"abbaab", "finish"]
    assert dict(watch.log[4:6]) == {"a": 0.1, "b": 0.3}
    assert times["a"] == timing.Spread(1.0, 1.0, 1.0, 3) and times["b"].median == 3.0
    counts = [
        timing.time_interleaved({"a": lambda: ("a", 1.0)}, _Stopwatch(), seconds=s, least=2, most=9)["a"].count for s in (0, 5, 99)
    ]
    assert counts == [2, 5, 9]


def test_percentiles() -> None:
    assert timing.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == timing.Spread(3.0, pytest.approx(1.8), pytest.approx(4.2), 5)
    assert timing.spread([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)


def test_cuda_events_enclose_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch.cuda: flush and wait come before the first event, and only finish() synchronises."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            return 2.5

    fake = SimpleNamespace(
        Event=Event, synchronize=lambda: log.append("synchronize"), _sleep=lambda cycles: log.append(f"sleep {cycles}")
    )
    monkeypatch.setattr(timing.torch, "cuda", fake)
    watch = timing.CudaStopwatch(flush_bytes=1000, device="cpu")
    watch._flush.fill_(1)
    started = watch.start(lambda: log.append("call"), host_s=1e-4)
    assert log == ["sleep 300000", "event", "call", "event"] and not watch._flush.any()
    watch.finish()
    assert log[-1] == "synchronize" and watch.seconds(started) == 0.0025
    host, total = watch.host_and_total(lambda: log.append("warm"))
    assert log[-3:] == ["synchronize", "warm", "synchronize"] and 0 <= host <= total


def test_the_ceiling_of_a_case_is_the_tighter_one() -> None:
    machine = ceilings.Ceilings(copy_gb_s=1000.0, tflops={"bf16": 100.0}, matrix=8192)
    big, small = Case("x", 1, 8192, 8192, 16, 16, 128, 128), Case("x", 1, 1, 8192, 16, 16, 128, 128)
    assert machine.seconds(big) == big.flops() / 100e12
    assert machine.seconds(replace(big, dtype="fp16")) == machine.seconds(big)
    assert machine.seconds(small) == small.bytes_moved() / 1000e9
    assert machine.seconds(replace(big, dtype="fp8")) is None
    measured = ceilings.measure("cpu", ["bf16", "fp32", "fp8"], timing.CpuStopwatch(), seconds=0.01)
    assert set(measured.tflops) == {"bf16", "fp32"} and measured.as_dict()["fp32_tflops"] > 0
    assert ceilings.product_dtypes(True, ["fp16"]) == ["bf16", "fp8"], "on a GPU always"
    assert ceilings.product_dtypes(False, ["fp16", "fp32"]) == ["bf16", "fp32"]


# --- NVML and energy ---


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Gpu:
    """A GPU of constant power whose counter starts at a value and wraps at a width; each reading may be missing."""

    def __init__(self, clock: _Clock, watts: float, start_mj: int = 0, bits: int = 64, missing: tuple[str, ...] = ()) -> None:
        self._clock, self.watts, self._start, self._bits, self._missing = clock, watts, start_mj, bits, missing

    def _have(self, name: str) -> None:
        if name in self._missing:
            raise nvml.Unavailable(f"NVML: {name} not supported")

    def describe(self) -> dict[str, Any]:
        return {}

    def energy_mj(self) -> int:
        self._have("energy")
        return (self._start + round(1000 * self.watts * self._clock.now)) % 2**self._bits

    def power_w(self) -> float:
        self._have("power")
        return self.watts

    def sm_clock_mhz(self) -> int:
        self._have("clock")
        return 1700

    def throttle_bits(self) -> int:
        return 0x1 | 0x20


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ({}, "counter"),
        ({"start_mj": 2**32 - 1000, "bits": 32}, "counter"),  # wraps within the first region
        ({"start_mj": 2**64 - 1000}, "counter"),
        ({"missing": ("energy",)}, "power samples"),
    ],
)
def test_constant_power_gives_exact_joules(options: dict[str, Any], source: str) -> None:
    clock = _Clock()
    gpu = _Gpu(clock, 300.0, **options)
    idle = energy.idle_watts(gpu, lambda: None, sleep=clock.sleep, clock=clock)
    assert idle == pytest.approx(300.0)
    used = energy.energy_of(lambda: clock.sleep(0.05), 0.05, 1e12, 100.0, gpu, lambda: None, clock=clock)
    assert used.source == source and used.calls == 3 * 44  # 44 calls of 50 ms are 1.1 regions
    assert used.joules_gross == pytest.approx(15.0) and used.joules == pytest.approx(10.0)
    assert (
        used.pj_per_flop == pytest.approx(10.0)
        and used.watts == pytest.approx(300.0)
        and used.spread == pytest.approx(0.0, abs=1e-9)
    )


def test_a_region_lasts_at_least_two_seconds() -> None:
    """A call that turns out faster than it was timed at is repeated until the region is long enough."""
    clock, regions = _Clock(), []
    gpu = _Gpu(clock, 200.0)
    exact = energy.EnergyMeter.__exit__

    class Meter(energy.EnergyMeter):
        def __exit__(self, *arguments: Any) -> None:
            exact(self, *arguments)
            regions.append(self.reading.seconds)

    original, energy.EnergyMeter = energy.EnergyMeter, Meter
    try:
        used = energy.energy_of(lambda: clock.sleep(0.01), 0.1, 1e9, 0.0, gpu, lambda: None, clock=clock)
    finally:
        energy.EnergyMeter = original
    assert used.joules == pytest.approx(2.0) and len([s for s in regions if s >= 2.0]) == 3


def test_neither_counter_nor_samples() -> None:
    clock = _Clock()
    gpu = _Gpu(clock, 1.0, missing=("energy", "power", "clock"))
    with pytest.raises(nvml.Unavailable):
        energy.idle_watts(gpu, lambda: None, sleep=clock.sleep, clock=clock)


def test_integral_of_samples() -> None:
    assert energy.trapezoid_j([(1.0, 100.0), (2.0, 300.0)], 0.0, 3.0) == 100.0 + 200.0 + 300.0
    assert energy.counter_difference_mj(10, 25) == 15


def test_an_error_within_a_region_is_not_hidden() -> None:
    clock = _Clock()
    with pytest.raises(ZeroDivisionError), energy.EnergyMeter(_Gpu(clock, 1.0), lambda: None, clock) as meter:
        raise ZeroDivisionError
    assert meter.reading is None


def test_sampling_and_throttling() -> None:
    with nvml.Sampler(_Gpu(_Clock(), 250.0), interval_s=0.001) as sampler:
        while len(sampler.conditions.clocks) < 5:
            pass
    assert sampler.conditions.summary() == {"power_w": 250.0, "sm_clock_mhz": 1700.0, "throttled": ["thermal (software)"]}
    with nvml.Sampler(None) as nothing:
        pass
    assert nothing.conditions.summary() == {"power_w": None, "sm_clock_mhz": None, "throttled": []}


class _Nvml:
    """nvidia-ml-py's functions, as far as they are used; `broken` raise its error."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        values = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByIndex": "gpu",
            "nvmlDeviceGetHandleByPciBusId": "gpu",
            "nvmlSystemGetDriverVersion": b"580.1",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetTemperature": 41,
            "nvmlDeviceGetTotalEnergyConsumption": 123_456,
            "nvmlDeviceGetPowerUsage": 432_100,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
        }
        for name, value in values.items():
            setattr(self, name, self._function(name, value, name in broken))

    def _function(self, name: str, value: Any, broken: bool) -> Any:
        def call(*_: Any) -> Any:
            if broken:
                raise self.NVMLError(f"{name} not supported")
            return value

        return call


def test_nvml_is_read_in_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(broken=("nvmlDeviceGetTemperature",)))
    gpu = nvml.NvmlProvider("00000000:01:00.0")
    assert gpu.describe() == {
        "driver": "580.1", "power_limit_w": 700.0, "max_sm_clock_mhz": 1980, "memory_clock_mhz": 1755, "temperature_c": None,
    }  # fmt: skip
    assert (gpu.energy_mj(), gpu.power_w(), gpu.sm_clock_mhz(), gpu.throttle_bits()) == (123_456, 432.1, 1755, 4)


def test_nvml_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.Unavailable, match="pip install nvidia-ml-py"):
        nvml.NvmlProvider()
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(broken=("nvmlInit",)))
    with pytest.raises(nvml.Unavailable, match="nvmlInit"):
        nvml.NvmlProvider()
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(broken=("nvmlDeviceGetTotalEnergyConsumption",)))
    with pytest.raises(nvml.Unavailable, match="TotalEnergy"):
        nvml.NvmlProvider().energy_mj()


# --- the peers, through stand-ins ---

MASKS = [
    Case("x", 2, 48, 48, 4, 2, 16, 16),
    Case("x", 1, 48, 48, 2, 2, 16, 16, causal=True),
    Case("x", 1, 48, 48, 2, 2, 16, 16, causal=True, window=(9, 0)),
    Case("x", 1, 48, 48, 2, 2, 16, 16, window=(9, 4)),
    Case("x", 1, 48, 48, 2, 2, 16, 16, causal=True, lengths=(20, 1, 27)),
    Case("x", 1, 48, 48, 2, 2, 16, 16, causal=True, prefix=12),
    Case("x", 2, 1, 48, 4, 2, 16, 16),
    Case("x", 1, 48, 48, 4, 2, 16, 16, causal=True, window=(9, 0), softcap=2.0),
    Case("x", 1, 48, 48, 4, 2, 16, 16, causal=True, sinks=True),
]


def passes(implementation: registry.Implementation, case: Case) -> list[str]:
    tensors = case.build("cpu")
    results = runner.results_of(case, implementation.bind(case, "cpu"), tensors)
    return check.problems_of(check.truth_of(case, tensors), results)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("case", MASKS, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["reference", "math", "fa2"])
def test_implementations_agree_with_the_oracle(name: str, case: Case, direction: str) -> None:
    try:
        assert passes(registry.implementations()[name], replace(case, direction=direction)) == []
    except registry.NotCovered as reason:
        assert (name != "math" or case.changes_scores) and not case.plain, reason


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("case", MASKS, ids=lambda c: c.name)
def test_flex_builds_the_mask_that_is_meant(case: Case) -> None:
    """FlexAttention without the compiler."""
    flex = registry.Flex()
    flex.compiler = lambda function, dynamic: function
    if case.sinks:
        with pytest.raises(registry.NotCovered, match="sinks"):
            flex.bind(case, "cpu")
    else:
        assert passes(flex, case) == []
    with pytest.raises(registry.NotCovered):
        flex.bind(replace(case, dtype="fp8"), "cpu")


FA3_ARGUMENTS = re.findall(
    r"\w+",
    "q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
    "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
    "v_descale softmax_scale is_causal window_size_left window_size_right softcap is_rotary_interleaved "
    "scheduler_metadata num_splits pack_gqa sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k ",
)


def _fa3_forward(*arguments: Any) -> list[torch.Tensor]:
    """Its signature over the dense definition."""
    a = dict(zip(FA3_ARGUMENTS, arguments, strict=True))
    assert a["num_splits"] in (0, 1) and a["cp_world_size"] == 1 and a["cp_rank"] == 0
    options = {"causal": a["is_causal"], "softmax_scale": a["softmax_scale"], "softcap": a["softcap"]}
    options["window_size"] = (a["window_size_left"], a["window_size_right"])
    q, k, v = (t.float() for t in (a["q"], a["k"], a["v"]))
    if a["cu_seqlens_q"] is None:
        out, lse = dense_attention(q, k, v, **options)
        if a["s_aux"] is not None:
            assert a["s_aux"].dtype == a["q"].dtype
            out = out * torch.sigmoid(lse.transpose(1, 2) - a["s_aux"].float())[..., None]
        return [out.to(torch.bfloat16)]
    ends = a["cu_seqlens_q"].tolist()
    assert a["max_seqlen_q"] == max(e - b for b, e in pairwise(ends)) and q.dim() == 3
    parts = [dense_attention(*(t[None, b:e] for t in (q, k, v)), **options)[0][0] for b, e in pairwise(ends)]
    return [torch.cat(parts).to(torch.bfloat16)]


@pytest.mark.parametrize("case", [*MASKS, replace(MASKS[1], dtype="fp8")], ids=lambda c: c.name)
def test_flash_attention_3_is_called_by_its_schema(case: Case) -> None:
    fa3 = registry.FlashAttention3()
    fa3._forward = _fa3_forward
    assert fa3.absent("cuda") is None
    if case.prefix:
        with pytest.raises(registry.NotCovered, match="prefix"):
            fa3.bind(case, "cpu")
    else:
        assert passes(fa3, case) == []
    with pytest.raises(registry.NotCovered, match="backward"):
        fa3.bind(replace(case, direction="bwd"), "cpu")


class _CudnnTensor:
    """A tensor of cudnn-frontend's graph: what is said of it."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def __getattr__(self, name: str) -> Any:
        def setter(value: Any) -> _CudnnTensor:
            self.said[name.removeprefix("set_")] = value
            return self

        return setter


class _CudnnGraph:
    """Its graph, whose execution computes the definition from the addresses it is given."""

    def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: int) -> None:
        assert (io_data_type, compute_data_type, handle) == ("e4m3", "float", 7)

    def tensor(self, *, dim: list[int], stride: list[int], data_type: str) -> _CudnnTensor:
        return _CudnnTensor(dim=dim, stride=stride, data_type=data_type)

    def sdpa_fp8(
        self, *, is_inference: bool, attn_scale: float, use_causal_mask: bool, **tensors: _CudnnTensor
    ) -> list[_CudnnTensor]:
        assert is_inference
        self.inputs, self.options = tensors, {"softmax_scale": attn_scale, "causal": use_causal_mask}
        self.outputs = [_CudnnTensor() for _ in range(4)]
        return self.outputs

    def build(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"] and all(self.outputs[i].said["output"] for i in (0, 2, 3))

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, addresses: dict[_CudnnTensor, int], workspace: int, *, handle: int) -> None:
        def at(tensor: _CudnnTensor) -> torch.Tensor:
            dtype = {"e4m3": torch.float8_e4m3fn, "float": torch.float32}[tensor.said["data_type"]]
            dim, stride = tensor.said["dim"], tensor.said["stride"]
            count = 1 + sum((d - 1) * s for d, s in zip(dim, stride, strict=True))
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(addresses[tensor])
            return torch.frombuffer(memory, dtype=dtype).as_strided(dim, stride)

        value = {name: at(tensor) for name, tensor in self.inputs.items()}
        assert value["scale_s"].item() * value["descale_s"].item() == 1.0
        q, k, v = (value[name].float().transpose(1, 2) * value[f"descale_{name}"].item() for name in "qkv")
        out = dense_attention(q, k, v, **self.options)[0].transpose(1, 2)
        at(self.outputs[0]).copy_((out * value["scale_o"].item()).to(torch.float8_e4m3fn))


def test_cudnns_fp8_is_called_by_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = SimpleNamespace(
        create_handle=lambda: 7,
        data_type=SimpleNamespace(FP8_E4M3="e4m3", FLOAT="float"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        pygraph=_CudnnGraph,
        __spec__=object(),
    )
    peer = registry.implementations()["cudnn"]
    case = Case("x", 2, 40, 40, 4, 2, 32, 16, causal=True, dtype="fp8")
    with pytest.raises(registry.NotCovered, match="pip install nvidia-cudnn-frontend"):
        peer.bind(case, "cpu")
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    assert passes(peer, case) == [] and passes(peer, replace(case, causal=False)) == []
    for other, words in (
        (replace(case, direction="bwd"), "backward"),
        (replace(case, prefix=4), "prefix"),
        (replace(case, head_dim=24), "16"),
    ):
        with pytest.raises(registry.NotCovered, match=words):
            peer.bind(other, "cpu")


def test_where_flash_attention_3_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.FA3_VARIABLE, raising=False)
    fa3 = registry.FlashAttention3()
    assert registry.FA3_VARIABLE in fa3.absent("cuda")
    folder = tmp_path / "vllm_flash_attn"
    folder.mkdir()
    (folder / registry.FA3_LIBRARY).write_text("not a library")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: spec if name == "vllm" else None)
    assert fa3.library() == folder / registry.FA3_LIBRARY and fa3.version() == registry.FA3_LIBRARY
    assert "GPU" in fa3.absent("cpu") and "cannot be loaded" in fa3.absent("cuda")
    monkeypatch.setenv(registry.FA3_VARIABLE, str(tmp_path / "gone.so"))
    assert "not a file" in fa3.absent("cuda")
    # Packed: unpacked beside the build, once.
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "benchmarks" / "registry.py"))
    (tmp_path / "small.so.xz").write_bytes(lzma.compress(b"library"))
    monkeypatch.setenv(registry.FA3_VARIABLE, str(tmp_path / "small.so.xz"))
    assert fa3.library() == tmp_path / "build/small.so" and fa3.library().read_bytes() == b"library"
    written = fa3.library().stat().st_mtime_ns
    assert fa3.library().stat().st_mtime_ns == written


def test_packed_sequences_through_torchs_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    case = MASKS[4]

    def stand_in(
        q: Any, k: Any, v: Any, ends: Any, ends_k: Any, longest: int, longest_k: int, *, window_size: Any = (-1, -1)
    ) -> Any:
        assert ends is ends_k and longest == longest_k == 27 and window_size == (-1, 0)
        parts = [dense_attention(*(t[None, b:e].float() for t in (q, k, v)), causal=True)[0][0]
                 for b, e in zip(ends.tolist(), ends[1:].tolist(), strict=False)]  # fmt: skip
        return torch.cat(parts).to(q.dtype)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(registry, "_cumulative", lambda lengths, device: torch.tensor([0, 20, 21, 48]))
    tensors = case.build("cpu")
    out = registry.implementations()["fa2"].bind(case, "cuda")(tensors.q, tensors.k, tensors.v)
    assert check.problems_of(check.truth_of(case, tensors), {"out": out}) == []


def test_peers_say_what_they_do_not_cover() -> None:
    known = registry.implementations()
    decode, fp8 = Case("x", 1, 1, 48, 1, 1, 16, 16, causal=True), Case("x", 1, 8, 8, 1, 1, 16, 16, dtype="fp8")
    for name, case, words in (
        ("math", decode, "top left"),
        ("fa2", MASKS[5], "prefix"),
        ("reference", fp8, "fp8"),
        ("flash_ext", fp8, "not on a CUDA device"),
        ("flash_ext_unflushed", fp8, "not on a CUDA device"),
        ("flash_ext_block", fp8, "not on a CUDA device"),
        ("flash_ext_unflushed", decode, "FP8 alone"),
        ("flash_ext_block", decode, "FP8 alone"),
        ("flash_ext", replace(fp8, direction="bwd"), "no backward"),
    ):
        with pytest.raises(registry.NotCovered, match=words):
            known[name].bind(case, "cpu")
    ours = [name for name, each in known.items() if not each.peer]
    assert ours == ["flash_ext", "flash_ext_sm80", "flash_ext_unflushed", "flash_ext_block", "reference"]


# --- the backward is timed the same way for all ---


def test_a_timed_backward_runs_no_forward() -> None:
    forwards = []
    case = Case("x", 1, 16, 16, 1, 1, 8, 8, direction="bwd")
    attend = registry.implementations()["math"].bind(case, "cpu")

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        forwards.append(torch.is_grad_enabled())
        return attend(*tensors)

    tensors = case.build("cpu")
    call = runner.call_of(case, counted, tensors)
    first, again = call(), call()
    assert forwards == [True] and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    forwards.clear()
    both = runner.call_of(replace(case, direction="fwd+bwd"), counted, tensors)
    both(), both()
    assert forwards == [True, True]
    forwards.clear()
    runner.call_of(replace(case, direction="fwd"), counted, tensors)()
    assert forwards == [False]


def test_numbers_of_tables() -> None:
    assert [report.number(x) for x in (0, 0.01234, 12.34, 123.4, 1234.0)] == ["0", "0.0123", "12.3", "123", "1234"]
    assert [report.human_bytes(x) for x in (512, 2048, 3 * 2**20, 5.5 * 2**30)] == ["512 B", "2 KiB", "3 MiB", "5.5 GiB"]


def test_a_stored_run_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        report.load(tmp_path / "a.json")
