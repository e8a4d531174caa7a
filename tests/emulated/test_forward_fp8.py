"""The FP8 forward, emulated: every row against the reference with the same scales, exact probes, schedules, and the
accuracy of its sums under the model of Hopper's accumulator."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import cases
import pytest
import torch
from cases import Case, packed

import flash_ext
from flash_ext import _emulator, _host, env

if env.EMULATE in ("sm80", "sm86"):
    pytest.skip("8-bit floats begin with compute capability 8.9", allow_module_level=True)

ARCH, BACKEND = ("sm90", "sm90") if env.EMULATE == "sm90" else ("sm89", "sm80")  # the group of rows, and its name in calls
HEAD_DIMS = (64, 96, 128, 192, 256) if ARCH == "sm90" else (64, 128, 256)  # of rows
HAS_UNFLUSHED = ARCH == "sm90"  # elsewhere flushing is free
ROWS = {row["name"]: row for row in _host.variants() if row["op"] == "fwd_fp8" and row["arch"] == int(ARCH[2:])}
# Weights are rounded to three mantissa bits: at most 2^-4 relative, 0.026 in the mean, of which sums keep about that.
FROBENIUS_BOUND = 0.032


def quantised(case: Case, scale: str) -> tuple[dict, dict]:
    """The case's tensors in e4m3 with their scales, and its side tensors."""
    tensors = cases.build(case, "cpu", torch.bfloat16)
    side = dict(tensors.side)
    q8, q_descale = flash_ext.quantize_fp8(tensors.q, scale, True, cu_seqlens=side.get("cu_seqlens_q"))
    k8, k_descale = flash_ext.quantize_fp8(tensors.k, scale, True, cu_seqlens=side.get("cu_seqlens_k"))
    v8, v_descale = flash_ext.quantize_fp8(tensors.v, scale, cu_seqlens=side.get("cu_seqlens_k"))
    return dict(q=q8, k=k8, v=v8), dict(side, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)


def row_name(head_dim: int, mask: str, kind: str) -> str:
    return f"fwd_fp8_{ARCH}_e4m3_d{head_dim}_{mask}_{kind}"


def expected_row(case: Case, scale: str, flush: int | None = None) -> str:
    head_dim = next(d for d in HEAD_DIMS if d >= max(case.head_dim, case.head_dim_v or case.head_dim))
    local = case.window_size != (-1, -1) or case.softcap > 0 or case.alibi or case.k_bias
    # Where keys do not begin with a block of scales, the most general row aligns them.
    local = local or (scale == "block" and (case.leftpad_k or case.leftpad_q or any(b % 64 for b in (case.splits or ())[:-1])))
    if local:
        return row_name(head_dim, "local_scored", "block")
    kind = "block" if scale == "block" else "head_unflushed" if flush == 0 and HAS_UNFLUSHED else "head"
    return row_name(head_dim, "causal" if case.causal and case.seqlen_q > 1 else "full", kind)


def attend(case: Case, tensors: dict, more: dict, backend: str, **options) -> tuple[torch.Tensor, ...]:
    options = {**case.options, **more, "backend": backend, "out_dtype": torch.float16, **options}
    if case.splits is None:
        options |= {"return_lse": True, "return_max_logit": case.max_logit}
    return case.function(*tensors.values(), **options)


def assert_close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    out, lse = got[0].double(), got[1]
    expected, expected_lse = want[0].double(), want[1]
    assert not torch.isnan(out).any()
    norm = expected.norm()
    assert (out - expected).norm() <= FROBENIUS_BOUND * norm + 1e-6
    if expected.numel():
        # A row of few keys shows the rounding of single weights.
        assert (out - expected).abs().max() <= 2**-4 * expected.abs().max() * 2 + 1e-3
    hidden = torch.isinf(expected_lse)
    assert torch.equal(torch.isinf(lse), hidden)
    torch.testing.assert_close(lse[~hidden], expected_lse[~hidden], rtol=1e-5, atol=1e-5)
    for left, right in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def check(case: Case, scale: str, **options) -> None:
    tensors, more = quantised(case, scale)
    _emulator.reset_reports()
    with cases.poisoned_memory():
        got = attend(case, tensors, more, BACKEND, **options)
    ran = {report.kernel for report in _emulator.reports() if report.kernel.startswith("fwd_fp8")}
    assert ran == {expected_row(case, scale, options.get("flush_every"))}
    assert_close(got, attend(case, tensors, more, "reference", **options))


