"""flash_ext.compat: flash-attn's functions, their signatures, and bert_padding."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch import Tensor

import flash_ext
import flash_ext.compat as compat
from flash_ext.compat import bert_padding, flash_attn_3

_TAIL_2 = (
    ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0),
    ("alibi_slopes", None), ("deterministic", False), ("return_attn_probs", False),
)  # fmt: skip
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_DESCALES = (("q_descale", None), ("k_descale", None), ("v_descale", None))
_TAIL_3 = (("window_size", (-1, -1)), ("attention_chunk", 0), ("softcap", 0.0))
_TUNING_3 = (("num_splits", 1), ("pack_gqa", None), ("deterministic", False), ("sm_margin", 0), ("return_attn_probs", False))
# (required, with defaults), in order, as flash-attn 2.8 and its hopper/flash_attn_interface.py have them.
SIGNATURES = {
    compat.flash_attn_func: (("q", "k", "v"), _TAIL_2),
    compat.flash_attn_qkvpacked_func: (("qkv",), _TAIL_2),
    compat.flash_attn_kvpacked_func: (("q", "kv"), _TAIL_2),
    compat.flash_attn_varlen_func: (("q", "k", "v", *_LENGTHS), (*_TAIL_2, ("block_table", None))),
    compat.flash_attn_varlen_qkvpacked_func: (("qkv", "cu_seqlens", "max_seqlen"), _TAIL_2),
    compat.flash_attn_varlen_kvpacked_func: (("q", "kv", *_LENGTHS), _TAIL_2),
    flash_attn_3.flash_attn_func: (
        ("q", "k", "v"), (("softmax_scale", None), ("causal", False), ("qv", None), *_DESCALES, *_TAIL_3, *_TUNING_3),
    ),
    flash_attn_3.flash_attn_varlen_func: (
        ("q", "k", "v", *_LENGTHS),
        (
            ("seqused_q", None), ("seqused_k", None), ("softmax_scale", None), ("causal", False), ("qv", None), *_DESCALES,
            *_TAIL_3, *_TUNING_3,
        ),
    ),
    flash_attn_3.flash_attn_qkvpacked_func: (
        ("qkv",),
        (
            ("softmax_scale", None), ("causal", False), *_DESCALES, *_TAIL_3, ("deterministic", False), ("num_heads_q", None),
            ("sm_margin", 0), ("return_attn_probs", False),
        ),
    ),
    flash_attn_3.flash_attn_combine: (("out_partial", "lse_partial"), (("out", None), ("out_dtype", None))),
    compat.flash_attn_with_kvcache: (
        ("q", "k_cache", "v_cache"),
        (
            ("k", None), ("v", None), ("rotary_cos", None), ("rotary_sin", None), ("cache_seqlens", None),
            ("cache_batch_idx", None), ("cache_leftpad", None), ("block_table", None), ("softmax_scale", None), ("causal", False),
            ("window_size", (-1, -1)), ("softcap", 0.0), ("rotary_interleaved", True), ("alibi_slopes", None), ("num_splits", 0),
            ("return_softmax_lse", False),
        ),
    ),
    flash_attn_3.flash_attn_with_kvcache: (
        ("q", "k_cache", "v_cache"),
        (
            ("k", None), ("v", None), ("qv", None), ("rotary_cos", None), ("rotary_sin", None), ("cache_seqlens", None),
            ("cache_batch_idx", None), ("cache_leftpad", None), ("page_table", None), ("cu_seqlens_q", None),
            ("cu_seqlens_k_new", None), ("max_seqlen_q", None), ("rotary_seqlens", None), *_DESCALES, ("softmax_scale", None),
            ("causal", False), *_TAIL_3, ("rotary_interleaved", True), ("scheduler_metadata", None), ("num_splits", 0),
            ("pack_gqa", None), ("sm_margin", 0), ("return_softmax_lse", False),
        ),
    ),
    flash_attn_3.get_scheduler_metadata: (
        ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim", "cache_seqlens"),
        (
            ("qkv_dtype", torch.bfloat16), ("headdim_v", None), ("cu_seqlens_q", None), ("cu_seqlens_k_new", None),
            ("cache_leftpad", None), ("page_size", None), ("max_seqlen_k_new", 0), ("causal", False), ("window_size", (-1, -1)),
            ("attention_chunk", 0), ("has_softcap", False), ("num_splits", 0), ("pack_gqa", None), ("sm_margin", 0),
        ),
    ),
    bert_padding.unpad_input: (("hidden_states", "attention_mask"), (("unused_mask", None),)),
    bert_padding.unpad_input_for_concatenated_sequences: (("hidden_states", "attention_mask_in_length"), ()),
    bert_padding.pad_input: (("hidden_states", "indices", "batch", "seqlen"), ()),
}  # fmt: skip


def name_of(function) -> str:
    return f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"


@pytest.mark.parametrize("function", SIGNATURES, ids=name_of)
def test_signatures_are_the_originals(function):
    required, defaults = SIGNATURES[function]
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    assert [(p.name, p.default) for p in parameters] == [*((n, inspect.Parameter.empty) for n in required), *defaults]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None, scale=None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of (batch, seqlen, heads, dim), by the definition in flash-attn's documentation."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    seqlen_q, seqlen_k = scores.shape[-2:]
    distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)
    if slopes is not None:
        scores = scores - slopes.double().reshape(-1, q.shape[1], 1, 1) * distance.abs()
    left, right = window_size
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance < 0) if causal else (distance < -right if right >= 0 else False)
    hidden |= (distance > left) if left >= 0 else False
    scores = scores.masked_fill(hidden, -math.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    return (p @ v).transpose(1, 2), scores.logsumexp(-1)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "window_negative": {"window_size": (3, -7)},
    "causal_window": {"causal": True, "window_size": (2, 5)},
    "softcap": {"softcap": 2.0},
    "softcap_negative": {"softcap": -1.0},
    "scale": {"softmax_scale": 0.3, "causal": True},
}


def wanted(q, k, v, options):
    window = tuple(-1 if w < 0 else w for w in options.get("window_size", (-1, -1)))
    return oracle(
        q, k, v, options.get("causal", False), window, max(options.get("softcap", 0.0), 0.0), scale=options.get("softmax_scale")
    )


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [(7, 7), (4, 9), (9, 4)], ids=str)
def test_dense_functions(options, lengths):
    q, k, v = random(2, lengths[0], 4, 8), random(2, lengths[1], 2, 8, seed=1), random(2, lengths[1], 2, 8, seed=2)
    out, lse = wanted(q, k, v, options)
    for result in (
        compat.flash_attn_func(q, k, v, return_attn_probs=True, **options),
        compat.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), return_attn_probs=True, **options),
        (*flash_attn_3.flash_attn_func(q, k, v, return_attn_probs=True, **options), q.new_empty(0)),
    ):
        torch.testing.assert_close(result[0], out)
        torch.testing.assert_close(result[1], lse)
        assert result[2].shape == (0,) and result[2].dtype == q.dtype
    torch.testing.assert_close(compat.flash_attn_func(q, k, v, **options), out)
    torch.testing.assert_close(flash_attn_3.flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_qkv(options):
    qkv = random(2, 6, 3, 4, 8).requires_grad_()
    out, lse = wanted(*qkv.unbind(2), options)
    grad = torch.autograd.grad(out.sum(), qkv)[0]
    result = compat.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)
    torch.testing.assert_close(result[:2], (out, lse))
    torch.testing.assert_close(torch.autograd.grad(result[0].sum(), qkv)[0], grad)
    torch.testing.assert_close(flash_attn_3.flash_attn_qkvpacked_func(qkv, **options), out)
    heads = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], dim=2)
    out, lse = wanted(heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:], options)
    result = flash_attn_3.flash_attn_qkvpacked_func(heads, num_heads_q=4, return_attn_probs=True, **options)
    torch.testing.assert_close(result, (out, lse))


LENGTHS_Q, LENGTHS_K = (3, 0, 5, 1), (4, 2, 5, 0)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def per_sequence(q: Tensor, k: Tensor, v: Tensor, lengths_k: tuple[int, ...], options: dict) -> tuple[Tensor, Tensor]:
    parts = [
        wanted(a[None], b[None], c[None], options)
        for a, b, c in zip(q.split(LENGTHS_Q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_varlen_functions(options):
    q, k, v = random(9, 4, 8), random(11, 2, 8, seed=1), random(11, 2, 8, seed=2)
    lengths = (offsets(LENGTHS_Q), offsets(LENGTHS_K), 5, 5)
    expected = per_sequence(q, k, v, LENGTHS_K, options)
    for result in (
        compat.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **options),
        compat.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *lengths, return_attn_probs=True, **options),
        flash_attn_3.flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **options),
    ):
        torch.testing.assert_close(result[:2], expected)
        assert len(result) == 2 or result[2].shape == (0,)
    torch.testing.assert_close(compat.flash_attn_varlen_func(q, k, v, *lengths, **options), expected[0])
    qkv = random(9, 3, 4, 8, seed=3)
    result = compat.flash_attn_varlen_qkvpacked_func(qkv, offsets(LENGTHS_Q), 5, return_attn_probs=True, **options)
    torch.testing.assert_close(result[:2], per_sequence(*qkv.unbind(1), LENGTHS_Q, options))


def test_version_3_takes_dense_tensors_among_packed_ones():
    """Without cu_seqlens a tensor is a batch, of which seqused counts."""
    q, k, v = random(3, 4, 4, 8), random(3, 6, 2, 8, seed=1), random(3, 6, 2, 8, seed=2)
    used_q, used_k = torch.tensor([4, 2, 0], dtype=torch.int32), torch.tensor([6, 3, 5], dtype=torch.int32)
    out, lse = flash_attn_3.flash_attn_varlen_func(q, k, v, None, None, 4, 6, used_q, used_k, causal=True, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (3, 4, 4)
    for b in range(3):
        rows, keys = int(used_q[b]), int(used_k[b])
        expected = oracle(q[b : b + 1, :rows], k[b : b + 1, :keys], v[b : b + 1, :keys], causal=True)
        torch.testing.assert_close((out[b : b + 1, :rows], lse[b : b + 1, :, :rows]), expected)
        assert out[b, rows:].eq(0).all() and lse[b, :, rows:].eq(-math.inf).all()
    packed = flash_attn_3.flash_attn_varlen_func(
        q.flatten(0, 1), k, v, torch.tensor([0, 4, 8, 12], dtype=torch.int32), None, 4, 6, used_q, used_k, causal=True
    )
    torch.testing.assert_close(packed, out.flatten(0, 1))


def test_combining_parts():
    """Two parts of the keys, and one that nobody sees; heads are the last dimension of lse here."""
    q, k, v = random(2, 5, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    expected_out, expected_lse = oracle(q, k, v)
    (first, lse_1), (second, lse_2) = oracle(q, k[:, :4], v[:, :4]), oracle(q, k[:, 4:], v[:, 4:])
    outs = torch.stack((first, second, torch.full_like(first, torch.nan)))
    lses = torch.stack((lse_1, lse_2, torch.full_like(lse_1, -torch.inf))).transpose(-1, -2)
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    assert lse.shape == (2, 5, 4)
    torch.testing.assert_close((out, lse.transpose(-1, -2)), (expected_out, expected_lse))
    given = torch.empty(2, 5, 4, 8, dtype=torch.bfloat16)
    out, _ = flash_attn_3.flash_attn_combine(outs, lses, given)
    assert out is given and torch.equal(given, expected_out.to(torch.bfloat16))
    assert flash_attn_3.flash_attn_combine(outs, lses, out_dtype=torch.float32)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="out_dtype"):
        flash_attn_3.flash_attn_combine(outs, lses, given, torch.float16)


def test_version_3_with_a_cache():
    """One step: the new row is stored, and attention over what each sequence holds then is returned."""
    q, k_cache, v_cache = random(2, 1, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    k, v = random(2, 1, 2, 8, seed=3), random(2, 1, 2, 8, seed=4)
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    full = [t.clone() for t in (k_cache, v_cache)]
    for b, length in enumerate(lengths.tolist()):
        full[0][b, length], full[1][b, length] = k[b, 0], v[b, 0]
    options = {"cache_seqlens": lengths, "causal": True, "window_size": (4, -9), "softcap": 3.0, "return_softmax_lse": True}
    out, lse, out_accum, lse_accum = flash_attn_3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    assert torch.equal(k_cache, full[0]) and torch.equal(v_cache, full[1])
    assert out_accum.numel() == lse_accum.numel() == 0
    for b, length in enumerate(lengths.tolist()):
        expected = oracle(
            q[b : b + 1], full[0][b : b + 1, : length + 1], full[1][b : b + 1, : length + 1], True, (4, -1), softcap=3.0
        )
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected)
    pages = torch.tensor([[0], [1]], dtype=torch.int32)
    paged = flash_attn_3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths + 1, page_table=pages, window_size=(4, 0), softcap=3.0, num_splits=2
    )
    torch.testing.assert_close(paged, out)
    same = compat.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths + 1, block_table=pages, window_size=(4, 0), softcap=3.0, alibi_slopes=None
    )
    torch.testing.assert_close(same, out)
    everything = compat.flash_attn_with_kvcache(q, k_cache, v_cache, window_size=(-7, -3), softcap=-2.0)
    torch.testing.assert_close(everything, oracle(q, k_cache, v_cache)[0])


def test_version_3_needs_no_plan_of_splits():
    """scheduler_metadata is taken, and changes no bit; what the calls themselves refuse, the plan refuses too."""
    q, k_cache, v_cache = random(2, 1, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    plan = flash_attn_3.get_scheduler_metadata(2, 1, 9, 4, 2, 8, lengths, page_size=16, causal=True, num_splits=4, pack_gqa=True)
    assert plan.dtype == torch.int32 and plan.shape == (0,) and plan.device == lengths.device
    options = {"cache_seqlens": lengths, "causal": True}
    out = flash_attn_3.flash_attn_with_kvcache(q, k_cache, v_cache, scheduler_metadata=plan, pack_gqa=True, **options)
    assert torch.equal(out, flash_attn_3.flash_attn_with_kvcache(q, k_cache, v_cache, **options))
    with pytest.raises(
        ValueError, match=r"cache_seqlens must be int32 of shape \(batch_size,\) = \(3,\), got int32 tensor of shape \(2,\)"
    ):
        flash_attn_3.get_scheduler_metadata(3, 1, 9, 4, 2, 8, lengths)
    with pytest.raises(TypeError, match="got int"):
        flash_attn_3.get_scheduler_metadata(2, 1, 9, 4, 2, 8, 5)
    with pytest.raises(NotImplementedError, match="sm_margin=8"):
        flash_attn_3.get_scheduler_metadata(2, 1, 9, 4, 2, 8, lengths, sm_margin=8)


def test_version_3_with_everything_a_cache_has():
    """Rotary embedding, padding on the left, sequences in any order and splits reach attention_with_kvcache as they are."""
    rotated = {"rotary_cos": random(20, 4), "rotary_sin": random(20, 4, seed=5), "rotary_interleaved": False}
    shared = {"cache_seqlens": torch.tensor([3, 6], dtype=torch.int32), "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32)}
    results = []
    for function, names in (
        (flash_attn_3.flash_attn_with_kvcache, {}),
        (flash_ext.attention_with_kvcache, {"leftpad": "leftpad_k"}),
    ):
        q, k_cache, v_cache = random(2, 2, 4, 8), random(3, 9, 2, 8, seed=1), random(3, 9, 2, 8, seed=2)
        k, v = random(2, 2, 2, 8, seed=3), random(2, 2, 2, 8, seed=4)
        leftpad = {names.get("leftpad", "cache_leftpad"): torch.tensor([1, 0], dtype=torch.int32)}
        out = function(q, k_cache, v_cache, k, v, **rotated, **shared, **leftpad, causal=True, softmax_scale=0.3, num_splits=3)
        results.append((out, k_cache, v_cache))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled():
    """No function breaks the graph."""

    def function(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        dense = compat.flash_attn_func(q[None], k[None], k[None], causal=True, return_attn_probs=True)[0][0]
        packed = compat.flash_attn_varlen_func(q, k, k, lengths, lengths, 5, 5, window_size=(2, 0))
        third = flash_attn_3.flash_attn_varlen_func(q, k[None], k[None], lengths[::2], None, 9, 9, causal=True)
        return dense + packed + third

    q, k, lengths = random(9, 4, 8), random(9, 2, 8, seed=1), torch.tensor([0, 5, 9], dtype=torch.int32)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="eager")(q, k, lengths), function(q, k, lengths))


@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi(per_batch):
    q, k, v = random(2, 5, 4, 8), random(2, 7, 4, 8, seed=1), random(2, 7, 4, 8, seed=2)
    slopes = random(*((2, 4) if per_batch else (4,)), seed=3, dtype=torch.float32).abs()
    out, lse = oracle(q, k, v, causal=True, slopes=slopes)
    result = compat.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    torch.testing.assert_close(result[:2], (out, lse), rtol=1e-6, atol=1e-6)


def test_last_dimensions_that_are_not_contiguous():
    q = random(2, 4, 8, 2).mT
    assert q.stride(-1) != 1
    torch.testing.assert_close(compat.flash_attn_func(q, q, q), oracle(q, q, q)[0])
    torch.testing.assert_close(flash_attn_3.flash_attn_func(q, q, q), oracle(q, q, q)[0])


def test_deterministic_overrides_nothing(monkeypatch):
    """False, flash-attn's default, must not switch torch.use_deterministic_algorithms off."""
    seen = []
    monkeypatch.setattr("flash_ext.compat.flash_attn_2.attention", lambda *a, **o: seen.append(o["deterministic"]) or a[0])
    q = random(1, 2, 1, 8)
    compat.flash_attn_func(q, q, q)
    compat.flash_attn_func(q, q, q, deterministic=True)
    assert seen == [None, True]


