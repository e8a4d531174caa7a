"""attention(block_mask=...) against its definition under a dense mask, in float64 unless said otherwise; and its arguments."""

from __future__ import annotations

from typing import Any

import block_mask_checks as checks
import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import create_block_mask

# (num_heads, num_heads_kv, head_dim, head_dim_v, options)
CALLS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "plain": (4, 4, 32, 32, {}),
    "gqa": (4, 2, 16, 24, {"softmax_scale": -0.3}),
    "mqa_scores": (4, 1, 16, 16, {"softcap": 3.0, "sinks": True, "alibi_slopes": True, "k_bias": True}),
}


def leaves_of(
    keep: Tensor, call: str, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor, Tensor]:
    """Tensors, plain options, dout and dlse."""
    heads, heads_kv, dim, dim_v, options = CALLS[call]
    batch = max(2, keep.shape[0])
    q, k, v, dout, dlse = checks.inputs(keep, batch, heads, heads_kv, dim, dim_v, dtype)
    leaves = {"q": q, "k": k, "v": v}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if "sinks" in options:
        generator = torch.Generator().manual_seed(5)
        leaves["sinks"] = torch.randn(heads, generator=generator, dtype=wide)
        leaves["alibi_slopes"] = torch.rand(batch, heads, generator=generator, dtype=wide) / 50
        leaves["k_bias"] = torch.randn(batch, heads_kv, keep.shape[3], generator=generator, dtype=wide)
    return leaves, {name: value for name, value in options.items() if name not in leaves}, dout, dlse