DENSE = tuple(
    case
    for d in HEAD_DIMS
    for case in (
        Case("full", 200, 530, num_heads=2, num_heads_kv=1, head_dim=d),
        Case("causal", 300, 460, batch=1, num_heads=4, num_heads_kv=2, head_dim=d, causal=True),
        Case("tall", 330, 120, batch=1, head_dim=d, causal=True),
        Case("scale", 150, 210, batch=1, head_dim=d, softmax_scale=-0.2, sinks=True),
        Case("zero", 70, 100, batch=1, head_dim=d, softmax_scale=0.0, causal=True),
        Case("one", 1, 1, batch=1, head_dim=d),
        Case("no_key", 130, 0, batch=1, head_dim=d),
    )
)
GENERAL = tuple(
    case
    for d in HEAD_DIMS
    for case in (
        Case("window", 300, 500, num_heads_kv=1, head_dim=d, window_size=(100, 30), max_logit=True),
        Case("left", 260, 400, batch=1, head_dim=d, causal=True, window_size=(64, 0)),
        Case("scored", 130, 300, num_heads_kv=1, head_dim=d, softcap=5.0, alibi="batch", k_bias="hidden", sinks=True, causal=True),
        Case("capped", 130, 300, batch=1, head_dim=d, softcap=2.0, softmax_scale=-0.3),
    )
)
LENGTHS = ((100, 100), (1, 333), (0, 20), (130, 0), (257, 129), (64, 64))
PACKED = tuple(
    case
    for d in HEAD_DIMS
    for case in (
        packed("full", LENGTHS, num_heads_kv=1, head_dim=d),
        packed("causal", LENGTHS, beyond=(9, 70), head_dim=d, causal=True, sinks=True),
        packed("window", LENGTHS, head_dim=d, window_size=(50, 10)),
        packed("used", LENGTHS, head_dim=d, causal=True, seqused_k=(90, 300, 20, 0, 1, 64), seqused_q=(99, 1, 0, 7, 200, 64)),
    )
)  # fmt: skip
ODD = tuple(
    Case("zero_fill", 100, 190, batch=1, num_heads_kv=1, head_dim=d, head_dim_v=d_v, causal=n % 2 == 0)
    for n, (d, d_v) in enumerate(((16, 16), (48, 80), (80, 48), (112, 112), (128, 64), (64, 192), (176, 160), (208, 256)))
)


@pytest.mark.parametrize("scale", ("tensor", "head", "block"))
@pytest.mark.parametrize("case", (*DENSE, *GENERAL, *PACKED, *ODD), ids=lambda c: c.name)
def test_case(case: Case, scale: str, schedule) -> None:
    schedule({"tensor": "late", "head": "checks", "block": "checks"}[scale])
    check(case, scale)


@pytest.mark.parametrize("case", [c for c in DENSE if c.softmax_scale is None], ids=lambda c: c.name)
def test_sums_that_are_never_flushed(case: Case, schedule) -> None:
    schedule("checks")
    check(case, "head", flush_every=0)


def test_parts_of_the_keys_with_head_scales(schedule) -> None:
    schedule("checks")
    case = Case("splits", 130, 500, num_heads_kv=1, head_dim=128, causal=True, splits=(0, 100, 100, 317, 500))
    check(case, "head")


def test_parts_of_the_keys_with_block_scales(schedule) -> None:
    schedule("checks")
    for head_dim in (64, 128):
        splits = (0, 64, 64, 320, 500)
        check(Case("splits", 130, 500, num_heads_kv=1, head_dim=head_dim, causal=True, splits=splits), "block")