Q = random(1, 4, 2, 8, dtype=torch.float32)
PACKED = (Q[0], Q[0], Q[0], offsets((4,)), offsets((4,)), 4, 4)
REFUSED = {
    "dropout": (compat.flash_attn_func, (Q, Q, Q), {"dropout_p": 0.1}, r"flash_attn_func: .*dropout_p=0\.1"),
    "dropout_packed": (compat.flash_attn_varlen_func, PACKED, {"dropout_p": 0.5}, r"flash_attn_varlen_func: .*dropout_p=0\.5"),
    "dropout_qkv": (compat.flash_attn_qkvpacked_func, (torch.stack((Q, Q, Q), 2), 0.2), {}, r"qkvpacked_func: .*dropout_p=0\.2"),
    "dropout_kv": (compat.flash_attn_kvpacked_func, (Q, torch.stack((Q, Q), 2), 0.2), {}, r"kvpacked_func: .*dropout_p=0\.2"),
    "block_table": (
        compat.flash_attn_varlen_func, PACKED, {"block_table": torch.zeros(1, 2, dtype=torch.int32)},
        r"block_table=int32 tensor of shape \(1, 2\)",
    ),
    "fp8": (compat.flash_attn_func, (Q.to(torch.float8_e4m3fn),) * 3, {}, r"q=float8_e4m3fn tensor.*k=.*v="),
    "qv": (flash_attn_3.flash_attn_func, (Q, Q, Q), {"qv": Q}, r"qv=float32 tensor of shape \(1, 4, 2, 8\)"),
    "chunk": (flash_attn_3.flash_attn_func, (Q, Q, Q), {"attention_chunk": 64}, r"attention_chunk=64"),
    "splits": (flash_attn_3.flash_attn_func, (Q, Q, Q), {"num_splits": 3}, r"num_splits=3"),
    "margin": (flash_attn_3.flash_attn_varlen_func, PACKED, {"sm_margin": 8}, r"flash_attn_3.flash_attn_varlen.*sm_margin=8"),
    "margin_cache": (flash_attn_3.flash_attn_with_kvcache, (Q, Q, Q), {"sm_margin": 8}, r"with_kvcache: .*sm_margin=8"),
    "cache_packed": (
        flash_attn_3.flash_attn_with_kvcache, (Q, Q, Q), {"cu_seqlens_q": PACKED[3], "qv": Q}, r"cu_seqlens_q=int32 tensor",
    ),
    "margin_qkv": (flash_attn_3.flash_attn_qkvpacked_func, (torch.stack((Q, Q, Q), 2),), {"sm_margin": 8}, r"sm_margin=8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    function, arguments, options, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        function(*arguments, **options)


def test_fp8_of_version_3():
    """e4m3 q, k and v with scales of (batch, nheads_k), in every function that has them."""
    torch.manual_seed(0)
    batch, seqlen, heads, heads_kv, dim = 2, 70, 4, 2, 16
    q, k, v = (torch.randn(batch, seqlen, h, dim).to(torch.float8_e4m3fn) for h in (heads, heads_kv, heads_kv))
    scales = {f"{name}_descale": torch.rand(batch, heads_kv) + 0.5 for name in "qkv"}
    wide = [
        t.float() * scales[f"{name}_descale"].repeat_interleave(t.shape[2] // heads_kv, 1)[:, None, :, None]
        for t, name in ((q, "q"), (k, "k"), (v, "v"))
    ]
    expected, lse = flash_ext.attention(*wide, causal=True, return_lse=True)
    close = dict(rtol=2**-8, atol=2**-8)
    out, got_lse = flash_attn_3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **scales)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, **close)
    torch.testing.assert_close(got_lse, lse)
    cu = offsets((seqlen,) * batch)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    out = flash_attn_3.flash_attn_varlen_func(*packed, cu, cu, seqlen, seqlen, causal=True, **scales)
    torch.testing.assert_close(out.unflatten(0, (batch, seqlen)).float(), expected, **close)
    joined = torch.cat((q, k, v), 2)
    out = flash_attn_3.flash_attn_qkvpacked_func(joined, causal=True, num_heads_q=heads, **scales)
    torch.testing.assert_close(out.float(), expected, **close)
    out = flash_attn_3.flash_attn_with_kvcache(q, k, v, causal=True, **scales)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, **close)
    caches, rows = (k.clone(), v.clone()), (k[:, -3:], v[:, -3:])
    new = flash_attn_3.flash_attn_with_kvcache(q[:, -3:], *caches, *rows, cache_seqlens=67, causal=True, **scales)
    torch.testing.assert_close(new.float(), expected[:, -3:], **close)
    with pytest.raises(ValueError, match="q_descale, v_descale: only for float8_e4m3fn"):
        flash_attn_3.flash_attn_func(Q, Q, Q, q_descale=torch.ones(1, 2), v_descale=torch.ones(1, 2))
    with pytest.raises(ValueError, match="k_descale: only for a float8_e4m3fn q and caches"):
        flash_attn_3.flash_attn_with_kvcache(Q, Q, Q, k_descale=torch.ones(1, 2))


