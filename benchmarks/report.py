"""A run as JSON and as markdown tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .criteria import PASS, criteria

SCHEMA = 1
Run = dict[str, Any]


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def check_writable(path: Path) -> None:
    """ValueError, one line, where a file cannot be written: what exists and is no regular file is never written or replaced."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    path = path.resolve()
    for each in (path, _beside(path)):
        if os.path.lexists(each) and not (each.is_file() and not each.is_symlink()):
            raise ValueError(f"{each} cannot be written: it exists and is no regular file; name another")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder; create it first: mkdir -p {path.parent}")
    for each in (path, _beside(path)):
        new = not each.exists()
        try:
            each.open("ab").close()
            if new:
                each.unlink()
        except OSError as error:
            why = "no permission" if isinstance(error, PermissionError) else error.strerror
            raise ValueError(f"{path} cannot be written: {why}; name a file in a folder of yours") from None


def save(run: Run, path: Path) -> None:
    """Written beside and moved into place, so that a run cut short leaves the last complete state."""
    path = path.resolve()  # a link stays one
    temporary = _beside(path)
    for each in (path, temporary):
        if os.path.lexists(each) and (each.is_symlink() or not each.is_file()):
            raise ValueError(f"{each} exists and is no regular file")
    temporary.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(temporary, path)


def load(path: Path) -> Run:
    """ValueError, one line, where the file holds no run."""
    try:
        run = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {schema}, expected {SCHEMA}")
    return run


def _of_one_run(run: Run) -> dict[str, Any]:
    """What the pieces of one run have in common."""
    machine = run["machine"]
    where = {"GPU" if machine.get("gpu") else "CPU": machine.get("gpu") or machine.get("cpu")}
    return {"commit": run["commit"], "preset": run["preset"], **where, "implementations": ", ".join(run["implementations"])}


def _pieces(run: Run) -> list[dict[str, Any]]:
    return run.get("pieces") or [{key: run[key] for key in ("date", "command", "ceilings")}]


def merge(runs: list[Run]) -> Run:
    """The pieces of one preset, measured one after another on the same kind of machine, as one run.

    A share of the ceilings belongs to those of its own piece; the merged run keeps them all, in "pieces".
    """
    first = _of_one_run(runs[0])
    for run in runs[1:]:
        for what, value in _of_one_run(run).items():
            if first.get(what) != value:
                raise ValueError(f"these are not pieces of one run: {what} {first.get(what)} and {value}")
    merged = dict(runs[0])
    merged["pieces"] = [piece for run in runs for piece in _pieces(run)]
    merged["notes"] = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    merged["cases"] = list({row["name"]: row for run in runs for row in run["cases"]}.values())
    done = {row["name"] for row in merged["cases"]}
    merged["criteria"] = criteria(merged)
    merged["left_out"] = [name for run in runs for name in run["left_out"] if name not in done]
    return merged


