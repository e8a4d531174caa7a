"""The generator of the files that instantiate the variants, which csrc/rows lists.

That is the only list of what is compiled. A variant's name is also the name of its kernel's entry point, so the same
word stands in file names, profiler rows, ptxas reports and error messages. Nothing generated is committed.

    python csrc/variants.py --list                     the names, one a line
    python csrc/variants.py --out DIR                  write the generated files
    FLASH_EXT_VARIANTS="bwd_preprocess_sm80_*"         build a subset: shell patterns, separated by commas

Standard library only: setup.py imports it before anything is installed.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rows import KERNELS, VARIANTS
from rows.model import CXX_SCALAR_TYPE, GROUPS, Variant


def select(groups: tuple[str, ...] = GROUPS, pattern: str | None = None) -> list[Variant]:
    """The rows of these architecture groups that match FLASH_EXT_VARIANTS (or the pattern given)."""
    pattern = os.environ.get("FLASH_EXT_VARIANTS", "") if pattern is None else pattern
    patterns = [p.strip() for p in pattern.split(",") if p.strip()] or ["*"]
    rows = [v for v in VARIANTS if any(fnmatch.fnmatch(v.name, p) for p in patterns)]
    if not rows:
        raise ValueError(f"FLASH_EXT_VARIANTS={pattern!r} matches none of: " + ", ".join(v.name for v in VARIANTS))
    return [v for v in rows if v.arch in groups]


def units(rows: list[Variant]) -> dict[str, list[Variant]]:
    grouped: dict[str, list[Variant]] = {}
    for row in rows:
        grouped.setdefault(row.unit, []).append(row)
    return grouped


def unit_source(rows: list[Variant]) -> str:
    """A translation unit: the entry point and the launcher of each row."""
    lines = [f'#include "{header}"' for header in sorted({KERNELS[row.op, row.arch].header for row in rows})]
    for row in rows:
        kernel, config = KERNELS[row.op, row.arch], f"{row.name}_config"
        tile = f"{config}::kBlockM == {row.block_m}" + (f" && {config}::kBlockN == {row.block_n}" if row.block_n else "")
        lines += [
            "",
            f"using {config} = flash_ext::{row.config};",
            f'static_assert({tile}, "csrc/rows and {kernel.header} disagree");',
            f'extern "C" __global__ void __launch_bounds__({config}::kNumThreads, {config}::kMinBlocksPerSm)',
            f"    {row.name}(const __grid_constant__ flash_ext::{kernel.params} params) {{",
            f"  flash_ext::{kernel.body}<{config}>(params);",
            "}",
            "namespace flash_ext {",
            f"cudaError_t launch_{row.name}(const {kernel.params}& params, cudaStream_t stream) {{",
            f"  return {kernel.launch}<{config}>(&{row.name}, params, stream);",
            "}",
            "}  // namespace flash_ext",
        ]
    return "\n".join(lines) + "\n"


def table_source(rows: list[Variant]) -> str:
    """The rows as data, for the planner: no CUDA, so that it compiles anywhere."""
    entries = [
        f'    {{"{r.name}", Op::k_{r.op}, {r.arch[2:]}, {CXX_SCALAR_TYPE[r.dtype]}, {r.head_dim}, {r.head_dim_v}, '
        f"Mask::k_{r.mask or 'none'}, Score::k_{'modified' if r.scored else 'plain'}, {r.block_m}, {r.block_n}, "
        f'{r.smem_kib * 1024}, "{r.kind}"}},'
        for r in rows
    ]
    return (
        "\n".join(
            [
                '#include "host/registry.h"',
                "namespace flash_ext {",
                f"static const std::array<Variant, {len(rows)}> kVariants{{{{",
                *entries,
                "}};",
                "std::span<const Variant> variants() { return kVariants; }",
                "}  // namespace flash_ext",
            ]
        )
        + "\n"
    )


def launchers_source(rows: list[Variant]) -> str:
    """Name to launcher, one function for each op."""
    lines = ['#include "host/launchers.h"', "namespace flash_ext {"]
    for op, (launcher_type, params) in {k.op: (k.launcher, k.params) for k in KERNELS.values()}.items():
        mine = [r for r in rows if r.op == op]
        lines += [f"cudaError_t launch_{r.name}(const {params}&, cudaStream_t);" for r in mine]
        lines += [f"{launcher_type} find_{op}([[maybe_unused]] std::string_view variant) {{"]
        lines += [f'  if (variant == "{r.name}") return launch_{r.name};' for r in mine]
        lines += ["  return nullptr;", "}"]
    return "\n".join([*lines, "}  // namespace flash_ext"]) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Leave the time stamp of an unchanged file alone, so that the build does not compile it again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def generate(out: Path, rows: list[Variant], known: list[Variant] | None = None) -> dict[str, tuple[str, Path]]:
    """Write every generated file below out; returns unit name -> (architecture, path of the unit).

    rows are compiled; known (by default the same) are those that the planner has in its table.
    """
    written = {}
    for unit, members in units(rows).items():
        path = out / f"{unit}.cu"
        write_if_changed(path, unit_source(members))
        written[unit] = (members[0].arch, path)
    write_if_changed(out / "variant_table.cpp", table_source(rows if known is None else known))
    write_if_changed(out / "launchers.cpp", launchers_source(rows))
    keep = {path for _, path in written.values()}
    for stale in set(out.glob("*.cu")) - keep:
        stale.unlink()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="list the compiled variants, or write the files that instantiate them")
    parser.add_argument("--list", action="store_true", help="print the names of the selected rows")
    parser.add_argument("--out", type=Path, help="folder for the generated files")
    arguments = parser.parse_args()
    rows = select()
    if arguments.list or arguments.out is None:
        print("\n".join(row.name for row in rows))
    if arguments.out is not None:
        generate(arguments.out, rows)


if __name__ == "__main__":
    main()
