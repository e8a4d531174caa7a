"""A stream of tiles between two CTAs that is right in every schedule, and what is reported when one thing is wrong."""

from __future__ import annotations

import harness
import numpy as np
import pytest
from harness import Kernels, Out, aligned

exchange = Kernels("exchange.cu")
ROUNDS = 5
SCHEDULES = [
    {"schedule": "early", "seed": 0},
    {"schedule": "late", "seed": 0},
    *({"schedule": "adversarial", "seed": seed} for seed in range(1, 5)),
]
BUGS = {  # kernel: kinds of fault, of which some schedule finds one
    "no_empty_wait": {"shared-race", "expect-tx", "mbarrier"},
    "no_full_wait": {"shared-race", "uninitialised-shared"},
    "early_release": {"shared-race"},
    "own_release": {"shared-race", "expect-tx", "mbarrier"},
    "no_proxy_fence": {"missing-proxy-fence"},
    "no_exit_barrier": {"cluster-exit", "async-at-exit"},
    "wrong_bytes": {"expect-tx", "deadlock"},
}


@pytest.mark.parametrize("rounds", [1, 2, ROUNDS])
def test_correct(rounds, mode):
    out = aligned((4, 64), np.int32)
    exchange.launch("correct", 4, 64, Out(out), rounds, cluster=2, **mode)
    lanes = rounds * np.arange(32) + 32 * sum(range(rounds))
    for cta in range(4):
        assert (out[cta, 32:] == lanes + rounds * 1000 * (cta % 2 ^ 1)).all()


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported(bug):
    found = set()
    for schedule in SCHEDULES:
        out = aligned((2, 64), np.int32)
        try:
            exchange.launch(bug, 2, 64, Out(out), ROUNDS, cluster=2, checks=True, **schedule)
        except harness.emulator().EmulatorError as error:
            found.add(error.kind)
    assert found & BUGS[bug], found
