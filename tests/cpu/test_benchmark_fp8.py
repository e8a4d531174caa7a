"""The fp8 preset of the benchmark: its cases, our implementations of it, and the verdicts, in pieces without a GPU."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

import flash_ext
from benchmarks import check, registry, render_performance, run
from benchmarks.criteria import criteria
from benchmarks.presets import Case, cases_of, default_dtypes, default_passes


def test_cases() -> None:
    cases = cases_of("fp8", True, default_passes("fp8"), default_dtypes("fp8"))
    assert {(c.head_dim, c.seqlen_k, c.mask, c.dtype) for c in cases} == {
        (d, s, mask, dtype)
        for d in (128, 256)
        for s in (2048, 4096, 8192, 16384)
        for mask in ("full", "causal")
        for dtype in ("fp8", "bf16")
    }
    assert cases_of("fp8", True, ["bwd"], ["fp8"]) == []
    assert run.default_implementations("fp8", "cuda") == ["flash_ext", "flash_ext_unflushed", "flash_ext_block", "cudnn", "fa3"]
    assert run.parser().parse_args(["--preset", "fp8"]).dtype is None and default_dtypes("quick") == ["bf16"]


OURS = {"flash_ext": "head", "flash_ext_unflushed": "head_unflushed", "flash_ext_block": "block"}


@pytest.mark.parametrize("name", OURS)
def test_our_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks for the row that it stands for, and gives what the oracle expects (here from the reference)."""
    case = Case("x", 2, 100, 100, 4, 2, 128, 128, causal=True, dtype="fp8")
    plans = []

    def planned(*tensors: torch.Tensor, **options: Any) -> flash_ext.dispatch.Explanation:
        plans.append(explain(*tensors, device_info="sm90", **options))
        return plans[-1]

    explain = flash_ext.explain
    monkeypatch.setattr(flash_ext, "explain", planned)
    attend = registry.implementations()[name].bind(case, "cpu")
    if plans[0].backend == "sm90":  # a build may have fewer rows
        assert plans[0].variant.endswith(f"d128_causal_{OURS[name]}")
    tensors = case.build("cpu")
    out = attend(tensors.q, tensors.k, tensors.v)
    assert out.dtype == torch.bfloat16
    assert check.problems_of(check.truth_of(case, tensors), {"out": out}) == []


def run_of(fp8: dict[str, float], bf16: float | None) -> dict[str, Any]:
    def row(case: Case, seconds: dict[str, float]) -> dict[str, Any]:
        timed = {n: {"status": "timed", "seconds": {"median": s}, "ceiling_share": 0.5} for n, s in seconds.items()}
        return {"name": case.name, "case": asdict(case) | {"mask": case.mask}, "limit": "products", "implementations": timed}

    case = Case("x", 1, 2048, 2048, 16, 16, 128, 128)
    rows = [row(Case(**{**asdict(case), "dtype": "fp8"}), fp8)]
    rows += [row(case, {"flash_ext": bf16})] if bf16 else []
    return {"machine": {"device": "cuda"}, "preset": "fp8", "ours": ["flash_ext", "flash_ext_unflushed"], "cases": rows}


def verdicts(fp8: dict[str, float], bf16: float | None = None) -> list[str]:
    return [f"{found['criterion']}: {found['verdict']}" for found in criteria(run_of(fp8, bf16))]


FLUSHED, UNFLUSHED, OVER_BF16 = "FP8 over the faster peer, flushed", "FP8 over the faster peer, never flushed", "FP8 over our bf16"


def test_verdicts() -> None:
    assert verdicts({"flash_ext": 1.0}) == []
    assert verdicts({"flash_ext": 1.0, "cudnn": 2.0, "fa3": 0.96}) == [f"{FLUSHED}: pass"]
    assert verdicts({"flash_ext": 1.0, "cudnn": 0.94, "fa3": 2.0}) == [f"{FLUSHED}: fail"]
    assert verdicts({"flash_ext_unflushed": 1.0, "fa3": 1.01}) == [f"{UNFLUSHED}: pass"]
    assert verdicts({"flash_ext_unflushed": 1.0, "fa3": 0.99}) == [f"{UNFLUSHED}: fail"]
    assert verdicts({"flash_ext": 1.0}, 1.41) == [f"{OVER_BF16}: pass"]
    assert verdicts({"flash_ext": 1.0}, 1.39) == [f"{OVER_BF16}: fail"]
    other = run_of({"flash_ext": 1.0, "fa3": 2.0}, 2.0) | {"preset": "quick"}
    assert criteria(other) == [] and criteria(run_of({"flash_ext": 1.0, "fa3": 2.0}, 2.0) | {"machine": {"device": "cpu"}}) == []


def test_what_is_not_measured_yet_is_said() -> None:
    text = render_performance.page([])
    line = next(line for line in text.splitlines() if line.startswith("- fp8, fwd, fp8 (head_dim 128 and 256"))
    assert line.endswith(": flash_ext, flash_ext_unflushed, flash_ext_block, cudnn, fa3")
