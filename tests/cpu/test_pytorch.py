"""flash_ext as a citizen of PyTorch: opcheck, compile, export, autocast, checkpointing, transforms, threads, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import cases
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import flash_ext

OPS = torch.ops.flash_ext
# After q, k, v: nothing of sequences and scores, softmax_scale, causal, window_left, window_right, softcap, no splits.
SCORING = (*(None,) * 9, 0.3, True, -1, -1, 0.0, ())
WANT_QKV = 7
# return_max_logit, deterministic, wanted, backend or reason, as far as each op has them.
TAIL = {
    "fwd": (False, False, None), "bwd": (False, WANT_QKV, None), "reference_fwd": (False, ""),
    "reference_bwd": (False, WANT_QKV, ""),
}  # fmt: skip


def qkv(seqlen_q: int = 9, seqlen_k: int = 12, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + seqlen_k)
    shapes = ((2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 24))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


def backward_arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v = qkv(dtype=dtype)
    out, lse, _ = OPS.fwd(q, k, v, *SCORING, *TAIL["fwd"])
    return [torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse]


# --- opcheck ---


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", ("fwd", "reference_fwd"))
def test_opcheck_forward(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(OPS, op).default, (*qkv(dtype=dtype, requires_grad=True), *SCORING, *TAIL[op]))


@pytest.mark.parametrize("absent", (None, 0, 1), ids=("both", "no_dout", "no_dlse"))
@pytest.mark.parametrize("op", ("bwd", "reference_bwd"))
def test_opcheck_backward(op: str, absent: int | None) -> None:
    arguments: list[Any] = backward_arguments()
    if absent is not None:
        arguments[absent] = None
    torch.library.opcheck(getattr(OPS, op).default, (*arguments, *SCORING, *TAIL[op]))


def test_opcheck_bwd_preprocess() -> None:
    dout, dlse, _, _, _, out, lse = backward_arguments()
    for gradient in (dlse, None):
        torch.library.opcheck(OPS.bwd_preprocess.default, (out, dout, lse, gradient))


@pytest.mark.parametrize("layout", ("heads_first", "odd_stride", "expanded_batch"))
def test_fake_kernels_tell_the_real_strides(layout: str) -> None:
    """What opcheck compares, on strided inputs: results are contiguous whatever the inputs are."""
    case = cases.find("layout_66x77_d64_b2h4kv2_causal_heads_first", layout=layout)
    made = cases.build(case, "cpu", torch.float32)
    arguments = (made.q.requires_grad_(), made.k.requires_grad_(), made.v.requires_grad_(), *SCORING, *TAIL["fwd"])
    torch.library.opcheck(OPS.fwd.default, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
    q, k, v = (t.detach() for t in arguments[:3])
    out, lse, _ = OPS.fwd(q, k, v, *SCORING, *TAIL["fwd"])
    backward = (torch.randn_like(out), None, q, k, v, out, lse, *SCORING, *TAIL["bwd"])
    torch.library.opcheck(OPS.bwd.default, backward, test_utils=("test_faketensor",))


# --- direct calls of the ops ---


@pytest.mark.parametrize("op", ("fwd", "reference_fwd"))
def test_direct_calls_have_the_same_gradients(op: str) -> None:
    direct, through = qkv(requires_grad=True), qkv(requires_grad=True)
    out, lse, _ = getattr(OPS, op)(*direct, *SCORING, *TAIL[op])
    expected_out, expected_lse = flash_ext.attention(*through, softmax_scale=0.3, causal=True, return_lse=True)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    (out.square().sum() + lse.sin().sum()).backward()
    (expected_out.square().sum() + expected_lse.sin().sum()).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(direct, through, strict=True))


def test_gradients_for_some_inputs_only() -> None:
    for chosen in range(3):
        inputs, everything = qkv(), qkv(requires_grad=True)
        inputs[chosen].requires_grad_()
        flash_ext.attention(*inputs, causal=True).sum().backward()
        flash_ext.attention(*everything, causal=True).sum().backward()
        assert torch.equal(inputs[chosen].grad, everything[chosen].grad)
        assert all(t.grad is None for i, t in enumerate(inputs) if i != chosen)


def test_no_graph_without_a_need() -> None:
    assert not flash_ext.attention(*qkv()).requires_grad
    with torch.no_grad():
        assert not flash_ext.attention(*qkv(requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert flash_ext.attention(*qkv()).is_inference()


def test_lse_alone_has_a_gradient() -> None:
    q, k, v = qkv(requires_grad=True)
    _, lse = flash_ext.attention(q, k, v, return_lse=True)
    assert lse.requires_grad
    lse.sum().backward()
    # d lse_i / d q_i is the mean key under P, so that summed over rows it is scale * sum_i P k.
    p = torch.softmax((q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT) / 4, -1)
    torch.testing.assert_close(q.grad, (p @ k.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2) / 4)
    assert not v.grad.any()


def test_double_backward_is_refused() -> None:
    q, k, v = qkv(requires_grad=True)
    (gradient,) = torch.autograd.grad(flash_ext.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        gradient.sum().backward()


def test_direct_backward_has_no_silent_gradient() -> None:
    arguments = backward_arguments()
    arguments[2].requires_grad_()
    for op in ("bwd", "reference_bwd"):
        dq, *_ = getattr(OPS, op)(*arguments, *SCORING, *TAIL[op])
        with pytest.raises(NotImplementedError, match="double backward is not supported"):
            dq.sum().backward()
    dout, dlse, _, _, _, out, lse = arguments
    delta, _ = OPS.bwd_preprocess(out.detach().requires_grad_(), dout, lse.detach(), dlse)
    with pytest.raises(NotImplementedError, match="bwd_preprocess has no gradient"):
        delta.sum().backward()


# --- torch.func and forward mode ---


def test_transforms_are_refused() -> None:
    q, k, v = qkv()

    def loss(q: Tensor) -> Tensor:
        return flash_ext.attention(q, k, v).sum()

    calls = (
        lambda: torch.func.grad(loss)(q),
        lambda: torch.func.vmap(lambda q: flash_ext.attention(q[None], k[:1], v[:1]))(q),
        lambda: torch.func.jvp(loss, (q,), (q,)),
        lambda: torch.func.vjp(loss, q),
        lambda: torch.func.jacrev(loss)(q),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"attention: torch\.func transforms .* are not supported"):
            call()


def test_forward_mode_is_refused() -> None:
    q, k, v = qkv()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
            flash_ext.attention(dual, k, v)
        assert flash_ext.attention(q, k, v).shape == (2, 9, 4, 24)


# --- torch.compile and torch.export ---


class Block(torch.nn.Module):
    """Projections around attention, so that a compiled graph holds more than one op."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.options = torch.nn.Linear(32, 3 * 32), torch.nn.Linear(32, 32), options
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return self.out(flash_ext.attention(q, k, v, **self.options).flatten(2))


