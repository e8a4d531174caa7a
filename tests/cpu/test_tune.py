"""tools/tune.py without a GPU: candidates, the copies that are built, what is done with the times."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import tune  # noqa: E402

ROW = tune.row_of(128, "causal", "bf16")
SHAPE = tune.Shape(128, 128, True, "bf16", (64, 128), tokens=128, hidden=128)


def test_the_present_tiles_are_among_the_candidates_and_all_fit() -> None:
    for row in (r for r in tune.variants.VARIANTS if (r.op, r.arch) == ("fwd", "sm90")):
        found = tune.candidates(row.head_dim, row.head_dim_v)
        assert (row.block_m, row.block_n) in {(t.block_m, t.block_n) for t in found}, row.name
        assert len(found) <= 40, "what one session can time"
        assert all(t.shared_bytes(row.head_dim, row.head_dim_v) <= 227 * 1024 for t in found)
    assert not tune.Tile(192, 128, 2, 1).fits(128, 128), "three warpgroups have no registers for it"
    assert not tune.Tile(128, 128, 4, 1).fits(128, 128), "four stages of 64 KB do not fit"
    assert not tune.Tile(256, 64, 2, 1).fits(64, 64)


def test_tiles_are_read_as_they_are_written() -> None:
    tile = tune.Tile(128, 176, 2, 1)
    assert tune.parse_tile(str(tile)) == tile


def test_a_copy_has_the_candidate_in_the_place_of_the_row(tmp_path: Path) -> None:
    """The copy's own generator, started as the build starts it, writes one unit with the candidate's tile and type."""
    tune.copy_checkout(tmp_path, ROW, tune.Tile(128, 144, 2, 1))
    assert not list(tmp_path.rglob("*.so")) and (tmp_path / "setup.py").is_file() and (tmp_path / "tests/oracle.py").is_file()
    spec = importlib.util.spec_from_file_location("copied_variants", tmp_path / "csrc/variants.py")
    copied = sys.modules["copied_variants"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    (row,) = copied.VARIANTS
    assert (row.name, row.block_m, row.block_n) == (ROW.name, 128, 144)
    written = copied.generate(tmp_path / "generated", copied.select())
    text = written[row.unit][1].read_text()
    assert "sm90::FwdConfig<__nv_bfloat16, 128, 128, flash_ext::sm90::CandidateMask, flash_ext::PlainScore>;" in text
    assert "kBlockN == 144" in text and text.count("__global__") == 1
    added = (tmp_path / "csrc/sm90/fwd.cuh").read_text().removeprefix((ROOT / "csrc/sm90/fwd.cuh").read_text())
    assert "struct CandidateMask : flash_ext::CausalMask {};" in added and "struct FwdTile<128, 128, CandidateMask, " in added
    assert "flash_ext::PlainScore> : TileSizes<128, 144, 2, 1> {};" in added
    del sys.modules["copied_variants"]


def test_a_width_that_no_row_uses_is_defined_in_the_copy(tmp_path: Path) -> None:
    """As the defined ones are: N / 2 accumulators, and the six numbers after them."""
    tune.copy_checkout(tmp_path, ROW, tune.Tile(128, 240, 2, 1))
    tune.copy_checkout(tmp_path / "defined", ROW, tune.Tile(128, 128, 2, 1))
    ours = (ROOT / "csrc/sm90/primitives.cuh").read_text()
    assert (tmp_path / "defined/csrc/sm90/primitives.cuh").read_text() == ours
    added = (tmp_path / "csrc/sm90/primitives.cuh").read_text().removeprefix(ours)
    assert "FX_DEFINE_WGMMA_BOTH(240, 120, 120, 121, 122, 123, 124, 125)" in added
    assert added.count("%") == 120 and '"+f"(d[119])' in added and "d[120]" not in added


def test_the_present_row_is_built_as_it_is(tmp_path: Path) -> None:
    tune.copy_checkout(tmp_path, ROW, None)
    lines = "import sys; sys.path[0] = 'csrc'; import variants; print(variants.VARIANTS)"
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"({ROW!r},)".replace("tune.variants.", "")


def session(tmp_path: Path, speeds: dict[str, float], **problems: str) -> str:
    """tune() over three tiles whose builds and times are given. Keys: 'present', 'again', '144', '160', '176'."""
    times: list[str] = []

    def building(folder: Path, limit: float) -> str:
        return next((why for part, why in problems.items() if part.strip("_") in folder.name), "")

    def timing(folder: Path, shape: tune.Shape, limit: float) -> dict[str, object]:
        key = next(k for k in speeds if k in folder.name)
        if key == "present" and "present" in times:
            key = "again"
        times.append(key)
        return {"tflops": {"64": speeds[key], "128": 2 * speeds[key]}}

    tiles = [tune.Tile(128, n, 2, 1) for n in (144, 160, 176)]
    return tune.tune(ROW, tiles, SHAPE, 100.0, tmp_path, building, timing)


def test_the_winner_is_printed_as_a_row(tmp_path: Path) -> None:
    text = session(tmp_path, {"present": 500.0, "144": 510.0, "160": 550.0, "176": 400.0, "again": 505.0})
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:8]] == [
        "128x160/2/1",
        "128x144/2/1",
        "present again",
        "present",
        "128x176/2/1",
    ]
    assert lines[3].endswith("| 550 | 1100 | 778 | 1.100 |")
    assert '(128, 128, "causal"): (128, 160),' in text and "TileSizes<128, 160, 2, 1>" in text


def test_a_gain_within_the_drift_is_no_gain(tmp_path: Path) -> None:
    assert "keep the present row" in session(tmp_path, {"present": 500.0, "144": 520.0, "160": 490.0, "176": 400.0, "again": 525.0})
    assert "keep the present row" in session(tmp_path, {"present": 500.0, "144": 504.0, "160": 490.0, "176": 400.0, "again": 500.0})


def test_what_spills_or_is_wrong_is_out(tmp_path: Path) -> None:
    text = session(tmp_path, {"present": 500.0, "144": 520.0, "160": 600.0, "176": 400.0, "again": 500.0}, _160_="spills")
    assert "- 128x160/2/1: out: spills" in text and "(128, 144)," in text
    assert "could not be timed: spills" in session(tmp_path, {"144": 1.0, "160": 1.0, "176": 1.0}, present="spills")


def test_when_the_time_is_up_the_rest_is_left_out(tmp_path: Path) -> None:
    text = tune.tune(
        ROW, [tune.Tile(128, 144, 2, 1)], SHAPE, 0.0, tmp_path, lambda *_: "", lambda *_: {"tflops": {"64": 1.0, "128": 1.0}}
    )
    assert "- 128x144/2/1: out: the time was up" in text and "- present again: out" in text and "keep the present row" in text


def test_building_says_what_failed(tmp_path: Path) -> None:
    """Stand-ins for setup.py and resources.py: an error of the compiler, a spill, silence, success."""
    (tmp_path / "tools").mkdir()
    resources = tmp_path / "tools/resources.py"
    resources.write_text("print('ok')")
    (tmp_path / "setup.py").write_text("import sys; print('fwd.cuh(3): error: no Tile'); print('more'); sys.exit(1)")
    assert tune.build(tmp_path, 60) == "fwd.cuh(3): error: no Tile"
    (tmp_path / "setup.py").write_text("import os; assert os.environ['TORCH_CUDA_ARCH_LIST'] == '9.0a'")
    assert tune.build(tmp_path, 60) == ""
    resources.write_text("print('k 9   FAILED: spills'); print('FAILED: 1: no kernel may spill'); raise SystemExit(1)")
    assert tune.build(tmp_path, 60) == "spills"
    resources.write_text("import time; time.sleep(100)")
    assert "more than 1 s" in tune.build(tmp_path, 1)


def test_timing_runs_in_the_copy(tmp_path: Path) -> None:
    """The copy's module is the one that measures; what it prints last is the result, and its failure is told."""
    (tmp_path / "tools").mkdir()
    copied = tmp_path / "tools/tune.py"
    copied.write_text(
        "class Shape:\n  def __init__(self, **o): self.o = o\ndef measure(s): print('noise'); return {'tflops': s.o['seqlens']}"
    )
    assert tune.time_in(tmp_path, SHAPE, 60) == {"tflops": [64, 128]}
    copied.write_text(
        "def measure(s): raise RuntimeError\nclass Shape:\n  def __init__(self, **o): raise ValueError('an error here')"
    )
    assert "an error here" in tune.time_in(tmp_path, SHAPE, 60)["problem"]
    copied.write_text("import time; time.sleep(100)")
    assert "no time within 1 s" in tune.time_in(tmp_path, SHAPE, 1)["problem"]