def test_padding_at_the_left_with_head_scales(schedule) -> None:
    schedule("checks")
    check(packed("leftpad", LENGTHS, head_dim=128, causal=True, leftpad_k=(30, 1, 0, 0, 100, 64)), "head")


MASKS = ({}, {"causal": True}, {"window_size": (70, 20)}, {"softcap": 5.0, "causal": True}, {"softmax_scale": -0.3})
hopper = pytest.mark.skipif(ARCH != "sm90", reason="Hopper's general rows alone align keys with blocks of scales")


@hopper
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_padding_at_the_left_with_block_scales(head_dim: int, mask: dict, schedule) -> None:
    """Blocks count from a sequence's first row, padding included; in the padding of v stands NaN."""
    schedule("checks")
    fields = dict(head_dim=head_dim, num_heads_kv=1, leftpad_k=(30, 1, 0, 0, 129, 64), **mask)
    check(packed("leftpad", LENGTHS, **fields), "block")
    check(packed("leftpad", LENGTHS, leftpad_q=(3, 0, 0, 100, 70, 64), sinks=True, **fields), "block")


@hopper
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_parts_of_the_keys_that_begin_within_a_block(head_dim: int, mask: dict, schedule) -> None:
    schedule("checks")
    for splits in ((0, 100, 100, 317, 500), (0, 1, 63, 64, 65, 500), (0, 7, 440, 499, 500)):
        check(Case("splits", 130, 500, num_heads_kv=1, head_dim=head_dim, splits=splits, **mask), "block")