def block_input(batch: int = 2, seqlen: int = 10) -> Tensor:
    return torch.randn(batch, seqlen, 32, generator=torch.Generator().manual_seed(seqlen))


BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_inference(backend: str) -> None:
    torch.compiler.reset()
    block = Block(causal=True, window_size=(4, -1), softcap=5.0)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend=backend, fullgraph=True)(block_input()), block(block_input()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training(backend: str) -> None:
    torch.compiler.reset()
    eager, traced = Block(causal=True), Block(causal=True)
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    eager(block_input()).square().sum().backward()
    compiled(block_input()).square().sum().backward()
    for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_lse_and_strided_inputs() -> None:
    torch.compiler.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash_ext.attention(q, k, v, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    inputs = [[t.transpose(1, 2).contiguous().requires_grad_() for t in qkv()] for _ in range(2)]
    for leaves, call in zip(inputs, (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)), strict=True):
        call(*(t.transpose(1, 2) for t in leaves)).backward()
    for a, b in zip(*inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_with_dynamic_shapes() -> None:
    torch.compiler.reset()
    block = Block(causal=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, seqlen in ((2, 10), (3, 11), (1, 300)):
        torch.testing.assert_close(compiled(block_input(batch, seqlen)), block(block_input(batch, seqlen)))


def test_compiled_with_dynamic_numbers() -> None:
    """Options that change from call to call become symbols of the graph."""
    torch.compiler.reset()
    q, k, v = qkv()
    compiled = torch.compile(flash_ext.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for scale, softcap, left in ((0.5, 2.0, 3), (0.25, 4.0, 5), (-1.5, 0.5, 2)):
        options = {"softmax_scale": scale, "softcap": softcap, "window_size": (left, left + 1)}
        torch.testing.assert_close(compiled(q, k, v, **options), flash_ext.attention(q, k, v, **options))


def test_compiled_options_of_every_backend_argument() -> None:
    torch.compiler.reset()
    q, k, v = qkv()
    expected = flash_ext.attention(q, k, v)
    compiled = torch.compile(flash_ext.attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, backend="reference"), expected)
    with pytest.raises((ValueError, RuntimeError), match="backend 'sm90' cannot run this call"):
        compiled(q, k, v, backend="sm90")


def test_export() -> None:
    block = Block(causal=True).eval()
    sizes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seqlen", max=4096)}}
    program = torch.export.export(block, (block_input(),), dynamic_shapes=sizes)
    assert any(node.target is OPS.fwd.default for node in program.graph.nodes)
    for batch, seqlen in ((2, 10), (3, 77)):
        torch.testing.assert_close(program.module()(block_input(batch, seqlen)), block(block_input(batch, seqlen)))


# --- fake and meta tensors ---


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_meta_and_fake_results(dtype: torch.dtype) -> None:
    real = flash_ext.attention(*qkv(dtype=dtype), causal=True, return_lse=True)
    meta = flash_ext.attention(*(t.to("meta") for t in qkv(dtype=dtype)), causal=True, return_lse=True)
    with FakeTensorMode():
        fake = flash_ext.attention(*qkv(dtype=dtype), causal=True, return_lse=True)
    for r, m, f in zip(real, meta, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride()) == (f.shape, f.dtype, f.stride())
    assert meta[0].device.type == "meta" and fake[0].device.type == "cpu"


def test_meta_gradients() -> None:
    inputs = [t.to("meta").requires_grad_() for t in qkv()]
    flash_ext.attention(*inputs).sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.device.type == "meta" for t in inputs)


def test_a_meta_call_allocates_nothing() -> None:
    q = torch.empty(64, 2**20, 128, 128, device="meta", dtype=torch.bfloat16)  # 2 TiB
    out, lse = flash_ext.attention(q, q, q, causal=True, return_lse=True)
    assert out.shape == q.shape and lse.shape == (64, 128, 2**20)


# --- autocast ---


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_autocast_as_sdpa_does(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(i)).to(dtype).requires_grad_() for i in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_ext.attention(q, k, v)
        expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)
    out.sum().backward()
    assert all(t.grad.dtype == dtype for t in (q, k, v))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_autocast_leaves_the_arithmetic_alone(dtype: torch.dtype) -> None:
    """Inputs are cast; inside the op nothing is: lse has the precision that it has outside, in the backward too."""
    inputs = [t.requires_grad_() for t in qkv(dtype=dtype)]
    low = inputs if dtype == torch.float64 else [t.detach().bfloat16().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = flash_ext.attention(*inputs, return_lse=True)
        (out.double().sum() + lse.double().sum()).backward()
    expected_out, expected_lse = flash_ext.attention(*low, return_lse=True)
    (expected_out.double().sum() + expected_lse.double().sum()).backward()
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert all(torch.equal(a.grad, b.grad.to(dtype)) for a, b in zip(inputs, low, strict=True))


def test_autocast_mixed_dtypes_are_one_error() -> None:
    """float64 is never cast, so autocast cannot make it fit."""
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"k\.dtype must equal q\.dtype"):
        flash_ext.attention(q, k.double(), v)


def test_autocast_takes_mixed_dtypes_as_sdpa_does() -> None:
    """Rotated queries and keys in float32 beside values that a linear layer gave in bfloat16."""
    q, k, v = (torch.randn(1, 9, 2, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_ext.attention(q, k, v.bfloat16())
        assert flash_ext.explain(q, k, v.bfloat16()).backend == "reference"
    assert torch.equal(out, flash_ext.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_autocast_compiled() -> None:
    torch.compiler.reset()
    block = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(block, backend="aot_eager", fullgraph=True)(block_input())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, block(block_input()))


# --- training machinery ---


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant: bool) -> None:
    plain, recomputed = Block(causal=True), Block(causal=True)
    x, y = block_input().requires_grad_(), block_input().requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(recomputed, y, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True))


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    """q, k, v, out and lse: nothing of the size of the scores."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        flash_ext.attention(*qkv(requires_grad=True))
    assert sorted(saved) == sorted([(2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 24), (2, 9, 4, 24), (2, 4, 9)])


def test_deterministic_follows_torch() -> None:
    """None takes torch's setting; what reaches the op is read from the graph."""
    q, k, v = qkv()
    given = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.fwd.default:
                given.append(args[-2])
            return func(*args, **(kwargs or {}))

    with Recorder():
        for setting in (False, True):
            torch.use_deterministic_algorithms(setting)
            try:
                for deterministic in (None, False, True):
                    flash_ext.attention(q, k, v, deterministic=deterministic)
            finally:
                torch.use_deterministic_algorithms(False)
    assert given == [False, False, True, True, False, True]


def test_a_result_without_a_gradient_costs_nothing() -> None:
    """The backward is told that no gradient flows into lse, rather than given zeros."""
    given = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.bwd.default:
                given.append((args[0] is None, args[1] is None))
            return func(*args, **(kwargs or {}))

    with Recorder():
        flash_ext.attention(*qkv(requires_grad=True)).sum().backward()
        flash_ext.attention(*qkv(requires_grad=True), return_lse=True)[1].sum().backward()
    assert given == [(False, True), (True, False)]


def test_concurrent_calls() -> None:
    names = (
        "gqa_113x203_d128_b2h6kv2_causal",
        "decode_1x513_d64",
        "long_query_203x113_d64_causal",
        "softcap_65x80_d64_causal_cap1.5",
    )
    failures = []

    def work(name: str) -> None:
        case = cases.find(name)
        made = cases.build(case, "cpu", torch.float32)
        try:
            for _ in range(3):
                cases.check(case, made, cases.run(case, made))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# --- the fallback's warning; a reason is what the compiled library passes on a GPU ---

REASON = "sm90: no compiled kernel has softcap"
FALLBACK = (*SCORING, False, REASON)


def test_a_fallback_warns_once_for_each_reason() -> None:
    q, k, v = qkv(requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            OPS.reference_fwd(q, k, v, *FALLBACK)[0].sum().backward()
        OPS.reference_fwd(q, k, v, *SCORING, False, "sm90: another reason")
        flash_ext.attention(q, k, v)
        OPS.reference_fwd(q, k, v, *SCORING, False, "")
    texts = [str(w.message) for w in caught if w.category is flash_ext.FallbackWarning]
    assert texts == [
        f"attention (forward) runs on the reference backend: {REASON}",
        f"attention (backward) runs on the reference backend: {REASON}",
        "attention (forward) runs on the reference backend: sm90: another reason",
    ]


def test_strict_makes_every_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    q, k, v = qkv()
    for _ in range(2):
        with pytest.raises(flash_ext.FallbackWarning, match=f"{REASON}.*FLASH_EXT_STRICT=1"):
            OPS.reference_fwd(q, k, v, *FALLBACK)
    assert flash_ext.attention(q, k, v).shape == (2, 9, 4, 24)  # a CPU call is no fallback


def test_a_compiled_fallback_warns_and_can_be_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: OPS.reference_fwd(q, k, v, *FALLBACK)[0] + 1, backend="aot_eager", fullgraph=True)
    with pytest.warns(flash_ext.FallbackWarning, match=REASON):
        compiled(q, k, v)
    monkeypatch.setenv("FLASH_EXT_STRICT", "1")
    with pytest.raises(flash_ext.FallbackWarning, match=REASON):
        compiled(q, k, v)


# --- processes ---


def python(code: str, **environment: str) -> str:
    """The output of code in a fresh interpreter."""
    env = {**os.environ, **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_initialises_no_cuda_and_forks_safely() -> None:
    code = """
import os, threading, torch, flash_ext
assert not torch.cuda.is_initialized()
q = torch.randn(1, 300, 2, 32, requires_grad=True)
def loss():
    out, lse = flash_ext.attention(q, q, q, causal=True, return_lse=True)
    return (out.sum() + lse.sum()).item()
torch.set_num_threads(1)
expected = loss()
child = os.fork()
if child == 0:
    flash_ext.attention(q, q, q, causal=True).sum().backward()
    os._exit(0 if loss() == expected and q.grad is not None and not torch.cuda.is_initialized() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print('ok')
"""
    assert python(code) == "ok\n"


def test_import_is_light() -> None:
    """Importing pulls in neither the compiler stack nor the planner."""
    code = "import sys, torch; before = set(sys.modules); import flash_ext; print(*sorted(set(sys.modules) - before))"
    modules = python(code).split()
    assert "flash_ext" in modules and "flash_ext._host" not in modules
    assert not [m for m in modules if m.startswith(("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"))]


def test_data_loader_workers_can_import_it() -> None:
    code = """
import torch, flash_ext
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        x = torch.full((1, 3, 1, 4), float(i))
        return flash_ext.attention(x, x, x)
if __name__ == '__main__':
    print([t.mean().item() for t in torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=None)])
"""
    assert python(code) == "[0.0, 1.0, 2.0, 3.0]\n"
