"""Which tile is fastest? Builds candidate tiles of one forward variant, times them on this GPU, prints the winner as a row.

    python tools/tune.py --head-dim 128 --mask causal [--head-dim-v 128] [--seqlens 2048,8192] [--tiles 128x128/2/2,128x160/2/1]

A tile is M x N / stages / stages_q: rows of queries, rows of keys, stages of K and V, stages of Q. Without --tiles, all
those that registers and shared memory allow. Each candidate is built in a copy of the checkout below build/tune, in which
its row stands in the place of the variant's; one that spills, or whose result is wrong, is out. Every candidate is timed in a
process of its own, the present row first and last, so that a drift of the clock shows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "tune"
COPIED = ("csrc", "flash_ext", "tools", "benchmarks", "tests/oracle.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")

sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tools")]

import toolchain  # noqa: E402
import variants  # noqa: E402

SHARED_BYTES = 227 * 1024
SLAB_COLUMNS = 64  # shared memory holds whole slabs
# Shared memory beside Q, K and V: barriers, and the staging of the result by each consumer warpgroup, which shares the
# memory of a single stage of Q where there is no room for it.
BARRIER_BYTES = 1024
STAGING_BYTES_PER_CONSUMER = 4 * 16 * 64 * 2
# Registers of a consumer thread for S, P (half of S) and O: what 240 and 160 a thread leave beside addresses and statistics.
ACCUMULATOR_REGISTERS = {2: 216, 3: 136}
TOKENS = 16384  # of a call that is timed: batch * seqlen
MAX_STAGES = 6
BUILD_JOBS = 2  # of each candidate; as many candidates are built at once as the cores allow


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    stages: int
    stages_q: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}/{self.stages}/{self.stages_q}"

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        columns, columns_v = (math.ceil(d / SLAB_COLUMNS) * SLAB_COLUMNS for d in (head_dim, head_dim_v))
        q = self.stages_q * self.block_m * columns
        kv = self.stages * self.block_n * (columns + columns_v)
        tiles, staging = 2 * (q + kv) + BARRIER_BYTES, self.block_m // 64 * STAGING_BYTES_PER_CONSUMER
        return tiles if self.stages_q == 1 and tiles + staging > SHARED_BYTES else tiles + staging

    def registers(self, head_dim_v: int) -> float:
        return self.block_n / 2 * 1.5 + head_dim_v / 2

    def fits(self, head_dim: int, head_dim_v: int) -> bool:
        consumers = self.block_m // 64
        room = self.shared_bytes(head_dim, head_dim_v) <= SHARED_BYTES
        return room and consumers in ACCUMULATOR_REGISTERS and self.registers(head_dim_v) <= ACCUMULATOR_REGISTERS[consumers]


def parse_tile(text: str) -> Tile:
    match = re.fullmatch(r"(\d+)x(\d+)/(\d+)/(\d+)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write M x N / stages / stages_q like 128x128/2/2")
    return Tile(*map(int, match.groups()))


def candidates(head_dim: int, head_dim_v: int) -> list[Tile]:
    """Every tile of 2 or 3 consumer warpgroups that fits, with as many stages as it leaves room for (MAX_STAGES at most)."""
    found = []
    for block_m in (128, 192):
        for block_n in range(64, 257, 16):
            for stages_q in (1, 2):
                fitting = [s for s in range(2, MAX_STAGES + 1) if Tile(block_m, block_n, s, stages_q).fits(head_dim, head_dim_v)]
                found += [Tile(block_m, block_n, stages, stages_q) for stages in fitting[-1:]]
    return found


def row_of(head_dim: int, mask: str, dtype: str, head_dim_v: int | None = None) -> variants.Variant:
    wanted = ("fwd", "sm90", dtype, head_dim, head_dim_v or head_dim, mask)
    for row in variants.VARIANTS:
        if (row.op, row.arch, row.dtype, row.head_dim, row.head_dim_v, row.mask) == wanted and not row.scored:
            return row
    known = sorted({(r.head_dim, r.head_dim_v, r.mask) for r in variants.VARIANTS if (r.op, r.arch) == ("fwd", "sm90")})
    raise LookupError(
        f"no forward variant of head_dim {head_dim}, head_dim_v {head_dim_v or head_dim}, mask {mask}; there are "
        + ", ".join(f"--head-dim {d}" + f" --head-dim-v {v}" * (v != d) + f" --mask {m}" for d, v, m in known)
    )


CANDIDATE_MASK = "flash_ext::sm90::CandidateMask"


def _mask_of(row: variants.Variant) -> str:
    return re.search(r"flash_ext::\w+Mask", row.config)[0]


def candidate_table(row: variants.Variant, tile: Tile | None) -> str:
    """Appended to a copy's csrc/variants.py: the table becomes this one row, with the candidate's tile (None: as it is)."""
    changes = ""
    if tile is not None:
        config = row.config.replace(_mask_of(row), CANDIDATE_MASK)
        changes = f", block_m={tile.block_m}, block_n={tile.block_n}, config={config!r}"
    return (
        "\n\nfrom dataclasses import replace as _replace  # a candidate of tools/tune.py\n\n"
        f"VARIANTS = tuple(_replace(v{changes}) for v in VARIANTS if v.name == {row.name!r})\n"
    )


def candidate_tile(row: variants.Variant, tile: Tile) -> str:
    """Appended to a copy's csrc/sm90/fwd.cuh: the row's mask under another name, for which FwdTile is the candidate's."""
    dims = row.config.split(",", 1)[1].replace(_mask_of(row), "CandidateMask").removesuffix(">")
    sizes = f"TileSizes<{tile.block_m}, {tile.block_n}, {tile.stages}, {tile.stages_q}>"
    return (
        f"\nnamespace flash_ext::sm90 {{\nstruct CandidateMask : {_mask_of(row)} {{}};\ntemplate <>\n"
        f"struct FwdTile<{dims.strip()}> : {sizes} {{}};\n}}  // namespace flash_ext::sm90\n"
    )


