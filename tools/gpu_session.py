"""Everything that needs a GPU, in one go: environment, build, doctor, then what the plan asks for.

    python tools/gpu_session.py [--plan gpu|bench|tune] [--out FOLDER] [--only STEP,STEP] [--budget SECONDS] [-- ARGUMENTS]

| plan | make | does |
|---|---|---|
| gpu | gpu | tests, a bfloat16 training run beside torch's, the quick benchmark, compute-sanitizer and ncu where they work |
| bench | gpu-bench | benchmarks/run.py with the arguments after --, such as --preset paper --part 1/4 |
| tune | gpu-tune | tools/tune.py with the arguments after --, such as --head-dim 128 --mask causal |

For a machine with a GPU, python3, torch, nvcc and ninja, and no network: packages that are missing there, CUTLASS's
headers above all, are taken from the wheels in the folder that FLASH_EXT_WHEELS names. They go into build/gpu_site and
the library is built in place, so the machine's own packages stay as they are, and git ignores all of it.

Each step has a time limit, and runs whatever became of the steps before it. FOLDER gets session.log, all output in order,
and summary.md, which is written anew after every step, so that a session cut short leaves one too; benchmarks add their
own files. Exit status 1: a step failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_site"
MARGIN_S = 10
TAIL_LINES = 25  # of a failed step's log, in the report

sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

PACKAGES = (
    "torch",
    "numpy",
    "setuptools",
    "ninja",
    "nvidia-cutlass",
    "triton",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "matplotlib",
    "nvidia-ml-py",
)


@dataclass(frozen=True)
class Step:
    """One command, run in the repository's root with a time limit in seconds. "{out}" in it is the session's folder.

    "{seconds}" in it is what the step may take, less some to end by itself.

    shown: lines of its output that the report ends with although it passed.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    shown: int = 1


PICTURE = "{out}/bench.png"


def _bench(*arguments: str) -> tuple[str, ...]:
    files = ("--json", "{out}/bench.json", "--plot", PICTURE, "--markdown", "{out}/bench.md")
    return (sys.executable, "benchmarks/run.py", *files, *arguments)


# Losses of flash_ext and torch step by step in training/losses.csv; a call that no kernel runs is an error.
TRAINING = (
    "env", "FLASH_EXT_STRICT=1", sys.executable, "examples/train_language_model.py", "--device", "cuda", "--plain",
    "--out", "{out}/training",
)  # fmt: skip

