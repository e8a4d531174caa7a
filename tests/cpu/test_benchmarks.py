"""benchmarks/run.py as its user meets it: what it writes, what it says when something is missing, wrong or forbidden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flash_ext

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import nvml, plots, registry, render_performance, report, run, runner  # noqa: E402
from benchmarks.presets import Case  # noqa: E402

TINY = Case("tiny", 1, 24, 24, 2, 1, 16, 16)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv("FLASH_EXT_EMULATE", raising=False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """quick is one tiny case, and no time is spent on timing it."""
    monkeypatch.setitem(run.PRESETS, "quick", ("tiny", lambda gpu: [TINY]))
    monkeypatch.setitem(run.DEFAULT_SECONDS, "cpu", 1e-3)


def measured(tmp_path: Path, *arguments: str, status: int = 0, **options: Any) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert run.main(["--json", str(out), "--device", "cpu", *arguments], **options) == status
    return json.loads(out.read_text())


def test_the_command_of_the_documentation(tmp_path: Path) -> None:
    """In a process of its own: exit status 0, both files, every case timed, from whatever folder it is started."""
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--preset", "quick", "--impl", "reference,math", "--device", "cpu"]
    command += ["--seconds", "0.01", "--json", "out.json", "--plot", "out.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert len(found["cases"]) == 16 and found["left_out"] == []
    assert {o["status"] for row in found["cases"] for o in row["implementations"].values()} == {"timed"}
    assert "| head dim | mask |" in done.stdout


def test_what_a_run_records(tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture) -> None:
    found = measured(tmp_path, "--impl", "reference,math,fa2", "--pass", "fwd,bwd,fwd+bwd", "--markdown", str(tmp_path / "t.md"))
    assert found["schema"] == report.SCHEMA and found["ours"] == ["reference"]
    assert {"torch", "cpu", "python", "flash_ext"} <= set(found["machine"]) and found["commit"] and found["date"].endswith("Z")
    assert found["ceilings"]["copy_gb_s"] > 0 and found["ceilings"]["bf16_tflops"] > 0
    assert [row["case"]["direction"] for row in found["cases"]] == ["fwd", "bwd", "fwd+bwd"]
    for row in found["cases"]:
        for name, outcome in row["implementations"].items():
            assert outcome["status"] == "timed", (name, outcome)
            seconds = outcome["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["count"] >= 3
            assert outcome["tflops"] == pytest.approx(row["flops"] / seconds["median"] / 1e12)
            assert outcome["gb_s"] == pytest.approx(row["bytes"] / seconds["median"] / 1e9)
            assert outcome["extra_bytes"] >= 24 * 2 * 16 * 2
        medians = {name: o["seconds"]["median"] for name, o in row["implementations"].items()}
        assert row["implementations"]["reference"]["ratio"] == pytest.approx(
            min(medians["math"], medians["fa2"]) / medians["reference"]
        )
        assert row["implementations"]["math"]["ratio"] == pytest.approx(medians["fa2"] / medians["math"])
    assert (tmp_path / "t.md").read_text() + "\n" == capsys.readouterr().out


@pytest.mark.parametrize("name", ["fa3", "cudnn", "flex"])
def test_an_absent_peer_is_told_in_the_table(name: str, tmp_path: Path, tiny: None, capsys, monkeypatch) -> None:
    monkeypatch.delenv(registry.FA3_VARIABLE, raising=False)
    found = measured(tmp_path, "--impl", name, "--pass", "fwd")
    outcome = found["cases"][0]["implementations"][name]
    assert outcome["status"] == "absent" and outcome["reason"]
    text = capsys.readouterr().out
    assert "| absent |" in text and f"- {name} absent in 1 of 1: {outcome['reason']}" in text


def test_the_reference_is_never_timed_as_ours(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(tmp_path, "--impl", "flash_ext,reference", "--pass", "fwd")
    ours = found["cases"][0]["implementations"]["flash_ext"]
    assert ours["status"] == "not covered" and ours["reason"] and "seconds" not in ours
    # A plan that promises a kernel while the op falls back all the same: the fallback is an error, not a time.
    monkeypatch.setattr(flash_ext, "explain", lambda *_, **__: SimpleNamespace(backend="sm90", rejected={}))

    def falls_back(*arguments: Any, **options: Any) -> Any:
        flash_ext.env.warn_of_fallback("attention (forward)", "invented")
        raise AssertionError("the fallback was not an error")

    monkeypatch.setattr(flash_ext, "attention", falls_back)
    ours = measured(tmp_path, "--impl", "flash_ext", "--pass", "fwd")["cases"][0]["implementations"]["flash_ext"]
    assert ours["status"] == "not covered" and "invented" in ours["reason"]
    assert "FLASH_EXT_STRICT" not in os.environ


class _Planted(registry.Implementation):
    """math, with something done to its result."""

    def __init__(self, name: str, peer: bool, change: Any) -> None:
        self.name, self.title, self.peer, self._change = name, name, peer, change

    def bind(self, case: Case, device: str) -> registry.Attend:
        attend = registry.implementations()["math"].bind(case, device)
        return lambda q, k, v: self._change(attend(q, k, v))


def _raise(error: Exception) -> Any:
    raise error


def _one_wrong_element(out: torch.Tensor) -> torch.Tensor:
    out = out.clone()
    out[-1, -1, -1, 3] += 0.5
    return out


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (_one_wrong_element, "wrong", "head 1: out:"),
        (lambda out: out * float("nan"), "wrong", "nan"),
        (lambda out: _raise(RuntimeError("boom\nmore")), "failed", "RuntimeError: boom"),
        (lambda out: _raise(torch.OutOfMemoryError("much text")), "failed", "out of memory"),
        (lambda out: _raise(RuntimeError("No available kernel. Aborting execution.")), "not covered", "no kernel"),
        (lambda out: _raise(RuntimeError('call("flash_ext::reference_bwd") failed at bwd.cpp')), "not covered", "falls back"),
    ],
)
@pytest.mark.parametrize("peer", [True, False])
def test_what_is_not_right_is_not_timed(change, status, reason, peer, tmp_path, tiny, capsys, monkeypatch) -> None:
    planted = _Planted("planted", peer, change)
    everything = {"planted": planted, "math": registry.implementations()["math"]}
    monkeypatch.setattr(run, "implementations", lambda: everything)
    fails = not peer and status in ("wrong", "failed")
    found = measured(tmp_path, "--impl", "planted,math", "--pass", "fwd", status=1 if fails else 0)
    outcome = found["cases"][0]["implementations"]["planted"]
    assert outcome["status"] == status and reason in outcome["reason"] and "seconds" not in outcome
    assert found["cases"][0]["implementations"]["math"]["status"] == "timed"
    assert ("FAILED: planted" in capsys.readouterr().err) == fails


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_a_wrong_gradient_is_not_timed(wrong: str, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = runner.results_of

    def spoiled(*arguments: Any) -> dict[str, torch.Tensor]:
        results = exact(*arguments)
        results[wrong][0, -1, -1, 5] += 0.5 * results[wrong].abs().max()
        return results

    monkeypatch.setattr(runner, "results_of", spoiled)
    found = measured(tmp_path, "--impl", "math", "--pass", "bwd")["cases"][0]["implementations"]["math"]
    assert found["status"] == "wrong" and f"{wrong}:" in found["reason"]


def test_a_lost_gpu_ends_the_run_but_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("tiny", 1, n, n, 1, 1, 16, 16) for n in (8, 12, 16)]
    monkeypatch.setitem(run.PRESETS, "quick", ("tiny", lambda gpu: cases))

    def breaks(out: torch.Tensor) -> torch.Tensor:
        return _raise(RuntimeError("CUDA error: an illegal memory access was encountered")) if out.shape[1] == 12 else out

    monkeypatch.setattr(run, "implementations", lambda: {"planted": _Planted("planted", True, breaks)})
    found = measured(tmp_path, "--impl", "planted", "--pass", "fwd", "--seconds", "0.001", status=1)
    assert len(found["cases"]) == 1 and len(found["left_out"]) == 2


def test_a_refused_launch_does_not_end_the_run(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """'CUDA error' from a GPU that still answers is that implementation's failure alone."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    refused = _Planted("planted", True, lambda out: _raise(RuntimeError("CUDA error: invalid configuration argument")))
    monkeypatch.setattr(run, "implementations", lambda: {"planted": refused, "math": registry.implementations()["math"]})
    outcomes = measured(tmp_path, "--impl", "planted,math", "--pass", "fwd")["cases"][0]["implementations"]
    assert (outcomes["planted"]["status"], outcomes["math"]["status"]) == ("failed", "timed")