def test_measuring_checks_and_times_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import registry

    monkeypatch.delenv("FLASH_EXT_EMULATE", raising=False)
    shape = replace(SHAPE, seqlens=(32, 64), tokens=64, hidden=128)
    assert "not covered at seqlen 32" in tune.measure(shape, "cpu")["problem"]
    monkeypatch.setattr(registry, "FlashExt", registry.Reference)
    found = json.loads(json.dumps(tune.measure(shape, "cpu")))["tflops"]
    assert set(found) == {"32", "64"} and min(found.values()) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dim", "77"], "--head-dim 128 --mask causal"),
        (["--tiles", "128x128"], "128x128/2/2"),
        (["--seqlens", "long"], "2048,8192"),
        (["--seqlens", "0"], "2048,8192"),
        (["--seqlens", "2048,32768"], "16384"),
        (["--head-dim", "big"], "--head-dim"),
        (["--tiles", "128x100/2/1"], "multiple of 16"),
        (["--tiles", "64x128/2/1"], "M is 128 or 192"),
        (["--tiles", "128x128/0/1"], "stages from 2"),
        (["--tiles", "128x128/2/3"], "stages_q 1 or 2"),
        (["--tiles", "128x128/2/2,192x256/2/1"], "no room"),
    ],
)
def test_bad_input_says_what_to_type(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    try:
        status = tune.main(arguments)
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.count("\n") == 1, error


def test_the_list_of_candidates(capsys: pytest.CaptureFixture) -> None:
    assert tune.main(["--list", "--head-dim", "64", "--mask", "full"]) == 0
    assert "192x128/4/2" in capsys.readouterr().out.splitlines()
