"""What decoding, masks, FP8 and the sm80 kernels must reach, judged from a run's own numbers.

A row for each case and criterion, pass or fail.

Over caches:
- share of the copy bandwidth: at least 0.85 where memory is the limit, that is where the ceilings say that the bytes take
  longer than the products, and at least SHORTEST_S: in less the launches, not the bytes, are the time.
- speed over FlashAttention-3: at least 1.0 for every case that both computed.
- pages of 16 rows over the dense cache: at most 1.05 times its time.

In FP8 (preset fp8), for every case that both computed:
- speed over the faster of cuDNN and FlashAttention-3, neither of which flushes: at least 0.95 with flushing, 1.0 without.
- speed over our own bf16 kernel for the same shape: at least 1.4 with flushing.

The sm80 kernels (preset sm80): at least 0.95 times the speed of FlashAttention-2, each pass by itself.

The preset `mask`: mask_criteria.py. Only times from a GPU are judged.
"""

from __future__ import annotations

from typing import Any

from .mask_criteria import mask_criteria

COPY_SHARE = 0.85
OVER_FA3 = 1.0
PAGED_OVER_DENSE = 1.05
COMPARED_PAGE = 16
FP8_FLUSHED, FP8_UNFLUSHED, FP8_OVER_BF16 = 0.95, 1.0, 1.4
UNFLUSHED = "flash_ext_unflushed"
SM80, SM80_OVER_FA2 = "flash_ext_sm80", 0.95
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


def _sm80(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of preset sm80."""
    found = []
    for row in run["cases"] if run.get("preset") == "sm80" else []:
        ours, theirs = _timed(row, SM80), _timed(row, "fa2")
        if ours and theirs:
            found.append(_judged("sm80 kernels over FlashAttention-2", row, theirs / ours, SM80_OVER_FA2, at_least=True))
    return found


_LENGTHS = ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v")


def _shape(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in (*_LENGTHS, "dtype"))


def _fp8(run: dict[str, Any], ours: str) -> list[dict[str, Any]]:
    """The rows of preset fp8."""
    if run.get("preset") != "fp8":
        return []

    def call(case: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(case[name] for name in (*_LENGTHS, "mask"))

    bf16 = {call(row["case"]): seconds for row in run["cases"] if row["case"]["dtype"] == "bf16" and (seconds := _timed(row, ours))}
    found = []
    for row in run["cases"]:
        if row["case"]["dtype"] != "fp8":
            continue
        flushed, unflushed = _timed(row, ours), _timed(row, UNFLUSHED)
        peers = [seconds for name in ("cudnn", "fa3") if (seconds := _timed(row, name))]
        if peers and flushed:
            over = min(peers) / flushed
            found.append(_judged("FP8 over the faster peer, flushed", row, over, FP8_FLUSHED, at_least=True))
        if peers and unflushed:
            over = min(peers) / unflushed
            found.append(_judged("FP8 over the faster peer, never flushed", row, over, FP8_UNFLUSHED, at_least=True))
        if flushed and call(row["case"]) in bf16:
            over = bf16[call(row["case"])] / flushed
            found.append(_judged("FP8 over our bf16", row, over, FP8_OVER_BF16, at_least=True))
    return found


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
    return found + _fp8(run, ours) + _sm80(run)
