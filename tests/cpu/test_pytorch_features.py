"""Sequences, sinks, ALiBi, key bias, splits and max_logit as citizens of PyTorch: opcheck, compile, export, autocast, meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_ext

OPS = torch.ops.flash_ext
SCALING = (0.3, True, 4, -1, 5.0)  # softmax_scale, causal, window_left, window_right, softcap
EVERYTHING = 31  # wanted: dq, dk, dv, dsinks, dk_bias
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def inputs(kind: str, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> tuple[Any, ...]:
    """The ops' arguments up to split_boundaries, of a dense, packed or split call with everything that it can have."""
    front_q, front_k, batch = ((21,), (25,), 3) if kind == "packed" else ((2, 9), (2, 12), 2)
    shapes = ((*front_q, 4, 16), (*front_k, 2, 16), (*front_k, 2, 24))
    q, k, v = (normal(*s, seed=i, dtype=dtype).requires_grad_(requires_grad) for i, s in enumerate(shapes))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k_bias = normal(*((2, 25) if kind == "packed" else (2, 2, 12)), seed=3, dtype=wide).requires_grad_(requires_grad)
    sinks = None if kind == "split" else normal(4, seed=4, dtype=wide).requires_grad_(requires_grad)
    sequences: tuple = (None,) * 6
    if kind == "packed":
        sequences = (int32(0, 5, 5, 19), int32(0, 7, 10, 24), int32(4, 0, 14), int32(7, 2, 13), int32(1, 0, 0), int32(0, 1, 2))
    boundaries = [0, 5, 5, 12] if kind == "split" else []
    return q, k, v, *sequences, sinks, normal(batch, 4, seed=5, dtype=wide).abs(), k_bias, *SCALING, boundaries


KINDS = ("dense", "packed", "split")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ("fwd", "reference_fwd"))
def test_opcheck_forward(op: str, kind: str, dtype: torch.dtype) -> None:
    tail = (kind != "split", False, None) if op == "fwd" else (kind != "split", "")
    torch.library.opcheck(getattr(OPS, op).default, (*inputs(kind, dtype, requires_grad=True), *tail))


@pytest.mark.parametrize("wanted", (EVERYTHING, 1, 2 + 16, 8, 4))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ("bwd", "reference_bwd"))
def test_opcheck_backward(op: str, kind: str, wanted: int) -> None:
    q, k, v, *rest = inputs(kind)
    out, lse, _ = OPS.fwd(q, k, v, *rest, False, False, None)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *rest, False, wanted)
    torch.library.opcheck(getattr(OPS, op).default, (*arguments, None if op == "bwd" else ""))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_computed(kind: str) -> None:
    q, k, v, *rest = inputs(kind)
    out, lse, _ = OPS.fwd(q, k, v, *rest, False, False, None)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    everything = OPS.bwd(dout, dlse, q, k, v, out, lse, *rest, False, EVERYTHING, None)
    for bit in range(5):
        alone = OPS.bwd(dout, dlse, q, k, v, out, lse, *rest, False, 1 << bit, None)
        for i, (got, expected) in enumerate(zip(alone, everything, strict=True)):
            assert torch.equal(got, expected) if i == bit else got.shape == (0,)
    assert (everything[3].shape == (0,)) == (kind == "split")  # no sinks there


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_rounded_once(kind: str) -> None:
    """The bits of a float32 call on the same numbers, rounded: sums over tiles, heads and parts of the keys stay float32."""
    q, k, v, *rest = inputs(kind, torch.bfloat16)
    out, lse, _ = OPS.fwd(q, k, v, *rest, False, False, None)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = OPS.bwd(dout, dlse, q, k, v, out, lse, *rest, False, EVERYTHING, None)
    wide = [t.float() for t in (dout, dlse, q, k, v, out, lse)]
    for low, full in zip(got, OPS.bwd(*wide, *rest, False, EVERYTHING, None), strict=True):
        assert torch.equal(low, full.to(low.dtype))


