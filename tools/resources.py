"""Resources of every compiled kernel, from ptxas's reports beside the object files: one line a kernel.

    python tools/resources.py [BUILD_FOLDER]       default: the newest build/temp.*

Exits 1 when a kernel spills, has a stack frame or uses local memory, when ptxas serialised wgmma instructions, or when a
unit of csrc/rows left no report.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
LOCAL = re.compile(r"(\d+) bytes lmem")
SERIALISED = re.compile(r".*(?:wgmma.*serializ|C75\d\d).*", re.IGNORECASE)


@dataclass
class Resources:
    name: str
    target: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    local: int = 0
    warning: str = ""

    @property
    def failure(self) -> str:
        found = []
        if self.spill_stores or self.spill_loads:
            found.append("spills")
        if self.stack:
            found.append("stack frame")
        if self.local:
            found.append("local memory")
        if self.warning:
            found.append(self.warning)
        return ", ".join(found)


def parse_report(text: str) -> list[Resources]:
    """ptxas -v output of one unit -> one entry for each kernel and target."""
    kernels: list[Resources] = []
    warnings = [line.strip() for line in text.splitlines() if SERIALISED.match(line)]
    for line in text.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Resources(match[1], match[2]))
            continue
        if not kernels:
            continue
        kernel = kernels[-1]
        if match := FRAME.search(line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
        if match := USED.search(line):
            kernel.registers = int(match[1])
            kernel.shared = int(m[1]) if (m := SHARED.search(line)) else 0
            kernel.local = int(m[1]) if (m := LOCAL.search(line)) else 0
    for warning in warnings:
        named = [k for k in kernels if k.name in warning] or kernels
        for kernel in named:
            kernel.warning = warning
    return kernels


def newest_build() -> Path:
    folders = sorted((ROOT / "build").glob("temp.*"), key=lambda p: p.stat().st_mtime)
    if not folders:
        raise SystemExit("tools/resources.py: no build/temp.* here; build first: pip install --no-build-isolation .")
    return folders[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", nargs="?", type=Path, help="build folder (default: the newest build/temp.*)")
    build = parser.parse_args().build or newest_build()
    units = sorted((build / "generated").glob("*.cu"))
    if not units:
        raise SystemExit(f"tools/resources.py: {build} holds no generated units; it was built without nvcc")
    failures = 0
    print(f"{'kernel':44} {'target':9} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}")
    for unit in units:
        report = build / "kernels" / f"{unit.stem}.o.ptxas"
        kernels = parse_report(report.read_text()) if report.exists() else []
        if not kernels:
            print(f"{unit.stem}: no ptxas report at {report}")
            failures += 1
        for k in sorted(kernels, key=lambda k: (k.name, k.target)):
            line = f"{k.name:44} {k.target:9} {k.registers:9} {k.shared:7} {k.stack:6} {k.spill_stores + k.spill_loads:7}"
            print(line + (f"   FAILED: {k.failure}" if k.failure else ""))
            failures += bool(k.failure)
    print(f"{'FAILED: ' + str(failures) if failures else 'ok'}: no kernel may spill, have a stack frame or use local memory")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
