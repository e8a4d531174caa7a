"""One call of flash_ext.attention in the emulator, and what its kernels did, by source line.

    python tests/emulator/report.py --seqlen 1024 --heads 2 --head-dim 128 --causal

Needs flash_ext/_C_emulated (`make emulator`). Counts are exact; times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# The first pattern that an opcode matches names its kind.
KINDS = (
    ("tensor core", r"wgmma\.mma|mma\."),
    ("TMA and bulk copies", r"cp\.(async|reduce\.async)\.bulk"),
    ("cp.async", r"cp\.async"),
    ("barriers and fences", r"mbarrier|bar\b|bar\.|barrier|fence|membar|wgmma\.|griddepcontrol|setmaxnreg|nanosleep"),
    ("matrix loads and stores", r"ldmatrix|stmatrix"),
    ("atomics", r"atom|red\.(?!sync)"),
    ("shared memory", r"(ld|st)\S*\.shared"),
    ("global memory", r"(ld|st)\S*\.global|prefetch"),
    ("other memory", r"ld|st\.|st\b"),
    ("exp2, log2, reciprocal", r"ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos|div"),
    ("conversions", r"cvt(?!a)"),
    ("shuffles and votes", r"shfl|vote|match|redux|elect|activemask"),
    ("control flow", r"bra|brx|ret|exit|call|setp|selp"),
    ("floating point", r"\w+\.\S*(f16|bf16|f32|f64)"),
    ("integers and moves", r""),
)


def kind_of(opcode: str) -> str:
    return next(name for name, pattern in KINDS if re.match(pattern, opcode))


def fewest_wavefronts(opcode: str) -> int:
    """Of a request of 32 lanes without bank conflicts: 128 bytes each."""
    if match := re.search(r"matrix\S*\.x([124])", opcode):
        return int(match[1])
    if opcode.startswith("cp.async.cg"):
        return 4  # always 16 bytes a lane
    width = int(match[1]) if (match := re.search(r"\.[a-z]+(\d+)$", opcode)) else 32
    vector = int(match[1]) if (match := re.search(r"\.v([248])\.", opcode)) else 1
    return max(1, width * vector // 32)


def lost_wavefronts(stats: Iterable[Any]) -> int:
    return sum(max(0, s.shared_wavefronts - s.shared_requests * fewest_wavefronts(s.opcode)) for s in stats)


def ratio(top: float, bottom: float) -> str:
    return f"{top / bottom:.2f}" if bottom else "-"


def table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...]) -> list[str]:
    """Right-aligned columns; the last is left-aligned."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return ["  " + "  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]]) for row in cells]


def place(file: str, line: int) -> str:
    path = Path(file)
    if path.is_relative_to(ROOT):
        return f"{path.relative_to(ROOT)}:{line}"
    return f"{'/'.join(path.parts[-2:])}:{line}" if file else "(no source line)"


def kernel_lines(report: Any, limit: int) -> list[str]:
    """The report of one kernel as lines of text."""
    total = report.warp_instructions
    kinds: dict[str, int] = defaultdict(int)
    sources: dict[str, list[Any]] = defaultdict(list)
    for stats in report.instructions:
        kinds[kind_of(stats.opcode)] += stats.executions
        sources[place(stats.file, stats.line)].append(stats)

    def add(stats: Iterable[Any], field: str) -> int:
        return sum(getattr(s, field) for s in stats)

    shared, waves = add(report.instructions, "shared_requests"), add(report.instructions, "shared_wavefronts")
    requests, sectors = add(report.instructions, "global_requests"), add(report.instructions, "global_sectors")
    lost = lost_wavefronts(report.instructions)
    lines = [f"{report.kernel}: {total:,} warp instructions", ""]
    lines += table(
        ((f"{n:,}", f"{100 * n / total:.1f} %", name) for name, n in sorted(kinds.items(), key=lambda item: -item[1])),
        ("executed", "share", "kind"),
    )
    lines += [
        "",
        f"  shared memory  {shared:,} requests, {waves:,} wavefronts, {lost:,} of them bank conflicts",
        f"  global memory  {requests:,} requests, {ratio(sectors, requests)} sectors of 32 bytes each",
        f"  TMA            {add(report.instructions, 'tma_bytes'):,} bytes",
        "",
    ]
    ordered = sorted(sources.items(), key=lambda item: -add(item[1], "executions"))
    rows = [
        (
            f"{add(s, 'executions'):,}", f"{100 * add(s, 'executions') / total:.1f} %",
            f"{lost_wavefronts(s):,}" if add(s, "shared_requests") else "",
            ratio(add(s, "global_sectors"), add(s, "global_requests")) if add(s, "global_requests") else "",
            f"{add(s, 'tma_bytes'):,}" if add(s, "tma_bytes") else "",
            where,
        )
        for where, s in ordered[:limit]
    ]  # fmt: skip
    lines += table(rows, ("executed", "share", "conflicts", "sectors/request", "TMA bytes", "source line"))
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit} more lines (--lines)")
    missed = [block for block in report.blocks if not block.executions]
    lines += ["", f"  {len(report.blocks) - len(missed)} of {len(report.blocks)} PTX blocks executed"]
    lines += [f"    never: PTX lines {b.first_line} to {b.last_line} {b.label}" for b in missed]
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=1024, help="of queries, and of keys unless told")
    parser.add_argument("--seqlen-k", type=int)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--heads-kv", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--arch", default="sm90", help="sm80, sm86, sm89, sm90 or sm120")
    parser.add_argument("--sms", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", choices=("early", "late", "random", "adversarial"), default="early")
    parser.add_argument("--checks", action="store_true", help="with all diagnostics")
    parser.add_argument("--lines", type=int, default=30, help="source lines to print per kernel")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    # Read by flash_ext at its import.
    os.environ.update(FLASH_EXT_EMULATE=given.arch, FLASH_EXT_EMULATE_SMS=str(given.sms))
    import torch

    import flash_ext
    from flash_ext import _emulator

    options = _emulator.get_options()
    options.seed, options.schedule, options.checks, options.profile = given.seed, given.schedule, given.checks, True
    _emulator.set_options(options)
    torch.manual_seed(given.seed)
    dtype = getattr(torch, given.dtype)
    seqlen_k = given.seqlen if given.seqlen_k is None else given.seqlen_k
    q = torch.randn(given.batch, given.seqlen, given.heads, given.head_dim).to(dtype)
    k, v = (torch.randn(given.batch, seqlen_k, given.heads_kv or given.heads, given.head_dim).to(dtype) for _ in range(2))
    _emulator.reset_reports()
    flash_ext.attention(q, k, v, causal=given.causal)
    reports = _emulator.reports()
    if not reports:
        raise SystemExit("no kernel ran: " + str(flash_ext.explain(q, k, v, causal=given.causal)))
    for launch in _emulator.launches():
        print(f"{launch.kernel}  grid {launch.grid}  block {launch.block}  {launch.dynamic_shared_bytes:,} bytes of shared memory")
    for report in reports:
        print("\n".join(["", *kernel_lines(report, given.lines)]))


if __name__ == "__main__":
    main()