def test_hints_are_taken():
    for options in ({"num_splits": 0}, {"pack_gqa": True}, {"pack_gqa": False}):
        torch.testing.assert_close(flash_attn_3.flash_attn_func(Q, Q, Q, **options), flash_attn_3.flash_attn_func(Q, Q, Q))


QKV = random(1, 4, 3, 2, 8)
MALFORMED = {
    "no_heads_3": (flash_attn_3.flash_attn_qkvpacked_func, (random(1, 4, 6, 8),), {}, ValueError, r"num_heads_q .*3, nheads"),
    "odd_heads_3": (flash_attn_3.flash_attn_qkvpacked_func, (random(1, 4, 7, 8),), {"num_heads_q": 4}, ValueError, "got 7 and 4"),
    "dimensions_3": (flash_attn_3.flash_attn_qkvpacked_func, (random(4, 6, 8),), {"num_heads_q": 4}, ValueError, "got 3"),
    "two_of_three": (compat.flash_attn_qkvpacked_func, (QKV[:, :, :2],), {}, ValueError, r"qkv must .*got \(1, 4, 2, 2, 8\)"),
    "three_of_two": (compat.flash_attn_kvpacked_func, (Q, QKV), {}, ValueError, r"kv must have shape \(batch, seqlen, 2, nheads"),
    "dense": (compat.flash_attn_varlen_qkvpacked_func, (QKV, PACKED[3], 4), {}, ValueError, r"shape \(total, 3, nheads, headdim\)"),
    "type": (compat.flash_attn_qkvpacked_func, ([1.0],), {}, TypeError, "qkv must be a torch.Tensor, got list"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_packed_tensors(case):
    function, arguments, options, error, message = MALFORMED[case]
    with pytest.raises(error, match=message):
        function(*arguments, **options)


# bert_padding

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("trailing", [(4,), (2, 4)])
def test_unpad_and_pad(dtype, trailing):
    hidden = random(3, 5, *trailing).requires_grad_()
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, MASK.to(dtype))
    assert indices.tolist() == [0, 1, 2, 6, 8, 9] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 6, 6] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int)
    assert used.tolist() == [3, 3, 0] and used.dtype == torch.int32
    assert torch.equal(rows, hidden.flatten(0, 1)[indices])
    padded = bert_padding.pad_input(rows, indices, 3, 5)
    keep = MASK.reshape(3, 5, *(1 for _ in trailing)).double()
    assert torch.equal(padded, hidden * keep)
    (grad,) = torch.autograd.grad((padded * padded).sum(), hidden)
    torch.testing.assert_close(grad, 2 * hidden * keep)


