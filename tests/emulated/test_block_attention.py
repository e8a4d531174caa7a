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
ROWS = [v["name"] for v in _host.variants() if "_blocks" in v["name"] and v["op"] == "fwd" and v["name"].startswith(f"fwd_{ARCH}")]
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
    for position in (0, 1, 2, 8):
        if position == 8:
            schedule("plain")  # blocks that come twice in the order are written twice
        for value in (huge, negative, 1000, -7):
            tensors = [t.clone() for t in mask.tensors()]
            tensors[position].view(-1)[1::2] = value
            arguments = (q, k, v, *tensors, None, None, None, 0.125, 0.0, False, False, None)
            torch.ops.flash_ext.fwd_block_mask(*arguments)
    if not BWD_ROWS:
        return
    out, lse, _ = torch.ops.flash_ext.fwd_block_mask(q, k, v, *mask.tensors(), None, None, None, 0.125, 0.0, False, False, None)
    for position in (3, 5, 9):
        for value in (huge, negative, 1000, -7):
            tensors = [t.clone() for t in mask.tensors()]
            tensors[position].view(-1)[1::2] = value
            arguments = (out, None, q, k, v, out, lse, *tensors, None, None, None, 0.125, 0.0, False, 7, None)
            torch.ops.flash_ext.bwd_block_mask(*arguments)


# Of rows that differ in their shared memory alone, this GPU takes one.
OTHER_MEMORY = {"sm90": "none", "sm80": "_smem99"}.get(env.EMULATE, "_smem163")
BWD_ROWS = [
    v["name"]
    for v in _host.variants()
    if "_blocks" in v["name"] and v["name"].startswith(f"bwd_{ARCH}") and not v["name"].endswith(OTHER_MEMORY)
]


def check_gradients(
    row: str, keep: Tensor, options: dict[str, Any], heads_kv: int = 2, change: Any = lambda mask: mask
) -> dict[str, Tensor]:
    """Gradients of out and lse by the row against the definition in float64; change(mask) is another form of the same mask."""
    parts = row.split("_")
    dims = [int(d) for d in parts[3].removeprefix("d").split("x")]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[parts[2]]
    leaves = leaves_of(keep, 4, heads_kv, (dims[0], dims[-1]), options, dtype)
    plain_options = {name: value for name, value in options.items() if name not in leaves}
    batch = leaves["q"].shape[0]
    *_, dout, dlse = checks.inputs(keep, batch, 4, heads_kv, dims[0], dims[-1], dtype)
    mask = change(create_block_mask(keep, *keep.shape))
    definition = {name: value for name, value in plain_options.items() if name != "deterministic"}

    def attend(**tensors: Tensor) -> tuple[Tensor, ...]:
        return flash_ext.attention(**tensors, **plain_options, block_mask=mask, return_lse=True, return_max_logit=True)

    _emulator.reset_reports()
    found = checks.results(attend, leaves, dout, dlse)
    assert row in [report.kernel for report in _emulator.reports()]
    exact = {name: t.double() for name, t in leaves.items()}
    wanted = checks.results(lambda **t: checks.dense_attention(**t, keep=keep, **definition), exact, dout.double(), dlse)
    for name in (n for n in wanted if n not in ("out", "lse", "max_logit")):
        error = (found[name].double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)
        assert error <= {torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype], (name, error)
    unseen = ~keep.any(-1).expand(batch, 4, keep.shape[2])
    assert (found["dq"].transpose(1, 2)[unseen] == 0).all()
    unseen_keys = (~keep.any(2)).expand(batch, 4, keep.shape[3]).unflatten(1, (heads_kv, -1)).all(2)
    assert (found["dk"].transpose(1, 2)[unseen_keys] == 0).all() and (found["dv"].transpose(1, 2)[unseen_keys] == 0).all()
    return found


@pytest.mark.parametrize("schedule_name", ("checks", "adversarial1"))
@pytest.mark.parametrize("row", BWD_ROWS)
def test_gradients_of_every_row(row: str, schedule_name: str, schedule) -> None:
    schedule(schedule_name, sms=3)
    check_gradients(row, checks.random_mask("half"), SCORES if "scored" in row else {})


@pytest.mark.parametrize("name", [n for n in checks.RANDOM if n != "empty"])
@pytest.mark.parametrize("row", [row for row in BWD_ROWS if row.split("_smem")[0].endswith(("_d64_blocks", "_d128_blocks"))])
def test_gradients_of_random_masks(row: str, name: str, schedule) -> None:
    schedule("late", sms=2)
    check_gradients(row, checks.random_mask(name), {"softmax_scale": -0.2}, heads_kv=1)


@pytest.mark.parametrize("row", [row for row in BWD_ROWS if "bf16" in row])
def test_deterministic_gradients(row: str, schedule) -> None:
    """Gradients as ever, and the same bits whatever the schedule and the number of CTAs; also of lists in another order."""
    keep = checks.random_mask("half")
    options = SCORES if "scored" in row else {}
    schedule("adversarial1", sms=2)
    first = check_gradients(row, keep, options | {"deterministic": True})
    schedule("late", sms=5)
    again = check_gradients(row, keep, options | {"deterministic": True})
    assert all(torch.equal(again[name], gradient) for name, gradient in first.items())
    check_gradients(row, keep, options | {"deterministic": True}, change=lambda mask: checks.shuffled(mask, 3))
