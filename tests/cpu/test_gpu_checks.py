"""tools/gpu_checks.py with stand-ins for compute-sanitizer and ncu, and its calls in the place where they are chosen."""

from __future__ import annotations

import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flash_ext

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import gpu_checks  # noqa: E402


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """tool(name, script): a program of that name, first on PATH; its arguments are logged."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, script: str) -> Path:
        path, log = tmp_path / name, tmp_path / f"{name}.log"
        path.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return log

    return make


def test_a_tool_that_is_absent_or_refused_fails_nothing(tool, capsys: pytest.CaptureFixture) -> None:
    for what, name in (("sanitize", "compute-sanitizer"), ("profile", "ncu")):
        assert gpu_checks.main([what]) == 0 and "not on PATH: skipped" in capsys.readouterr().out
        tool(name, "echo Device not supported; exit 3")
        assert gpu_checks.main([what]) == 0
        text = capsys.readouterr().out
        assert "does not work on this machine (exit 3): skipped" in text and "Device not supported" in text


def test_every_sanitizer_runs_over_our_kernels(tool, capsys: pytest.CaptureFixture) -> None:
    log = tool("compute-sanitizer", 'echo "========= ERROR SUMMARY: 0 errors"')
    assert gpu_checks.main(["sanitize"]) == 0
    probe, *runs = log.read_text().splitlines()
    assert "torch.zeros" in probe and [line.split()[1] for line in runs] == ["memcheck", "synccheck", "racecheck"]
    assert all("kns=^(fwd|bwd|combine)_" in line and line.endswith("gpu_checks.py launch") for line in runs)
    assert "0 errors" in capsys.readouterr().out


def test_an_older_sanitizer_without_the_filter_is_used_without(tool) -> None:
    log = tool("compute-sanitizer", 'case "$*" in *kns=*) exit 1;; esac')
    assert gpu_checks.main(["sanitize"]) == 0
    assert len(log.read_text().splitlines()) == 5 and "kns=" not in log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "fails"),
    [
        ('case "$*" in *"tool memcheck"*) echo "========= Invalid __global__ write"; exit 9;; esac', "FAILED: memcheck"),
        ('case "$*" in *"tool racecheck"*) echo "========= hazard"; exit 9;; esac', ""),
        ('case "$*" in *"tool racecheck"*) echo crashed; exit 1;; esac', "FAILED: racecheck"),
    ],
)
def test_findings_fail_except_racechecks(script: str, fails: str, tool, capsys: pytest.CaptureFixture) -> None:
    tool("compute-sanitizer", script)
    assert gpu_checks.main(["sanitize"]) == (1 if fails else 0)
    text = capsys.readouterr().out
    assert fails in text and ("FAILED" in text) == bool(fails)
    assert any(words in text for words in ("Invalid __global__ write", "hazard", "crashed"))


def _ends(pid: str, within: float) -> bool:
    """Whether the process is gone or a zombie before the time is over: a killed one dies when it is next scheduled."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_tool_that_hangs_is_ended_with_its_children(tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tool("compute-sanitizer", f'case "$*" in *launch*) sleep 100 & echo $! > {tmp_path}/child; wait;; esac')
    begin = time.monotonic()
    assert gpu_checks.main(["sanitize", "--limit", "6"]) == 0 and time.monotonic() - begin < 15
    text = capsys.readouterr().out
    assert text.count("stopped after 2 s") == 3 and "FAILED" not in text
    assert "--- memcheck: not finished" in text and "\nnot finished: memcheck, synccheck, racecheck\n" in text
    assert _ends((tmp_path / "child").read_text().strip(), within=60.0)


def test_a_finding_before_the_limit_fails(tool, capsys: pytest.CaptureFixture) -> None:
    tool("compute-sanitizer", 'case "$*" in *"tool memcheck"*) echo "========= Invalid __global__ write"; sleep 100;; esac')
    assert gpu_checks.main(["sanitize", "--limit", "6"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: memcheck" in text and "========= Invalid" in text


def test_an_unfinished_profile_is_no_failure(tool, capsys: pytest.CaptureFixture) -> None:
    tool("ncu", 'case "$*" in *large*) sleep 100;; esac')
    assert gpu_checks.main(["profile", "--limit", "3"]) == 0 and "not finished: ncu" in capsys.readouterr().out


def test_the_profile_names_our_kernels_and_leaves_the_clocks(tool, capsys: pytest.CaptureFixture) -> None:
    log = tool("ncu", 'case "$*" in *large*) echo "fwd_sm90 Duration 1 ms";; esac')
    assert gpu_checks.main(["profile"]) == 0 and "Duration 1 ms" in capsys.readouterr().out
    line = log.read_text().splitlines()[-1]
    assert "--clock-control none" in line and "regex:^(fwd|bwd|combine)_" in line and "--section SpeedOfLight" in line
    tool("ncu", 'case "$*" in *large*) exit 4;; esac')
    assert gpu_checks.main(["profile"]) == 1


def row(name: str, op: str, arch: int, tile: tuple[int, int]) -> dict[str, object]:
    dtype = "bfloat16" if "bf16" in name else "float16"
    return {"name": name, "op": op, "arch": arch, "dtype": dtype, "head_dim": 64, "head_dim_v": 64, "tile": tile}


ROWS = [
    row("fwd_sm90_bf16_d64_causal", "fwd", 90, (192, 128)),
    row("fwd_sm80_bf16_d64", "fwd", 80, (64, 64)),
    row("bwd_sm90_fp16_d64_causal", "bwd", 90, (80, 128)),
    row("bwd_preprocess_sm90_fp16_d64", "bwd_preprocess", 90, (256, 0)),
    row("bwd_preprocess_sm80_fp16_d64", "bwd_preprocess", 80, (256, 0)),
]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.randn(device='cuda') gives CPU tensors, the planner takes them for a Hopper GPU's, and ops are only logged."""
    launched: list[str] = []
    randn, explain = torch.randn, flash_ext.explain
    monkeypatch.setattr(torch, "randn", lambda *shape, device, **options: randn(*shape, **options))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: launched.append("synchronize"))
    monkeypatch.setattr(flash_ext, "explain", lambda *tensors, **options: explain(*tensors, device_info="sm90", **options))
    attention = flash_ext.attention

    def logged(q: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        launched.append(f"attention {tuple(q.shape)} {options}")
        return attention(q, *rest, **options)

    monkeypatch.setattr(flash_ext, "attention", logged)
    pretended, real = SimpleNamespace(variants=lambda: ROWS), flash_ext.dispatch._host()
    monkeypatch.setattr(flash_ext.dispatch, "_host", lambda: pretended if _caller() else real)
    return launched


def _caller() -> bool:
    """Whether gpu_checks asks: the planner must keep answering everybody else."""
    return sys._getframe(2).f_globals.get("__name__") == "gpu_checks"


def test_each_variant_is_launched_where_it_would_be_chosen(pretended_gpu: list[str], capsys: pytest.CaptureFixture) -> None:
    if not any(row["name"] == ROWS[0]["name"] for row in flash_ext.dispatch._host().variants()):
        pytest.skip("this build has no kernel")
    assert gpu_checks.main(["launch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["launched", "no call on this GPU chooses it", "launched", "launched",
                                                      "no call on this GPU chooses it"]  # fmt: skip
    assert pretended_gpu.count("synchronize") == 3
    assert [line for line in pretended_gpu if "attention" in line] == [
        "attention (1, 389, 2, 64) {'causal': True}", "attention (1, 165, 2, 64) {'causal': True}",
    ]  # fmt: skip
