"""Absorbed latent attention in the words of FlashMLA and of FlashAttention-3 (qv)."""

from __future__ import annotations

import inspect

import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

from flash_ext import attention_with_kvcache
from flash_ext.compat import flash_attn_3, flash_mla

CASE = Case("compat", (70, 9), head_dim=576, head_dim_v=512, num_heads=4, num_heads_kv=1, seqlen_q=2, page_size=64, shared=True)


def made_and_expected(**options) -> tuple[dict, tuple[torch.Tensor, torch.Tensor]]:
    made = kvcache_cases.build(CASE, "cpu", torch.float32)
    return made, attention_with_kvcache(**made, **options, return_lse=True)


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_signature_is_that_of_flash_mla() -> None:
    assert list(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters) == [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits", "softmax_scale",
        "causal", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
        "extra_topk_length",
    ]  # fmt: skip


@pytest.mark.parametrize("causal", (False, True))
def test_flash_mla_is_the_same_function(causal: bool) -> None:
    made, expected = made_and_expected(causal=causal, softmax_scale=192**-0.5)
    q, cache, table, lengths = (made[name] for name in ("q", "k_cache", "page_table", "cache_seqlens"))
    plan = flash_mla.get_mla_metadata(lengths, 2 * 4, 1)
    got = flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *plan, softmax_scale=192**-0.5, causal=causal)
    assert same(got, expected)
    assert not flash_mla.flash_mla_with_kvcache(q.requires_grad_(), cache, table, lengths, 512)[0].requires_grad


def test_sparse_attention_is_refused() -> None:
    made, _ = made_and_expected()
    q, cache, table, lengths = (made[name] for name in ("q", "k_cache", "page_table", "cache_seqlens"))
    with pytest.raises(NotImplementedError, match=r"not supported by flash_ext: indices=int32 tensor of shape \(2, 2, 8\)"):
        flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, indices=torch.zeros(2, 2, 8, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="is_fp8_kvcache=True"):
        flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, is_fp8_kvcache=True)


def halves(made: dict) -> dict:
    q, cache = made["q"], made["k_cache"]
    pairs = {"q": q[..., 512:], "qv": q[..., :512], "k_cache": cache[..., 512:], "v_cache": cache[..., :512]}
    return {**pairs, "cache_seqlens": made["cache_seqlens"], "page_table": made["page_table"]}


def test_qv_of_flash_attention_3() -> None:
    made, expected = made_and_expected(causal=True)
    out, lse, *_ = flash_attn_3.flash_attn_with_kvcache(**halves(made), causal=True, return_softmax_lse=True)
    assert same((out, lse), expected)
    # New rows come in two pieces.
    row = torch.randn(2, 1, 1, 576)
    other = kvcache_cases.build(CASE, "cpu", torch.float32)
    expected = attention_with_kvcache(**{**other, "k": row}, causal=True)
    out = flash_attn_3.flash_attn_with_kvcache(**halves(made), k=row[..., 512:], v=row[..., :512], causal=True)
    assert torch.equal(out, expected) and torch.equal(made["k_cache"].nan_to_num(), other["k_cache"].nan_to_num())


def test_qv_needs_one_memory() -> None:
    given = halves(made_and_expected()[0])
    with pytest.raises(NotImplementedError, match=r"v_cache = cache\[..., :512\] and k_cache = cache\[..., 512:\]"):
        flash_attn_3.flash_attn_with_kvcache(**{**given, "k_cache": given["k_cache"].clone()})
    with pytest.raises(ValueError, match="k and v must be given together"):
        flash_attn_3.flash_attn_with_kvcache(**given, k=torch.randn(2, 1, 1, 64))
    with pytest.raises(NotImplementedError, match="rotary_cos"):
        flash_attn_3.flash_attn_with_kvcache(**given, rotary_cos=torch.ones(99, 8), rotary_sin=torch.ones(99, 8))