PREPARATION = (
    Step("environment", (sys.executable, "tools/gpu_session.py", "--print-environment"), 60),
    Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 240),
    Step("doctor", (sys.executable, "-m", "flash_ext"), 60),
)
# The benchmark's own budget lies below its limit, so that it ends by itself and its tables are complete.
PLANS = {
    "gpu": (
        *PREPARATION,
        Step("resources", (sys.executable, "tools/resources.py"), 30),
        Step("tests", (sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10"), 240),
        Step("training", TRAINING, 90, shown=12),
        Step("benchmark", _bench("--preset", "quick", "--budget", "90"), 150, shown=60),
        Step("sanitizer", (sys.executable, "tools/gpu_checks.py", "sanitize", "--limit", "{seconds}"), 150, shown=8),
        Step("profile", (sys.executable, "tools/gpu_checks.py", "profile", "--limit", "{seconds}"), 90),
    ),
    "bench": (*PREPARATION, Step("benchmark", _bench("--budget", "360"), 450, shown=100)),
    "tune": (*PREPARATION, Step("tune", (sys.executable, "tools/tune.py"), 500, shown=100)),
}


@dataclass(frozen=True)
class Result:
    step: Step
    status: str  # "ok", "failed (exit N)", "timed out (N s)" or "not run (budget spent)"
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def run_step(step: Step, limit: float, log: Path, environment: dict[str, str]) -> Result:
    """Run a step with all its output added to log; at the limit its whole process group is ended."""
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n=== {step.name}: {shlex.join(step.command)}\n".encode())
        output.flush()
        begin = output.tell()

        def result(status: str) -> Result:
            return Result(step, status, time.monotonic() - start, log.read_bytes()[begin:].decode(errors="replace"))

        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            output.flush()
            return result("failed (cannot start)")
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            _end_group(process)
            status = f"timed out ({limit:.0f} s)"
        except BaseException:
            _end_group(process)
            raise
        return result(status)


def _end_group(process: subprocess.Popen) -> None:
    """Ask, wait a little, then kill: a compiler's or a test's children must not outlive their step."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def summary(results: Sequence[Result]) -> str:
    """A Markdown table, and the verdict."""
    width = max(len(r.step.name) for r in results)
    lines = [f"| {'step':{width}} | status | time |", "|---|---|---|"]
    lines += [f"| {r.step.name:{width}} | {r.status} | {r.seconds:.0f} s |" for r in results]
    failed = [r.step.name for r in results if not r.ok]
    verdict = f"FAILED: {', '.join(failed)}" if failed else f"all {len(results)} steps passed"
    return "\n".join([*lines, "", verdict])


def report(results: Sequence[Result]) -> str:
    """The summary first, then how each step's output ends: of the failed ones much, of the others what they ask for."""
    parts = [summary(results)]
    for result in results:
        tail = result.output.splitlines()[-(result.step.shown if result.ok else max(TAIL_LINES, result.step.shown)) :]
        parts.append("\n".join([f"--- {result.step.name}: {result.status}", *(line[:300] for line in tail)]))
    return "\n\n".join(parts)


def run_session(steps: Sequence[Step], out: Path, environment: dict[str, str], budget: float = float("inf")) -> int:
    """Run all steps, print the report, and return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "session.log"
    log.write_bytes(b"")
    end = time.monotonic() + budget
    results: list[Result] = []
    for step in steps:
        limit = min(step.limit, end - time.monotonic())
        seconds = f"{max(limit - MARGIN_S, 1):.0f}"
        command = (word.replace("{out}", str(out)).replace("{seconds}", seconds) for word in step.command)
        step = replace(step, command=tuple(command))
        print(f"{step.name}: at most {max(limit, 0):.0f} s ...", flush=True)
        if limit < 1:
            results.append(Result(step, "not run (budget spent)", 0.0, ""))
        else:
            results.append(run_step(step, limit, log, environment))
        print(f"{step.name}: {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        (out / "summary.md").write_text(f"# GPU session\n\n{summary(results)}\n")
    print(f"\n{report(results)}\n\nall output: {log}", flush=True)
    return 0 if all(r.ok for r in results) else 1


def without_plot(step: Step) -> Step:
    """The step without its picture where matplotlib is missing: the benchmark would refuse to start."""
    words = step.command
    importlib.invalidate_caches()
    if PICTURE not in words or (SITE / "matplotlib").is_dir() or importlib.util.find_spec("matplotlib"):
        return step
    print(f"{step.name}: matplotlib is missing, so no picture is drawn", flush=True)
    at = words.index(PICTURE)
    return replace(step, command=words[: at - 1] + words[at + 1 :])


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def missing_wheels(folder: Path) -> list[Path]:
    """The wheels in folder whose package is not installed in that very version."""
    installed = {}
    for distribution in importlib.metadata.distributions():
        # The first on the path is the one that Python imports.
        installed.setdefault(_normal(distribution.metadata["Name"] or ""), distribution.version)
    wheels = sorted(folder.glob("*.whl"))
    return [w for w in wheels if installed.get(_normal(w.name.split("-")[0])) != w.name.split("-")[1]]


def prepare_environment() -> dict[str, str]:
    """The steps' environment: the checkout and the wheels' packages importable, nvcc found."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    # Entries that are there already come last: the session's own packages win.
    paths = [str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if shutil.which("nvcc") is None and not {"CUDA_HOME", "CUDA_PATH"} & set(environment):
        usual = Path("/usr/local/cuda")
        if (usual / "bin" / "nvcc").is_file():
            environment["CUDA_HOME"] = str(usual)
    folder = os.environ.get("FLASH_EXT_WHEELS")
    if not folder:
        return environment
    if not Path(folder).is_dir():
        raise SystemExit(f"FLASH_EXT_WHEELS={folder} is no folder")
    sys.path.insert(0, str(SITE))
    wheels = missing_wheels(Path(folder))
    print(f"wheels: {', '.join(w.name for w in wheels) or 'nothing is missing'}", flush=True)
    if wheels:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", str(SITE), *map(str, wheels)], check=True, timeout=300)
    return environment


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({command[0]}: {error})"
    return (done.stdout.strip() or done.stderr.strip()) or "(no output)"


def print_environment() -> int:
    """What the numbers of this session were got with. Exit status 1 without a GPU that torch can use."""
    print(_output_of("nvidia-smi"))
    print(
        "clocks, power:",
        _output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"),
    )
    print(f"machine: {platform.platform()}, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"{toolchain.free_memory_bytes() / 2**30:.0f} GiB of memory free, {toolchain.parallel_jobs()} parallel jobs")
    print(f"python {platform.python_version()} at {sys.executable}")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is missing")
    print("commit:", _output_of("git", "rev-parse", "HEAD").splitlines()[0])
    cuda = toolchain.find_cuda()
    print(f"nvcc {cuda.version[0]}.{cuda.version[1]} at {cuda.nvcc} ({cuda.found_by})" if cuda else toolchain.MISSING_NVCC)
    print(f"CUTLASS's headers: {toolchain.find_cutlass()}")
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU")
        return 1
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index} {torch.cuda.get_device_properties(index)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--plan", choices=list(PLANS), default="gpu", help="default gpu")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "gpu", help="folder for session.log and summary.md")
    parser.add_argument("--only", default="", help="some of the plan's steps, separated by commas")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all steps together")
    parser.add_argument("--print-environment", action="store_true", help="do nothing but that")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENTS", help="for the last step of the plans bench and tune")
    options = parser.parse_args(arguments)
    if options.print_environment:
        return print_environment()
    *first, last = PLANS[options.plan]
    if options.extra and options.plan == "gpu":
        parser.error("only the plans bench and tune take arguments after --")
    plan = [*first, replace(last, command=(*last.command, *options.extra))]
    wanted = [name for name in options.only.split(",") if name]
    unknown = set(wanted) - {step.name for step in plan}
    if unknown:
        parser.error(f"--only: unknown step {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in plan)}")
    steps = [step for step in plan if not wanted or step.name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended with the session
    begin = time.monotonic()
    environment = prepare_environment()
    left = options.budget - (time.monotonic() - begin)  # installing the wheels counts, too
    return run_session([without_plot(step) for step in steps], options.out.resolve(), environment, left)


if __name__ == "__main__":
    sys.exit(main())
