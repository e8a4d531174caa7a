"""Every case on a GPU, and what only a GPU can show: streams, devices, graphs, fallbacks, sizes."""

from __future__ import annotations

import threading
import warnings

import cases
import oracle
import pytest
import torch

import flash_ext
from flash_ext import ops

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
needs_kernels = pytest.mark.skipif(ops.library_error is not None, reason=f"no compiled kernels: {ops.library_error}")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def has_kernel(*tensors: torch.Tensor, **options: object) -> bool:
    return flash_ext.explain(*tensors, **options).backend != "reference"


@pytest.fixture
def quiet() -> None:
    """A fallback is no failure: which calls have kernels differs from GPU to GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flash_ext.FallbackWarning)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", cases.CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    cases.check_case(cases.CASES[name], "cuda", dtype)


@pytest.mark.parametrize("name", cases.CASES)
def test_case_on_the_reference(name: str) -> None:
    cases.check_case(cases.CASES[name], "cuda", torch.bfloat16, backend="reference")


# --- fallback ---


@needs_kernels
def test_a_fallback_warns_once_and_gives_the_reasons() -> None:
    q = rand(1, 33, 2, 72, dtype=torch.float32)  # no kernel takes it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            flash_ext.attention(q, q, q)
        flash_ext.attention(q, q, q, backend="reference")
    (warning,) = [w for w in caught if w.category is flash_ext.FallbackWarning]
    for backend, reasons in flash_ext.supported(q, q, q).items():
        assert all(reason in str(warning.message) for reason in reasons), backend


@needs_kernels
def test_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    q = rand(1, 33, 2, 72, dtype=torch.float32)
    with pytest.raises(flash_ext.FallbackWarning, match="FLASH_EXT_STRICT=1"):
        flash_ext.attention(q, q, q)
    compiled = torch.compile(lambda q: flash_ext.attention(q, q, q), backend="aot_eager", fullgraph=True)
    with pytest.raises(flash_ext.FallbackWarning, match="FLASH_EXT_STRICT=1"):
        compiled(q)
    flash_ext.attention(q, q, q, backend="reference")


@needs_kernels
def test_an_unavailable_backend_is_an_error_with_reasons() -> None:
    q = rand(1, 33, 2, 72, dtype=torch.float32)
    for backend in ("sm90", "sm80"):
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this call; these can: reference"):
            flash_ext.attention(q, q, q, backend=backend)


def test_mixed_devices_are_an_error() -> None:
    q, k = rand(1, 5, 2, 64), rand(1, 5, 2, 64, device="cpu")
    with pytest.raises(ValueError, match=r"k\.device must equal q\.device, got cpu and cuda:0"):
        flash_ext.attention(q, k, q)


# --- streams, threads, devices ---


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("head_dim", (64, 128, 72))
def test_a_side_stream_is_used(head_dim: int) -> None:
    q, k, v = (rand(2, 300, 4, head_dim, seed=s) for s in range(3))
    expected = flash_ext.attention(q, k, v, causal=True)
    late = torch.full_like(q, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        out = flash_ext.attention(late, k, v, causal=True)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("quiet")
def test_threads_with_streams_of_their_own() -> None:
    q, k, v = (rand(2, 200, 4, 128, seed=s) for s in range(3))
    expected = flash_ext.attention(q, k, v)
    torch.cuda.synchronize()
    results: list = [None] * 8

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                results[i] = flash_ext.attention(q, k, v)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.usefixtures("quiet")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device_while_the_first_is_current() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        first = [rand(1, 130, 4, 64, seed=s, dtype=dtype).requires_grad_() for s in range(3)]
        second = [t.detach().to("cuda:1").requires_grad_() for t in first]
        torch.cuda.set_device(0)
        for tensors in (first, second):
            flash_ext.attention(*tensors, causal=True).float().square().sum().backward()
        assert torch.cuda.current_device() == 0
        for a, b in zip(first, second, strict=True):
            assert b.grad.device == torch.device("cuda:1")
            torch.testing.assert_close(a.grad.cpu(), b.grad.cpu())


def test_no_synchronisation() -> None:
    """A call neither reads device memory nor waits: torch's own detector must stay silent."""
    q = rand(1, 150, 4, 128)
    if not has_kernel(q, q, q, causal=True):
        pytest.skip("no kernel for this GPU yet")
    flash_ext.attention(q, q, q, causal=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_ext.attention(q, q, q, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs() -> None:
    q, k, v = (rand(2, 150, 4, 128, seed=s) for s in range(3))
    if not has_kernel(q, k, v, causal=True):
        pytest.skip("no kernel for this GPU yet")
    flash_ext.attention(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_ext.attention(q, k, v, causal=True)
    q.copy_(rand(2, 150, 4, 128, seed=9))
    graph.replay()
    assert torch.equal(out, flash_ext.attention(q, k, v, causal=True))


# --- bits ---


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 72, 96, 128, 192, 256))
def test_forward_is_bitwise_repeatable(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (rand(2, 700, 4, head_dim, seed=s, dtype=dtype) for s in range(3))
    first = flash_ext.attention(q, k, v, causal=True, return_lse=True)
    for _ in range(5):
        again = flash_ext.attention(q, k, v, causal=True, return_lse=True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("head_dim", (64, 72, 96, 128, 192, 256))
def test_one_hot_values_spell_out_probabilities(head_dim: int) -> None:
    """Scores of 0: out[i, j] is 1 / (visible keys) for the keys row i sees and 0 for the others, column by column."""
    seqlen = head_dim
    q = torch.zeros(1, seqlen, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    v = torch.eye(seqlen, device="cuda", dtype=torch.bfloat16)[None, :, None]
    out = flash_ext.attention(q, rand(1, seqlen, 1, head_dim), v, causal=True)[0, :, 0].float()
    keep = oracle.visible_keys(seqlen, seqlen, True, (-1, -1), "cuda")
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep / keep.sum(-1, keepdim=True), rtol=2**-8, atol=0)


# --- sizes ---


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("head_dim", (64, 8))
def test_a_batch_beyond_65535(head_dim: int) -> None:
    q, k, v = (rand(70_000, n, 1, head_dim, seed=s, dtype=torch.float16) for s, n in enumerate((2, 3, 3)))
    out, lse = flash_ext.attention(q, k, v, return_lse=True)
    expected_out, expected_lse = oracle.dense_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.float(), expected_out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("quiet")
def test_more_than_2_31_elements() -> None:
    """The last sequences of tensors beyond 2^31 elements equal the same sequences alone."""
    shape = (5, 32_800, 128, 128)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * torch.Size(shape).numel() + 4 * 2**30:
        pytest.skip("needs 21 GiB of free GPU memory")
    if not has_kernel(
        *(torch.empty(shape, device="meta", dtype=torch.bfloat16),) * 3, device_info="sm90"
    ) or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no kernel for this GPU yet; the plan of such a call is tested without one")
    q = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(generator=torch.Generator("cuda").manual_seed(0))
    assert q.numel() > 2**31
    k = rand(5, 100, 8, 128)
    out, lse = flash_ext.attention(q, k, k, return_lse=True)
    alone, alone_lse = flash_ext.attention(q[4:].clone(), k[4:], k[4:], return_lse=True)
    assert torch.equal(out[4:], alone) and torch.equal(lse[4:], alone_lse)


@pytest.mark.usefixtures("quiet")
def test_training_through_compile_with_autocast() -> None:
    torch.compiler.reset()
    linear = torch.nn.Linear(64, 3 * 4 * 64, device="cuda")
    compiled = torch.compile(
        lambda x: flash_ext.attention(*linear(x).unflatten(-1, (3, 4, 64)).unbind(2), causal=True),
        backend="aot_eager",
        fullgraph=True,
    )
    x = rand(2, 130, 64, dtype=torch.float32)
    gradients = []
    for call in (compiled, compiled._torchdynamo_orig_callable):
        linear.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = call(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        gradients.append(linear.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)
