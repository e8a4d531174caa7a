"""The kernels for GPUs without wgmma on whatever GPU is here, a Hopper too: through their PTX where there is no machine code."""

from __future__ import annotations

import cases
import kvcache_cases
import pytest
import torch

import flash_ext

pytestmark = pytest.mark.gpu
TWO_BYTES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", cases.CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    """Results and gradients."""
    case = cases.CASES[name]
    if flash_ext.explain(**cases.meta(case, dtype), device_info="sm80").backend != "sm80":
        pytest.skip("no sm80 kernel covers it")
    cases.check_case(case, "cuda", dtype, backend="sm80")


def covers(case: kvcache_cases.Case) -> bool:
    made = kvcache_cases.build(case, "cuda", torch.bfloat16)
    return not flash_ext.supported_with_kvcache(**made)["sm80"]


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", kvcache_cases.CASES)
def test_cache(name: str, dtype: torch.dtype) -> None:
    case = kvcache_cases.CASES[name]
    if not covers(case):
        pytest.skip("no sm80 kernel covers it")
    kvcache_cases.check_case(case, "cuda", dtype, backend="sm80")
