"""Split-KV and the places of a cache on the host by plain g++ (splits.cpp); planted mistakes show that it can fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_layouts import run

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

MISTAKES = {
    "rounding": ("splits.cuh", "part * each + min_of(part, longer)", "part * each"),
    "masked": ("splits.cuh", "clamp(tiles.num_masked - begin, 0, count)", "clamp(tiles.num_masked, 0, count)"),
    "room": ("splits.cuh", "problem.batch + filling", "problem.batch + filling / 8"),
    "choice": ("splits.cuh", "if (cost < least)", "if (cost < least && candidate == 7)"),
    "window": ("splits.cuh", "- problem.seqlen_q - problem.window_left", "- problem.window_left"),
    "page": ("kv.cuh", "existing == block}", "true}"),
}


def test_splits_and_places(tmp_path: Path) -> None:
    status, output = run(tmp_path, "splits.cpp", [], {})
    assert status == 0, output


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, tmp_path: Path) -> None:
    file, old, new = MISTAKES[name]
    status, output = run(tmp_path, "splits.cpp", [], {file: (old, new)})
    assert status != 0, output
