"""The sm80 preset of the benchmark: its cases, what it compares, and the verdicts, without a GPU."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import registry, run
from benchmarks.criteria import criteria
from benchmarks.presets import Case, cases_of, default_passes
from benchmarks.registry import NotCovered


def test_cases() -> None:
    cases = cases_of("sm80", True, default_passes("sm80"), ["bf16"])
    assert {(c.direction, c.head_dim, c.mask, c.seqlen_k) for c in cases} == {
        (direction, d, mask, s)
        for direction in ("fwd", "bwd")
        for d in (64, 128)
        for mask in ("full", "causal")
        for s in (512, 1024, 2048, 4096, 8192, 16384)
    }
    assert run.default_implementations("sm80", "cuda") == ["flash_ext_sm80", "fa2"]


def test_without_a_gpu_it_says_why_not() -> None:
    forced = registry.implementations()["flash_ext_sm80"]
    assert not forced.peer
    for dtype, reason in (("bf16", "not on a CUDA device"), ("fp8", "not measured with fp8")):
        with pytest.raises(NotCovered, match=reason):
            forced.bind(Case("x", 1, 64, 64, 2, 2, 64, 64, dtype=dtype), "cpu")


@pytest.mark.parametrize(("theirs", "verdict"), ((0.95, "pass"), (0.9, "fail"), (2.0, "pass")))
@pytest.mark.parametrize("direction", ("fwd", "bwd"))
def test_verdicts(theirs: float, verdict: str, direction: str) -> None:
    case = Case("x", 1, 512, 512, 2, 2, 64, 64, direction=direction)
    timed = {n: {"status": "timed", "seconds": {"median": s}} for n, s in (("flash_ext_sm80", 1.0), ("fa2", theirs))}
    row = {"name": case.name, "case": asdict(case) | {"mask": case.mask}, "limit": "products", "implementations": timed}
    judged = {"machine": {"device": "cuda"}, "preset": "sm80", "ours": ["flash_ext_sm80"], "cases": [row]}
    (found,) = criteria(judged)
    assert (found["verdict"], found["value"], found["bound"], found["case"]) == (verdict, theirs, 0.95, case.name)
    assert criteria(judged | {"preset": "paper"}) == []
    assert criteria(judged | {"cases": [row | {"implementations": {"fa2": timed["fa2"]}}]}) == []
