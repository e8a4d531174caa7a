"""Attention measured side by side: ours, cuDNN, FlashAttention-2 and -3, FlexAttention, unfused, and the reference.

    python benchmarks/run.py --preset quick --json out.json --plot out.png
    python benchmarks/run.py --preset paper --part 2/6 --impl flash_ext,cudnn,fa3 --pass fwd

Without a GPU the presets are small, and torch's CPU kernels stand in for the peers. The table goes to standard output.
Exit status: 0; 1 when a result of ours was wrong or failed, or the GPU was lost; 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # the checkout whose commit is recorded is the one that is measured
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks import ceilings, energy, machine, report
from benchmarks.criteria import criteria
from benchmarks.nvml import Provider, Unavailable
from benchmarks.presets import DTYPES, PASSES, PRESETS, Case, cases_of, default_dtypes, default_passes
from benchmarks.registry import Implementation, implementations
from benchmarks.runner import FAILED, WRONG, DeviceLost, Session, measure_case
from benchmarks.timing import stopwatch_of

DEFAULT_IMPLEMENTATIONS = {"cuda": "flash_ext,cudnn,fa2,fa3,flex", "cpu": "reference,fa2,math"}
# Over KV caches; SDPA has no cache, so that its kernels read gathered ones.
CACHE_PRESETS = ("decode", "paged")
CACHE_IMPLEMENTATIONS = {"cuda": "flash_ext,fa3,flash_attn,flashinfer,flashmla,cudnn,fa2", "cpu": "reference,math"}
SM80_IMPLEMENTATIONS = "flash_ext_sm80,fa2"
FP8_IMPLEMENTATIONS = "flash_ext,flash_ext_unflushed,flash_ext_block,cudnn,fa3"
UNFUSED = "math"  # what the memory preset compares with
DEFAULT_SECONDS = {"cuda": 1.0, "cpu": 0.2}


class Parser(argparse.ArgumentParser):
    """One line and exit status 2 for whatever is wrong."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"run.py: {message.removeprefix('argument ')}\n")
        raise SystemExit(2)


def _one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {word!r}; choose from {', '.join(known)}")
        return word

    return check


