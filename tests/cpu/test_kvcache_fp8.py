"""attention_with_kvcache on e4m3 tensors without kernels: the reference against the oracle, and what is refused."""

from __future__ import annotations

import kvcache_fp8_cases
import pytest
import torch
from kvcache_cases import Case
from kvcache_fp8_cases import CASES_FP8, SCALES, build

import flash_ext


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CASES_FP8)
def test_reference(name: str, scale: str) -> None:
    case = CASES_FP8[name]
    if not kvcache_fp8_cases.takes(case, scale):
        pytest.skip("such scales do not exist")
    made, scales = build(case, scale, "cpu")
    before = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in made.items()}
    call = {**made, **scales, "return_lse": True, "backend": "reference", "out_dtype": torch.float16}
    out, lse = flash_ext.attention_with_kvcache(**call)
    kvcache_fp8_cases.check_caches(case, made, before)
    truth = kvcache_fp8_cases.expected(case, made, scales)
    assert out.dtype == torch.float16 and out.shape == truth.out.shape
    torch.testing.assert_close(out.double(), truth.out, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-5, atol=1e-5)


def call(**changes):
    made, scales = build(Case("errors", (70, 33), page_size=64), "block", "cpu")
    return flash_ext.attention_with_kvcache(**{**made, **scales, **changes})


def test_default_out_dtype_and_groups_of_query_heads() -> None:
    assert call().dtype == torch.bfloat16
    of_groups = torch.rand(2, 2) + 0.5
    assert torch.equal(call(q_descale=of_groups), call(q_descale=of_groups.repeat_interleave(2, 1)))


def test_traced_shapes() -> None:
    made, scales = build(Case("traced", (70, 33)), "head", "cpu")

    @torch.compile(backend="eager", fullgraph=True)
    def traced(q, k_cache, v_cache, lengths, scales):
        return flash_ext.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, return_lse=True, **scales)

    arguments = (made["q"], made["k_cache"], made["v_cache"], made["cache_seqlens"], scales)
    got = traced(*arguments)
    expected = flash_ext.attention_with_kvcache(**made, **scales, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


WRONG = {
    "shape": ({"k_descale": torch.ones(2, 3)}, ValueError, r"k_descale must have shape .*\(2, 2\).*block of 64 rows.*got \(2, 3\)"),
    "q_shape": ({"q_descale": torch.ones(2, 4, 2)}, ValueError, r"q_descale must have shape .*\(2, 4, 1\).*got \(2, 4, 2\)"),
    "pages": ({"page_table": None, "cache_seqlens": 3}, ValueError, "k_cache.batch must equal q.batch"),
    "dtype": ({"v_descale": torch.ones(2, 2).double()}, ValueError, "v_descale.dtype must be float32, got torch.float64"),
    "zero": ({"q_descale": torch.zeros(2, 4)}, ValueError, "q_descale must be positive and finite"),
    "nan": ({"k_descale": torch.tensor(float("nan"))}, ValueError, "k_descale must be positive and finite"),
    "out": ({"out_dtype": torch.float32}, ValueError, "out_dtype must be bfloat16 or float16, got torch.float32"),
    "kind": ({"q_descale": 1.0}, TypeError, "q_descale must be a torch.Tensor or None, got float"),
    "out_kind": ({"out_dtype": "half"}, TypeError, "out_dtype must be a torch.dtype or None, got str"),
    "q_dtype": ({"q": torch.zeros(2, 1, 4, 64)}, ValueError, "k_cache.dtype must equal q.dtype"),
    "rotary": (
        {"rotary_cos": torch.ones(99, 8), "rotary_sin": torch.ones(99, 8), "k": torch.zeros(2, 1, 2, 64).to(torch.float8_e4m3fn),
         "v": torch.zeros(2, 1, 2, 64).to(torch.float8_e4m3fn)},
        ValueError, "rotate q and k before they are quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error(case: str) -> None:
    changes, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call(**changes)


def test_pages_that_are_no_whole_blocks() -> None:
    made, _ = build(Case("pages", (70, 33), page_size=16), "none", "cpu")
    with pytest.raises(ValueError, match="pages of a multiple of 64"):
        flash_ext.attention_with_kvcache(**made, k_descale=torch.ones(13, 2, 1))


def test_scales_belong_to_e4m3() -> None:
    q, cache = torch.zeros(1, 1, 2, 16), torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="k_descale, out_dtype: only for a float8_e4m3fn q and caches"):
        flash_ext.attention_with_kvcache(q, cache, cache, cache_seqlens=4, k_descale=torch.ones(()), out_dtype=torch.bfloat16)