def results_of(
    mask: flash_ext.BlockMask, leaves: dict[str, Tensor], options: dict[str, Any], dout: Any, dlse: Any
) -> dict[str, Tensor]:
    def attend(**tensors: Tensor) -> tuple[Tensor, ...]:
        return flash_ext.attention(**tensors, **options, block_mask=mask, return_lse=True, return_max_logit=True)

    return checks.results(attend, leaves, dout, dlse)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = found[name]
        assert got.shape == value.shape, name
        assert torch.equal(got.isinf(), value.isinf()), name
        got, value = (t.double().where(t.isfinite(), 0.0) for t in (got, value))
        assert not got.isnan().any() and (got - value).norm() <= relative * value.norm() + relative, name


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", checks.RANDOM)
def test_against_the_definition(name: str, call: str) -> None:
    keep = checks.random_mask(name)
    leaves, options, dout, dlse = leaves_of(keep, call)
    mask = create_block_mask(keep, keep.shape[0], keep.shape[1], *keep.shape[2:])
    found = results_of(mask, leaves, options, dout, dlse)
    wanted = checks.results(lambda **tensors: checks.dense_attention(**tensors, keep=keep, **options), leaves, dout, dlse)
    assert_close(found, wanted, 1e-13)
    unseen = ~keep.any(-1).expand(found["lse"].shape)
    assert (found["out"].transpose(1, 2)[unseen] == 0).all() and (found["dq"].transpose(1, 2)[unseen] == 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    keep = checks.random_mask("half")
    leaves, options, dout, dlse = leaves_of(keep, "mqa_scores", dtype)
    found = results_of(create_block_mask(keep, 1, 4, *keep.shape[2:]), leaves, options, dout, dlse)
    assert found["out"].dtype == found["dq"].dtype == dtype and found["dsinks"].dtype == found["lse"].dtype == torch.float32
    exact = {name: t.double() for name, t in leaves.items()}
    wanted = checks.results(lambda **t: checks.dense_attention(**t, keep=keep, **options), exact, dout.double(), dlse)
    assert_close(found, wanted, 8e-3 if dtype == torch.bfloat16 else 2e-6)


def test_a_hidden_key_by_bias() -> None:
    keep = checks.random_mask("half")
    leaves, options, dout, dlse = leaves_of(keep, "mqa_scores")
    hiding = leaves | {"k_bias": leaves["k_bias"].index_fill(2, torch.tensor(3), -torch.inf)}
    found = results_of(create_block_mask(keep, 1, 4, *keep.shape[2:]), hiding, options, dout, dlse)
    without = keep.clone()
    without[..., 3] = False
    hidden = results_of(create_block_mask(without, 1, 4, *keep.shape[2:]), leaves, options, dout, dlse)
    assert_close(found, hidden, 1e-13)
    assert (found["dk_bias"][:, :, 3] == 0).all() and (found["dk"][:, 3] == 0).all()


@pytest.mark.parametrize("gradients", (("dout",), ("dlse",)), ids=str)
def test_one_gradient_alone(gradients: tuple[str, ...]) -> None:
    keep = checks.random_mask("sparse")
    leaves, options, dout, dlse = leaves_of(keep, "gqa")
    given = (dout if "dout" in gradients else None, dlse if "dlse" in gradients else None)
    found = results_of(create_block_mask(keep, 2, None, *keep.shape[2:]), leaves, options, *given)
    wanted = checks.results(lambda **tensors: checks.dense_attention(**tensors, keep=keep, **options), leaves, *given)
    assert_close(found, wanted, 1e-13)


def test_order_of_the_lists() -> None:
    keep = checks.random_mask("half")
    leaves, options, dout, dlse = leaves_of(keep, "gqa")
    mask = create_block_mask(keep, 1, 4, *keep.shape[2:])
    plain = results_of(mask, leaves, options, dout, dlse)
    other = checks.shuffled(mask, 1)
    assert not torch.equal(other.rows.entries, mask.rows.entries)
    assert_close(results_of(other, leaves, options, dout, dlse), plain, 1e-14)


@pytest.mark.parametrize(
    "options", ({"causal": True}, {"window_size": (40, 20)}, {"causal": True, "window_size": (100, -1)}), ids=str
)
def test_with_causal_and_windows(options: dict[str, Any]) -> None:
    keep = checks.random_mask("half")
    leaves, plain, dout, dlse = leaves_of(keep, "plain")
    mask = create_block_mask(keep, 1, 4, *keep.shape[2:])
    found = results_of(mask, leaves, plain | options, dout, dlse)
    left, right = options.get("window_size", (-1, -1))
    distance = torch.arange(384) - torch.arange(257)[:, None] - (384 - 257)
    right = 0 if options.get("causal") else right
    seen = keep & ((distance <= right) if right >= 0 else True) & ((distance >= -left) if left >= 0 else True)
    wanted = checks.results(lambda **tensors: checks.dense_attention(**tensors, keep=seen), leaves, dout, dlse)
    assert_close(found, wanted, 1e-13)


def test_as_attention_without_a_mask() -> None:
    q, k, v, *_ = checks.inputs(torch.empty(200, 333), 2, 4, 2, 16, 16, torch.float64)
    everything = create_block_mask(torch.ones(200, 333, dtype=torch.bool), None, None, 200, 333)
    for options in ({}, {"causal": True}):
        torch.testing.assert_close(
            flash_ext.attention(q, k, v, block_mask=everything, **options), flash_ext.attention(q, k, v, **options)
        )  # fmt: skip


def test_block_sparse() -> None:
    coarse = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    q, k, v, *_ = checks.inputs(torch.empty(300, 400), 2, 4, 2, 16, 16, torch.float64)
    for block_size in ((128, 160), (128, 134)):
        keep = coarse.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)[:300, :400]
        out, lse = flash_ext.block_sparse_attention(q, k, v, coarse, block_size=block_size, return_lse=True)
        wanted, wanted_lse, _ = checks.dense_attention(q, k, v, keep[None, None])
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(lse, wanted_lse)
    made = flash_ext.create_block_mask(keep, None, None, 300, 400)
    torch.testing.assert_close(flash_ext.block_sparse_attention(q, k, v, made), out)
    with pytest.raises(ValueError, match="block_size describes a coarse mask, not a BlockMask"):
        flash_ext.block_sparse_attention(q, k, v, made, block_size=(64, 64))
    with pytest.raises(ValueError, match=r"num_heads or 1, 3, 3\)"):
        flash_ext.block_sparse_attention(q, k, v, coarse[:2], block_size=(128, 160))


def test_permuted_as_in_order() -> None:
    pytest.importorskip("scipy")
    keep = torch.rand(300, 300, generator=torch.Generator().manual_seed(4)) < 0.01
    q, k, v, *_ = checks.inputs(keep, 2, 2, 2, 16, 16, torch.float64)
    order, back = flash_ext.rcm_permutation(keep)
    mask = create_block_mask(keep[order][:, order], None, None, 300, 300)
    out = flash_ext.attention(q[:, order], k[:, order], v[:, order], block_mask=mask)[:, back]
    torch.testing.assert_close(out, checks.dense_attention(q, k, v, keep[None, None])[0])


