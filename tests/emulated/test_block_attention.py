"""The forward kernels with lists of blocks, emulated, against attention by its definition under the dense mask."""

from __future__ import annotations

from typing import Any

import block_mask_checks as checks
import pytest
import torch
from torch import Tensor

import flash_ext
from flash_ext import _emulator, _host, create_block_mask, env, masks

ARCH = "sm90" if env.EMULATE == "sm90" else "sm80"
ROWS = [
    v["name"] for v in _host.variants() if "_blocks" in v["name"] and v["op"] == "fwd" and v["name"].startswith(f"fwd_{ARCH}")
]
pytestmark = pytest.mark.skipif(not ROWS, reason="no kernel with lists of blocks for this GPU")

SCORES = {"softcap": 3.0, "sinks": True, "alibi_slopes": True, "k_bias": True}


def row_of(head_dim: int) -> str:
    """The row of a plain bfloat16 call; skips where a build of some variants lacks it."""
    named = [name for name in ROWS if name.startswith(f"fwd_{ARCH}_bf16_d{head_dim}_blocks") and "scored" not in name]
    q = torch.empty(1, 256, 1, head_dim, dtype=torch.bfloat16)
    mask = create_block_mask(torch.ones(256, 256, dtype=torch.bool), None, None, 256, 256)
    chosen = flash_ext.explain(q, q, q, block_mask=mask).variant
    if chosen not in named:
        pytest.skip(f"this build has no row of head_dim {head_dim}")
    return chosen


def leaves_of(keep: Tensor, heads: int, heads_kv: int, dims: tuple[int, int], options: dict[str, Any], dtype: torch.dtype) -> dict:
    batch = max(2, keep.shape[0])
    q, k, v, *_ = checks.inputs(keep, batch, heads, heads_kv, *dims, dtype)
    leaves = {"q": q, "k": k, "v": v}
    generator = torch.Generator().manual_seed(5)
    if "sinks" in options:
        leaves["sinks"] = torch.randn(heads, generator=generator)
        leaves["alibi_slopes"] = torch.rand(batch, heads, generator=generator) / 50
        leaves["k_bias"] = torch.randn(batch, heads_kv, keep.shape[3], generator=generator)
    return leaves


def check(mask: flash_ext.BlockMask, keep: Tensor, leaves: dict[str, Tensor], options: dict[str, Any], row: str) -> Tensor:
    """Runs the row; at most twice the error of plain PyTorch in the same dtype, plus two units in the last place."""
    plain_options = {name: value for name, value in options.items() if name not in leaves}
    _emulator.reset_reports()
    out, lse, top = flash_ext.attention(
        **leaves, **plain_options, block_mask=mask, return_lse=True, return_max_logit=True, backend=ARCH
    )
    assert [report.kernel for report in _emulator.reports()] == [row]
    exact = {name: t.double() for name, t in leaves.items()}
    wanted, wanted_lse, wanted_top = checks.dense_attention(**exact, keep=keep, **plain_options)
    plain, _, _ = checks.dense_attention(**leaves, keep=keep, **plain_options)
    unseen = ~keep.any(-1).expand(lse.shape)
    assert (out.transpose(1, 2)[unseen] == 0).all() and torch.equal(lse.isinf(), wanted_lse.isinf())
    for got, true, same_dtype, ulp in (
        (out, wanted, plain, 2 * torch.finfo(out.dtype).eps),
        (lse, wanted_lse, wanted_lse, 2e-5),
        (top, wanted_top, wanted_top, 2e-5),
    ):
        got, true, same_dtype = (t.double().where(true.isfinite(), 0.0) for t in (got, true, same_dtype))
        allowed = 2 * (same_dtype - true).abs().max() + ulp * max(1.0, true.abs().max().item())
        assert (got - true).abs().max() <= allowed
    return out


@pytest.mark.parametrize("name", checks.RANDOM)
@pytest.mark.parametrize("head_dim", (64, 128))
def test_random_masks(name: str, head_dim: int, schedule) -> None:
    row = row_of(head_dim)
    schedule("checks", sms=3)
    keep = checks.random_mask(name)
    mask = create_block_mask(keep, *keep.shape)
    check(mask, keep, leaves_of(keep, 4, 2, (head_dim, head_dim), {}, torch.bfloat16), {"softmax_scale": -0.1}, row)


