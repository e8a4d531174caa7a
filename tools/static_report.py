"""Speed without a GPU: what each compiled variant's main loops cost, read from its machine code.

    python tools/static_report.py                print the report for the newest build
    python tools/static_report.py --check        and exit 1 when a main loop has grown against tools/static_figures.json
                                                 With another nvcc than theirs it compares nothing and says so; fails if CI is set
    python tools/static_report.py --update       write the figures of this build there: commit them with the change that moved them

A main loop is an innermost loop with tensor-core instructions. For one trip of it over one tile (unrolling divided out) and
one warp on each of an SM's four sub-partitions, as a warpgroup stands, the report counts instructions by pipe and the cycles
that each pipe needs. The largest is the least time of a trip; tensor / largest is the share of the tensor cores' peak that
the loop cannot exceed. Published times of FlashAttention-3 lie closer to tensor + issue, so that share stands beside it.
These are bounds for comparing two kernels, not predictions.

Needs cuobjdump and nvdisasm: on PATH, or pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools")]

import resources  # noqa: E402
import toolchain  # noqa: E402
import variants  # noqa: E402

FIGURES = ROOT / "tools" / "static_figures.json"
ALLOWED_GROWTH = 0.03
REGISTER_GRANULE = 8  # ptxas hands out registers in eights; fewer than that is no growth

# The pipe that executes an opcode, the first pattern that matches its beginning. Cycles are those of one warp instruction on a
# sub-partition of compute capability 9.0: 32 float32 lanes, 16 integer, comparison and conversion lanes, 4 MUFU lanes.
PIPES = {
    "tensor": r"[HQI]GMMA|[HIDQ]MMA",
    "mufu": r"MUFU",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2",
    "imad": r"IMAD",
    "uniform": r"U(IADD3|LEA|LOP3|SEL|SETP|SHF|IMAD|ISETP|PLOP3|MOV|FLO|POPC|LDC|PRMT)|R2UR|VOTEU",
    "alu": r"FMNMX|FSEL|FSETP|ISETP|LOP3|SHF|SEL|PRMT|VIADD|IADD3|IMNMX|VIMNMX|PLOP3|R2P|F2FP|I2FP|LEA|IABS|ISCADD|POPC|FLO",
    "move": r"MOV|S2R|S2UR|CS2R|P2R",
    "shared": r"LDS|STS|LDSM|STSM",
    "local": r"LDL|STL",
    "global": r"LDG|STG|RED|ATOM|UTMA|UBLK|LDC|LDGSTS",
    "sync": r"BAR|SYNCS|WARPGROUP|WARPSYNC|FENCE|DEPBAR|LDGDEPBAR|NANOSLEEP|MEMBAR|ELECT|USETMAXREG",
    "shuffle": r"SHFL",
    "branch": r"BRA|BSYNC|BSSY|CALL|RET|EXIT|YIELD|NOP|BRX|BREAK",
}
CYCLES = {"mufu": 8, "fma": 1, "alu": 2, "imad": 2}
# Fused multiply-adds a cycle of an SM's tensor cores, 16-bit; 8-bit twice that. mma.sync is an instruction of one warp.
GMMA_FMAS = 2048
MMA_SYNC_FMAS = 1024  # an A100's 16-bit and an L40's 8-bit products
CONSUMER_ROWS = 64  # rows of queries of one warpgroup's tile

# FlashAttention-3 at 0251105a, compiled with nvcc 13.0 for sm_90a with its own flags and counted the same way:
# (op, 16-bit or e4m3, head_dim, mask) -> tile, instructions a trip, FMA pipe, ALU, tensor cycles, MUFU cycles.
FA3 = {
    ("fwd", "16", 128, "full"): ("64x176", 594, 246, 150, 1408, 720),
    ("fwd", "16", 128, "causal"): ("64x128", 469, 198, 114, 1024, 528),
    ("fwd", "16", 128, "causal, masked"): ("64x128", 616, 198, 249, 1024, 528),
    ("fwd", "16", 128, "window, masked"): ("64x128", 727, 198, 336, 1024, 528),
    ("fwd", "16", 64, "full"): ("64x192", 632, 230, 167, 768, 784),
    ("fwd", "16", 64, "window, masked"): ("64x128", 684, 166, 338, 512, 528),
    ("bwd", "16", 128, "full"): ("80x128", 510, 120, 88, 1600, 320),
    ("fwd", "8", 128, "full"): ("64x224", 679, 294, 185, 896, 912),
}


class Missing(RuntimeError):
    """Something that the report is made from is not there; the message says how to get it."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str
    predicated: bool

    @property
    def target(self) -> int | None:
        found = re.findall(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else []
        return int(found[-1], 16) if found else None


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """cuobjdump --dump-sass -> the instructions of each kernel."""
    kernels: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = kernels.setdefault(match[1], [])
        elif match := LINE.match(line):
            body.append(Instruction(int(match[1], 16), match[3], match[4], match[2] is not None or "P" in match[4].split(",")[0]))
    return kernels


def _blocks(body: list[Instruction]) -> tuple[list[range], dict[int, list[int]]]:
    """Basic blocks as ranges of instruction indices, and the successors of each."""
    index = {instruction.address: i for i, instruction in enumerate(body)}
    starts = {0}
    for i, instruction in enumerate(body):
        if instruction.target in index:
            starts.add(index[instruction.target])
        if instruction.opcode.startswith(("BRA", "EXIT", "RET")) and i + 1 < len(body):
            starts.add(i + 1)
    ordered = sorted(starts)
    blocks = [range(begin, end) for begin, end in zip(ordered, [*ordered[1:], len(body)], strict=True)]
    number = {block.start: n for n, block in enumerate(blocks)}
    successors: dict[int, list[int]] = {}
    for n, block in enumerate(blocks):
        last = body[block[-1]]
        leaves = last.opcode.startswith(("BRA", "EXIT", "RET")) and not last.predicated
        following = [] if leaves or n + 1 == len(blocks) else [n + 1]
        jumps = [number[index[last.target]]] if last.target in index else []
        successors[n] = list(dict.fromkeys(jumps + following))
    return blocks, successors


def _dominators(successors: dict[int, list[int]], predecessors: dict[int, list[int]]) -> list[set[int]]:
    everything = set(successors)
    dominators = [{0}, *(set(everything) for _ in range(len(successors) - 1))]
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            incoming = [dominators[p] for p in predecessors[n]]
            new = ({n} | set.intersection(*incoming)) if incoming else {n}
            if new != dominators[n]:
                dominators[n], changed = new, True
    return dominators


def _natural_loop(header: int, latch: int, predecessors: dict[int, list[int]]) -> set[int]:
    """The blocks from which the latch is reached without passing the header, and the header."""
    body, waiting = {header, latch}, [latch]
    while waiting:
        n = waiting.pop()
        if n != header:
            waiting += [p for p in predecessors[n] if p not in body]
            body.update(predecessors[n])
    return body


def main_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The innermost natural loops with tensor-core instructions.

    Waits that were moved out of line (they run only when a barrier is late) are left out: a trip is what stands between the
    loop's header and its last branch.
    """
    blocks, successors = _blocks(body)
    predecessors = {n: [p for p in successors if n in successors[p]] for n in successors}
    dominators = _dominators(successors, predecessors)
    loops: dict[int, tuple[set[int], set[int]]] = {}  # header -> blocks, blocks that mark its ends
    for latch, following in successors.items():
        for header in following:
            if header in dominators[latch]:
                members, ends = loops.setdefault(header, (set(), {header}))
                members |= _natural_loop(header, latch, predecessors)
                ends.add(latch)
    trips: dict[int, list[Instruction]] = {}
    for header, (members, ends) in loops.items():
        trip = [body[i] for n in sorted(members) if min(ends) <= n <= max(ends) for i in blocks[n]]
        if any(pipe_of(i.opcode) == "tensor" for i in trip):
            trips[header] = trip
    return [trip for header, trip in sorted(trips.items()) if not any(h != header and h in loops[header][0] for h in trips)]


def pipe_of(opcode: str) -> str:
    return next((pipe for pipe, pattern in PIPES.items() if re.match(pattern, opcode)), "other")


def fmas_of(opcode: str) -> tuple[int, float]:
    """Fused multiply-adds of a tensor-core instruction by a warpgroup (four warps, for mma.sync), and the cycles it takes."""
    if match := re.match(r"([HQI])GMMA\.(?:SP\.)?64x(\d+)x(\d+)", opcode):
        fmas = 64 * int(match[2]) * int(match[3])
        return fmas, fmas / (GMMA_FMAS if match[1] == "H" else 2 * GMMA_FMAS)
    if match := re.match(r"[HQ]MMA\.(16)(8)(8|16|32)\b", opcode):
        fmas = 4 * int(match[1]) * int(match[2]) * int(match[3])
        return fmas, fmas / MMA_SYNC_FMAS
    return 0, 0.0


@dataclass(frozen=True)
class Loop:
    """One trip over one tile. Counts may be fractions where the compiler's unrolling does not divide them."""

    unrolled: int
    instructions: float
    counts: dict[str, float]
    cycles: dict[str, float]  # tensor, mufu, fma, alu (with integer multiply-adds), issue
    mma_sync: dict[str, float]  # of loops with mma.sync: the products ("mma") and the matrix loads that feed them ("ldmatrix")

    @property
    def bound(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def peak_share(self) -> float:
        return self.cycles["tensor"] / self.cycles[self.bound]

    @property
    def added_share(self) -> float:
        return self.cycles["tensor"] / (self.cycles["tensor"] + self.cycles["issue"])

    def figures(self) -> dict[str, float]:
        rounded = {name: round(value, 1) for name, value in self.cycles.items()}
        return {"instructions": round(self.instructions, 1), **rounded, **self.mma_sync}


def fmas_of_a_tile(row: variants.Variant) -> int | None:
    """Fused multiply-adds that one warpgroup does for one tile of a Hopper variant; None where that is no measure of its loops."""
    if row.arch != "sm90":
        return None
    if row.op == "fwd":
        return CONSUMER_ROWS * row.block_n * (row.head_dim + row.head_dim_v)
    if row.op == "bwd":  # five products, shared by two warpgroups
        return row.block_m * row.block_n * (3 * row.head_dim + 2 * row.head_dim_v) // 2
    return None


def loop_of(trip: list[Instruction], tile_fmas: int | None) -> Loop:
    fmas, tensor = (sum(values) for values in zip(*(fmas_of(i.opcode) for i in trip), strict=True))
    unrolled = max(1, round(fmas / tile_fmas)) if tile_fmas else 1
    counts = {pipe: n / unrolled for pipe, n in Counter(pipe_of(i.opcode) for i in trip).items()}
    issue = len(trip) / unrolled
    cycles = {
        "tensor": tensor / unrolled,
        "mufu": CYCLES["mufu"] * counts.get("mufu", 0),
        "fma": CYCLES["fma"] * counts.get("fma", 0) + CYCLES["imad"] * counts.get("imad", 0),
        "alu": CYCLES["alu"] * counts.get("alu", 0),
        "issue": issue,
    }
    products = sum(re.match(r"[HIQ]MMA", i.opcode) is not None for i in trip)
    loads = sum(i.opcode.startswith("LDSM") for i in trip)
    mma_sync = {"mma": round(products / unrolled, 1), "ldmatrix": round(loads / unrolled, 1)} if products else {}
    return Loop(unrolled, issue, counts, cycles, mma_sync)


@dataclass(frozen=True)
class Report:
    """One variant. Loops stand from the shortest (interior tiles) to the longest (masked ones)."""

    row: variants.Variant
    registers: int
    spills: int
    instructions: int
    loops: list[Loop]

    def figures(self) -> dict[str, object]:
        return {"registers": self.registers, "spills": self.spills, "loops": [loop.figures() for loop in self.loops]}


def report_of(row: variants.Variant, used: resources.Resources, body: list[Instruction]) -> Report:
    loops = [loop_of(trip, fmas_of_a_tile(row)) for trip in main_loops(body)]
    loops.sort(key=lambda loop: loop.instructions)
    return Report(row, used.registers, used.spill_stores + used.spill_loads, len(body), loops)


# --- a build on disk ---


def find_tool(name: str) -> Path:
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    for site in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        for found in sorted(Path(site or ".").glob(f"nvidia/**/bin/{name}")):
            return found
    raise Missing(f"no {name} on PATH or among the installed wheels: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def disassemble(objects: Path) -> str:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    environment = {**os.environ, "PATH": f"{nvdisasm.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([cuobjdump, "--dump-sass", objects], capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode:
        raise Missing(f"{cuobjdump} --dump-sass {objects} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def reports_of(build: Path) -> list[Report]:
    """Every variant whose machine code is in the build. One architecture of each: the group's own."""
    by_name, found = {row.name: row for row in variants.VARIANTS}, []
    for ptxas in sorted((build / "kernels").glob("*.o.ptxas")):
        used = {entry.name: entry for entry in reversed(resources.parse_report(ptxas.read_text()))}
        for name, body in parse_sass(disassemble(ptxas.with_suffix(""))).items():
            if name in by_name and name in used:
                found.append(report_of(by_name[name], used[name], body))
    if not found:
        raise Missing(f"{build} holds no compiled kernel: pip install --no-build-isolation -e .")
    return found


# --- text ---


def _beside(row: variants.Variant, masked: bool) -> str:
    kind = "8" if row.dtype in ("e4m3", "fp8") else "16"
    peer = row.arch == "sm90" and FA3.get((row.op, kind, row.head_dim, f"{row.mask}, masked" if masked else row.mask))
    if not peer:
        return ""
    tile, instructions, _, _, tensor, mufu = peer
    added = 100 * tensor / (tensor + instructions)
    return f"{tile}: {instructions} instr, {tensor} tensor, {mufu} mufu, {added:.0f} % added"


LEGEND = """\
Cycles of a trip over one tile and warpgroup; issue takes as many cycles as instr. peak: the share of the tensor cores' peak
that the largest allows; added: that of tensor + issue. A second loop of a variant is the one over masked tiles."""


def print_report(reports: list[Report]) -> None:
    print(f"{'variant':34} {'regs':>4} {'spill':>5} {'loop':>9}  {'instr':>5} {'tensor':>6} {'mufu':>5} {'fma':>5} {'alu':>5}  "
          f"{'bound':6} {'peak':>5} {'added':>5}   FlashAttention-3")  # fmt: skip
    for r in reports:
        start = f"{r.row.name:34} {r.registers:4} {r.spills:5}"
        if not r.loops:
            print(f"{start} {'none':>9}  {r.instructions:5}")
        for n, loop in enumerate(r.loops):
            rows = CONSUMER_ROWS if r.row.op == "fwd" else r.row.block_m
            tile = f"{rows}x{r.row.block_n}" + (f"/{loop.unrolled}" if loop.unrolled > 1 else "")
            cycles = " ".join(
                f"{loop.cycles[pipe]:{width}.0f}" for pipe, width in (("tensor", 6), ("mufu", 5), ("fma", 5), ("alu", 5))
            )
            shares = f"{100 * loop.peak_share:4.0f}% {100 * loop.added_share:4.0f}%"
            line = f"{start if n == 0 else '':45} {tile:>9}  {loop.instructions:5.0f} {cycles}  {loop.bound:6} {shares}"
            print(f"{line}   {_beside(r.row, masked=n > 0)}".rstrip())
    print(LEGEND)


# --- the kept figures ---


def problems_of(reports: list[Report], kept: dict[str, dict], known: list[str]) -> list[str]:
    """What has grown, appeared or vanished against the kept figures."""
    found = [f"{name} is kept but is no variant any more" for name in kept if name not in known]
    for r in reports:
        if r.row.name not in kept:
            found.append(f"{r.row.name} has no kept figures")
            continue
        now, before = r.figures(), kept[r.row.name]
        if len(now["loops"]) != len(before["loops"]):
            found.append(f"{r.row.name}: {len(now['loops'])} main loops, {len(before['loops'])} kept")
            continue
        if now["spills"] > before["spills"] or now["registers"] >= before["registers"] + REGISTER_GRANULE:
            had = f"kept {before['registers']}, {before['spills']}"
            found.append(f"{r.row.name}: {now['registers']} registers, {now['spills']} spilled; {had}")
        for n, (a, b) in enumerate(zip(now["loops"], before["loops"], strict=True)):
            grown = [f"{what} {b[what]:g} -> {a[what]:g}" for what in b if a[what] > b[what] * (1 + ALLOWED_GROWTH)]
            if grown:
                found.append(f"{r.row.name}: main loop {n} grew: {', '.join(grown)}")
    return found


def compiler() -> str:
    cuda = toolchain.find_cuda()
    return f"{cuda.version[0]}.{cuda.version[1]}" if cuda else "none"


def check(reports: list[Report], path: Path = FIGURES) -> int:
    if not path.exists():
        print(f"FAILED: no {path.name}; write it: python tools/static_report.py --update")
        return 1
    kept = json.loads(path.read_text())
    if kept["nvcc"] != compiler():
        versions = f"the kept figures are those of nvcc {kept['nvcc']}, here is {compiler()}"
        if os.environ.get("CI"):
            print(f"FAILED: not compared: {versions}; install that nvcc, or python tools/static_report.py --update")
            return 1
        print(f"SKIPPED: nothing was compared: {versions} (with CI set, this fails)")
        return 0
    problems = problems_of(reports, kept["variants"], [row.name for row in variants.VARIANTS])
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        print("If the change is meant: python tools/static_report.py --update, and commit tools/static_figures.json with it.")
    else:
        print(f"ok: no main loop is more than {100 * ALLOWED_GROWTH:.0f} % above the kept figures")
    return 1 if problems else 0


def update(reports: list[Report], path: Path = FIGURES) -> None:
    """Figures of variants that this build left out are kept as they are."""
    kept = json.loads(path.read_text())["variants"] if path.exists() else {}
    known = {row.name for row in variants.VARIANTS}
    figures = {name: value for name, value in kept.items() if name in known} | {r.row.name: r.figures() for r in reports}
    lines = [f'  "{name}": {json.dumps(figures[name])}' for name in sorted(figures)]
    path.write_text(f'{{"nvcc": "{compiler()}", "variants": {{\n' + ",\n".join(lines) + "\n}}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", nargs="?", type=Path, help="build folder (default: the newest build/temp.*)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a main loop grew by more than 3 percent")
    parser.add_argument("--update", action="store_true", help="write tools/static_figures.json")
    arguments = parser.parse_args(argv)
    try:
        reports = reports_of(arguments.build or resources.newest_build())
    except Missing as error:
        print(f"static_report.py: {error}", file=sys.stderr)
        return 2
    print_report(reports)
    if arguments.update:
        update(reports)
    return check(reports) if arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
