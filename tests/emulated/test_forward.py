"""The forward kernels, emulated: named cases against the oracle, schedules against each other, exact probes."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case
from forward_cases import ALL, LONG, MORE_DIMS

import flash_ext
from flash_ext import _emulator, env

ARCH = env.EMULATE
BACKEND = "sm90" if ARCH == "sm90" else "sm80"
TWO_BYTES = (torch.bfloat16, torch.float16)


def planned(case: Case, dtype: torch.dtype) -> flash_ext.Explanation:
    return flash_ext.explain(**cases.meta(case, dtype), device_info=f"{ARCH}:{env.EMULATE_SMS}")


COVERED = {c.name: c for c in ALL if planned(c, torch.bfloat16).backend == BACKEND}
if not COVERED:
    pytest.skip(f"no forward kernel for {ARCH} yet", allow_module_level=True)


def test_the_cases_reach_every_forward_variant() -> None:
    reached = {planned(c, d).variant for c in COVERED.values() for d in TWO_BYTES}
    rows = (row for row in flash_ext._host.variants() if row["op"] == "fwd" and f"sm{row['arch']}" == BACKEND)
    others = ("_blocks", "_segments")  # those: test_block_attention.py, test_jagged.py
    compiled = {row["name"] for row in rows if not any(part in row["name"] for part in others)}
    # Of the tiles of one row, the device gets the largest that its shared memory allows.
    limit = 99 if ARCH in ("sm86", "sm89", "sm120") else 163
    largest: dict[str, int] = {}
    for name in compiled:
        row, _, kib = name.partition("_smem")
        if int(kib or 0) <= limit:
            largest[row] = max(int(kib or 0), largest.get(row, 0))
    assert reached == {f"{row}_smem{kib}" if kib else row for row, kib in largest.items()}


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("name", COVERED)
def test_case(name: str, dtype: torch.dtype, schedule) -> None:
    schedule("checks" if dtype == torch.bfloat16 else "late")
    _emulator.reset_reports()
    got = cases.check_case(COVERED[name], "cpu", dtype, backend=BACKEND)
    ran = {report.kernel for report in _emulator.reports() if report.kernel.startswith("fwd_")}
    # No kernel runs where no sequence has a query.
    assert ran == {planned(COVERED[name], dtype).variant} or (not ran and not got.out.count_nonzero())


# PTX blocks (by kernel and first line's label) that no case reaches, each with its reason.
UNREACHED: dict[tuple[str, str], str] = {}


@pytest.mark.skipif(BACKEND != "sm90", reason="the rows of every other GPU: test_coverage_sm80.py")
def test_every_block_of_every_row_is_executed(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for case in COVERED.values():
        for dtype in TWO_BYTES:
            tensors = cases.build(case, "cpu", dtype)
            cases.call(case, tensors, backend=BACKEND)
    missed = []
    for report in _emulator.reports():
        if not report.kernel.startswith("fwd"):
            continue
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            if not block.executions and (report.kernel, block.label) not in UNREACHED:
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line] if ".loc" not in line]
                missed.append(f"{report.kernel}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:4])}")
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("dtype", TWO_BYTES, ids=("bf16", "fp16"))
@pytest.mark.parametrize("num_sms", (1, 2, 3, 4))
@pytest.mark.parametrize(
    "case", [*LONG[:5], *(c for c in LONG if c.head_dim not in (64, 128) and c.softmax_scale is None)], ids=lambda c: c.name
)
def test_every_schedule_gives_the_same_bits(case: Case, num_sms: int, dtype: torch.dtype, schedule) -> None:
    tensors = cases.build(case, "cpu", dtype)
    results = []
    for name in ("plain", "late", "adversarial1", "adversarial2", "adversarial3"):
        schedule(name, sms=num_sms)
        with cases.poisoned_memory():
            results.append(cases.call(case, tensors, backend=BACKEND))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("head_dim,head_dim_v", ((64, 64), (128, 128), *MORE_DIMS, (24, 24), (80, 88), (200, 72)))
@pytest.mark.parametrize("causal", (False, True))
def test_one_hot_values_spell_out_the_weights(head_dim: int, head_dim_v: int, causal: bool, schedule) -> None:
    """Row i attends to one key alone (scores differ by far more than exp can hold), so out must be that key's value, exactly."""
    schedule("checks")
    seqlen = 300
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, seqlen, (seqlen,), generator=generator)
    if causal:
        target = torch.minimum(target, torch.arange(seqlen))
    # Keys are the corners of a cube, scaled: every pair of different keys scores at least 2 * 16 * 16 below a match.
    bits = 9
    corner = ((torch.arange(seqlen)[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1
    k = torch.zeros(1, seqlen, 1, head_dim)
    k[0, :, 0, -bits:] = 16 * corner
    q = k[:, target]
    # Values spell the key's number in three digits of base 8, exact in bf16, in changing columns.
    v = torch.zeros(1, seqlen, 1, head_dim_v)
    for digit in range(3):
        v[0, :, 0, digit::3] = (torch.arange(seqlen) >> (3 * digit) & 7).float()[:, None]
    q, k, v = (t.bfloat16() for t in (q, k, v))
    out = flash_ext.attention(q, k, v, causal=causal, softmax_scale=1.0, backend=BACKEND)
    assert torch.equal(out, v[:, target])


def test_rows_beyond_the_sequence_hold_nan_and_inf(schedule) -> None:
    """TMA's boxes reach beyond the sequence; what lies there must not show, also as 0 * inf."""
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(1, 200, 2, 128, generator=generator).bfloat16() for _ in range(3)]
    for poison in (torch.nan, torch.inf, -torch.inf):
        poisoned = []
        for tensor in clean:
            larger = torch.full((3, 400, 4, 128), poison, dtype=torch.bfloat16)
            larger[1:2, :200, 1:3] = tensor
            poisoned.append(larger[1:2, :200, 1:3])
        for causal in (False, True):
            expected = flash_ext.attention(*clean, causal=causal, backend=BACKEND)
            assert torch.equal(flash_ext.attention(*poisoned, causal=causal, backend=BACKEND), expected)


@pytest.mark.parametrize("head_dim,head_dim_v", ((40, 72), (80, 80), (104, 56), (136, 120), (168, 176), (232, 248)))
def test_columns_beyond_the_head_dims_hold_nan_and_inf(head_dim: int, head_dim_v: int, schedule) -> None:
    """The kernel's columns beyond head_dim and head_dim_v read as zeros, whatever stands behind a row."""
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    clean = [torch.randn(1, 150, 2, d, generator=generator).bfloat16() for d in (head_dim, head_dim, head_dim_v)]
    expected = flash_ext.attention(*clean, return_lse=True, backend=BACKEND)
    assert torch.isfinite(expected[0]).all() and torch.isfinite(expected[1]).all()
    for poison in (torch.nan, torch.inf):
        poisoned = []
        for tensor in clean:
            larger = torch.full((1, 150, 2, 320), poison, dtype=torch.bfloat16)
            larger[..., : tensor.shape[-1]] = tensor
            poisoned.append(larger[..., : tensor.shape[-1]])
        for got, want in zip(flash_ext.attention(*poisoned, return_lse=True, backend=BACKEND), expected, strict=True):
            assert torch.equal(got, want)


def test_a_copy_is_made_and_explained_for_unaligned_tensors(schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 64, generator=generator).bfloat16() for _ in range(3))
    odd = cases.lay_out(k, "odd_stride")
    explanation = flash_ext.explain(q, odd, v)
    assert explanation.backend == BACKEND
    assert len(explanation.copies) == 1 and explanation.copies[0].startswith("k:")
    assert explanation.workspace_bytes == k.numel() * 2
    assert torch.equal(flash_ext.attention(q, odd, v), flash_ext.attention(q, k, v))


def test_expanded_tensors_give_the_bits_of_their_copies(schedule) -> None:
    """Stride 0: heads and batches are read where they lie, rows are copied."""
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, 2, 64, generator=generator).bfloat16() for _ in range(3))
    for dim, copied in ((0, ()), (2, ()), (1, ("k: rows must not share memory (seqlen stride 0)",))):
        expanded = k.narrow(dim, 0, 1).expand(k.shape)
        assert expanded.stride(dim) == 0
        assert flash_ext.explain(q, expanded, v).copies == copied
        expected = flash_ext.attention(q, expanded.contiguous(), v, backend=BACKEND)
        assert torch.equal(flash_ext.attention(q, expanded, v, backend=BACKEND), expected)