def missing_product(block_n: int, primitives: str) -> str:
    """The wgmma of this width for a copy's sm90/primitives.cuh, '' where it is defined already: few widths are needed at once."""
    if f"FX_DEFINE_WGMMA_BOTH({block_n}," in primitives:
        return ""
    r = block_n // 2
    text = ", ".join(f"%{i}" for i in range(r))
    registers = ", ".join(f'"+f"(d[{i}])' for i in range(r))
    return (
        f'\n#define FX_TEXT_{r} "{text}"\n#define FX_REGS_{r} {registers}\n'
        f"namespace flash_ext::sm90 {{\nFX_DEFINE_WGMMA_BOTH({block_n}, {r}, {', '.join(str(r + i) for i in range(6))})\n}}\n"
    )


def copy_checkout(target: Path, row: variants.Variant, tile: Tile | None) -> None:
    for name in COPIED:
        source, destination = ROOT / name, target / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
            shutil.copytree(source, destination, dirs_exist_ok=True, ignore=ignored)
        else:
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination)
    with (target / "csrc" / "variants.py").open("a") as table:
        table.write(candidate_table(row, tile))
    if tile is not None:
        sm90 = target / "csrc" / "sm90"
        with (sm90 / "fwd.cuh").open("a") as kernel:
            kernel.write(candidate_tile(row, tile))
        defined = (sm90 / "primitives.cuh").read_text()
        (sm90 / "primitives.cuh").write_text(defined + missing_product(tile.block_n, defined))


def _environment(folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_EXT_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH", "").replace(f"{ROOT}{os.pathsep}", "")])
    )
    return environment | {"TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": str(BUILD_JOBS)}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()] or text.strip().splitlines() or ["no output"]
    return lines[0 if "error" in lines[0].lower() else -1][:300]


def build(folder: Path, limit: float) -> str:
    """'' when the copy was built without spills, else why it is out."""
    for command in ([sys.executable, "setup.py", "build_ext", "--inplace"], [sys.executable, "tools/resources.py"]):
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=limit, env=_environment(folder), errors="replace"
            )
        except subprocess.TimeoutExpired:
            return f"{command[1]} took more than {limit:.0f} s"
        if done.returncode:
            failed = re.findall(r"FAILED: (\D.*)", done.stdout) if "resources" in command[1] else []
            return failed[0] if failed else _last_line(done.stdout + done.stderr)
    return ""


