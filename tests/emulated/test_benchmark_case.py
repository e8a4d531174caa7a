"""benchmarks/ with our own kernels under it: what is covered is checked and timed, what is not is never the reference's time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flash_ext

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import registry, runner, timing  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.presets import Case  # noqa: E402

CASE = Case("x", 1, 130, 130, 2, 1, 64, 64, causal=True)
SESSION = runner.Session("cpu", timing.CpuStopwatch(), Ceilings(1.0, {}, 0), None, seconds=0.001, least=1, most=1, pause_s=0.0)


def outcome(case: Case) -> dict:
    return runner.measure_case(case, {"flash_ext": registry.FlashExt()}, SESSION)["implementations"]["flash_ext"]


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")


def covered(case: Case) -> bool:
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in case.shapes()[:3]]
    return flash_ext.explain(*tensors, causal=case.causal).backend != "reference"


def test_a_covered_case_is_checked_and_timed() -> None:
    if not covered(CASE):
        pytest.skip("no kernel of the emulated architecture takes it")
    found = outcome(CASE)
    assert found["status"] == "timed" and found["tflops"] > 0 and found["extra_bytes"] >= 2 * 130 * 2 * 64


def test_a_backward_is_timed_only_with_a_kernel_of_its_own() -> None:
    """A fallback within the backward is told with its reason, whatever language it was raised through."""
    found = outcome(replace(CASE, direction="bwd"))
    assert found["status"] in ("timed", "not covered")
    if found["status"] == "not covered":
        assert found["reason"] and "seconds" not in found
        assert not covered(CASE) or "no backward kernel" in found["reason"]
