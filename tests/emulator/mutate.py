"""Planted bugs: single-site edits of a kernel's PTX, each of which a person could have made in the source.

    python tests/emulator/mutate.py kernel.ptx [--kernel NAME] [--kind KIND ...]      lists the sites

sites() finds them, apply() makes one. An edit keeps the number of lines, so that line numbers in reports stay those of
the original. The id of a site, kernel/kind/index, counts the sites of its kind in the order of the PTX.
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = {
    "skip_wait": "an mbarrier wait that is true at once",
    "flip_parity": "an mbarrier wait for the other parity",
    "wrong_barrier": "a wait, an arrival or a copy on the next mbarrier (the next stage of an array)",
    "drop_arrive": "an mbarrier arrival left out",
    "expect_more": "expect_tx 16 bytes too many",
    "expect_less": "expect_tx 16 bytes too few",
    "drop_barrier": "a bar.sync, bar.arrive or barrier.cluster operation left out",
    "drop_warp_sync": "a bar.warp.sync left out",
    "drop_fence": "a fence (proxy, mbarrier_init, membar, fence.acq_rel) left out",
    "drop_wgmma_fence": "a wgmma.fence left out",
    "drop_wgmma_wait": "a wgmma.wait_group left out",
    "raise_wgmma_wait": "a wgmma.wait_group that lets one more group be pending",
    "drop_commit": "a commit_group (wgmma, bulk, cp.async) left out",
    "drop_copy_wait": "a wait_group of bulk copies or cp.async left out",
    "raise_copy_wait": "a wait_group of bulk copies or cp.async that lets one more group be pending",
    "weaken_copy_wait": "a wait for bulk stores that only waits for their source (.read)",
    "drop_copy": "an asynchronous copy left out",
    "wrong_swizzle": "a wgmma descriptor with 64-byte instead of 128-byte swizzle (or none and 32)",
    "shift_descriptor": "a wgmma descriptor that starts 1 KiB later",
    "swap_rows": "two accumulator registers of one wgmma swapped: rows r and r + 8",
    "weaken_atomic": "a release or acquire made relaxed",
    "raise_registers": "setmaxnreg.inc by 8 registers more",
    "mask_edge": "a comparison of a mask off by one (lt and le, gt and ge), once for each place in the source",
}

_OPCODES = r"mbarrier|bar|barrier|fence|membar|wgmma|cp|setmaxnreg|setp|ld|st|atom|red"
_STATEMENT = re.compile(
    rf"(?P<guard>@!?[%\w$]+\s+)?\b(?P<op>(?:{_OPCODES})\.[\w.:]+)(?P<args>[^;{{}}]*(?:\{{[^}}]*\}}[^;{{}}]*)*);"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,\s*function_name\s+[^,\s]+(?:\s*\+\s*\d+)?,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?"
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Site:
    """One possible edit: text[start:end] of the PTX becomes replacement."""

    kernel: str
    kind: str
    index: int
    ptx_line: int
    source: tuple[str, ...]  # "file:line", innermost inlined function first
    text: str
    start: int
    end: int
    replacement: str

    @property
    def id(self) -> str:
        return f"{self.kernel}/{self.kind}/{self.index}"

    def __str__(self) -> str:
        return f"{self.id}  PTX line {self.ptx_line}  {' < '.join(self.source) or '?'}  {self.text}"


def apply(ptx: str, site: Site) -> str:
    """The PTX with one bug in it."""
    return ptx[: site.start] + site.replacement + ptx[site.end :]


def sites(ptx: str, kernel: str | None = None, kinds: Iterable[str] | None = None) -> list[Site]:
    """All sites of all kernels, or of one; ValueError for a kernel or kind that does not exist."""
    wanted = set(KINDS if kinds is None else kinds)
    if unknown := wanted - set(KINDS):
        raise ValueError(f"mutate: unknown kinds {sorted(unknown)}, known are {sorted(KINDS)}")
    code = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), ptx)  # keeps offsets
    found = []
    names = []
    for name, start, end in _kernels(code):
        names.append(name)
        if kernel is None or name == kernel:
            found += _kernel_sites(ptx, code, name, start, end, wanted)
    if kernel is not None and kernel not in names:
        raise ValueError(f"mutate: no kernel {kernel}, the PTX has {names}")
    return found


def _kernels(code: str) -> Iterator[tuple[str, int, int]]:
    for entry in _ENTRY.finditer(code):
        start = code.find("{", code.find(")", entry.end()))
        depth = 0
        for brace in re.finditer(r"[{}]", code[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                yield entry[1], start, start + brace.end()
                break
        else:
            raise ValueError(f"mutate: the body of {entry[1]} does not end")


class _Source:
    """Which source line an offset of the PTX belongs to."""

    def __init__(self, ptx: str, code: str, start: int, end: int) -> None:
        files = {int(number): Path(path).name for number, path in _FILE.findall(ptx)}
        self._offsets: list[int] = []
        self._chains: list[tuple[str, ...]] = []
        callers: dict[tuple[str, ...], tuple[str, ...]] = {}
        for loc in _LOC.finditer(code, start, end):
            place, caller = loc.groups()[:3], loc.groups()[3:]
            if caller[0]:
                callers[place] = caller
            else:
                callers.pop(place, None)
            chain = [place]
            while (place := callers.get(place)) and place not in chain:
                chain.append(place)
            self._offsets.append(loc.start())
            self._chains.append(tuple(f"{files.get(int(file), file)}:{line}" for file, line, _ in chain))

    def __call__(self, offset: int) -> tuple[str, ...]:
        at = bisect_right(self._offsets, offset)
        return self._chains[at - 1] if at else ()


def _kernel_sites(ptx: str, code: str, kernel: str, start: int, end: int, kinds: set[str]) -> list[Site]:
    source = _Source(ptx, code, start, end)
    counts: Counter[str] = Counter()
    found = []
    unrolled = set()
    first_of_group = True  # wgmma: the first after a fence, a commit or a wait stands for its neighbours
    line, line_offset = 1 + ptx.count("\n", 0, start), start
    for match in _STATEMENT.finditer(code, start, end):
        line += ptx.count("\n", line_offset, match.start())
        line_offset = match.start()
        op = match["op"]
        where = source(match.start())
        edits = list(_edits(match["guard"] or "", op, match["args"], where, first_of_group))
        if op.startswith("wgmma."):
            first_of_group = not op.startswith("wgmma.mma_async")
        for kind, replacement in edits:
            if kind == "mask_edge":
                if where in unrolled:
                    continue
                unrolled.add(where)
            index = counts[kind]
            counts[kind] += 1
            if kind not in kinds:
                continue
            lines = "\n" * (match[0].count("\n") - replacement.count("\n"))
            text = " ".join(match[0].split())
            found.append(
                Site(
                    kernel, kind, index, line, where, text if len(text) <= 120 else text[:60] + " ... " + text[-55:],
                    match.start(), match.end(), replacement + lines,
                )
            )  # fmt: skip
    return found


def _split(args: str) -> list[str]:
    """Operands: commas inside brackets do not separate."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(args):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(args[start:i].strip())
            start = i + 1
    return [*parts, args[start:].strip()]