@pytest.mark.parametrize("schedule_name", ("late", "adversarial1"))
@pytest.mark.parametrize("row", ROWS)
def test_every_row(row: str, schedule_name: str, schedule) -> None:
    """Each tile size, dtype and score, with causal joined to the mask."""
    schedule(schedule_name, sms=2)
    parts = row.split("_")
    dims = parts[3].removeprefix("d").split("x")
    keep = checks.random_mask("half")
    options = SCORES if "scored" in parts else {}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[parts[2]]
    leaves = leaves_of(keep, 4, 2, (int(dims[0]), int(dims[-1])), options, dtype)
    mask = create_block_mask(keep, *keep.shape)
    plain_options = {name: value for name, value in options.items() if name not in leaves}
    chosen = flash_ext.explain(**leaves, **plain_options, block_mask=mask).variant
    if chosen != row:
        pytest.skip(f"this GPU takes {chosen}")
    check(mask, keep, leaves, options, row)


def test_causal_and_windows_join_the_mask(schedule) -> None:
    row = row_of(64)
    schedule("plain")
    keep = checks.random_mask("half")
    leaves = leaves_of(keep, 4, 4, (64, 64), {}, torch.bfloat16)
    distance = torch.arange(384) - torch.arange(257)[:, None] - (384 - 257)
    mask = create_block_mask(keep, *keep.shape).within_window(True, (150, -1))
    check(mask, keep & (distance <= 0) & (distance >= -150), leaves, {}, row)


def test_trees_and_documents(schedule) -> None:
    row = row_of(64)
    schedule("plain")
    parents = torch.arange(363) // 3 - 1
    ids = torch.arange(300) // 70
    for mask in (masks.tree_mask(parents, context_length=130), masks.document_mask(ids, causal=True)):
        keep = mask.to_dense()
        check(mask, keep, leaves_of(keep, 2, 1, (64, 64), {}, torch.bfloat16), {}, row)


def test_order_of_the_lists_and_of_the_ctas(schedule) -> None:
    """Another order within the partial and within the full blocks: the same up to rounding. Other CTAs: the same bits."""
    row = row_of(64)
    keep = checks.random_mask("half")
    mask = create_block_mask(keep, *keep.shape)
    leaves = leaves_of(keep, 4, 4, (64, 64), {}, torch.bfloat16)
    schedule("plain", sms=1)
    alone = check(mask, keep, leaves, {}, row)
    schedule("plain", sms=7)
    assert torch.equal(alone, check(mask, keep, leaves, {}, row))
    check(checks.shuffled(mask, 3), keep, leaves, {}, row)


def test_empty_blocks_are_not_loaded(schedule) -> None:
    """NaN and infinities there do not show, though 0 * NaN would."""
    row_of(64)
    schedule("plain")
    keep = torch.zeros(1, 1, 256, 384, dtype=torch.bool)
    keep[..., :200, 128:256] = True
    leaves = leaves_of(keep, 2, 2, (64, 64), {}, torch.bfloat16)
    mask = create_block_mask(keep, None, None, 256, 384)
    plain = flash_ext.attention(**leaves, block_mask=mask)
    for name in "kv":
        leaves[name][:, :128] = torch.nan
        leaves[name][:, 256:] = torch.inf
    assert torch.equal(flash_ext.attention(**leaves, block_mask=mask), plain)


def test_lists_that_cannot_be_right_stay_within_the_tensors(schedule) -> None:
    """Device memory is not trusted: the emulator would stop at an address of no tensor."""
    row_of(64)
    schedule("checks")
    keep = checks.random_mask("half")
    mask = create_block_mask(keep, *keep.shape)
    leaves = leaves_of(keep, 4, 4, (64, 64), {}, torch.bfloat16)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    huge, negative = 2**31 - 1, -(2**31)
    for position in range(3):
        for value in (huge, negative, 1000, -7):
            tensors = [t.clone() for t in mask.tensors()]
            tensors[position].view(-1)[1::2] = value
            arguments = (q, k, v, *tensors, None, None, None, 0.125, 0.0, False, False, None)
            torch.ops.flash_ext.fwd_block_mask(*arguments)


def test_the_backward_takes_the_reference(schedule) -> None:
    row_of(64)
    schedule("plain")
    keep = checks.random_mask("sparse")
    leaves = {name: t.requires_grad_() for name, t in leaves_of(keep, 2, 2, (64, 64), {}, torch.bfloat16).items()}
    mask = create_block_mask(keep, *keep.shape)
    out = flash_ext.attention(**leaves, block_mask=mask)
    with pytest.warns(flash_ext.FallbackWarning, match="no backward kernel"):
        out.float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in leaves.values()]
    wanted, _, _ = checks.dense_attention(*exact, keep=keep)
    wanted.square().sum().backward()
    for got, true in zip(leaves.values(), exact, strict=True):
        assert (got.grad.double() - true.grad).norm() <= 1.5e-2 * true.grad.norm()