def test_gradients_flow_to_what_needs_them() -> None:
    """Each input alone gets what it gets among all; the op computes no more than that."""
    names = ("q", "k", "v", "sinks", "k_bias")
    asked: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is OPS.bwd.default:
                asked.append(args[-2])
            return func(*args, **(kwargs or {}))

    def run(needed: tuple[str, ...]) -> dict[str, Tensor | None]:
        q, k, v, *_, sinks, slopes, k_bias = inputs("dense")[:12]
        leaves = dict(zip(names, (q, k, v, sinks, k_bias), strict=True))
        for name in needed:
            leaves[name].requires_grad_()
        out, lse = flash_ext.attention(**leaves, alibi_slopes=slopes, causal=True, return_lse=True)
        (out.square().sum() + lse.sum()).backward()
        return {name: t.grad for name, t in leaves.items()}

    everything = run(names)
    for name in names:
        with Recorder():
            alone = run((name,))
        assert torch.equal(alone[name], everything[name])
        assert all(gradient is None for other, gradient in alone.items() if other != name)
    assert asked == [1, 2, 4, 8, 16]


def test_max_logit_has_no_gradient() -> None:
    q, k, v = inputs("dense", requires_grad=True)[:3]
    out, lse, max_logit = flash_ext.attention(q, k, v, return_lse=True, return_max_logit=True)
    assert out.requires_grad and lse.requires_grad and not max_logit.requires_grad
    both = flash_ext.attention(q, k, v, return_max_logit=True)
    assert len(both) == 2 and torch.equal(both[1], max_logit)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT) / 4
    torch.testing.assert_close(max_logit, scores.amax((0, 2, 3)).detach())


def test_slopes_with_a_gradient_are_refused() -> None:
    q, k, v, *_, slopes, _ = inputs("dense", requires_grad=True)[:12]
    slopes.requires_grad_()
    with pytest.raises(ValueError, match=r"alibi_slopes must not require a gradient .*alibi_slopes\.detach\(\)"):
        flash_ext.attention(q, k, v, alibi_slopes=slopes)
    with torch.no_grad():
        flash_ext.attention(q, k, v, alibi_slopes=slopes)
    out, _, _ = OPS.fwd(q, k, v, *(None,) * 6, None, slopes, None, *SCALING, [], False, False, None)
    with pytest.raises(NotImplementedError, match="alibi_slopes have no gradient"):
        out.sum().backward()