def _groups(rows: Iterable[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    grouped: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        case = row["case"]
        grouped.setdefault((case["family"], case["direction"], case["dtype"]), []).append(row)
    return grouped


def in_bytes(row: dict[str, Any]) -> bool:
    """Whether the case's speed is told in GB/s: a single row of queries makes the keys' bytes the work."""
    return row["case"]["seqlen_q"] == 1


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _where(case: dict[str, Any]) -> list[str]:
    dims = str(case["head_dim"]) if case["head_dim"] == case["head_dim_v"] else f"{case['head_dim']}/{case['head_dim_v']}"
    seqlen = str(case["seqlen_k"]) if case["seqlen_q"] in (1, case["seqlen_k"]) else f"{case['seqlen_q']}x{case['seqlen_k']}"
    batch = f"{len(case['lengths'])} packed" if case["lengths"] else str(case["batch"])
    return [dims, case["mask"], batch, seqlen]


WHERE = ["head dim", "mask", "batch", "seqlen"]


def number(value: float) -> str:
    """Three digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _speed(row: dict[str, Any], outcome: dict[str, Any]) -> str:
    if outcome["status"] != "timed":
        return outcome["status"]
    value, seconds = outcome["gb_s" if in_bytes(row) else "tflops"], outcome["seconds"]
    wide = 100 * (seconds["p80"] - seconds["p20"]) / seconds["median"]
    share = "" if outcome["ceiling_share"] is None else f", {100 * outcome['ceiling_share']:.0f} %"
    return f"{number(value)} (±{wide / 2:.0f} %{share})"


def _conditions(row: dict[str, Any]) -> str:
    seen = row["conditions"]
    if not seen:
        return "not sampled"
    parts = [f"{seen['sm_clock_mhz']:.0f} MHz"] if seen["sm_clock_mhz"] else []
    parts += [f"{seen['power_w']:.0f} W"] if seen["power_w"] else []
    return ", ".join(parts + ([f"throttled: {'; '.join(seen['throttled'])}"] if seen["throttled"] else []))


def _ratio(row: dict[str, Any], ours: list[str]) -> str:
    for name in ours:
        outcome = row["implementations"].get(name, {})
        if outcome.get("status") == "timed":
            return f"{outcome['ratio']:.2f} ({name})" if outcome["ratio"] else "no peer timed"
    return "ours not timed"


def speed_tables(run: Run) -> list[str]:
    names = run["implementations"]
    ours = [name for name in names if name in run["ours"]]
    lines = []
    for (family, direction, dtype), rows in _groups(run["cases"]).items():
        unit = "GB/s" if in_bytes(rows[0]) else "TFLOP/s"
        heads = {(r["case"]["heads"], r["case"]["heads_kv"]) for r in rows}
        told = f", heads {next(iter(heads))[0]}/{next(iter(heads))[1]}" if len(heads) == 1 else ""
        lines += [f"### {family}, {direction}, {dtype}{told}: {unit}", ""]
        header = [*WHERE, *names, "speed / fastest peer", "conditions"]
        lines += _table(
            header,
            [
                [
                    *_where(row["case"]),
                    *(_speed(row, row["implementations"][name]) for name in names),
                    _ratio(row, ours),
                    _conditions(row),
                ]
                for row in rows
            ],
        )
        lines.append("")
    return lines


def _reasons(run: Run) -> list[str]:
    """Each reason why something was not timed, once, with the number of cases."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in run["cases"]:
        for name, outcome in row["implementations"].items():
            if outcome["status"] != "timed":
                key = (name, outcome["status"], outcome["reason"])
                counts[key] = counts.get(key, 0) + 1
    if not counts:
        return []
    lines = ["Not timed:", ""]
    lines += [f"- {name} {status} in {count} of {len(run['cases'])}: {reason}" for (name, status, reason), count in counts.items()]
    return [*lines, ""]


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{number(count)} {unit}"
        count /= 1024
    raise AssertionError


def memory_table(run: Run) -> list[str]:
    rows = [row for row in run["cases"] if row["case"]["family"] == "memory"]
    if not rows:
        return []
    names = run["implementations"]

    def cell(outcome: dict[str, Any]) -> str:
        return human_bytes(outcome["extra_bytes"]) if outcome["status"] == "timed" else outcome["status"]

    body = [
        [r["case"]["direction"], r["case"]["dtype"], *_where(r["case"]), *(cell(r["implementations"][n]) for n in names)]
        for r in rows
    ]
    return ["### Peak extra bytes of a call, results included", "", *_table(["pass", "dtype", *WHERE, *names], body), ""]


def energy_table(run: Run) -> list[str]:
    body = []
    for row in run["cases"]:
        for name, outcome in row["implementations"].items():
            if e := outcome.get("energy"):
                cells = [
                    row["name"],
                    name,
                    f"{e['joules']:.3g}",
                    f"{e['pj_per_flop']:.3g}",
                    f"{e['watts']:.0f}",
                    f"{e['idle_watts']:.0f}",
                ]
                body.append([*cells, f"{100 * e['spread']:.0f} %", e["source"]])
    if not body:
        return []
    header = ["case", "implementation", "J per call, net", "pJ/FLOP", "W", "idle W", "spread", "source"]
    return ["### Energy, net of idle", "", *_table(header, body), ""]


def criteria_table(run: Run) -> list[str]:
    rows = criteria(run)
    if not rows:
        return []
    passed = sum(row["verdict"] == PASS for row in rows)
    body = [[r["criterion"], r["case"], f"{r['value']:.2f}", f"{r['bound']:.2f}", r["verdict"]] for r in rows]
    header = ["criterion", "case", "measured", "bound", "verdict"]
    return [f"### Criteria: {passed} of {len(rows)} pass", "", *_table(header, body), ""]


def _ceilings(ceilings: dict[str, Any], when: str) -> str:
    products = ", ".join(
        f"{k.removesuffix('_tflops')} matrix product {number(v)} TFLOP/s" for k, v in ceilings.items() if k.endswith("_tflops")
    )
    copy = f"device copy {number(ceilings['copy_gb_s'])} GB/s"
    return f"Ceilings measured in {when}: {copy}, {products} (size {ceilings['matrix']})."


def summary(run: Run) -> list[str]:
    machine = run["machine"]
    where = machine.get("gpu") or f"CPU: {machine['cpu']}, {machine['threads']} threads"
    clocks = ", ".join(
        f"{label} {machine[key]:.0f} {unit}"
        for key, label, unit in (("power_limit_w", "power limit", "W"), ("max_sm_clock_mhz", "SM clock at most", "MHz"))
        if machine.get(key)
    )
    software = [f"torch {machine['torch']}", f"CUDA {machine['cuda']}" if machine["cuda"] else "no CUDA"]
    software += [f"driver {machine['driver']}"] if machine.get("driver") else []
    software += [f"flash_ext {machine['flash_ext']}", f"commit {run['commit']}"]
    lines = [
        f"{where}{'; ' + clocks if clocks else ''}; {', '.join(software)}; {run['date']}.",
        "",
        *(_ceilings(piece["ceilings"], piece["date"] if "pieces" in run else "this run") for piece in _pieces(run)),
        "",
    ]
    lines += [f"Note: {note}" for note in run["notes"]] + [""] * bool(run["notes"])
    return lines


LEGEND = (
    "Speeds are medians; in brackets half the distance from the 20th to the 80th percentile, and the share of what the "
    "ceilings allow. Every time stands for a result that passed the oracle first; a backward is autograd.grad over a "
    "retained graph, for all."
)


def markdown(run: Run) -> str:
    lines = [*summary(run), LEGEND, "", *speed_tables(run), *criteria_table(run)]
    lines += [*memory_table(run), *energy_table(run), *_reasons(run)]
    if run["left_out"]:
        lines += [f"Left out, the time being up: {len(run['left_out'])} cases.", ""]
    return "\n".join(lines)
