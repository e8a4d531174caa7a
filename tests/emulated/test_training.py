"""examples/train_language_model.py in bfloat16 through the Hopper kernels, beside torch's attention."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

from flash_ext import _emulator, env

pytestmark = pytest.mark.skipif(env.EMULATE != "sm90", reason="trains on the Hopper kernels")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_language_model.py"


def test_bfloat16_training_follows_torchs(tmp_path: Path, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    schedule("plain")
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    example = sys.modules[EXAMPLE.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    size = {"steps": 12, "batch": 2, "seqlen": 160, "layers": 2, "width": 128, "heads": 2}
    _emulator.reset_reports()
    arguments = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    assert (
        example.main([*arguments, "--device", "cpu", "--dtype", "bfloat16", "--plain", "--min-gain", "-10", "--out", str(tmp_path)])
        == 0
    )
    ran = {report.kernel for report in _emulator.reports()}
    assert {"fwd_sm90_bf16_d64_causal", "bwd_sm90_bf16_d64_causal"} <= ran
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and float(rows[-1]["flash_ext"]) < float(rows[0]["flash_ext"]) - 0.1
