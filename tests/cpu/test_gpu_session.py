"""tools/gpu_session.py with steps that need no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu_session():
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "tools" / "gpu_session.py")
    module = sys.modules["gpu_session"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(gpu_session, name: str, code: str, limit: float = 60):
    return gpu_session.Step(name, (sys.executable, "-c", code), limit)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# A step that starts a child, says its id, and waits for ever.
STUCK = "import subprocess, time; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); time.sleep(1000)"


def test_later_steps_run_after_a_failure_and_a_timeout(gpu_session, tmp_path, capsys):
    steps = [
        python(gpu_session, "first", "print('fine')"),
        python(gpu_session, "broken", "print('what went wrong'); raise SystemExit(3)"),
        python(gpu_session, "stuck", STUCK, limit=2),
        gpu_session.Step("absent", ("no-such-program",), 5),
        python(gpu_session, "last", "import os; print(os.environ['MARK'])"),
    ]
    assert gpu_session.run_session(steps, tmp_path, dict(os.environ, MARK="marked")) == 1

    output = capsys.readouterr().out
    report = output[output.index("| step") :]
    statuses = [line.split("|")[2].strip() for line in report.splitlines()[2:7]]
    assert statuses == ["ok", "failed (exit 3)", "timed out (2 s)", "failed (cannot start)", "ok"]
    assert "FAILED: broken, stuck, absent" in report
    assert report.index("FAILED") < report.index("what went wrong"), "the summary stands first"
    log = (tmp_path / "session.log").read_text()
    assert log.endswith("\nmarked\n") and [line.split()[1] for line in log.splitlines() if line.startswith("===")] == [
        f"{step.name}:" for step in steps
    ]
    assert "timed out (2 s)" in (tmp_path / "summary.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["session.log", "summary.md"]

    child = int(log.split("=== stuck")[1].splitlines()[1])
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child), "a step's children end with it"


def test_all_passed(gpu_session, tmp_path, capsys):
    steps = [python(gpu_session, name, "") for name in ("one", "two")]
    assert gpu_session.run_session(steps, tmp_path, dict(os.environ)) == 0
    assert "all 2 steps passed" in capsys.readouterr().out


def test_a_spent_budget_is_a_failure(gpu_session, tmp_path):
    steps = [python(gpu_session, "stuck", STUCK), python(gpu_session, "late", "")]
    assert gpu_session.run_session(steps, tmp_path, dict(os.environ), budget=2) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "timed out (2 s)" in text
    assert "not run (budget spent)" in text


def test_the_summary_is_there_while_the_session_runs(gpu_session, tmp_path):
    read = f"print(open({str(tmp_path / 'summary.md')!r}).read())"
    gpu_session.run_session([python(gpu_session, "one", ""), python(gpu_session, "two", read)], tmp_path, dict(os.environ))
    assert "all 1 steps passed" in (tmp_path / "session.log").read_text()


def test_a_step_may_show_more_and_write_beside_the_log(gpu_session, tmp_path, capsys):
    """'{out}' in a command is the session's folder, and `shown` lines of a step that passed end the report."""
    code = "import sys; open(sys.argv[1], 'w').write('kept'); print('first\\nsecond\\nthird')"
    step = gpu_session.Step("table", (sys.executable, "-c", code, "{out}/file"), 60, shown=2)
    assert gpu_session.run_session([step], tmp_path, dict(os.environ)) == 0
    report = capsys.readouterr().out.split("--- table: ok\n")[1]
    assert report.startswith("second\nthird\n") and (tmp_path / "file").read_text() == "kept"


def test_a_step_knows_its_time(gpu_session, tmp_path):
    """'{seconds}' is what is left for it, less a margin; 50 of a budget of 50, not the step's own 60."""
    step = gpu_session.Step("timed", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"), 60)
    assert gpu_session.run_session([step], tmp_path, dict(os.environ), budget=50) == 0
    assert (tmp_path / "session.log").read_text().splitlines()[-1] == "40"


def test_no_picture_without_matplotlib(gpu_session, tmp_path, monkeypatch, capsys):
    step = next(s for s in gpu_session.PLANS["gpu"] if s.name == "benchmark")
    monkeypatch.setattr(gpu_session, "SITE", tmp_path)
    monkeypatch.setattr(gpu_session.importlib.util, "find_spec", lambda name: None)
    changed = gpu_session.without_plot(step)
    assert [word for word in step.command if word not in changed.command] == ["--plot", gpu_session.PICTURE]
    assert "matplotlib is missing" in capsys.readouterr().out
    (tmp_path / "matplotlib").mkdir()
    assert gpu_session.without_plot(step) == step


def test_installing_the_wheels_counts(gpu_session, tmp_path, monkeypatch):
    budgets = []
    monkeypatch.setattr(gpu_session, "prepare_environment", lambda: time.sleep(0.2) or {})
    monkeypatch.setattr(gpu_session, "run_session", lambda steps, out, environment, budget: budgets.append(budget) or 0)
    assert gpu_session.main(["--out", str(tmp_path), "--budget", "10"]) == 0
    assert budgets[0] <= 9.8


def test_wheels_that_are_installed_already_are_left_alone(gpu_session, tmp_path):
    import numpy

    for name in (f"numpy-{numpy.__version__}", "numpy-0.0.1", "no_such_package-1.0"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    missing = [path.name.split("-py3")[0] for path in gpu_session.missing_wheels(tmp_path)]
    assert missing == ["no_such_package-1.0", "numpy-0.0.1"]


def test_the_steps_of_this_repository(gpu_session):
    tests = next(s for s in gpu_session.PLANS["gpu"] if s.name == "tests").command
    assert tests[tests.index("pytest") + 1 :][:3] == ("tests/gpu", "-m", "gpu")
    for plan in gpu_session.PLANS.values():
        assert [s.name for s in plan][:3] == ["environment", "build", "doctor"]
        written = {word for step in plan for word in step.command if word.startswith("{out}")}
        assert len(written) + len(("session.log", "summary.md")) <= 8
        for step in plan:
            files = [ROOT / word for word in step.command if word.endswith(".py")]
            assert all(path.is_file() for path in files)
            if "--budget" in step.command:
                assert float(step.command[step.command.index("--budget") + 1]) < step.limit


def test_arguments_go_to_the_last_step(gpu_session, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_session, "prepare_environment", dict)
    monkeypatch.setattr(gpu_session, "run_session", lambda steps, *_: seen.append(steps) or 0)
    assert gpu_session.main(["--plan", "bench", "--", "--preset", "paper", "--part", "2/4"]) == 0
    assert gpu_session.main(["--plan", "tune", "--only", "tune", "--", "--head-dim", "64"]) == 0
    assert seen[0][-1].command[-4:] == ("--preset", "paper", "--part", "2/4") and len(seen[0]) == 4
    assert [s.command[-2:] for s in seen[1]] == [("--head-dim", "64")]
    with pytest.raises(SystemExit):
        gpu_session.main(["--", "--preset", "paper"])


def test_an_unknown_step_is_named(tmp_path):
    command = [sys.executable, "tools/gpu_session.py", "--only", "buidl", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown step buidl; there are environment, build" in done.stderr
