"""docs/performance.md from the stored runs in benchmarks/results; also merges the pieces of one run.

python benchmarks/render_performance.py                      write docs/performance.md
python benchmarks/render_performance.py --merge OUT A B ...  join the pieces of a preset (--part K/N) into OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import report
from benchmarks.presets import PRESETS, default_dtypes, default_passes
from benchmarks.run import default_implementations

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
TRIED = ROOT / "benchmarks" / "tried.md"  # changes judged by counting instructions; edited by hand

INTRODUCTION = """# Performance

Written by `python benchmarks/render_performance.py` from the runs in `benchmarks/results/`; do not edit. Every speed
here was measured by this project, in one run beside its peers and the machine's own ceilings; "Tried by counting" has
counts of instructions and bytes instead, and says which of them are predictions.
`make gpu-bench` repeats a run on your GPU, and `python benchmarks/run.py --help` says what else there is to measure.

How it is measured: a case is timed only after its result passed the oracle (two heads, 256 rows of each); then all
implementations take turns within one run, each call from a cold L2 between two CUDA events, warmed up; the median, the
20th and the 80th percentile are kept. A backward is `torch.autograd.grad` over a retained graph, for every
implementation. Floating-point operations are counted the same for all: 4 * seqlen^2 * head_dim for each head, half of it
when causal, 2.5 times that for the backward. Power, SM clock and throttling are sampled meanwhile, and the ceilings (a
device copy, matrix products in bf16 and, where the GPU has it, fp8) are measured in the same run. What our kernels do not
cover is not timed: the reference never stands in for them.

What can be said without a GPU, instructions and cycles of each kernel's main loops, is printed by
`python tools/static_report.py`.
"""
NOTHING = """**Nothing has been measured on a GPU yet.** No speed of flash_ext is known; whoever states one did not get it here.
"""


def stored() -> list[report.Run]:
    """The runs kept in the repository, the newest first."""
    return sorted((report.load(path) for path in RESULTS.glob("*.json")), key=lambda run: run["date"], reverse=True)


def _measured(runs: list[report.Run]) -> set[tuple[str, str, str, str]]:
    """(preset, pass, dtype, implementation) with at least one time on a GPU."""
    return {
        (run["preset"], row["case"]["direction"], row["case"]["dtype"], name)
        for run in runs
        for row in run["cases"]
        for name, outcome in row["implementations"].items()
        if outcome["status"] == "timed" and run["machine"]["device"] == "cuda"
    }


def _not_measured(runs: list[report.Run]) -> list[str]:
    measured, lines = _measured(runs), []
    for preset, (what, _) in PRESETS.items():
        for direction in default_passes(preset):
            dtype = default_dtypes(preset)[0]
            missing = [n for n in default_implementations(preset, "cuda") if (preset, direction, dtype, n) not in measured]
            if missing:
                lines.append(f"- {preset}, {direction}, {dtype} ({what}): {', '.join(missing)}")
    if not any(dtype == "fp16" for _, _, dtype, _ in measured):
        lines.append("- everything in fp16")
    if not any("energy" in o for run in runs for row in run["cases"] for o in row["implementations"].values()):
        lines.append("- energy, of anything")
    return lines


def page(runs: list[report.Run]) -> str:
    parts = [INTRODUCTION]
    on_gpu = [run for run in runs if run["machine"]["device"] == "cuda"]
    if not on_gpu:
        parts.append(NOTHING)
    for run in on_gpu:
        parts.append(f"## {run['preset']}: {run['machine']['gpu']}, {run['date'][:10]}, commit {run['commit']}\n")
        parts.append(report.markdown(run))
    parts.append(TRIED.read_text())
    missing = _not_measured(runs)
    if missing:
        parts.append("## Not measured\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="OUT, then the pieces")
    arguments = parser.parse_args(argv)
    if arguments.merge:
        out, *pieces = arguments.merge
        if not pieces:
            parser.error("--merge takes the file to write and then the pieces: --merge all.json part1.json part2.json")
        try:
            report.check_writable(out)
            report.save(report.merge([report.load(piece) for piece in pieces]), out)
        except ValueError as error:
            print(f"render_performance.py: {error}", file=sys.stderr)
            return 2
    else:
        PAGE.write_text(page(stored()))
        print(f"wrote {PAGE.relative_to(ROOT)} from {len(stored())} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