def test_what_fails_only_while_it_is_timed(tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "time_interleaved", lambda *_, **__: _raise(torch.OutOfMemoryError("much text")))
    outcome = measured(tmp_path, "--impl", "math", "--pass", "fwd")["cases"][0]["implementations"]["math"]
    assert outcome == {"status": "failed", "reason": "out of memory"}


def test_budget_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cases = [Case("tiny", 1, n, n, 1, 1, 16, 16) for n in (8, 12, 16, 20, 24)]
    monkeypatch.setitem(run.PRESETS, "quick", ("tiny", lambda gpu: cases))
    options = ["--impl", "math", "--pass", "fwd", "--seconds", "0.001"]
    pieces = [measured(tmp_path, *options, "--part", f"{k}/2") for k in (1, 2)]
    assert [[row["case"]["seqlen_q"] for row in piece["cases"]] for piece in pieces] == [[8, 16, 24], [12, 20]]
    assert len(report.merge(pieces)["cases"]) == 5
    spent = measured(tmp_path, *options, "--budget", "1e-9")
    assert spent["cases"] == [] and len(spent["left_out"]) == 5 and "5 cases" in capsys.readouterr().out
    assert report.merge([spent, *pieces])["left_out"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--impl", "flash"], ["--impl", "'flash'", "flash_ext", "cudnn"]),
        (["--impl", ","], ["--impl", "flash_ext"]),
        (["--preset", "fast"], ["--preset", "'fast'", "quick", "paper"]),
        (["--pass", "backward"], ["--pass", "fwd+bwd"]),
        (["--dtype", "float16"], ["--dtype", "fp16"]),
        (["--head-dim", "96"], ["--head-dim 64,128", "quick"]),
        (["--head-dim", "big"], ["--head-dim", "64,128"]),
        (["--preset", "decode", "--pass", "bwd"], ["decode", "--pass fwd"]),
        (["--json", "/nowhere/out.json"], ["/nowhere", "mkdir -p"]),
        (["--plot", "."], ["is a folder", "name a file"]),
        (["--json", "{tmp}"], ["is a folder", "name a file"]),
        (["--json", "{tmp}/fifo"], ["--json", "no regular file"]),
        (["--markdown", "{tmp}/fifo"], ["--markdown", "no regular file"]),
        (["--plot", "{tmp}/link"], ["--plot", "no regular file"]),
        (["--json", "{tmp}/blocked.json"], ["blocked.json.part", "no regular file"]),
        (["--plot", "{tmp}/a.jpg"], ["--plot", ".png"]),
        (["--json", "{tmp}/a.png", "--plot", "{tmp}/./a.png"], ["--json and --plot", "same file"]),
        (["--plot", "{tmp}/a.png", "--markdown", "{tmp}/a.png"], ["--plot and --markdown", "same file"]),
        (["--part", "3/2"], ["--part", "K/N"]),
        (["--part", "99/100"], ["--part", "16 cases"]),
        (["--budget", "-1"], ["--budget", "seconds"]),
        (["--seconds", "soon"], ["--seconds", "seconds"]),
        (["--device", "tpu"], ["--device", "cpu"]),
        (["--fast"], ["unrecognized", "--fast"]),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "blocked.json.part").mkdir()
    before = sorted(tmp_path.iterdir())
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        run.main([*([] if "--device" in arguments else ["--device", "cpu"]), *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and all(word in captured.err for word in words), captured.err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "fifo").is_fifo()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(Path, "open", lambda *_: _raise(PermissionError(13, "denied")))  # a folder's mode does not keep root out
    with pytest.raises(SystemExit):
        run.main(["--json", str(tmp_path / "out.json")])
    assert "no permission" in capsys.readouterr().err


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(ValueError, match="no regular file"):
            report.save({}, tmp_path / name)
    assert (tmp_path / "fifo").is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    report.check_writable(tmp_path / "file")
    report.check_writable(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "old" and not (tmp_path / "new").exists()
    report.save({}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "{}\n"


def test_merging(tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture) -> None:
    """Pieces of different runs are refused; those of one keep every piece's ceilings."""
    piece = measured(tmp_path, "--impl", "math", "--pass", "fwd")
    other = json.loads(json.dumps(piece)) | {"date": "2026-02-02T02:02:02Z"}
    other["ceilings"]["copy_gb_s"] = 4321.0
    merged = report.merge([report.merge([piece, other]), other])
    assert [p["ceilings"]["copy_gb_s"] for p in merged["pieces"]] == [piece["ceilings"]["copy_gb_s"], 4321.0, 4321.0]
    assert "Ceilings measured in 2026-02-02T02:02:02Z: device copy 4321 GB/s" in report.markdown(merged)
    names = []
    for number, change in enumerate((
        {"commit": "another"}, {"preset": "paper"}, {"machine": piece["machine"] | {"gpu": "NVIDIA H200"}},
        {"implementations": ["math", "fa2"]},
    )):  # fmt: skip
        names.append(tmp_path / f"{number}.json")
        report.save(piece | change, names[-1])
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[]")
    capsys.readouterr()
    out, first = tmp_path / "merged.json", str(tmp_path / "out.json")
    names += [tmp_path / f"{name}.json" for name in ("missing", "text", "list")]
    told = ("commit", "preset", "GPU", "implementations", "cannot be read", "is no JSON", "schema")
    for bad, words in zip(names, told, strict=True):
        assert render_performance.main(["--merge", str(out), first, str(bad)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not out.exists(), error
    assert render_performance.main(["--merge", str(tmp_path), first]) == 2 and "is a folder" in capsys.readouterr().err
    assert render_performance.main(["--merge", str(out), first, first]) == 0 and len(report.load(out)["pieces"]) == 2


def test_what_is_measured_by_default() -> None:
    assert run.default_implementations("quick", "cuda") == ["flash_ext", "cudnn", "fa2", "fa3", "flex"]
    assert run.default_implementations("memory", "cuda") == ["flash_ext", "cudnn", "fa2", "fa3", "flex", "math"]
    assert run.default_implementations("memory", "cpu").count("math") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--device", "cuda"])
    assert ended.value.code == 2 and "--device cpu" in capsys.readouterr().err


def test_an_emulator_is_not_timed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_EMULATE", "sm90")
    with pytest.raises(SystemExit) as ended:
        run.main([])
    assert ended.value.code == 2 and "unset" in capsys.readouterr().err


class _Meter:
    """A GPU that draws 300 W and counts it, at 1500 MHz, held down by its power cap."""

    def __init__(self) -> None:
        self._mj = 0

    def describe(self) -> dict[str, Any]:
        return {"driver": "1.2", "power_limit_w": 700.0, "max_sm_clock_mhz": 1980}

    def energy_mj(self) -> int:
        self._mj += 5000
        return self._mj

    def power_w(self) -> float:
        return 300.0

    def sm_clock_mhz(self) -> int:
        return 1500

    def throttle_bits(self) -> int:
        return 0x4 | 0x1


class _Blind(_Meter):
    """A GPU that tells neither energy nor power nor clocks."""

    def _unavailable(self) -> Any:
        raise nvml.Unavailable("NVML: not supported")

    energy_mj = power_w = sm_clock_mhz = throttle_bits = _unavailable


def test_energy_and_conditions(tmp_path: Path, tiny: None, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run.energy, "idle_watts", lambda *_: 0.0)
    monkeypatch.setattr(run, "Session", lambda *a, **k: runner.Session(*a, **k, region_s=0.01))
    found = measured(tmp_path, "--impl", "math", "--pass", "fwd", "--energy", provider=_Meter())
    row = found["cases"][0]
    used = row["implementations"]["math"]["energy"]
    assert used["source"] == "counter" and used["calls"] >= 3 and used["joules"] == pytest.approx(used["joules_gross"])
    assert used["pj_per_flop"] == pytest.approx(used["joules"] / row["flops"] * 1e12)
    assert row["conditions"] == {"power_w": 300.0, "sm_clock_mhz": 1500.0, "throttled": ["power cap"]}
    text = capsys.readouterr().out
    assert "1500 MHz, 300 W, throttled: power cap" in text and "pJ/FLOP" in text and "power limit 700 W" in text


@pytest.mark.parametrize("provider", [None, _Blind()])
def test_energy_without_a_meter_is_said_and_is_no_failure(provider: Any, tmp_path: Path, tiny: None, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run.energy, "REGION_S", 0.01)
    monkeypatch.setattr(run.energy.time, "sleep", lambda seconds: None)
    found = measured(tmp_path, "--impl", "math", "--pass", "fwd", "--energy", provider=provider)
    assert (
        any("energy was not measured" in note for note in found["notes"]) and "energy was not measured" in capsys.readouterr().out
    )


@pytest.mark.parametrize("preset", ["paper", "decode", "paged", "varlen", "mask", "features", "memory"])
def test_every_preset_runs_without_a_gpu(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "plot.png"
    found = measured(
        tmp_path, "--preset", preset, "--impl", "reference,math", "--seconds", "0.001", "--plot", str(out), "--pass", "fwd"
    )
    statuses = {(name, o["status"]) for row in found["cases"] for name, o in row["implementations"].items()}
    assert ("math", "timed") in statuses and not {s for _, s in statuses} & {"wrong", "failed"}
    assert out.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert ("GB/s |" in text or ": GB/s" in text) == (preset in ("decode", "paged"))
    assert ("Peak extra bytes" in text) == (preset == "memory")


def test_memory_grows_linearly_for_ours_and_quadratically_unfused(tmp_path: Path) -> None:
    found = measured(tmp_path, "--preset", "memory", "--impl", "reference,math", "--seconds", "0.001")
    extra: dict[tuple[str, str], list[int]] = {}
    for row in found["cases"]:
        for name, outcome in row["implementations"].items():
            extra.setdefault((row["case"]["direction"], name), []).append(outcome["extra_bytes"])
    for direction in ("fwd", "fwd+bwd"):
        unfused, ours = extra[direction, "math"], extra[direction, "reference"]
        assert unfused[-1] > 3 * unfused[-2] and ours[-1] < 2.5 * ours[-2] and ours[-1] < unfused[-1] / 2


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run.main(["--plot", str(tmp_path / "a.png")])
    assert "pip install" in capsys.readouterr().err


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path, tiny: None, monkeypatch, capsys) -> None:
    measured(tmp_path, "--impl", "math", "--pass", "fwd")
    assert "1/1 tiny fwd bf16" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measured(tmp_path, "--impl", "math", "--pass", "fwd")
    assert "100%" in capsys.readouterr().err
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    measured(tmp_path, "--impl", "math", "--pass", "fwd")
    assert "1/1 tiny fwd bf16" in capsys.readouterr().err


def test_nothing_to_draw_is_drawn(tmp_path: Path) -> None:
    case = {"family": "f", "direction": "fwd", "dtype": "bf16", "head_dim": 8, "head_dim_v": 4, "mask": "full"}
    row = {"case": case | {"seqlen_q": 4, "seqlen_k": 4}, "implementations": {"fa3": {"status": "absent"}}}
    run_ = {"cases": [row], "implementations": ["fa3"], "machine": {"cpu": "x"}, "commit": "c", "date": "2026-01-01T"}
    plots.plot(run_, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_the_performance_page_is_the_generated_one() -> None:
    assert render_performance.page(render_performance.stored()) == (ROOT / "docs/performance.md").read_text(), (
        "run: python benchmarks/render_performance.py"
    )


def test_a_page_of_stored_runs(tmp_path: Path, tiny: None) -> None:
    """Nothing measured: said plainly. One GPU run: its tables stand there, and what it lacks is listed."""
    assert "Nothing has been measured" in render_performance.page([])
    found = measured(tmp_path, "--impl", "reference,math", "--pass", "fwd")
    found["machine"] |= {"device": "cuda", "gpu": "NVIDIA H200"}
    page = render_performance.page([found])
    assert "NVIDIA H200" in page and "| 16 | full | 1 | 24 |" in page and "Nothing has been measured" not in page
    assert "paper, fwd, bf16" in page and "cudnn" in page.split("## Not measured")[1]


def test_provider_of_no_gpu() -> None:
    assert run.machine.provider_of("cpu") == (None, "no GPU")
    assert issubclass(nvml.Unavailable, RuntimeError)
