"""compat.flash_attn_with_kvcache: flash-attn's names and defaults."""

from __future__ import annotations

import inspect

import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

from flash_ext import attention_with_kvcache
from flash_ext.compat.kvcache import flash_attn_with_kvcache

NAMES = {"leftpad_k": "cache_leftpad", "page_table": "block_table"}


def test_the_signature_is_that_of_flash_attn() -> None:
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert list(parameters) == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
        "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
        "return_softmax_lse",
    ]  # fmt: skip
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert parameters["causal"].default is False and parameters["rotary_interleaved"].default is True


@pytest.mark.parametrize(
    "case",
    (
        Case("compat", (30, 9), seqlen_q=2, seqlen_new=2, page_size=16, rotary="interleaved", alibi=True),
        Case("compat", (30, 9), seqlen_q=2, leftpad=(3, 0), batch_idx=(2, 0)),
        Case("compat", (30, 9), options={"window_size": (8, 0), "softcap": 3.0, "softmax_scale": 0.2}),
    ),
    ids=lambda case: case.name,
)
def test_it_is_the_same_function(case: Case) -> None:
    made, other = (kvcache_cases.build(case, "cpu", torch.float32) for _ in range(2))
    out, lse = flash_attn_with_kvcache(**{NAMES.get(n, n): value for n, value in made.items()}, return_softmax_lse=True)
    expected, expected_lse = attention_with_kvcache(**other, causal=False, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert torch.equal(made["k_cache"].nan_to_num(), other["k_cache"].nan_to_num())


def test_without_lengths_the_cache_is_full() -> None:
    made = kvcache_cases.build(Case("compat", (32, 32), page_size=16), "cpu", torch.float32)
    q, k_cache, v_cache, table = (made[n] for n in ("q", "k_cache", "v_cache", "page_table"))
    out = flash_attn_with_kvcache(q, k_cache, v_cache, block_table=table)
    assert torch.equal(out, attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=32, page_table=table))
    dense = [c[table.long()].flatten(1, 2) for c in (k_cache, v_cache)]
    assert torch.equal(flash_attn_with_kvcache(q, *dense), out)
    with pytest.raises(ValueError, match="k and v need cache_seqlens"):
        flash_attn_with_kvcache(q, k_cache, v_cache, q, q, block_table=table)


def test_nothing_has_a_gradient() -> None:
    made = kvcache_cases.build(Case("compat", (32, 32)), "cpu", torch.float32)
    out = flash_attn_with_kvcache(made["q"].requires_grad_(), made["k_cache"], made["v_cache"], cache_seqlens=32)
    assert not out.requires_grad


def test_strided_queries() -> None:
    made = kvcache_cases.build(Case("compat", (32, 32)), "cpu", torch.float32)
    q = made["q"]
    strided = torch.empty(*q.shape, 2)[..., 0].copy_(q)
    options = {"cache_seqlens": made["cache_seqlens"]}
    assert torch.equal(
        flash_attn_with_kvcache(strided, made["k_cache"], made["v_cache"], **options),
        flash_attn_with_kvcache(q, made["k_cache"], made["v_cache"], **options),
    )