@dataclass(frozen=True)
class Shape:
    """The family that is timed: FlashAttention's protocol, batch * seqlen and heads * head_dim constant."""

    head_dim: int
    head_dim_v: int
    causal: bool
    dtype: str
    seqlens: tuple[int, ...]
    tokens: int = TOKENS
    hidden: int = 2048


def measure(shape: Shape, device: str = "cuda") -> dict[str, object]:
    """Runs in a candidate's copy: {"tflops": {seqlen: TFLOP/s}}, or {"problem": why not}."""
    from benchmarks import presets, registry, runner, timing
    from benchmarks.ceilings import Ceilings

    nothing = Ceilings(1.0, {}, 0)
    session = runner.Session(device, timing.stopwatch_of(device), nothing, None, seconds=0.5, least=10, most=200, pause_s=0.0)
    chosen, found = {"flash_ext": registry.FlashExt()}, {}
    for seqlen in shape.seqlens:
        heads = shape.hidden // shape.head_dim
        case = presets.Case(
            "tune",
            shape.tokens // seqlen,
            seqlen,
            seqlen,
            heads,
            heads,
            shape.head_dim,
            shape.head_dim_v,
            shape.causal,
            dtype=shape.dtype,
        )
        outcome = runner.measure_case(case, chosen, session)["implementations"]["flash_ext"]
        if outcome["status"] != runner.TIMED:
            return {"problem": f"{outcome['status']} at seqlen {seqlen}: {outcome['reason']}"}
        found[str(seqlen)] = outcome["tflops"]
    return {"tflops": found}


