"""The report of one call: tests/emulator/report.py as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flash_ext import env

REPORT = Path(__file__).resolve().parents[1] / "emulator" / "report.py"
if env.EMULATE != "sm90":
    pytest.skip("the report is printed for sm90", allow_module_level=True)


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPORT.parents[2])}
    command = [sys.executable, str(REPORT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_counts_of_a_call(tmp_path: Path) -> None:
    done = run_report("--seqlen", "256", "--seqlen-k", "512", "--heads", "1", "--head-dim", "128")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "fwd_sm90_bf16_d128_full: " in text and "PTX blocks executed" in text
    # S = Q K^T and P V: 2 x 256 x 512 x 128 multiply-adds, padded to tiles of 128 x 176; each m64n176k16 is 4 warp instructions.
    tensor_core = int(re.search(r"([\d,]+) +[\d.]+ % +tensor core", text)[1].replace(",", ""))
    query_tiles, key_tiles = 256 // 128, -(-512 // 176)
    scores = query_tiles * key_tiles * 2 * (128 // 16) * 4
    values = query_tiles * key_tiles * 2 * (176 // 16) * 4
    assert tensor_core == scores + values
    # Every tile that TMA brings counts whole, with the rows beyond the end.
    moved = int(re.search(r"TMA +([\d,]+) bytes", text)[1].replace(",", ""))
    assert moved >= 2 * (256 * 128 + 2 * query_tiles * 512 * 128)
    assert re.search(r"csrc/sm90/fwd\.cuh:\d+", text)


def test_a_call_without_kernel_says_so() -> None:
    done = run_report("--seqlen", "16", "--head-dim", "128", "--arch", "sm75")
    assert done.returncode != 0 and "sm75" in done.stderr