def test_scales_of_groups_of_query_heads(schedule) -> None:
    """q_descale (batch, num_heads_kv), as FlashAttention-3 takes it."""
    schedule("checks")
    torch.manual_seed(0)
    q8, k8, v8 = (torch.randn(2, 100, heads, 64).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    of_groups = torch.rand(2, 2) + 0.5
    options = dict(k_descale=torch.rand(2, 2) + 0.5, v_descale=torch.tensor(0.7), return_lse=True)
    got = flash_ext.attention(q8, k8, v8, q_descale=of_groups, backend=BACKEND, **options)
    same = flash_ext.attention(q8, k8, v8, q_descale=of_groups.repeat_interleave(2, 1), backend=BACKEND, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    assert_close(got, flash_ext.attention(q8, k8, v8, q_descale=of_groups, backend="reference", **options))
    assert got[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ("head", "block", "head_unflushed", "scored"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_hot_values_spell_out_the_weights(head_dim: int, causal: bool, kind: str, schedule) -> None:
    """Row i attends to one key alone, so out must be that key's value: exact, whatever order the keys and columns took."""
    schedule("checks")
    seqlen, bits = 300, 9
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, seqlen, (seqlen,), generator=generator)
    if causal:
        target = torch.minimum(target, torch.arange(seqlen))
    corner = ((torch.arange(seqlen)[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1
    k = torch.zeros(1, seqlen, 1, head_dim)
    k[0, :, 0, -bits:] = 16 * corner
    v = torch.zeros(1, seqlen, 1, head_dim)
    for digit in range(3):  # the key's number in three digits of base 8, in changing columns
        v[0, :, 0, digit::3] = (torch.arange(seqlen) >> (3 * digit) & 7).float()[:, None]
    v[..., 1::2] *= -1
    q8, k8, v8 = (t.to(torch.float8_e4m3fn) for t in (k[:, target], k, v))
    options = dict(causal=causal, softmax_scale=1.0, backend=BACKEND)
    if kind == "head_unflushed":
        options["flush_every"] = 0
    if kind == "scored":
        options["k_bias"] = torch.zeros(1, 1, seqlen)
    if kind == "block":
        options["v_descale"] = torch.full((1, 1, 5), 2.0)
    out = flash_ext.attention(q8, k8, v8, **options)
    assert torch.equal(out.float(), v[:, target] * (2.0 if kind == "block" else 1.0))


@pytest.mark.parametrize("num_sms", (1, 3))
@pytest.mark.parametrize("scale,flush", (("head", None), ("block", None), ("head", 0)))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_schedule_gives_the_same_bits(head_dim: int, scale: str, flush: int | None, num_sms: int, schedule) -> None:
    """Long enough that persistent CTAs take several tiles and every ring of stages wraps."""
    case = Case("wrap", 300, 900, batch=1, num_heads_kv=1, head_dim=head_dim, causal=True)
    tensors, more = quantised(case, scale)
    results = []
    for name in ("plain", "late", "adversarial1", "adversarial2", "adversarial3"):
        schedule(name, sms=num_sms)
        with cases.poisoned_memory():
            results.append(attend(case, tensors, more, BACKEND, flush_every=flush))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_scales_that_differ_by_far_stay_exact_in_the_score(schedule) -> None:
    """Blocks of keys and values whose scales span 2^40: lse and out as with the values written out."""
    schedule("checks")
    torch.manual_seed(0)
    q = torch.randn(1, 128, 1, 64)
    k, v = (torch.randn(1, 512, 1, 64) for _ in range(2))
    size = torch.tensor([1.0, 2.0**-20, 2.0**-40, 3.0, 2.0**-8, 1.0, 0.5, 2.0**-30]).repeat_interleave(64)[None, :, None, None]
    (q8, qd), (k8, kd), (v8, vd) = (flash_ext.quantize_fp8(t) for t in (q, k * size, v * size.flip(1)))
    options = dict(q_descale=qd, k_descale=kd, v_descale=vd, return_lse=True, out_dtype=torch.float16)
    for more in ({}, {"causal": True}, {"softcap": 30.0}):
        got = flash_ext.attention(q8, k8, v8, backend=BACKEND, **options, **more)
        assert_close(got, flash_ext.attention(q8, k8, v8, backend="reference", **options, **more))


@functools.cache
def _sum_errors(seqlen: int, head_dim: int) -> dict[str, float]:
    """RMS error of weighted sums under the model of the accumulator, relative to the RMS of the result. Values of one
    sign and equal scores make it a plain sum: the worst that a long row does to an accumulator of 14 bits."""
    generator = torch.Generator().manual_seed(0)
    q8 = torch.zeros(1, 1, 1, head_dim).to(torch.float8_e4m3fn)
    k8 = torch.randn(1, seqlen, 1, head_dim, generator=generator).to(torch.float8_e4m3fn)
    v8 = torch.rand(1, seqlen, 1, head_dim, generator=generator).to(torch.float8_e4m3fn)
    before = _emulator.get_options()
    errors = {}
    try:
        for name, bits, flush in (("flushed", 13, None), ("unflushed", 13, 0), ("exact", 0, 0)):
            options = _emulator.Options(before)
            options.checks, options.schedule, options.fp8_fraction_bits = False, "early", bits
            _emulator.set_options(options)
            out = flash_ext.attention(q8, k8, v8, backend=BACKEND, out_dtype=torch.float16, flush_every=flush)
            error = out.double() - v8.double().mean(1, keepdim=True)
            errors[name] = (error.square().mean().sqrt() / v8.double().mean()).item()
    finally:
        _emulator.set_options(before)
    return errors


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_flushing_bounds_the_error_of_long_sums(head_dim: int) -> None:
    short, long = _sum_errors(512, head_dim), _sum_errors(16384, head_dim)
    fp16 = 2.0**-11
    assert short["exact"] < fp16 and long["exact"] < fp16
    assert long["flushed"] < 3 * fp16  # whatever the length: a tile's sum is truncated, then added in float32
    if HAS_UNFLUSHED:
        assert long["unflushed"] > 8 * long["flushed"]  # and grows with the length
        assert long["unflushed"] > 4 * short["unflushed"]
    else:
        assert long["unflushed"] == long["flushed"]


def test_errors_and_fallbacks() -> None:
    q = torch.zeros(1, 64, 1, 40).to(torch.float8_e4m3fn)
    assert "multiple of 16" in " ".join(flash_ext.supported(q, q, q)[BACKEND])
    with pytest.warns(flash_ext.FallbackWarning, match="multiple of 16"):
        flash_ext.attention(q, q, q)
    with pytest.raises(ValueError, match="cannot run this"):
        flash_ext.attention(q, q, q, backend=BACKEND)
    q = torch.zeros(1, 130, 1, 64).to(torch.float8_e4m3fn)
    blocks = torch.ones(1, 1, 3)
    options = dict(split_boundaries=(0, 60, 130), k_descale=blocks)
    if ARCH == "sm89":
        with pytest.raises(ValueError, match="block scales with split_boundaries that"):
            flash_ext.attention_partials(q, q, q, backend=BACKEND, **options)
    general = flash_ext.explain(q, q, q, device_info="sm90", **options)
    assert general.variant == "fwd_fp8_sm90_e4m3_d64_local_scored_block"
    explanation = flash_ext.explain(q, q, q, device_info="sm90", k_descale=blocks, causal=True)
    assert explanation.variant == "fwd_fp8_sm90_e4m3_d64_causal_block" and explanation.tile == (128, 192)
    assert flash_ext.explain(q, q, q, device_info="sm120").variant == "fwd_fp8_sm89_e4m3_d64_full_head"
    assert flash_ext.explain(q, q, q, device_info="sm80").backend == "reference"


SEQLENS = (Path(__file__).resolve().parents[2] / "csrc/common/seqlens.cuh").read_text().splitlines()


def reads_padding(ptx: list[str], block) -> bool:
    """Whether a PTX block is there for leftpad, which plain rows for blocks never take: the most general ones do."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', "\n".join(ptx), re.MULTILINE))
    for line in ptx[block.first_line - 1 : block.last_line]:
        place = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if place and files[place[1]].endswith("seqlens.cuh") and "leftpad" in SEQLENS[int(place[2]) - 1]:
            return True
    return False


def coverage_cases(head_dim: int) -> list[Case]:
    """Everything that a row decides at run time, for rows of one head_dim."""
    more = []
    for mask in ({}, {"causal": True}, {"window_size": (90, 20)}):
        fields = {"head_dim": head_dim, **mask}
        more += [
            Case("splits", 130, 500, num_heads_kv=1, splits=(0, 100, 100, 317, 500), **fields),
            Case("logits", 100, 150, num_heads_kv=1, max_logit=True, sinks=True, softmax_scale=-0.2, **fields),
            Case("low", 5, 2, num_heads=6, num_heads_kv=1, max_logit=True, softmax_scale=3.0, **fields),
            Case("heads", 5, 300, num_heads=6, num_heads_kv=1, max_logit=True, sinks=True, **fields),
            Case("zero", 100, 150, softmax_scale=0.0, max_logit=True, **fields),
            packed("heads", LENGTHS, num_heads=6, num_heads_kv=1, max_logit=True, **fields),
            packed("pads", LENGTHS, leftpad_k=(30, 1, 0, 0, 100, 64), leftpad_q=(1, 0, 0, 5, 0, 2), **fields),
            packed("used", LENGTHS, seqused_k=(90, 300, 20, 0, 1, 64), seqused_q=(99, 1, 0, 7, 200, 64), **fields),
            packed("one", ((70, 90),), **fields),
        ]
    for mask in ({}, {"window_size": (90, 20)}):
        more += [
            # Single scores below zero, in a head's own tile and in a shared one; a last tile of keys that is full, with scores on
            # either side of what a cap bends.
            Case("single", 1, 1, batch=1, num_heads=16, num_heads_kv=1, max_logit=True, softcap=9.0, head_dim=head_dim, **mask),
            Case("single", 1, 1, batch=1, num_heads=8, num_heads_kv=8, max_logit=True, softcap=9.0, head_dim=head_dim, **mask),
            Case("long", 300, 960, softcap=600.0, softmax_scale=200.0, k_bias="normal", head_dim=head_dim, **mask),
        ]
        more += [
            Case("capped", 100, 500, softcap=cap, softmax_scale=scale, alibi=alibi, k_bias=bias, head_dim=head_dim, **mask)
            for cap, scale, alibi, bias in (
                (0.0, None, "heads", ""), (1.0, None, "", "normal"), (3000.0, None, "batch", ""), (1e5, None, "", "nothing"),
                (600.0, 50.0, "", ""),
            )
        ]  # fmt: skip
    return more


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_block_of_every_row_is_executed(head_dim: int, schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for case in (*(c for c in (*DENSE, *GENERAL, *PACKED) if c.head_dim == head_dim), *coverage_cases(head_dim)):
        # Parts that begin with a block of scales run on rows of their own mask, others on the most general one.
        aligned = [Case(**{**case.__dict__, "splits": (0, 64, 64, 320, 500)})] if case.splits else []
        runs = [(case, "tensor"), (case, "head"), *((c, "block") for c in (case, *aligned))]
        for case, scale in runs:
            if scale == "block" and ARCH == "sm89" and (case.leftpad_k or (case.splits and case not in aligned)):
                continue
            tensors, more = quantised(case, scale)
            plain = {name: tensor for name, tensor in more.items() if "descale" not in name}
            for flush in (None, 0):
                for dtype in (torch.float16, torch.bfloat16):
                    attend(case, tensors, more, BACKEND, flush_every=flush, out_dtype=dtype)
                attend(case, tensors, plain, BACKEND, flush_every=flush)
                if scale == "block":  # of one tensor alone
                    attend(case, tensors, {**plain, "k_descale": more["k_descale"]}, BACKEND, flush_every=flush)
                    attend(case, tensors, {**plain, "v_descale": more["v_descale"]}, BACKEND, flush_every=flush)
                    attend(case, tensors, {**plain, "q_descale": more["q_descale"]}, BACKEND, flush_every=flush)
    for mask in ({}, {"causal": True}, {"window_size": (90, 20)}):
        # Keys behind the sequence, so that two of three heads fill the cache's budget and a smaller group follows.
        beyond = (0, 3_200_000 // head_dim)
        case = packed("groups", ((7, 90),), num_heads=3, num_heads_kv=3, beyond=beyond, head_dim=head_dim, **mask)
        tensors = cases.build(case, "cpu", torch.bfloat16)
        e4m3 = {name: getattr(tensors, name).to(torch.float8_e4m3fn) for name in "qkv"}
        slots = e4m3["k"].shape[0] // 64 + 1
        for more in ({}, {"k_descale": torch.ones(1, 3, slots)}):
            attend(case, e4m3, {**tensors.side, **more}, BACKEND)
    reports = [r for r in _emulator.reports() if r.kernel.startswith("fwd_fp8")]
    assert {r.kernel for r in reports} == {name for name, row in ROWS.items() if row["head_dim"] == head_dim}
    missed = []
    for report in reports:
        ptx = _emulator.kernel_ptx(report.kernel).splitlines()
        for block in report.blocks:
            plain_block = report.kernel.endswith("_block") and "scored" not in report.kernel
            if not block.executions and not (plain_block and reads_padding(ptx, block)):
                text = [line.strip() for line in ptx[block.first_line - 1 : block.last_line] if ".loc" not in line]
                missed.append(f"{report.kernel}, PTX lines {block.first_line} to {block.last_line}: {' '.join(text[:4])}")
    assert not missed, "\n".join(missed)


def test_rows_beyond_the_sequence_hold_nan(schedule) -> None:
    """What lies behind a tensor's rows and columns must not show."""
    schedule("checks")
    torch.manual_seed(0)
    clean = [torch.randn(1, 200, 2, 96).to(torch.float8_e4m3fn) for _ in range(3)]
    expected = flash_ext.attention(*clean, causal=True, backend=BACKEND)
    assert torch.isfinite(expected).all()
    poisoned = []
    for tensor in clean:
        larger = torch.full((3, 400, 4, 128), torch.nan).to(torch.float8_e4m3fn)
        larger[1:2, :200, 1:3, :96] = tensor
        poisoned.append(larger[1:2, :200, 1:3, :96])
    assert torch.equal(flash_ext.attention(*poisoned, causal=True, backend=BACKEND), expected)