def test_a_failed_call_does_not_fail_the_next(schedule) -> None:
    schedule("plain")
    q, k, v = (torch.randn(1, 40, 1, 64).bfloat16() for _ in range(3))
    expected = flash_ext.attention(q, k, v, backend=BACKEND)
    kernel = flash_ext.explain(q, k, v).variant
    ptx = _emulator.kernel_ptx(kernel)
    _emulator.replace_ptx(kernel, ptx[:1000])
    try:
        with pytest.raises(RuntimeError, match=kernel):
            flash_ext.attention(q, k, v, backend=BACKEND)
    finally:
        _emulator.replace_ptx(kernel, None)
    assert torch.equal(flash_ext.attention(q, k, v, backend=BACKEND), expected)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window_size": (250, 30)}, {"softcap": 0.0, "k_bias": True}), ids=str)
def test_scores_of_minus_infinity_weigh_nothing(head_dim: int, options: dict, schedule) -> None:
    """The tiles visited first hold no score above -inf, masked or not; keys that come later make the rows finite."""
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, rows, 2, head_dim, generator=generator).bfloat16() + 0.1 for rows in (150, 700, 700))
    k[:, 90:] = -torch.inf
    if "k_bias" in options:
        k, options = k.clamp(min=-1), {"k_bias": torch.zeros(1, 2, 700)}
        options["k_bias"][:, :, 90:] = -torch.inf
    elif "window_size" in options:
        k[:, 400:520] = 0.5
    got = flash_ext.attention(q, k, v, **options, return_lse=True, return_max_logit=True, backend=BACKEND)
    expected = flash_ext.attention(q, k, v, **options, return_lse=True, return_max_logit=True, backend="reference")
    visible = expected[1].isfinite()
    assert visible.any() and torch.equal(got[1].isfinite(), visible) and got[0].isfinite().all()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)
    nothing = flash_ext.attention(q, torch.full_like(k, -torch.inf), v, return_lse=True, backend=BACKEND)
    assert not nothing[0].any() and (nothing[1] == -torch.inf).all()


