"""compute-sanitizer and ncu over our kernels, one launch of each. Steps of tools/gpu_session.py; they need a GPU.

    python tools/gpu_checks.py sanitize      memcheck, synccheck and racecheck on a small call of every variant
    python tools/gpu_checks.py profile       ncu on a large call of the bfloat16 variants
    python tools/gpu_checks.py launch [--large]   only the calls

Some machines refuse these tools; each is tried on a trivial program first, and where it does not work that is said and is
no failure. Nor is a tool that reaches its time limit: it is reported as not finished, and fails only for what it found by
then. racecheck's findings are shown but fail nothing: it does not see that a TMA copy is ordered by its mbarrier.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "^(fwd|bwd|combine)_"  # our kernels' names begin with their op
SANITIZERS = {"memcheck": True, "synccheck": True, "racecheck": False}  # whether findings fail
NOT_FINISHED = 124  # what stands for an exit status where a tool reached its limit
TRIVIAL_S = 30.0  # for the trivial program, at most
TRIVIAL = "import torch; print(torch.zeros(8, device='cuda').sum().item())"
FINDING = r"(?m)^========= (Invalid|Barrier error|Program hit|Misaligned|Stack overflow|Error)"
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
    *("SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats"),
)


def _attention_inputs(row: dict[str, Any], large: bool) -> tuple[Any, Any, Any]:
    import torch

    block_m, block_n = row["tile"]
    batch, heads, heads_kv, rows, keys = (2, 16, 16, 4096, 4096) if large else (1, 2, 1, 2 * block_m + 5, 2 * block_n + 3)
    dtype = getattr(torch, row["dtype"])

    def normal(seqlen: int, num_heads: int, dim: int) -> Any:
        return torch.randn(batch, seqlen, num_heads, dim, device="cuda", dtype=torch.float32).to(dtype)

    return normal(rows, heads, row["head_dim"]), normal(keys, heads_kv, row["head_dim"]), normal(keys, heads_kv, row["head_dim_v"])


def call_of(row: dict[str, Any], large: bool) -> Callable[[], Any] | None:
    """A call that launches this variant on this GPU; None where there is none, such as a row of another architecture."""
    import torch

    import flash_ext

    causal = row["name"].endswith("causal")
    if row["op"] in ("fwd", "bwd"):
        q, k, v = (t.requires_grad_(row["op"] == "bwd") for t in _attention_inputs(row, large))
        chosen = flash_ext.explain(q, k, v, causal=causal)
        if chosen.backend != f"sm{row['arch']}" or (row["op"] == "fwd" and chosen.variant != row["name"]):
            return None
        if row["op"] == "fwd":
            return lambda: flash_ext.attention(q, k, v, causal=causal)
        return lambda: torch.autograd.grad(flash_ext.attention(q, k, v, causal=causal).sum(), (q, k, v))
    if row["op"] == "bwd_preprocess" and (row["arch"] >= 90) == (torch.cuda.get_device_capability() == (9, 0)):
        rows = 4096 if large else 133
        out, dout = (torch.randn(1, rows, 2, row["head_dim_v"], device="cuda").to(getattr(torch, row["dtype"])) for _ in range(2))
        lse = torch.randn(1, 2, rows, device="cuda")
        return lambda: torch.ops.flash_ext.bwd_preprocess(out, dout, lse, None)
    return None


def launch(large: bool) -> int:
    import torch

    from flash_ext.dispatch import _host

    launched = 0
    for row in _host().variants():
        if large and row["dtype"] != "bfloat16":
            continue
        call = call_of(row, large)
        if call is None:
            print(f"{row['name']}: no call on this GPU chooses it")
            continue
        call()
        torch.cuda.synchronize()
        launched += 1
        print(f"{row['name']}: launched", flush=True)
    return 0 if launched else 1


def _run(command: list[str], limit: float) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FLASH_EXT_STRICT": "1"}  # every tensor is an allocation of its own
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    try:
        text, _ = process.communicate(timeout=limit)
        return process.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            text, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            text = ""
        return NOT_FINISHED, f"{text.rstrip()}\nstopped after {limit:.0f} s".lstrip()
    finally:
        if process.poll() is None:  # the tool's own child, the program, must end with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def working(tool: str, choices: list[list[str]], limit: float) -> list[str] | None:
    """The first of these command beginnings that runs a trivial program on the GPU; None, with the reason printed."""
    if shutil.which(tool) is None:
        print(f"{tool} is not on PATH: skipped")
        return None
    for options in choices:
        code, text = _run([tool, *options, sys.executable, "-c", TRIVIAL], limit)
        if code == 0:
            return [tool, *options]
    lines = [line for line in text.splitlines() if line.strip()]
    print(f"{tool} does not work on this machine (exit {code}): skipped. It said: {' / '.join(lines[-3:])[:400]}")
    return None


def _calls(*options: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "gpu_checks.py"), "launch", *options]


def sanitize(limit: float) -> int:
    """limit: seconds for everything; what one tool leaves of its share goes to the next."""
    end = time.monotonic() + limit
    only_ours = ["--kernel-regex", f"kns={OURS}"]
    found = working("compute-sanitizer", [[*only_ours], []], min(TRIVIAL_S, limit / 5))
    if found is None:
        return 0
    failed, unfinished = [], []
    for done, (tool, findings_fail) in enumerate(SANITIZERS.items()):
        share = max((end - time.monotonic()) / (len(SANITIZERS) - done), 1.0)
        code, text = _run([found[0], "--tool", tool, "--error-exitcode", "9", *found[1:], *_calls()], share)
        lines = [line for line in text.splitlines() if re.match(r"=========|\S+: launched", line) or code not in (0, 9)]
        print(f"--- {tool}: {'not finished' if code == NOT_FINISHED else f'exit {code}'}")
        print("\n".join(lines[:60] + (lines[60:][-1:])), flush=True)
        if code == NOT_FINISHED and not (findings_fail and re.search(FINDING, text)):
            unfinished.append(tool)
        elif code not in (0, 9) or (code == 9 and findings_fail):
            failed.append(tool)
    print(f"FAILED: {', '.join(failed)}" if failed else "no finding that fails")
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}")
    return 1 if failed else 0


def profile(limit: float) -> int:
    end = time.monotonic() + limit
    found = working("ncu", [["--clock-control", "none", "--section", "LaunchStats"]], min(TRIVIAL_S, limit / 2))
    if found is None:
        return 0
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", *sections, "--kernel-name", f"regex:{OURS}", "--print-summary", "none"]
    code, text = _run([found[0], *options, *_calls("--large")], max(end - time.monotonic(), 1.0))
    print(text)
    if code == NOT_FINISHED:
        print("not finished: ncu")
    return 1 if code not in (0, NOT_FINISHED) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sanitize", "profile", "launch"])
    parser.add_argument("--large", action="store_true", help="launch: large bfloat16 calls instead of small ones of every variant")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for all runs of a tool together")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running tool, too
    if arguments.what == "launch":
        sys.path.insert(0, str(ROOT))
        return launch(arguments.large)
    return (sanitize if arguments.what == "sanitize" else profile)(arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
