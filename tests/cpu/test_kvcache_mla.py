"""attention_with_kvcache where v_cache is the first columns of k_cache: rules, semantics, torch.compile, and what would run."""

from __future__ import annotations

import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

import flash_ext
from flash_ext import attention_with_kvcache
from flash_ext.kvcache_arguments import shares_rows

NEEDED = "k and v must be given together, unless v_cache is k_cache"


def small(**fields) -> dict:
    """A cache of 24 columns whose first 16 are values, and new rows without v."""
    case = Case("shared", (17, 5), head_dim=24, head_dim_v=16, num_heads=4, num_heads_kv=1, shared=True, seqlen_new=2, capacity=40)
    return kvcache_cases.build(Case(**{**case.__dict__, **fields}), "cpu", torch.float32)


def test_which_caches_share_their_rows() -> None:
    for device in ("cpu", "meta"):
        cache = torch.empty(4, 16, 2, 24, device=device)
        assert shares_rows(cache, cache) and shares_rows(cache, cache[..., :16]) and shares_rows(cache[1:], cache[1:, ..., :8])
        assert not shares_rows(cache, cache[..., 8:]) and not shares_rows(cache[..., :8], cache)
        assert not shares_rows(cache, torch.empty_like(cache)[..., :16]) and not shares_rows(cache[:2], cache[2:])
        # Keys and values that take turns in one memory are neighbours.
        both = torch.empty(4, 2, 16, 2, 24, device=device)
        assert not shares_rows(both[:, 0], both[:, 1])


def test_rules_about_new_rows() -> None:
    made = small()
    separate = {**made, "v_cache": made["v_cache"].clone()}
    with pytest.raises(ValueError, match=NEEDED):
        attention_with_kvcache(**separate)
    with pytest.raises(ValueError, match=NEEDED):
        attention_with_kvcache(**{**made, "k": None, "v": made["k"][..., :16]})
    angles = torch.zeros(40, 4)
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin need v: without it they would turn the values"):
        attention_with_kvcache(**made, rotary_cos=angles, rotary_sin=angles)


def test_a_given_v_takes_the_place_of_the_first_columns() -> None:
    alone, given = small(), small()
    out = attention_with_kvcache(**alone)
    assert torch.equal(attention_with_kvcache(**{**given, "v": given["k"][..., :16]}), out)
    other = small()
    values = torch.randn(2, 2, 1, 16)
    attention_with_kvcache(**{**other, "v": values})
    for b, length in enumerate((17, 5)):
        rows = other["k_cache"][b, length : length + 2]
        assert torch.equal(rows[..., :16], values[b]) and torch.equal(rows[..., 16:], other["k"][b, ..., 16:])


@pytest.mark.parametrize("page_size", (None, 8))
@pytest.mark.parametrize("view", ("outside", "inside"))
def test_compile(page_size: int | None, view: str) -> None:
    def step(made: dict) -> torch.Tensor:
        values = made["v_cache"] if view == "outside" else made["k_cache"][..., :16]
        return attention_with_kvcache(**{**made, "v_cache": values})

    made, other = small(page_size=page_size), small(page_size=page_size)
    expected = step(other)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(made), expected)
    assert torch.equal(made["k_cache"].nan_to_num(), other["k_cache"].nan_to_num())


def test_compiled_calls_check_too() -> None:
    made = small()
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=NEEDED):
        compiled(**{**made, "v_cache": made["v_cache"].clone()})


def call(page_size: int | None = None, heads: int = 128, dims: tuple[int, int] = (576, 512), **changes) -> dict:
    """A decoding step on meta tensors."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pages = 0 if page_size is None else 6400 // page_size
    cache = meta(4, 6400, 1, dims[0]) if page_size is None else meta(4 * pages, page_size, 1, dims[0])
    made = {"q": meta(4, 1, heads, dims[0]), "k_cache": cache, "v_cache": cache[..., : dims[1]]}
    table = None if page_size is None else meta(4, pages, dtype=torch.int32)
    return {**made, "cache_seqlens": meta(4, dtype=torch.int32), "page_table": table, **changes}


def on(device: str, **changes) -> flash_ext.CacheExplanation:
    return flash_ext.explain_with_kvcache(**call(**changes), device_info=device)


needs_rows = pytest.mark.skipif(on("sm90").backend == "reference", reason="this build's table has no row over latent vectors")


@needs_rows
@pytest.mark.parametrize(
    ("page_size", "gathers"), ((None, False), (1, True), (4, True), (8, False), (64, False), (128, False), (100, True))
)
def test_the_rows_of_latent_vectors(page_size: int | None, gathers: bool) -> None:
    found = on("sm90", page_size=page_size)
    assert found.variant == f"fwd_mla{'_gather' * gathers}_sm90_bf16_d576x512_local" and found.tile == (64, 64)
    assert found.keys_by == ("gather" if gathers else "tma") and found.heads_per_tile == 64
    assert found.kernels == ("append_kv_sm90_bf16", found.variant, "combine_sm90_bf16_d512")
    assert on("sm90", page_size=page_size, heads=16).heads_per_tile == 16


@needs_rows
def test_why_another_call_has_no_kernel() -> None:
    def reasons(device: str, **changes) -> str:
        found = on(device, **changes)
        assert found.backend == "reference"
        return " ".join(found.rejected["sm90"])

    separate = torch.empty(4, 6400, 1, 512, dtype=torch.bfloat16, device="meta")
    assert "head dims above 256 need a v_cache that is k_cache[..., :head_dim_v]" in reasons("sm90", v_cache=separate)
    assert "no kernel takes softcap or alibi_slopes with head dims above 256" in reasons("sm90", softcap=3.0)
    assert "9.0" in reasons("sm80")
    # Smaller head dims read keys and values each for itself.
    assert on("sm90", dims=(192, 128)).variant == "fwd_cache_sm90_bf16_d256_causal"