def test_double_backward_is_refused() -> None:
    q, k, v, *_, sinks, _, _ = inputs("dense", requires_grad=True)[:12]
    (gradient,) = torch.autograd.grad(flash_ext.attention(q, k, v, sinks=sinks).square().sum(), sinks, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        gradient.sum().backward()


def test_transforms_and_forward_mode_are_refused() -> None:
    q, k, v, *_, sinks, _, _ = inputs("dense")[:12]
    with pytest.raises(NotImplementedError, match=r"attention: torch\.func transforms"):
        torch.func.grad(lambda sinks: flash_ext.attention(q, k, v, sinks=sinks).sum())(sinks)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        flash_ext.attention(q, k, v, sinks=torch.autograd.forward_ad.make_dual(sinks, torch.ones_like(sinks)))


# --- compile, export ---


class Packed(torch.nn.Module):
    """Projections, attention_varlen with everything, a projection."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.options = torch.nn.Linear(32, 3 * 32), torch.nn.Linear(32, 32), options
        self.sinks = torch.nn.Parameter(torch.zeros(2))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=i) / 6)

    def forward(self, x: Tensor, cu_seqlens: Tensor, k_bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(1)
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        out = flash_ext.attention_varlen(q, k, v, **lengths, sinks=self.sinks, k_bias=k_bias, causal=True, **self.options)
        return self.out(out.flatten(1))


def packed_inputs(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    total = int(ends[-1]) + 2
    return normal(total, 32, seed=total), ends, normal(2, total, seed=1)


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_training(backend: str) -> None:
    torch.compiler.reset()
    eager, traced = Packed(), Packed()
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    eager(*packed_inputs(5, 0, 9)).square().sum().backward()
    compiled(*packed_inputs(5, 0, 9)).square().sum().backward()
    for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
        assert a.grad.any()
        torch.testing.assert_close(a.grad, b.grad)


def test_one_graph_serves_every_packing() -> None:
    """Neither the lengths nor their number nor the total pins a graph down; max_seqlen may be a number or a tensor."""
    torch.compiler.reset()
    graphs = []

    def backend(module: torch.fx.GraphModule, _: list) -> Any:
        graphs.append(module)
        return module.forward

    block = Packed(max_seqlen_q=torch.tensor(300))
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ((5, 0, 9), (7, 2, 11), (300, 1, 2, 3)):
        made = packed_inputs(*lengths)
        torch.testing.assert_close(compiled(*made), block(*made))
    assert len(graphs) == 1


def test_export() -> None:
    block = Packed().eval()
    total, batch = torch.export.Dim("total", min=4, max=4096), torch.export.Dim("ends", min=2, max=64)
    sizes = {"x": {0: total}, "cu_seqlens": {0: batch}, "k_bias": {1: total}}
    program = torch.export.export(block, packed_inputs(5, 0, 9), dynamic_shapes=sizes)
    assert any(node.target is OPS.fwd.default for node in program.graph.nodes)
    for lengths in ((5, 0, 9), (20, 30, 1, 1)):
        made = packed_inputs(*lengths)
        torch.testing.assert_close(program.module()(*made), block(*made))


def test_compiled_dense_with_everything() -> None:
    torch.compiler.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor, k_bias: Tensor) -> Tensor:
        options = {"sinks": sinks, "alibi_slopes": slopes, "k_bias": k_bias, "causal": True, "return_lse": True}
        out, lse, max_logit = flash_ext.attention(q, k, v, **options, return_max_logit=True)
        return out.square().sum() + lse.sin().sum() + max_logit.sum()

    runs = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        q, k, v, *_, sinks, slopes, k_bias = inputs("dense", requires_grad=True)[:12]
        total = call(q, k, v, sinks, slopes, k_bias)
        total.backward()
        runs.append([total.detach(), q.grad, k.grad, v.grad, sinks.grad, k_bias.grad])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_validate_cannot_be_compiled() -> None:
    """It reads the device; without fullgraph the call runs uncompiled."""
    torch.compiler.reset()
    x, ends, k_bias = packed_inputs(5, 0, 9)
    block = Packed(validate=True)
    with pytest.raises(Exception, match="validate=True reads values from the device and cannot be compiled"):
        torch.compile(block, backend="eager", fullgraph=True)(x, ends, k_bias)


# --- meta tensors, autocast, checkpoints ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_results(kind: str, dtype: torch.dtype) -> None:
    real = OPS.fwd(*inputs(kind, dtype), kind != "split", False, None)
    on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in inputs(kind, dtype)]
    for r, m in zip(real, OPS.fwd(*on_meta, kind != "split", False, None), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride()) and m.device.type == "meta"


def test_meta_gradients() -> None:
    made = [t.to("meta") for t in packed_inputs(5, 0, 9)]
    block = Packed(return_max_logit=False).to("meta")
    block(*made).sum().backward()
    assert all(p.grad.shape == p.shape for p in block.parameters())


@pytest.mark.parametrize("kind", ("dense", "packed"))
def test_autocast(kind: str) -> None:
    """q, k and v are cast; sinks and biases stay float32, and so do lse and their gradients."""
    q, k, v, *sequences, sinks, slopes, k_bias = inputs(kind, requires_grad=True)[:12]
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_q", "leftpad_k")
    function = flash_ext.attention_varlen if kind == "packed" else flash_ext.attention
    options = {"sinks": sinks, "alibi_slopes": slopes, "k_bias": k_bias, "return_lse": True}
    if kind == "packed":
        options |= dict(zip(names, sequences, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = function(q, k, v, **options)
    expected = function(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (q, k, v, sinks, k_bias))


def test_what_is_saved_for_the_backward() -> None:
    """The inputs, out and lse, nothing of the size of the scores, and max_logit not."""
    saved = []
    q, k, v, *_, sinks, slopes, k_bias = inputs("dense", requires_grad=True)[:12]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        flash_ext.attention(q, k, v, sinks=sinks, alibi_slopes=slopes, k_bias=k_bias, return_max_logit=True)
    wanted = [(2, 9, 4, 16), (2, 12, 2, 16), (2, 12, 2, 24), (4,), (2, 4), (2, 2, 12), (2, 9, 4, 24), (2, 4, 9)]
    assert sorted(saved) == sorted(wanted)


def test_direct_calls_of_the_ops_check_what_goes_together() -> None:
    q, k, v, *rest = inputs("packed")
    cases = {
        "multiple of k's": (q[None], k[None], v[None], *rest),
        "come together": (q, k, v, rest[0], None, *rest[2:]),
        "dense calls without sinks": (q, k, v, *rest[:-1], [0, 25]),
    }
    dense = inputs("dense")
    cases["and seqused and leftpad with them"] = (*dense[:6], int32(1, 2), *dense[7:])
    for words, arguments in cases.items():
        with pytest.raises(ValueError, match=words):
            OPS.fwd(*arguments, False, False, None)
