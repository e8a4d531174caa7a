"""FP8 calls on the reference: the same as the call with the tensors written out, for every kind of scale; bad input;
training through them."""

from __future__ import annotations

import itertools

import pytest
import torch

import flash_ext

FP8 = torch.float8_e4m3fn


def quantised(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(FP8)


def expand(scale: torch.Tensor, heads: int, seqlen: int) -> torch.Tensor:
    """(batch, seqlen, heads, 1) factors of a dense scale, written with loops."""
    batch = 2
    out = torch.empty(batch, seqlen, heads, 1)
    for b in range(batch):
        for h in range(heads):
            for i in range(seqlen):
                if scale.dim() < 2:
                    out[b, i, h] = scale.reshape(())
                elif scale.dim() == 2:
                    out[b, i, h] = scale[b, h * scale.shape[1] // heads]
                else:
                    out[b, i, h] = scale[b, h, i // 64]
    return out


SCALES = {
    "none": lambda heads, seqlen: None,
    "tensor": lambda heads, seqlen: torch.tensor(0.3),
    "one": lambda heads, seqlen: torch.tensor([0.3]),
    "head": lambda heads, seqlen: torch.rand(2, heads) + 0.1,
    "block": lambda heads, seqlen: torch.rand(2, heads, -(-seqlen // 64)) + 0.1,
}
OPTIONS = (
    {},
    {"causal": True},
    {"window_size": (20, 5), "softcap": 3.0, "sinks": torch.tensor([0.1, -1.0, 0.5, 2.0])},
    {"alibi_slopes": torch.rand(4), "k_bias": torch.randn(2, 2, 150)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(o) or "plain")
@pytest.mark.parametrize("kind", SCALES)
def test_scales(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    q8, k8, v8 = quantised(2, 70, 4, 32), quantised(2, 150, 2, 32, seed=1), quantised(2, 150, 2, 16, seed=2)
    scales = [SCALES[kind](heads, seqlen) for heads, seqlen in ((4, 70), (2, 150), (2, 150))]
    written = [
        x.float() if s is None else x.float() * expand(s, x.shape[2], x.shape[1]) for x, s in zip((q8, k8, v8), scales, strict=True)
    ]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    out, lse, max_logit = flash_ext.attention(q8, k8, v8, **named, **options, return_lse=True, return_max_logit=True)
    expected = flash_ext.attention(*written, **options, return_lse=True, return_max_logit=True)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected[0].bfloat16())
    assert torch.equal(lse, expected[1]) and torch.equal(max_logit, expected[2])
    half = flash_ext.attention(q8, k8, v8, **named, **options, out_dtype=torch.float16, flush_every=4)
    assert torch.equal(half, expected[0].half())


def test_scales_of_groups_of_query_heads() -> None:
    q8, k8 = quantised(2, 70, 4, 32), quantised(2, 70, 2, 32)
    groups = torch.rand(2, 2) + 0.1
    one = flash_ext.attention(q8, k8, k8, q_descale=groups)
    assert torch.equal(one, flash_ext.attention(q8, k8, k8, q_descale=groups.repeat_interleave(2, 1)))


@pytest.mark.parametrize("scale", ("tensor", "head", "block"))
def test_packed_sequences_are_as_sequences_alone(scale: str) -> None:
    torch.manual_seed(0)
    bounds = [0, 100, 100, 170, 300]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    q, k, v = (torch.randn(300, heads, 32) for heads in (4, 2, 2))
    given = {"cu_seqlens": cu_seqlens} if scale != "tensor" else {}
    parts = [flash_ext.quantize_fp8(x, scale, **given) for x in (q, k, v)]
    named = dict(zip(("q_descale", "k_descale", "v_descale"), (d for _, d in parts), strict=True))
    out, lse = flash_ext.attention_varlen(
        *(x for x, _ in parts), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, return_lse=True, **named
    )
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        alone = [flash_ext.quantize_fp8(x[None, begin:end], scale) for x in (q, k, v)]
        if scale == "tensor":
            alone = [(x[None, begin:end], d) for x, d in parts]
        named = dict(zip(("q_descale", "k_descale", "v_descale"), (d for _, d in alone), strict=True))
        expected = flash_ext.attention(*(x for x, _ in alone), causal=True, return_lse=True, **named)
        torch.testing.assert_close(out[begin:end], expected[0][0])
        torch.testing.assert_close(lse[:, begin:end], expected[1][0])


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    q8, k8 = quantised(2, 70, 4, 32), quantised(2, 150, 2, 32)
    named = {"k_descale": torch.rand(2, 2, 3) + 0.1, "v_descale": torch.rand(2, 2) + 0.1, "out_dtype": torch.float16}
    outs, lses = flash_ext.attention_partials(q8, k8, k8, split_boundaries=(0, 64, 150), **named)
    out, lse = flash_ext.merge_attention(outs, lses)
    expected = flash_ext.attention(q8, k8, k8, return_lse=True, **named)
    torch.testing.assert_close(out, expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, expected[1])


def test_rotated_tensors_give_the_same_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 64) for _ in range(3))
    exact = flash_ext.attention(q, k, v)
    for hadamard in (False, True):
        (q8, qd), (k8, kd) = (flash_ext.quantize_fp8(x, hadamard=hadamard) for x in (q, k))
        v8, vd = flash_ext.quantize_fp8(v)
        out = flash_ext.attention(q8, k8, v8, q_descale=qd, k_descale=kd, v_descale=vd, out_dtype=torch.float16)
        assert (out.float() - exact).norm() < 0.06 * exact.norm()


def test_compiles_and_has_fake_kernels() -> None:
    q8 = quantised(1, 70, 2, 32)
    scale = torch.rand(1, 2, 2) + 0.1

    def call(q8, scale):
        return flash_ext.attention(q8, q8, q8, k_descale=scale, causal=True, return_lse=True)

    out, lse = torch.compile(call, fullgraph=True, backend="aot_eager")(q8, scale)
    expected = call(q8, scale)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_the_planner_is_asked() -> None:
    q8 = torch.empty(1, 300, 4, 128, dtype=FP8, device="meta")
    blocks = torch.empty(1, 4, 5, device="meta")
    assert flash_ext.explain(q8, q8, q8, device_info="sm90").variant == "fwd_fp8_sm90_e4m3_d128_full_head"
    found = flash_ext.explain(q8, q8, q8, device_info="sm90", causal=True, v_descale=blocks)
    assert found.variant == "fwd_fp8_sm90_e4m3_d128_causal_block"
    found = flash_ext.explain(q8, q8, q8, device_info="sm90", causal=True, flush_every=0)
    assert found.variant == "fwd_fp8_sm90_e4m3_d128_causal_head_unflushed" and found.tile == (128, 224)
    # Rows that are flushed, or for blocks, stand in for those that are missing.
    found = flash_ext.explain(q8, q8, q8, device_info="sm90", softcap=3.0, flush_every=0)
    assert found.variant == "fwd_fp8_sm90_e4m3_d128_local_scored_block"
    for device in ("sm89", "sm100", "sm120"):
        found = flash_ext.explain(q8, q8, q8, device_info=device, causal=True, flush_every=0)
        assert found.backend == "sm80" and found.variant == "fwd_fp8_sm89_e4m3_d128_causal_head" and found.tile == (128, 64)
        assert found.grid[0] == 3 * 4 and "9.0" in found.rejected["sm90"][0]
    on_hopper = flash_ext.explain(q8, q8, q8, device_info="sm90", backend="sm80", v_descale=blocks)
    assert on_hopper.variant == "fwd_fp8_sm89_e4m3_d128_full_block"
    for device in ("sm80", "sm86"):
        found = flash_ext.explain(q8, q8, q8, device_info=device)
        assert found.backend == "reference" and "8.9 or later" in found.rejected["sm80"][0]


@pytest.mark.parametrize(
    "changes,error,texts",
    (
        ({"q_descale": 1.0}, TypeError, ["q_descale must be a torch.Tensor or None, got float"]),
        ({"out_dtype": "bf16", "flush_every": 1.5}, TypeError, ["out_dtype must be a torch.dtype", "flush_every must be an int"]),
        ({"k_descale": torch.ones(2, 3)}, ValueError, ["k_descale must have shape", "(2, 2)", "(2, 2, 2)", "got (2, 3)"]),
        ({"v_descale": torch.ones(2, 2, 5)}, ValueError, ["v_descale must have shape", "got (2, 2, 5)"]),
        ({"q_descale": torch.ones(2, 2, dtype=torch.float64)}, ValueError, ["q_descale.dtype must be float32"]),
        ({"q_descale": torch.tensor(0.0)}, ValueError, ["q_descale must be positive and finite"]),
        ({"k_descale": torch.tensor([torch.nan])}, ValueError, ["k_descale must be positive and finite"]),
        ({"out_dtype": torch.float32, "flush_every": -1}, ValueError, ["bfloat16 or float16", "flush_every must be at least 0"]),
        ({"backend": "sm80"}, ValueError, ["cannot run this"]),
    ),
)  # fmt: skip
def test_bad_input(changes: dict, error: type, texts: list[str]) -> None:
    q8 = quantised(2, 70, 2, 32)
    with pytest.raises(error) as caught:
        flash_ext.attention(q8, q8, q8, **changes)
    for text in texts:
        assert text in str(caught.value)


def test_scales_without_fp8_are_refused() -> None:
    q = torch.zeros(1, 3, 1, 8)
    with pytest.raises(ValueError, match="only for float8_e4m3fn"):
        flash_ext.attention(q, q, q, k_descale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"q\.dtype must be"):
        flash_ext.attention(*(q.to(torch.float8_e5m2),) * 3)


def test_there_is_no_backward_but_a_helper() -> None:
    q8 = quantised(1, 70, 2, 32)
    scale = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(NotImplementedError, match="attention_fp8_straight_through"):
        flash_ext.attention(q8, q8, q8, k_descale=scale).float().sum().backward()


@pytest.mark.parametrize("packed", (False, True))
def test_straight_through_gradients_are_those_of_sixteen_bits(packed: bool) -> None:
    torch.manual_seed(0)
    shape = (200,) if packed else (2, 100)
    q, k, v = (torch.randn(*shape, heads, 64).bfloat16().requires_grad_() for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)
    more = {"causal": True, "sinks": sinks, "return_lse": True}
    function = flash_ext.attention
    if packed:
        more |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 70, 200], dtype=torch.int32))
        function = flash_ext.attention_varlen
    out, lse = flash_ext.attention_fp8_straight_through(q, k, v, **more)
    assert out.dtype == q.dtype
    weight, weight_lse = torch.randn(out.shape), torch.randn(lse.shape)
    got = torch.autograd.grad((out.float() * weight).sum() + (lse * weight_lse).sum(), (q, k, v, sinks))
    exact, exact_lse = function(q, k, v, **more)
    assert (out.float() - exact.float()).norm() < 0.06 * exact.float().norm()
    want = torch.autograd.grad((exact.float() * weight).sum() + (exact_lse * weight_lse).sum(), (q, k, v, sinks))
    for a, b, bound in zip(got, want, (0.06, 0.06, 0.06, 0.15), strict=True):  # a sink's gradient is a sum that cancels
        assert a.dtype == b.dtype and (a.float() - b.float()).norm() < bound * b.float().norm()


def test_straight_through_trains() -> None:
    """A little regression, whose loss falls as with exact attention."""
    losses = {}
    for name, attend in (("fp8", flash_ext.attention_fp8_straight_through), ("exact", flash_ext.attention)):
        torch.manual_seed(0)
        x, target = torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 64, 32)
        weights = [torch.nn.Parameter(torch.randn(32, 32) / 6) for _ in range(4)]
        optimiser = torch.optim.Adam(weights, 0.02)
        for _ in range(30):
            q, k, v = ((x.float() @ w).bfloat16().view(1, 64, 2, 16) for w in weights[:3])
            loss = (attend(q, k, v).flatten(2).float() @ weights[3] - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[name] = loss.item()
    assert losses["fp8"] < 1.0 and abs(losses["fp8"] - losses["exact"]) < 0.1


def test_straight_through_refuses_what_it_cannot_do() -> None:
    q = torch.zeros(1, 3, 1, 8)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        flash_ext.attention_fp8_straight_through(q, q, q)
    half = q.bfloat16()
    with pytest.raises(ValueError, match="return_max_logit"):
        flash_ext.attention_fp8_straight_through(half, half, half, return_max_logit=True)
    with pytest.raises(ValueError, match="scale must be one of"):
        flash_ext.attention_fp8_straight_through(half, half, half, scale="row")
