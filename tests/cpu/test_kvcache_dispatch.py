"""explain_with_kvcache and supported_with_kvcache: which kernels a call over a cache runs, told without a GPU."""

from __future__ import annotations

import kvcache_cases
import pytest
import torch
from kvcache_cases import Case

import flash_ext
from flash_ext import explain_with_kvcache as explain
from flash_ext import kvcache_dispatch
from flash_ext import supported_with_kvcache as supported


def call(page_size: int | None = None, batch: int = 4, seqlen: int = 8192, heads_kv: int = 8, dim: int = 128, **changes) -> dict:
    """A decoding step of 64 query heads on meta tensors."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    paged = page_size is not None
    pages = seqlen // page_size if paged else 0
    cache = meta(batch * pages + 1, page_size, heads_kv, dim) if paged else meta(batch, seqlen, heads_kv, dim)
    made = {"q": meta(batch, 1, 64, dim), "k_cache": cache, "v_cache": cache, "cache_seqlens": meta(batch, dtype=torch.int32)}
    return {**made, "page_table": meta(batch, pages, dtype=torch.int32) if paged else None, **changes}


def on_hopper(**changes) -> flash_ext.CacheExplanation:
    return explain(**call(**changes), device_info="sm90")


needs_rows = pytest.mark.skipif(on_hopper().backend == "reference", reason="this build's table has no row that reads a cache")


@needs_rows
@pytest.mark.parametrize(
    ("page_size", "keys_by"),
    ((None, "tma"), (1, "gather"), (4, "gather"), (8, "tma"), (16, "tma"), (64, "tma"), (256, "tma"), (100, "gather")),
)
def test_the_route_of_the_keys(page_size: int | None, keys_by: str) -> None:
    found = on_hopper(page_size=page_size, seqlen=6400)
    row = {"tma": "fwd_cache", "gather": "fwd_cache_gather"}[keys_by]
    assert found.keys_by == keys_by and found.variant == f"{row}_sm90_bf16_d128_causal"
    assert found.kernels == ("append_kv_sm90_bf16", found.variant, "combine_sm90_bf16_d128")
    assert found.backend == "sm90" and found.heads_per_tile == 8 and found.tile == (64, 128) and found.grid == (132, 1, 1)


@needs_rows
def test_padding_on_the_left_makes_pages_gather() -> None:
    leftpad = torch.empty(4, dtype=torch.int32, device="meta")
    assert on_hopper(page_size=16, leftpad_k=leftpad).keys_by == "gather"
    assert on_hopper(leftpad_k=leftpad).keys_by == "tma"


@needs_rows
def test_splits_and_workspace() -> None:
    decided = on_hopper()
    assert decided.num_splits == 0 and decided.max_parts > 4
    # Partial results and their lse in float32; lengths, and the first part of each sequence.
    assert decided.workspace_bytes == decided.max_parts * 64 * (128 + 1) * 4 + 4 * 4 + 5 * 4
    fixed = on_hopper(num_splits=3)
    assert fixed.num_splits == 3 and fixed.max_parts == 12
    whole = on_hopper(num_splits=1)
    assert (whole.num_splits, whole.max_parts, whole.workspace_bytes) == (1, 0, 0) and whole.kernels == (whole.variant,)
    # A batch that fills the GPU many times over is not split.
    assert on_hopper(batch=1000).max_parts == 0
    # One of lengths that may differ is, to even them out; several rows of queries, whose partial results are many, sooner not.
    several = torch.empty(256, 64, 64, 128, dtype=torch.bfloat16, device="meta")
    assert on_hopper(batch=256).max_parts > 256 and on_hopper(batch=256, q=several).max_parts == 0


@needs_rows
def test_new_rows_and_copies() -> None:
    new = torch.empty(4, 1, 8, 128, dtype=torch.bfloat16, device="meta")
    appended = on_hopper(k=new, v=new, num_splits=1)
    assert appended.kernels == ("append_kv_sm90_bf16", appended.variant) and appended.workspace_bytes == 4 * 4
    angles = torch.empty(9000, 64, device="meta")
    rotated = on_hopper(k=new, v=new, num_splits=1, rotary_cos=angles, rotary_sin=angles)
    assert rotated.workspace_bytes == 4 * 4 + 4 * 64 * 128 * 2
    odd = torch.empty(4, 1, 8, 129, dtype=torch.bfloat16, device="meta")[..., :128]
    copied = on_hopper(k=odd, v=new, num_splits=1)
    assert [text.split(":")[0] for text in copied.copies] == ["k"] and copied.workspace_bytes == 4 * 4 + 4 * 8 * 128 * 2


def test_why_not() -> None:
    found = explain(**call(), device_info="sm80", backend="reference")
    assert found.variant == "reference_kvcache" and found.kernels == ("reference_kvcache",) and found.keys_by == ""
    assert found.grid == (1, 64, 4)
    _, old = kvcache_dispatch._plans("sm75:40:65536", kvcache_dispatch._checked((), call()))
    assert old["sm90"] == ["kernels that read a KV cache need compute capability 9.0, this GPU has 7.5"]
    assert old["sm80"] == ["kernels that read a KV cache need compute capability 8.0 or later, this GPU has 7.5"]
    odd = call(dim=132)
    reasons = explain(**odd, device_info="sm90").rejected["sm90"]
    assert any("multiples of 8" in reason for reason in reasons)
    shifted = torch.empty(4, 8192, 8, 129, dtype=torch.bfloat16, device="meta")[..., :128]
    reasons = explain(**call(k_cache=shifted), device_info="sm90").rejected["sm90"]
    assert any(reason.startswith("k_cache: ") for reason in reasons)


@needs_rows
@pytest.mark.parametrize("page_size", (None, 1, 16, 256))
@pytest.mark.parametrize(("device", "ctas"), (("sm80", 2 * 108), ("sm86", 82), ("sm89", 128), ("sm100", 2 * 148), ("sm120", 170)))
def test_gpus_without_wgmma(device: str, ctas: int, page_size: int | None) -> None:
    """Any page size is gathered by one row; two CTAs an SM where its shared memory holds them."""
    found = explain(**call(page_size=page_size), device_info=device)
    assert found.backend == "sm80" and found.variant == "fwd_cache_sm80_bf16_d128_causal" and found.keys_by == "gather"
    assert found.kernels == ("append_kv_sm80_bf16", found.variant, "combine_sm80_bf16_d128")
    assert found.grid == (ctas, 1, 1) and found.tile == (64, 64) and found.heads_per_tile == 8
    assert found.rejected["reference"] == ("sm80 is preferred",) and "compute capability 9.0" in found.rejected["sm90"][0]


@needs_rows
def test_a_hopper_can_be_asked_for_the_other_kernels() -> None:
    preferred, asked = on_hopper(), on_hopper(backend="sm80")
    assert preferred.rejected["sm80"] == ("sm90 is preferred",)
    assert asked.backend == "sm80" and asked.variant == "fwd_cache_sm80_bf16_d128_causal" and asked.grid == (264, 1, 1)
    assert asked.rejected["sm90"] == ("backend 'sm80' was asked for",)
    # A scale that is not above zero cannot be folded into the exponent.
    assert on_hopper(backend="sm80", softmax_scale=-0.1).variant == "fwd_cache_sm80_bf16_d128_local_scored"
    assert on_hopper(softmax_scale=-0.1).variant == "fwd_cache_sm90_bf16_d128_causal"


def test_supported_is_where_the_tensors_are() -> None:
    made = kvcache_cases.build(Case("here", (5, 9)), "cpu", torch.bfloat16)
    found = supported(**made)
    assert found["reference"] == [] and found["sm90"] == found["sm80"] == ["the tensors are not on a CUDA device"]
    assert explain(**made).backend == "reference"


def test_the_text() -> None:
    text = str(on_hopper(page_size=16))
    for line in ("backend ", "kernels ", "keys by ", "splits ", "workspace "):
        assert f"\n{line}" in f"\n{text}"
    assert ("decided on the device, room for" in text) == ("sm90" in text.splitlines()[0])


def test_errors_are_those_of_the_call() -> None:
    with pytest.raises(ValueError, match=r"v_cache\.batch must equal k_cache\.batch"):
        explain(**call(v_cache=torch.empty(3, 8192, 8, 128, dtype=torch.bfloat16, device="meta")))
    with pytest.raises(TypeError, match="unexpected keyword argument 'pages'"):
        explain(**call(), pages=3)
    with pytest.raises(ValueError, match="device_info must be one of sm80"):
        explain(**call(), device_info="h100")
    with pytest.raises(ValueError, match="backend 'sm90' cannot run this call; sm90: "):
        explain(**call(dim=132), device_info="sm90", backend="sm90")
    asked = explain(**call(), device_info="sm90", backend="reference")
    assert asked.backend == "reference" and "reference" not in asked.rejected
    assert asked.rejected["sm90"] in (
        ("backend 'reference' was asked for",),
        explain(**call(), device_info="sm90").rejected.get("sm90"),
    )
