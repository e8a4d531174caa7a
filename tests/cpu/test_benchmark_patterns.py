"""The benchmarks' masks that are no range of keys: both ways of writing them agree, and so does the arithmetic."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from benchmarks import mask_building, patterns
from benchmarks.criteria import criteria
from benchmarks.presets import PRESETS, Case
from benchmarks.registry import _mask_mod, _options_of_ours

PATTERNS = ("tree 4x3", "parents 4x3", "window 8 + 4", "window 100 + 130", "blocks 30%", "blocks 2%")


@pytest.mark.parametrize("seqlen", (200, 384))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_written_twice_meant_once(pattern: str, seqlen: int) -> None:
    rows = torch.arange(seqlen)
    keep = patterns.visible(pattern, rows, seqlen)
    assert torch.equal(patterns.block_mask(pattern, seqlen, "cpu").to_dense()[0, 0], keep)
    assert torch.equal(patterns.visible(pattern, rows[7::3], seqlen), keep[7::3])
    assert patterns.pairs(pattern, seqlen) == keep.sum()


def test_medusas_tree() -> None:
    """Each node of level d sees d nodes: itself and its ancestors; its parent alone in the published runs."""
    levels = [(d, 3**d) for d in range(1, 5)]
    padding = 200 - sum(n for _, n in levels)
    assert patterns.pairs("tree 4x3", 200) == sum(d * n for d, n in levels) + padding
    assert patterns.pairs("parents 4x3", 200) == sum(min(d, 2) * n for d, n in levels) + padding
    with pytest.raises(ValueError, match="has 120 nodes, more than 100"):
        patterns.parents(4, 3, 100)
    with pytest.raises(ValueError, match="no such pattern: spiral"):
        patterns.visible("spiral", torch.arange(3), 3)
    with pytest.raises(ValueError, match="no such pattern: spiral"):
        patterns.block_mask("spiral", 3, "cpu")


def test_density_is_what_it_says() -> None:
    for percent in (10, 40, 100):
        assert abs(patterns.block_mask(f"blocks {percent}%", 128 * 20, "cpu").density - percent / 100) < 0.03


@pytest.mark.parametrize("case", [c for c in PRESETS["mask"][1](False) if c.pattern or c.prefix], ids=lambda c: c.name)
def test_every_implementation_gets_the_mask_that_is_meant(case: Case) -> None:
    keep = case.visible(torch.arange(case.seqlen_q))
    options = _options_of_ours(case, "cpu")
    assert torch.equal(options["block_mask"].to_dense()[0, 0], keep) and not options["causal"]
    row, key = torch.arange(case.seqlen_q)[:, None], torch.arange(case.seqlen_k)[None]
    assert torch.equal(_mask_mod(case, "cpu")(0, 0, row, key).expand_as(keep), keep)
    assert abs(case.pairs() / case.heads / case.batch - int(keep.sum())) <= case.seqlen_q  # causal counts half the square


def test_building_is_timed(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    target = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["mask_building.py", "--seqlen", "256", "--repeats", "1", "--json", str(target)])
    mask_building.main()
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 5 and all(row["build_s"] > 0 and row["forward_s"] > 0 and 0 < row["density"] <= 1 for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


def _run(*timed: tuple[Case, dict[str, float]], device: str = "cuda") -> dict[str, Any]:
    rows = []
    for case, seconds in timed:
        outcomes = {
            name: {"status": "timed", "seconds": {"median": value}, "ceiling_share": 0.5} for name, value in seconds.items()
        }
        rows.append(
            {"name": case.name, "case": asdict(case) | {"mask": case.mask}, "limit": "products", "implementations": outcomes}
        )
    return {"machine": {"device": device}, "ours": ["flash_ext"], "cases": rows}


def _both(case: Case, **seconds: float) -> list[tuple[Case, dict[str, float]]]:
    return [(replace(case, direction=direction), seconds) for direction in ("fwd", "bwd")]


def test_each_criterion_passes_and_fails() -> None:
    cases = {case.name: case for case in PRESETS["mask"][1](True)}
    sweep = {case.pattern: case for case in cases.values() if case.family == "density"}
    whole, half, sparse = (sweep[pattern] for pattern in ("", "blocks 40%", "blocks 5%"))
    density = [(whole, {"flash_ext": 1.0}), (half, {"flash_ext": 0.49}), (sparse, {"flash_ext": 0.9})]
    assert [row["verdict"] for row in criteria(_run(*density))] == ["pass"]
    assert [row["verdict"] for row in criteria(_run(density[0], (half, {"flash_ext": 0.51})))] == ["fail"]
    assert criteria(_run(density[1])) == [] and criteria(_run(*density, device="cpu")) == []
    causal, tree = (next(c for c in cases.values() if c.family == "masks" and c.pattern == p) for p in ("", "tree 8x3"))
    for ours, verdict in ((1.0, "pass"), (1.2, "fail")):
        found = criteria(_run(*_both(causal, fa2=9.5, flash_ext=5.0), *_both(tree, flash_ext=ours)))
        assert [(row["verdict"], row["bound"]) for row in found] == [(verdict, 9.0)]
    jagged, padded = (case for case in cases.values() if case.family == "jagged U(0, 512) d64")
    found = criteria(_run(*_both(jagged, flash_ext=1.0), *_both(padded, fa2=3.1, math=8.0, flash_ext=2.0)))
    assert [(row["verdict"], row["value"]) for row in found] == [("pass", 3.1), ("fail", 8.0)]
