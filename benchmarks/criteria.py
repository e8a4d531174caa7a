"""What decoding and masks must reach, judged from a run's own numbers: a row for each case and criterion, pass or fail.

- share of the copy bandwidth: at least 0.85 where memory is the limit, that is where the ceilings say that the bytes take
  longer than the products, and at least SHORTEST_S: in less the launches, not the bytes, are the time.
- speed over FlashAttention-3: at least 1.0 for every case that both computed.
- pages of 16 rows over the dense cache: at most 1.05 times its time.

The preset `mask`: mask_criteria.py. Only times from a GPU are judged.
"""

from __future__ import annotations

from typing import Any

from .mask_criteria import mask_criteria

COPY_SHARE = 0.85
OVER_FA3 = 1.0
PAGED_OVER_DENSE = 1.05
COMPARED_PAGE = 16
SHORTEST_S = 20e-6
PASS, FAIL = "pass", "fail"


def _timed(row: dict[str, Any], name: str) -> float | None:
    """Median seconds, None where it was not timed."""
    outcome = row["implementations"].get(name, {})
    return outcome["seconds"]["median"] if outcome.get("status") == "timed" else None


def _judged(criterion: str, row: dict[str, Any], value: float, bound: float, at_least: bool) -> dict[str, Any]:
    passed = value >= bound if at_least else value <= bound
    verdict = PASS if passed else FAIL
    return {"criterion": criterion, "case": row["name"], "value": value, "bound": bound, "verdict": verdict}


def _shape(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v", "dtype"))


def criteria(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run, in the order of its cases; empty for presets without criteria and for runs without a GPU."""
    if run["machine"]["device"] != "cuda" or not run["ours"]:
        return []
    ours = run["ours"][0]
    rows = [row for row in run["cases"] if "page_size" in row["case"]]
    dense = {_shape(row["case"]): seconds for row in rows if not row["case"]["page_size"] and (seconds := _timed(row, ours))}
    found = []
    for row in rows:
        case, seconds = row["case"], _timed(row, ours)
        if seconds is None:
            continue
        share = row["implementations"][ours]["ceiling_share"]
        if row["limit"] == "memory" and share * seconds >= SHORTEST_S:
            found.append(_judged("share of the copy bandwidth", row, share, COPY_SHARE, at_least=True))
        if fa3 := _timed(row, "fa3"):
            found.append(_judged("speed over FlashAttention-3", row, fa3 / seconds, OVER_FA3, at_least=True))
        if case["page_size"] == COMPARED_PAGE and _shape(case) in dense:
            over = seconds / dense[_shape(case)]
            found.append(_judged("time over the dense cache", row, over, PAGED_OVER_DENSE, at_least=False))
    for criterion, name, value, bound, at_least in mask_criteria(run["cases"], ours):
        found.append(_judged(criterion, {"name": name}, value, bound, at_least))
    return found
