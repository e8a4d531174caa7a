"""What the preset `mask` must reach, judged from a run's own numbers (criteria.py puts these rows beside those of caches).

- block-sparse time follows the kept blocks: time over that of the same call without a mask is at most density + 0.1, from a
  density of 0.1 on (block-sparse FlashAttention's claim, Dao et al. 2022).
- MEDUSA's tree, forward and backward: at least 9 times faster than causal FlashAttention-2 (Binary Block Masking, Sharma and
  Geiping 2024, publishes 9.4).
- jagged rows U(0, longest), forward and backward: at least 3 times faster than FlashAttention-2 on the padded batch, 9 times
  faster than unfused attention on it (Jagged Flash Attention, Xu et al. 2024).
- building a mask takes at most a fifth of a forward: benchmarks/mask_building.py.
"""

from __future__ import annotations

from typing import Any

ABOVE_DENSITY, FROM_DENSITY = 0.1, 0.1
TREE_OVER_CAUSAL = 9.0
JAGGED_OVER = {"fa2": ("FlashAttention-2", 3.0), "math": ("unfused attention", 9.0)}

Times = dict[tuple[Any, ...], dict[str, float]]


def density_of(case: dict[str, Any]) -> float | None:
    """The share of blocks that a case of the sweep keeps."""
    pattern = case.get("pattern", "")
    return int(pattern.removeprefix("blocks ").removesuffix("%")) / 100 if pattern.startswith("blocks ") else None


def both_passes(times: Times, family: str, mask: str, dtype: str, name: str) -> float | None:
    """Seconds of forward and backward together."""
    found = [times.get((family, mask, dtype, direction), {}).get(name) for direction in ("fwd", "bwd")]
    return None if None in found else sum(found)


def mask_criteria(rows: list[dict[str, Any]], ours: str) -> list[tuple[str, str, float, float, bool]]:
    """(criterion, case, value, bound, whether the value must be at least the bound) of the rows of a run."""
    times: Times = {}
    for row in rows:
        case = row["case"]
        key = (case.get("family"), case.get("mask"), case["dtype"], case["direction"])
        times[key] = {
            name: outcome["seconds"]["median"]
            for name, outcome in row["implementations"].items()
            if outcome.get("status") == "timed"
        }
    found = []
    for row in rows:
        case, dtype = row["case"], row["case"]["dtype"]
        density = density_of(case)
        mine = times[case.get("family"), case.get("mask"), dtype, case["direction"]].get(ours)
        whole = times.get(("density", "full", dtype, case["direction"]), {}).get(ours)
        if density is not None and density >= FROM_DENSITY and mine and whole:
            found.append(("time over that without a mask", row["name"], mine / whole, density + ABOVE_DENSITY, False))
        if case["direction"] != "bwd":
            continue
        if case.get("family") == "masks" and case.get("pattern", "").startswith(("tree", "parents")):
            mine, causal = (
                both_passes(times, "masks", case["mask"], dtype, ours),
                both_passes(times, "masks", "causal", dtype, "fa2"),
            )
            if mine and causal:
                name = "both passes, speed over causal FlashAttention-2"
                found.append((name, row["name"], causal / mine, TREE_OVER_CAUSAL, True))
        if case.get("family", "").startswith("jagged") and case.get("lengths"):
            mine = both_passes(times, case["family"], case["mask"], dtype, ours)
            for peer, (title, bound) in JAGGED_OVER.items():
                padded = both_passes(times, case["family"], "full", dtype, peer)
                if mine and padded:
                    found.append((f"both passes, speed over {title} on padded rows", row["name"], padded / mine, bound, True))
    return found