@pytest.mark.parametrize("heads,heads_kv", ((2, 1), (6, 2), (5, 1), (70, 1)))
@pytest.mark.parametrize("options", ({}, {"causal": True}, {"window_size": (40, 3)}, {"softcap": 5.0, "causal": True}), ids=str)
def test_heads_that_share_a_tile_give_the_bits_of_heads_alone(heads: int, heads_kv: int, options: dict, schedule) -> None:
    schedule("checks")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 64, generator=generator).bfloat16() for n, h in ((9, heads), (200, heads_kv), (200, heads_kv)))
    extra = {"sinks": torch.randn(heads, generator=generator), "alibi_slopes": torch.rand(2, heads, generator=generator)}
    if "softcap" not in options:
        extra.pop("alibi_slopes")
    assert flash_ext.explain(q, k, v, **options, **extra).heads_per_tile > 1
    together = flash_ext.attention(q, k, v, **options, **extra, return_lse=True, return_max_logit=True, backend=BACKEND)
    for head in range(heads):
        mine, shared = slice(head, head + 1), slice(head // (heads // heads_kv), head // (heads // heads_kv) + 1)
        part = {name: tensor[..., mine].contiguous() for name, tensor in extra.items()}
        alone = flash_ext.attention(
            q[:, :, mine], k[:, :, shared], v[:, :, shared], **options, **part, return_lse=True, return_max_logit=True,
            backend=BACKEND,
        )  # fmt: skip
        assert torch.equal(together[0][:, :, mine], alone[0]) and torch.equal(together[1][:, mine], alone[1])
        assert torch.equal(together[2][mine], alone[2])


@pytest.mark.parametrize("dim", (0, 1, 2))
def test_offsets_beyond_31_bits(dim: int, schedule) -> None:
    """Elements that lie more than 2^31 apart, in the batch's, the rows' or the heads' direction; the memory is never touched."""
    schedule("plain")
    generator = torch.Generator().manual_seed(0)
    small = [torch.randn(2, 2, 2, 64, generator=generator).bfloat16() for _ in range(3)]
    far = []
    for tensor in small:
        strides = [256, 128, 64, 1]
        strides[dim] = 2**31 + 512
        far.append(torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor))
    expected = flash_ext.attention(*small, causal=True, backend=BACKEND)
    assert torch.equal(flash_ext.attention(*far, causal=True, backend=BACKEND), expected)


@pytest.mark.parametrize("scale", (1.0, 1e30, 1e38))
@pytest.mark.parametrize("sign", (1, -1))
def test_scores_below_zero_at_large_scales(scale: float, sign: int, schedule) -> None:
    """Every score is negative, and the scale brings tiny products to ordinary size."""
    schedule("plain")
    generator = torch.Generator().manual_seed(0)
    size = scale**-0.5
    q = torch.full((1, 40, 1, 64), -sign * size).bfloat16()
    k = ((torch.rand(1, 300, 1, 64, generator=generator) / 8 + 0.01) * size).bfloat16()
    v = torch.randn(1, 300, 1, 64, generator=generator).bfloat16()
    got = flash_ext.attention(q, k, v, softmax_scale=sign * scale, return_lse=True, backend=BACKEND)
    want = flash_ext.attention(q, k, v, softmax_scale=sign * scale, return_lse=True, backend="reference")
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)