def time_in(folder: Path, shape: Shape, limit: float) -> dict[str, object]:
    """measure() in a process of the candidate's copy."""
    program = (
        f"import sys, json; sys.path[:0] = [{str(folder)!r}, {str(folder / 'tools')!r}]; import tune; "
        f"print(json.dumps(tune.measure(tune.{shape!r})))"
    )
    try:
        environment = _environment(folder) | {"FLASH_EXT_STRICT": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"no time within {limit:.0f} s: it hangs, or the shapes are too large"}
    if done.returncode:
        return {"problem": _last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def mean(values: Iterable[float]) -> float:
    """Geometric: the same for times and speeds."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def report(row: variants.Variant, results: dict[str, dict[str, object]], seqlens: tuple[int, ...]) -> str:
    """A table of all candidates, the fastest first, and the winner as the row of csrc/rows/fwd.py. 'present' is today's."""
    timed = {name: r["tflops"] for name, r in results.items() if "tflops" in r}
    if "present" not in timed:
        return f"the present row could not be timed: {results['present']['problem']}"
    base = mean(timed["present"].values())
    order = sorted(timed, key=lambda name: -mean(timed[name].values()))
    lines = [f"{row.name}, TFLOP/s", "| tile | " + " | ".join(f"seqlen {s}" for s in seqlens) + " | mean | against present |"]
    lines.append("|---" * (len(seqlens) + 3) + "|")
    for name in order:
        speeds = [timed[name][str(s)] for s in seqlens]
        lines.append(
            f"| {name} | " + " | ".join(f"{s:.0f}" for s in speeds) + f" | {mean(speeds):.0f} | {mean(speeds) / base:.3f} |"
        )
    lines += [f"- {name}: out: {r['problem']}" for name, r in results.items() if "problem" in r]
    best = order[0]
    drift = abs(mean(timed["present again"].values()) / base - 1) if "present again" in timed else 0.0
    if best.startswith("present") or mean(timed[best].values()) / base - 1 <= max(drift, 0.01):
        lines.append(f"keep the present row: nothing is faster by more than 1 % and the drift of the run ({100 * drift:.1f} %)")
    else:
        tile = parse_tile(best)
        lines += [
            f'winner, for csrc/rows/fwd.py:      ({row.head_dim}, {row.head_dim_v}, "{row.mask}"): '
            f"({tile.block_m}, {tile.block_n}),",
            f"and for FwdTile in sm90/fwd.cuh:   TileSizes<{tile.block_m}, {tile.block_n}, {tile.stages}, {tile.stages_q}>",
        ]  # fmt: skip
    return "\n".join(lines)


def tune(
    row: variants.Variant, tiles: list[Tile], shape: Shape, budget: float, scratch: Path = SCRATCH,
    building: Callable[[Path, float], str] = build, timing: Callable[[Path, Shape, float], dict[str, object]] = time_in,
) -> str:  # fmt: skip
    """Builds all, times what was built while the budget lasts, and reports."""
    end = time.monotonic() + budget
    folders = {"present": scratch / "present"} | {str(tile): scratch / re.sub(r"\W", "_", str(tile)) for tile in tiles}
    for name, folder in folders.items():
        copy_checkout(folder, row, None if name == "present" else parse_tile(name))
    workers = max(1, toolchain.parallel_jobs() // BUILD_JOBS)
    with ThreadPoolExecutor(workers) as pool:
        problems = dict(zip(folders, pool.map(lambda folder: building(folder, budget), folders.values()), strict=True))
    results: dict[str, dict[str, object]] = {}
    for name, folder in [*folders.items(), ("present again", folders["present"])]:
        left = end - time.monotonic()
        problem = problems[name.removesuffix(" again")] or ("the time was up" if left < 1 and name != "present" else "")
        results[name] = {"problem": problem} if problem else timing(folder, shape, max(left, 60.0))
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    return report(row, results, shape.seqlens)


class Parser(argparse.ArgumentParser):
    """One line and exit status 2 for whatever is wrong."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"tune.py: {message.removeprefix('argument ')}\n")
        raise SystemExit(2)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}; write numbers like 2048,8192") from None
    if not all(1 <= number <= TOKENS for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: each from 1 to {TOKENS}, the tokens of a call; write numbers like 2048,8192")
    return numbers


def _checked(tile: Tile, row: variants.Variant) -> Tile:
    """argparse.ArgumentTypeError for a tile that cannot be built: those of --list differ only in size and stages."""
    widths = tile.block_n % 16 == 0 and 16 <= tile.block_n <= 256 and tile.block_m in (128, 192)
    if not widths or not 2 <= tile.stages <= MAX_STAGES or tile.stages_q not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"--tiles: {tile}: M is 128 or 192, N a multiple of 16 up to 256, stages from 2 to {MAX_STAGES}, stages_q 1 or 2"
        )
    if not tile.fits(row.head_dim, row.head_dim_v):
        raise argparse.ArgumentTypeError(f"--tiles: {tile} has no room in registers or shared memory; --list prints those that fit")
    return tile


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--head-dim-v", type=int, help="default: --head-dim")
    parser.add_argument("--mask", default="causal")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument(
        "--seqlens", type=_numbers, default=(2048, 8192), help="default 2048,8192, at 16k tokens and hidden size 2048"
    )
    parser.add_argument("--tiles", help="some tiles, separated by commas, such as 128x128/2/2,128x160/2/1; default: all that fit")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds: what is not timed by then is left out")
    parser.add_argument("--list", action="store_true", help="only print the candidates")
    arguments = parser.parse_args(argv)
    try:
        row = row_of(arguments.head_dim, arguments.mask, arguments.dtype, arguments.head_dim_v)
        tiles = (
            [_checked(parse_tile(text), row) for text in arguments.tiles.split(",")]
            if arguments.tiles
            else candidates(row.head_dim, row.head_dim_v)
        )
    except (LookupError, argparse.ArgumentTypeError) as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(map(str, tiles)))
        return 0
    shape = Shape(row.head_dim, row.head_dim_v, row.mask == "causal", arguments.dtype, arguments.seqlens)
    text = tune(row, tiles, shape, arguments.budget)
    print(text)
    return 0 if text.startswith(row.name) else 1


if __name__ == "__main__":
    sys.exit(main())
