"""Planted bugs: every wait, arrival, fence, copy and descriptor of some kernels broken in turn, under the checks.

One row of each kind: three or two consumers, causal, full and a window with a modified score, one or two stages of Q, and
the output staged in an area of its own or (d192, d256) in Q; a row of the backward, and rows over KV caches, by TMA and
gathered; rows of FP8; for other GPUs each scheme of stages of the forward, a row of the backward, and rows over caches.
`python tests/emulator/planted.py NAME` runs any other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_ext import env

EMULATOR = Path(__file__).resolve().parents[1] / "emulator"
sys.path.append(str(EMULATOR))

import planted  # noqa: E402

ROWS = ("d64_causal", "d64_full", "d128_causal", "d128_full", "d128_local_scored", "d192_causal", "d256_full")
CACHE_ROWS = (
    "fwd_cache_sm90_bf16_d128_causal", "fwd_cache_gather_sm90_bf16_d128_causal", "fwd_cache_sm90_bf16_d64_local_scored",
    "fwd_mla_sm90_bf16_d576x512_local", "fwd_mla_gather_sm90_bf16_d576x512_local",
)  # fmt: skip
KERNELS = {
    "sm90": [
        *(f"fwd_sm90_bf16_{row}" for row in ROWS), "bwd_sm90_bf16_d128_causal", "bwd_sm90_bf16_d128_causal_pair", *CACHE_ROWS,
        "fwd_fp8_sm90_e4m3_d128_causal_head",
    ],
    "sm89": ["fwd_fp8_sm89_e4m3_d128_causal_head"],
    "sm80": [
        "fwd_sm80_bf16_d128_causal_smem163", "fwd_sm80_bf16_d128_causal_smem99", "fwd_sm80_bf16_d256_full_smem99",
        "bwd_sm80_bf16_d64_causal_smem163", "fwd_cache_sm80_bf16_d128_causal", "fwd_cache_sm80_bf16_d256_local_scored",
    ],
}.get(env.EMULATE, [])  # fmt: skip
results: dict[str, list[planted.Result]] = {}

pytestmark = pytest.mark.skipif(not KERNELS, reason="bugs are planted in the kernels of sm90, sm89 and sm80")


@pytest.mark.parametrize("kernel", KERNELS)
def test_planted_bugs_are_caught(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A process of its own: edited kernels, and a number of SMs that nobody has asked for before.
    report = tmp_path / "planted.json"
    command = [sys.executable, EMULATOR / "planted.py", kernel, "--json", report]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert report.is_file(), process.stdout + process.stderr
    found = results[kernel] = [planted.Result(**entry) for entry in json.loads(report.read_text())]
    with capsys.disabled():
        print(f"\n{kernel}: {planted.summary(found)}", end=" ")
    missed = [f"{r.id} at {r.source} (PTX line {r.ptx_line})" for r in found if not r.caught and not r.because]
    assert not missed, "neither caught nor explained in planted.SURVIVORS:\n" + "\n".join(missed)
    assert len(found) > (100 if env.EMULATE == "sm90" else 20)


def test_every_explanation_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    if set(results) != set(KERNELS):
        pytest.skip("needs the results of all kernels")
    everything = [r for found in results.values() for r in found]
    with capsys.disabled():
        print("".join(f"\n{r.id}: {r.because}" for r in everything if r.because))
        print(planted.summary(everything), end=" ")
    used = {r.because for r in everything}
    assert [entry for entry in planted.survivors_of(KERNELS[0]) if entry.because not in used] == []