def _list_of(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    def check(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise argparse.ArgumentTypeError(f"names no {what}; give one or more of {','.join(known)}")
        return list(dict.fromkeys(_one_of(what, known)(word) for word in words))

    return check


def _head_dims(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write head dims like 64,128") from None


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(word) for word in text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write K/N with 1 <= K <= N, like 2/6")
    return part, parts


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write a positive number of seconds")
    return value


def _writable(text: str) -> Path:
    path = Path(text)
    try:
        report.check_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def _picture(text: str) -> Path:
    path = _writable(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} is no name of a picture; it must end in .png")
    return path


def _check_files_differ(arguments: argparse.Namespace, fail: Callable[[str], NoReturn]) -> None:
    seen: dict[Path, str] = {}
    for option in ("json", "plot", "markdown"):
        path = getattr(arguments, option)
        if path and (first := seen.setdefault(path.resolve(), option)) != option:
            fail(f"--{first} and --{option} name the same file, {path}; give each its own")


def parser() -> Parser:
    known = list(implementations())
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = "; ".join(f"{name}: {what}" for name, (what, _) in PRESETS.items())
    p.add_argument("--preset", type=_one_of("preset", list(PRESETS)), default="quick", help=f"default quick. {presets}")
    p.add_argument(
        "--impl", type=_list_of("implementation", known), help=f"of {','.join(known)}; by default those that suit the device"
    )
    p.add_argument(
        "--pass", dest="passes", type=_list_of("pass", PASSES), help="of fwd,bwd,fwd+bwd; by default what suits the preset"
    )
    p.add_argument(
        "--dtype", type=_list_of("dtype", list(DTYPES)), help=f"of {','.join(DTYPES)}; default bf16, of preset fp8 fp8,bf16"
    )
    p.add_argument("--head-dim", type=_head_dims, default=[], help="only the preset's cases of these head dims, such as 64,128")
    p.add_argument(
        "--device", type=_one_of("device", ["auto", "cuda", "cpu"]), default="auto", help="default: cuda where there is one"
    )
    p.add_argument("--json", type=_writable, help="write everything measured here, after each case")
    p.add_argument("--plot", type=_picture, help="draw speed by sequence length (PNG)")
    p.add_argument("--markdown", type=_writable, help="write the tables here, too")
    p.add_argument(
        "--energy", action="store_true", help="also joules a call and pJ/FLOP: two seconds and more, three times, a time each"
    )
    p.add_argument(
        "--part", type=_part, default=(1, 1), help="K/N: every N-th case, from the K-th; merge with render_performance.py"
    )
    p.add_argument("--budget", type=_seconds, help="start no case after this many seconds, and say which were left out")
    p.add_argument("--seconds", type=_seconds, help="to spend on timing each case (default 1 on a GPU, 0.2 without)")
    return p


def default_implementations(preset: str, device: str) -> list[str]:
    names = (CACHE_IMPLEMENTATIONS if preset in CACHE_PRESETS else DEFAULT_IMPLEMENTATIONS)[device].split(",")
    if preset == "fp8" and device == "cuda":
        names = FP8_IMPLEMENTATIONS.split(",")
    if preset == "sm80" and device == "cuda":
        names = SM80_IMPLEMENTATIONS.split(",")
    return [*names, UNFUSED] if preset == "memory" and UNFUSED not in names else names


def _device(asked: str, fail: Callable[[str], NoReturn]) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        fail("--device: torch sees no GPU here; leave --device out, or give --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _selection(arguments: argparse.Namespace, device: str, fail: Callable[[str], NoReturn]) -> list[Case]:
    gpu, passes = device == "cuda", arguments.passes or default_passes(arguments.preset)
    cases = cases_of(arguments.preset, gpu, passes, arguments.dtype, arguments.head_dim)
    if not cases:
        has = ",".join(str(d) for d in dict.fromkeys(case.head_dim for case in PRESETS[arguments.preset][1](gpu)))
        fail(
            f"no case is left of preset {arguments.preset}; on this device it has --head-dim {has} and "
            f"--pass {','.join(default_passes(arguments.preset))}"
        )
    part, parts = arguments.part
    if part > len(cases):
        fail(f"--part: there are only {len(cases)} cases; give --part K/N with K at most {len(cases)}")
    return cases[part - 1 :: parts]


@contextmanager
def _strict() -> Iterator[None]:
    """A fallback of ours to the reference is an error: the reference is never timed under our kernels' name."""
    before = os.environ.get("FLASH_EXT_STRICT")
    os.environ["FLASH_EXT_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLASH_EXT_STRICT"]
        else:
            os.environ["FLASH_EXT_STRICT"] = before


def _progress(cases: list[Case]) -> Any:
    """A progress bar on standard error; plain lines in a log, and where tqdm is not installed."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        return tqdm(cases, unit="case", dynamic_ncols=True)

    def lines() -> Iterator[Case]:
        for index, case in enumerate(cases, 1):
            print(f"{index}/{len(cases)} {case.name}", file=sys.stderr, flush=True)
            yield case

    return lines()


def _session(arguments: argparse.Namespace, device: str, provider: Provider | None, notes: list[str], why: str) -> Session:
    stopwatch = stopwatch_of(device)
    idle_w = None
    if arguments.energy and provider is None:
        notes.append(f"energy was not measured: {why}")
    elif arguments.energy:
        try:
            idle_w = energy.idle_watts(provider, torch.cuda.synchronize if device == "cuda" else lambda: None)
        except Unavailable as error:
            notes.append(f"energy was not measured: {error}")
    measured = ceilings.measure(device, arguments.dtype, stopwatch)
    seconds, gpu = arguments.seconds or DEFAULT_SECONDS[device], device == "cuda"
    return Session(
        device, stopwatch, measured, provider, seconds, least=5 if gpu else 3, most=100, pause_s=1.0 if gpu else 0.0, idle_w=idle_w
    )


def _failures(run: report.Run) -> list[str]:
    return [
        f"{name} {outcome['status']}: {row['name']}: {outcome['reason']}"
        for row in run["cases"]
        for name, outcome in row["implementations"].items()
        if name in run["ours"] and outcome["status"] in (WRONG, FAILED)
    ]


def _measure(
    run: report.Run, cases: list[Case], chosen: dict[str, Implementation], session: Session, arguments: argparse.Namespace
) -> list[str]:
    """Fills the run's cases, saving after each; returns what failed the run."""
    begin, lost = time.monotonic(), []
    for case in _progress(cases):
        if arguments.budget and time.monotonic() - begin > arguments.budget:
            run["left_out"].append(case.name)
            continue
        try:
            run["cases"].append(measure_case(case, chosen, session))
        except DeviceLost as error:
            lost.append(f"the GPU was lost in {case.name}: {error}")
            run["left_out"] += [c.name for c in cases[cases.index(case) :]]
            break
        if arguments.json:
            report.save(run, arguments.json)
    return lost + _failures(run)


def main(argv: Sequence[str] | None = None, provider: Provider | None = None) -> int:
    """provider: put in NVML's place by tests."""
    p = parser()
    arguments = p.parse_args(argv)
    arguments.dtype = arguments.dtype or default_dtypes(arguments.preset)
    if os.environ.get("FLASH_EXT_EMULATE"):
        p.error("FLASH_EXT_EMULATE is set, and an emulator's times mean nothing; unset it")
    _check_files_differ(arguments, p.error)
    if arguments.plot and not importlib.util.find_spec("matplotlib"):
        p.error("--plot needs matplotlib: pip install 'flash_ext[bench]', or leave --plot out")
    device = _device(arguments.device, p.error)
    cases = _selection(arguments, device, p.error)
    known = implementations()
    chosen = {name: known[name] for name in arguments.impl or default_implementations(arguments.preset, device)}
    why = "given by the caller"
    if provider is None:
        provider, why = machine.provider_of(device)
    notes: list[str] = [] if provider or device == "cpu" else [f"clocks and power were not sampled: {why}"]
    with _strict():
        session = _session(arguments, device, provider, notes, why)
        run: report.Run = {
            "schema": report.SCHEMA,
            "date": machine.now(),
            "commit": machine.commit(),
            "command": shlex.join(["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)]),
            "preset": arguments.preset,
            "machine": machine.describe(device, provider),
            "ceilings": session.ceilings.as_dict(),
            "implementations": list(chosen),
            "ours": [name for name, each in chosen.items() if not each.peer],
            "versions": {name: each.version() for name, each in chosen.items()},
            "notes": notes,
            "cases": [],
            "left_out": [],
        }
        failures = _measure(run, cases, chosen, session, arguments)
    run["criteria"] = criteria(run)
    text = report.markdown(run)
    print(text)
    if arguments.json:
        report.save(run, arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.plot and run["cases"]:
        from benchmarks.plots import plot

        plot(run, arguments.plot)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
