"""Pictures of a run: speed by sequence length, a line for each implementation; memory by sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import Run, in_bytes

COLUMNS = 4
COLORS = {
    "flash_ext": "#d62728", "cudnn": "#2ca02c", "fa3": "#1f77b4", "fa2": "#9467bd", "flex": "#ff7f0e", "math": "#7f7f7f",
    "reference": "#8c564b",
}  # fmt: skip


def _panels(run: Run) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(title, unit) -> rows that differ in the sequence length only; memory comes as further panels."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run["cases"]:
        case = row["case"]
        dims = str(case["head_dim"]) if case["head_dim"] == case["head_dim_v"] else f"{case['head_dim']}/{case['head_dim_v']}"
        title = f"{case['family']}\n{case['direction']} {case['dtype']} d{dims} {case['mask']}"
        panels.setdefault((title, "GB/s" if in_bytes(row) else "TFLOP/s"), []).append(row)
        if case["family"] == "memory":
            panels.setdefault((title, "MiB"), []).append(row)
    return panels


def _value(outcome: dict[str, Any], unit: str) -> float:
    return {"GB/s": outcome.get("gb_s"), "TFLOP/s": outcome.get("tflops"), "MiB": outcome["extra_bytes"] / 2**20}[unit]


def _draw(axes: Any, rows: list[dict[str, Any]], names: list[str], unit: str) -> None:
    for name in names:
        points = sorted(
            (row["case"]["seqlen_k"], _value(row["implementations"][name], unit))
            for row in rows
            if row["implementations"][name]["status"] == "timed"
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS.get(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["case"]["seqlen_k"] for row in rows}))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    axes.minorticks_off()
    if unit == "MiB":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.set_xlabel("sequence length")
    axes.grid(alpha=0.3)


def plot(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(run)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width, height = 4.2 * columns, 3.4 * lines + 0.5  # inches; half of one for the legend
    figure, grid = pyplot.subplots(lines, columns, figsize=(width, height), squeeze=False)
    cells = grid.flatten()
    for axes, ((title, unit), rows) in zip(cells, panels.items(), strict=False):
        _draw(axes, rows, run["implementations"], unit)
        axes.set_title(title, fontsize=9)
    for axes in cells[len(panels) :]:
        axes.set_visible(False)
    found = {label: handle for axes in cells for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(found.values(), found.keys(), loc="lower center", ncols=len(found), frameon=False)
    machine = run["machine"]
    figure.suptitle(f"{machine.get('gpu') or machine['cpu']}, commit {run['commit']}, {run['date'][:10]}", fontsize=10)
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1 - 0.1 / height))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
