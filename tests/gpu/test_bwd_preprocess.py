"""The compiled kernels of the backward's first step against float64, on a GPU."""

from __future__ import annotations

import bwd_preprocess_checks as checks
import pytest
import torch

from flash_ext import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.library_error is not None, reason=f"no compiled kernels: {ops.library_error}"),
]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", checks.CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    checks.check(checks.CASES[name], "cuda", dtype)


def test_the_kernel_runs_not_the_reference() -> None:
    made = checks.build(checks.CASES["rows_129"], "cuda", torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ops.flash_ext.bwd_preprocess(*made)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any(name.startswith("bwd_preprocess_sm") for name in names), names


def test_repeated_calls_are_bitwise_equal() -> None:
    made = checks.build(checks.CASES["dim_256"], "cuda", torch.bfloat16)
    first = torch.ops.flash_ext.bwd_preprocess(*made)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.flash_ext.bwd_preprocess(*made), strict=True))


def test_unsupported_input_is_an_error() -> None:
    out, dout, lse, dlse = checks.build(checks.CASES["rows_127"], "cuda", torch.bfloat16)
    for arguments, words in (
        ((out.float(), dout.float(), lse, dlse), "no kernel for float32"),
        ((out[..., :9], dout[..., :9], lse, dlse), "head_dim_v must be a multiple of 8, got 9"),
        ((out, dout[:, :5], lse, dlse), "dout.shape must equal out.shape"),
        ((out, dout, lse[..., :5], dlse), "lse must be float32 of shape"),
        ((out, dout, lse.double(), dlse), "lse must be float32 of shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.flash_ext.bwd_preprocess(*arguments)


def test_a_side_stream_is_used() -> None:
    """The op must wait for what its own stream holds: the input is filled there behind a long sleep."""
    out, dout, lse, dlse = checks.build(checks.CASES["rows_300"], "cuda", torch.bfloat16)
    late = torch.full_like(out, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(out)
        delta, lse_log2 = torch.ops.flash_ext.bwd_preprocess(late, dout, lse, dlse)
    stream.synchronize()
    checks.compare(delta, lse_log2, out, dout, lse, dlse)


def test_more_than_2_31_elements() -> None:
    """The last rows of a tensor beyond 2^31 elements; every row is checked on the device, in parts."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    out = torch.empty(1, 2**23 + 128, 2, 136, device="cuda", dtype=torch.bfloat16)  # 2.28e9 elements
    assert out.numel() > 2**31
    out.normal_(generator=torch.Generator("cuda").manual_seed(0))
    dout = out[:, :, :1].expand(out.shape)
    lse = torch.zeros(1, 2, out.shape[1], device="cuda")
    delta, lse_log2 = torch.ops.flash_ext.bwd_preprocess(out, dout, lse, None)
    for begin in range(0, out.shape[1], 2**20):
        rows = slice(begin, min(begin + 2**20, out.shape[1]))
        expected = (out[:, rows].float() * dout[:, rows].float()).sum(-1).transpose(1, 2)
        torch.testing.assert_close(delta[..., rows], expected, rtol=1e-4, atol=1e-3)
    assert not lse_log2.any()


def test_a_batch_beyond_65535() -> None:
    case = checks.Case(70_000, 3, 1, 8)
    made = checks.build(case, "cuda", torch.float16)
    checks.compare(*torch.ops.flash_ext.bwd_preprocess(*made), *made)