def test_empty_blocks_are_not_read() -> None:
    keep = torch.zeros(1, 1, 256, 384, dtype=torch.bool)
    keep[..., :200, 128:256] = True
    q, k, v, dout, _ = checks.inputs(keep, 1, 2, 2, 16, 16, torch.float64)
    mask = create_block_mask(keep, None, None, 256, 384)
    plain = results_of(mask, {"q": q, "k": k, "v": v}, {}, dout, None)
    for tensor in (k, v):
        tensor[:, :128] = torch.nan
        tensor[:, 256:] = torch.inf
    poisoned = results_of(mask, {"q": q, "k": k, "v": v}, {}, dout, None)
    for name in ("out", "lse", "dq"):
        assert torch.equal(plain[name], poisoned[name])


def test_compiled_without_graph_breaks() -> None:
    keep = checks.random_mask("half")
    leaves, options, dout, dlse = leaves_of(keep, "gqa")
    mask = create_block_mask(keep, 1, 4, *keep.shape[2:])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return flash_ext.attention(q, k, v, block_mask=mask, return_lse=True, return_max_logit=True, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = checks.results(compiled, leaves, dout, dlse)
    assert_close(found, checks.results(attend, leaves, dout, dlse), 1e-14)


def test_ops_pass_opcheck() -> None:
    keep = checks.random_mask("half")
    leaves, _, _, _ = leaves_of(keep, "mqa_scores")
    tensors = [t.requires_grad_(name != "alibi_slopes") for name, t in leaves.items()]
    mask = create_block_mask(keep, 1, 4, *keep.shape[2:])
    arguments = (*tensors[:3], *mask.tensors(), *tensors[3:], 0.25, 2.0, True, False, None)
    torch.library.opcheck(torch.ops.flash_ext.fwd_block_mask.default, arguments)
    torch.library.opcheck(torch.ops.flash_ext.mask_blocks.default, (keep[0],))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"block_mask": torch.ones(3, 3)}, TypeError, "block_mask must be a flash_ext.BlockMask or None, got Tensor"),
        ({"seqlen_q": 200}, ValueError, "block_mask was built for seqlen_q 200, got 257"),
        ({"seqlen_k": 128}, ValueError, "block_mask was built for seqlen_k 128, got 384"),
        ({"heads": 3}, ValueError, "block_mask.num_heads must be 1 or that of q, got 3 and 4"),
        ({"batch": 3}, ValueError, "block_mask.batch must be 1 or that of q, got 3 and 2"),
        ({"device": "meta"}, ValueError, "block_mask.device must equal q.device, got meta and cpu; block_mask.to"),
    ),
)  # fmt: skip
def test_bad_masks(change: dict[str, Any], error: type[Exception], message: str) -> None:
    sizes = {"batch": 1, "heads": 1, "seqlen_q": 257, "seqlen_k": 384} | change
    q, k, v, *_ = checks.inputs(torch.empty(257, 384), 2, 4, 2, 16, 16, torch.float32)
    keep = torch.ones(sizes["batch"], sizes["heads"], sizes["seqlen_q"], sizes["seqlen_k"], dtype=torch.bool)
    mask = create_block_mask(keep, *keep.shape).to(sizes.get("device", "cpu"))
    with pytest.raises(error, match=message):
        flash_ext.attention(q, k, v, block_mask=change.get("block_mask", mask))


def test_no_packed_sequences() -> None:
    q = torch.randn(10, 2, 16)
    offsets = torch.tensor([0, 10], dtype=torch.int32)
    mask = create_block_mask(torch.ones(10, 10, dtype=torch.bool), None, None, 10, 10)
    with pytest.raises(ValueError, match="block_mask is an option of attention alone"):
        flash_ext.supported(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets, block_mask=mask)


def test_explained() -> None:
    q = torch.empty(1, 257, 2, 64, dtype=torch.bfloat16, device="meta")
    mask = create_block_mask(torch.ones(257, 257, dtype=torch.bool), None, None, 257, 257).to("meta")
    assert flash_ext.explain(q, q, q, block_mask=mask, backend="reference").backend == "reference"