def test_unpad_with_unused_places():
    unused = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    _, indices, cu_seqlens, longest, used = bert_padding.unpad_input(random(3, 5, 2), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 3, 5, 6, 8, 9] and cu_seqlens.tolist() == [0, 4, 8, 8]
    assert longest == 4 and used.tolist() == [3, 3, 0]


def test_unpad_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = random(3, 6, 2)
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32 and longest == 6
    assert torch.equal(rows, hidden.flatten(0, 1)[indices])


def test_rows_by_index():
    rows = random(5, 3).requires_grad_()
    indices = torch.tensor([4, 0, 4])
    picked, residual = bert_padding.index_first_axis_residual(rows, indices)
    assert torch.equal(picked, rows[indices]) and torch.equal(residual, rows)
    assert torch.equal(picked, bert_padding.index_first_axis(rows, indices))
    (grad,) = torch.autograd.grad(picked.sum() + 2 * residual.sum(), rows)
    assert grad[:, 0].tolist() == [3, 2, 2, 2, 4]
    put = bert_padding.index_put_first_axis(rows[:2], torch.tensor([3, 1]), 4)
    assert torch.equal(put, torch.stack((torch.zeros(3).double(), rows[1], torch.zeros(3).double(), rows[0])))


def test_unpadded_attention_equals_attention_over_each_sequence():
    """The way in which models use these functions together."""
    q = random(3, 5, 2, 8)
    rows, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(q, MASK)
    packed = compat.flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    out = bert_padding.pad_input(packed, indices, 3, 5)
    for b in range(3):
        tokens = q[b : b + 1, MASK[b].bool()]
        torch.testing.assert_close(out[b : b + 1, MASK[b].bool()], oracle(tokens, tokens, tokens, causal=True)[0])
        assert out[b, ~MASK[b].bool()].eq(0).all()


def test_the_names_in_the_readme(root):
    """Every import that the README promises works."""
    lines = re.findall(r"\| `(from flash_ext\.compat\S* import [^`]+)` \|", (root / "README.md").read_text())
    assert len(lines) == 4
    for line in lines:
        exec(line, {})
    for form in ("qkvpacked_func", "kvpacked_func", "func"):
        assert callable(getattr(compat, f"flash_attn_{form}")) and callable(getattr(compat, f"flash_attn_varlen_{form}"))