def _edits(guard: str, op: str, args: str, where: tuple[str, ...], first_wgmma: bool) -> Iterator[tuple[str, str]]:
    """(kind, replacement) of every bug that one instruction can have."""
    operands = _split(args)

    def changed(position: int, operand: str) -> str:
        return f"{guard}{op} " + ", ".join([*operands[:position], operand, *operands[position + 1 :]]) + ";"

    def computed(position: int, ptx_type: str, instruction: str, by: str) -> str:
        """The statement with one operand replaced by `instruction operand, by`, in a scope of its own."""
        setup = f".reg .{ptx_type} planted; {instruction} planted, {operands[position]}, {by};"
        return f"{{ {setup} {changed(position, 'planted')} }}"

    if re.match(r"mbarrier\.(try|test)_wait", op):
        yield "skip_wait", f"{guard}setp.eq.u32 {operands[0].split('|')[0]}, 0, 0;"
        if ".parity" in op:
            yield "flip_parity", computed(2, "b32", "xor.b32", "1")
        yield "wrong_barrier", changed(1, _next_barrier(operands[1]))
    elif op.startswith("mbarrier.arrive"):
        state = operands[0]
        yield "drop_arrive", "" if state == "_" or state.startswith("[") else f"{guard}mov.b64 {state}, 0;"
        address = 0 if state.startswith("[") else 1
        yield "wrong_barrier", changed(address, _next_barrier(operands[address]))
    if re.match(r"mbarrier\.(arrive\.)?expect_tx", op):
        last = len(operands) - 1
        yield "expect_more", computed(last, "b32", "add.s32", "16")
        yield "expect_less", computed(last, "b32", "sub.s32", "16")
    elif op.startswith("bar.warp.sync"):
        yield "drop_warp_sync", ""
    elif re.match(r"(bar|barrier)(\.cta|\.cluster)?\.(sync|arrive|wait)", op):
        yield "drop_barrier", ""
    elif op.startswith(("fence.", "membar.")):
        yield "drop_fence", ""
    elif op.startswith("wgmma.fence"):
        yield "drop_wgmma_fence", ""
    elif op.startswith("wgmma.wait_group"):
        yield "drop_wgmma_wait", ""
        yield "raise_wgmma_wait", changed(0, str(int(operands[0], 0) + 1))
    elif ".commit_group" in op:
        yield "drop_commit", ""
    elif op.startswith("cp.async") and ".wait_" in op:
        yield "drop_copy_wait", ""
        if ".wait_group" in op:
            yield "raise_copy_wait", changed(0, str(int(operands[0], 0) + 1))
        if op.startswith("cp.async.bulk.wait_group") and not op.endswith(".read"):
            yield "weaken_copy_wait", f"{guard}{op}.read {operands[0]};"
    elif op.startswith(("cp.async", "cp.reduce.async")) and "prefetch" not in op and operands[0]:
        yield "drop_copy", ""
        if "mbarrier" in op and len(operands) > 2 and operands[2].startswith("["):
            yield "wrong_barrier", changed(2, _next_barrier(operands[2]))
    elif op.startswith("wgmma.mma_async") and first_wgmma:
        yield from _wgmma_edits(operands, changed, computed)
    elif op.startswith("setmaxnreg.inc"):
        yield "raise_registers", changed(0, str(int(operands[0], 0) + 8))
    elif re.match(r"(ld|st|atom|red)\.", op) and (order := re.search(r"\.(acquire|release|acq_rel)\b", op)):
        yield "weaken_atomic", f"{guard}{op.replace(order[0], '.relaxed')} {args.strip()};"
    elif any("mask" in place for place in where) and (compare := re.match(r"setp\.(lt|le|gt|ge)\.[su]32", op)):
        other = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}[compare[1]]
        yield "mask_edge", f"{guard}{op.replace(compare[1], other, 1)} {args.strip()};"


def _wgmma_edits(operands: list[str], changed, computed) -> Iterator[tuple[str, str]]:
    descriptors = [2] if operands[1].startswith("{") else [1, 2]
    for position in descriptors:  # bits 63:62: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
        yield "wrong_swizzle", computed(position, "b64", "xor.b64", "-4611686018427387904")
        yield "shift_descriptor", computed(position, "b64", "add.s64", "64")
    accumulators = _split(operands[0].strip("{} \n\t"))
    if len(accumulators) >= 4:
        accumulators[0], accumulators[2] = accumulators[2], accumulators[0]
        yield "swap_rows", changed(0, "{" + ", ".join(accumulators) + "}")


def _next_barrier(address: str) -> str:
    base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", address).groups()
    return f"[{base}+{int(offset or 0) + 8}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptx", type=Path)
    parser.add_argument("--kernel")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    options = parser.parse_args()
    found = sites(options.ptx.read_text(), options.kernel, options.kind)
    for site in found:
        print(site)
    print(f"{len(found)} sites:", dict(sorted(Counter(site.kind for site in found).items())))


if __name__ == "__main__":
    main()
