"""benchmarks/ over KV caches: the cases, what other libraries are given, and the verdicts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks import cache_peers, caches, check, registry, report, runner, timing  # noqa: E402
from benchmarks.caches import CacheCase  # noqa: E402
from benchmarks.ceilings import Ceilings  # noqa: E402
from benchmarks.criteria import criteria  # noqa: E402

GROUPED = CacheCase("grouped", 2, 1, 64, 4, 2, 32, 32)
LATENT = CacheCase("latent", 2, 1, 128, 4, 1, 24, 16, shares_values=True)
SESSION = runner.Session("cpu", timing.CpuStopwatch(), Ceilings(1.0, {"bf16": 1.0}, 0), None, 0.001, least=1, most=1, pause_s=0.0)


@pytest.fixture(autouse=True)
def _not_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_EXT_EMULATE", raising=False)


def problems(case: CacheCase, attend: Any) -> list[str]:
    tensors = case.build("cpu")
    return check.problems_of(check.truth_of(case, tensors), runner.results_of(case, attend, tensors))


# --- cases ---


@pytest.mark.parametrize("page_size", (0, 1, 16))
@pytest.mark.parametrize("case", (GROUPED, LATENT), ids=lambda case: case.family)
def test_a_case_is_what_it_says(case: CacheCase, page_size: int) -> None:
    case = replace(case, page_size=page_size)
    tensors = case.build("cpu")
    assert [tuple(t.shape) for t in (tensors.q, tensors.k, tensors.v, tensors.dout)] == list(case.shapes())
    assert (tensors.v.data_ptr() == tensors.k.data_ptr()) == case.shares_values
    keys = 2 * case.batch * case.seqlen_k * case.heads_kv * (case.head_dim + (0 if case.shares_values else case.head_dim_v))
    results = 2 * case.batch * case.heads * (case.head_dim + case.head_dim_v) + 4 * case.batch * case.heads
    assert case.bytes_moved() == keys + results + (4 * case.batch * case.seqlen_k // page_size if page_size else 0)
    table = case.page_table("cpu")
    assert (table is None) == (page_size == 0)
    if table is not None:
        assert table.flatten().sort().values.equal(torch.arange(table.numel(), dtype=torch.int32))
        assert page_size > 1 or not table.flatten().equal(torch.arange(table.numel(), dtype=torch.int32))
        assert case.keys_of(tensors.k, 1, 0)[page_size - 1].equal(tensors.k[table[1, 0], page_size - 1, 0])
    assert case.mask in case.name


def test_presets_hold_what_the_issue_names() -> None:
    decode, paged = caches.decode(True), caches.paged(True)
    for kind in (
        [c for c in decode if c.heads_kv == 8],
        [c for c in decode if c.shares_values],
        [c for c in paged if c.heads_kv == 8],
    ):
        assert {1, 128} <= {c.batch for c in kind} and {8192, 131072} <= {c.seqlen_k for c in kind}
    assert {c.page_size for c in paged if c.shares_values} == {c.page_size for c in paged} == {0, 1, 16, 64, 256}
    names = [c.name for c in (*decode, *paged)]
    assert len({c.name for c in paged}) == len(paged) and len({c.name for c in decode}) == len(decode) and len(names) > 50
    # The largest fits a GPU of 141 GB beside the oracle's float64 copy of a head.
    assert max(c.bytes_moved() for c in (*decode, *paged)) < 70 * 2**30


@pytest.mark.parametrize("page_size", (0, 16))
def test_a_wrong_page_is_not_timed(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(GROUPED, page_size=page_size)
    reference = registry.implementations()["reference"]
    assert problems(case, reference.bind(case, "cpu")) == []
    tables = {"cache_seqlens": case.lengths_of_cache("cpu"), "page_table": case.page_table("cpu")}
    if page_size:
        tables["page_table"] = tables["page_table"].roll(1, 0)
    else:
        tables["cache_seqlens"] = tables["cache_seqlens"] - 8
    monkeypatch.setattr(cache_peers, "_tables", lambda *_: tables)
    outcome = runner.measure_case(case, {"reference": reference}, SESSION)["implementations"]["reference"]
    assert outcome["status"] == "wrong" and "seconds" not in outcome


def test_a_case_larger_than_the_gpu_is_nobodys_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("much text")

    monkeypatch.setattr(CacheCase, "build", full)
    row = runner.measure_case(GROUPED, {"reference": registry.implementations()["reference"]}, SESSION)
    assert row["implementations"]["reference"] == {
        "status": "not covered", "reason": "the case does not fit this GPU's memory",
    }  # fmt: skip


# --- what other libraries are given, by stand-ins that compute from just that ---


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (heads, dim), k and v (rows, heads_kv, dim) -> (heads, dim_v)."""
    q, k, v = q[None, :, None].double(), k.transpose(0, 1)[None].double(), v.transpose(0, 1)[None].double()
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)[0, :, 0]


def over_pages(q: Any, k: Any, v: Any, table: torch.Tensor | None, lengths: torch.Tensor) -> torch.Tensor:
    """q (batch, heads, dim); k and v pages or dense caches; (batch, heads, dim_v) in q's dtype."""
    rows = []
    for b, length in enumerate(lengths.tolist()):
        own = [c[b] if table is None else c[table[b].long()].flatten(0, 1) for c in (k, v)]
        rows.append(attend_rows(q[b], own[0][:length], own[1][:length]))
    return torch.stack(rows).to(q.dtype)


PAGED = [replace(GROUPED, page_size=16), GROUPED, replace(LATENT, page_size=64), LATENT]


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_flash_attention_3_is_given_the_cache(case: CacheCase) -> None:
    def stand_in(q: Any, k: Any, v: Any, k_new: Any, v_new: Any, qv: Any, out: Any, *rest: Any) -> list[torch.Tensor]:
        lengths, table, scale = rest[4], rest[7], rest[16]
        assert scale == case.head_dim**-0.5 and rest[17] is True and lengths.dtype == torch.int32 and len(rest) == 30
        assert (qv is not None) == case.shares_values
        if qv is not None:
            q, k = torch.cat((qv, q), -1), torch.cat((v, k), -1)
        return [over_pages(q[:, 0], k, v, table, lengths)[:, None]]

    assert problems(case, cache_peers.flash_attention_3(case, "cpu", stand_in)) == []


@pytest.mark.parametrize("case", (GROUPED, CacheCase("grouped", 2, 1, 512, 4, 2, 32, 32, page_size=256)), ids=lambda c: c.name)
def test_flash_attention_2_is_given_the_cache(case: CacheCase) -> None:
    def stand_in(q: Any, k: Any, v: Any, *, cache_seqlens: Any, block_table: Any, causal: bool) -> torch.Tensor:
        assert causal
        return over_pages(q[:, 0], k, v, block_table, cache_seqlens)[:, None]

    package = SimpleNamespace(flash_attn_with_kvcache=stand_in)
    assert problems(case, cache_peers.flash_attention_2(case, "cpu", package)) == []
    for other in (replace(case, page_size=16), LATENT):
        with pytest.raises(registry.NotCovered):
            cache_peers.flash_attention_2(other, "cpu", package)


class _Wrapper:
    """FlashInfer's two wrappers: what plan is given, run computes."""

    def __init__(self, workspace: torch.Tensor, *_: Any, **__: Any) -> None:
        assert workspace.dtype == torch.uint8

    def plan(self, *arguments: Any, **options: Any) -> None:
        if options:
            self.indptr, self.indices, last, heads, heads_kv, dim, self.page = arguments
            assert (last == self.page).all() and (heads, heads_kv, dim) == (4, 2, 32)
        else:
            starts, self.indptr, self.indices, lengths, heads, latent, rest, self.page, causal, scale, *_ = arguments
            assert starts.tolist() == [0, 1, 2] and lengths.tolist() == [128, 128] and (heads, latent, rest) == (4, 16, 8)
            assert causal is False and scale == 24**-0.5

    def run(self, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(rest) == 1:
            k, v = rest[0]
        else:
            q_rest, v, k_rest = (t if t.dim() == 3 and i == 0 else t[:, :, None] for i, t in enumerate(rest))
            q, k = torch.cat((q, q_rest), -1), torch.cat((v, k_rest), -1)
        assert k.shape[1] == self.page
        rows = []
        for b in range(len(q)):
            pages = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
            rows.append(attend_rows(q[b], k[pages].flatten(0, 1), v[pages].flatten(0, 1)))
        return torch.stack(rows).to(q.dtype)


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_flash_infer_is_given_the_cache(case: CacheCase) -> None:
    package = SimpleNamespace(
        mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=_Wrapper), BatchDecodeWithPagedKVCacheWrapper=_Wrapper
    )
    assert problems(case, cache_peers.flash_infer(case, "cpu", package)) == []


def test_flash_mla_is_given_the_cache() -> None:
    def stand_in(q: Any, k: Any, table: Any, lengths: Any, dv: int, plan: Any, splits: Any, *, softmax_scale: float, causal: bool):
        assert k.shape[1] == 64 and (plan, splits, causal) == ("plan", "splits", True) and softmax_scale == 24**-0.5
        return over_pages(q[:, 0], k, k[..., :dv], table, lengths)[:, None], None

    package = SimpleNamespace(get_mla_metadata=lambda lengths, rows, heads: ("plan", "splits"), flash_mla_with_kvcache=stand_in)
    for case in (LATENT, replace(LATENT, page_size=64)):
        assert problems(case, cache_peers.flash_mla(case, "cpu", package)) == []
    for case in (GROUPED, replace(LATENT, page_size=16)):
        with pytest.raises(registry.NotCovered):
            cache_peers.flash_mla(case, "cpu", package)


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_sdpa_gathers_first(case: CacheCase) -> None:
    assert problems(case, registry.implementations()["math"].bind(case, "cpu")) == []


def test_packages_say_where_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.implementations()
    for name, (_, module, _) in cache_peers.PACKAGES.items():
        monkeypatch.setattr(cache_peers.importlib.util, "find_spec", lambda name: None)
        assert module in known[name].absent("cuda") and known[name].version() == ""
        monkeypatch.setattr(cache_peers.importlib.util, "find_spec", lambda name: object())
        assert "GPU" in known[name].absent("cpu") and known[name].absent("cuda") is None
        with pytest.raises(registry.NotCovered, match="KV caches alone"):
            known[name].bind(registry.Case("x", 1, 8, 8, 1, 1, 16, 16), "cuda")
    with pytest.raises(registry.NotCovered, match="not on a CUDA device"):
        known["flash_ext"].bind(GROUPED, "cpu")


# --- verdicts ---


def run_of(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return {"machine": {"device": device}, "ours": ["flash_ext"], "implementations": ["flash_ext", "fa3"], "cases": list(rows)}


def row_of(
    case: CacheCase, ours: float | None, fa3: float | None = None, share: float = 0.9, limit: str = "memory"
) -> dict[str, Any]:
    def outcome(seconds: float | None) -> dict[str, Any]:
        if seconds is None:
            return {"status": "absent", "reason": "gone"}
        return {"status": "timed", "seconds": {"median": seconds}, "ceiling_share": share}

    implementations = {"flash_ext": outcome(ours), "fa3": outcome(fa3)}
    return {"name": case.name, "case": asdict(case) | {"mask": case.mask}, "limit": limit, "implementations": implementations}


def verdicts(*rows: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    return [(found["criterion"], found["verdict"]) for found in criteria(run_of(*rows, **options))]


COPY, OVER_FA3, OVER_DENSE = "share of the copy bandwidth", "speed over FlashAttention-3", "time over the dense cache"


def test_each_criterion_passes_and_fails() -> None:
    paged = replace(GROUPED, page_size=16)
    assert verdicts(row_of(GROUPED, 1e-3)) == [(COPY, "pass")]
    assert verdicts(row_of(GROUPED, 1e-3, share=0.8)) == [(COPY, "fail")]
    assert verdicts(row_of(GROUPED, 1e-3, 0.99e-3)) == [(COPY, "pass"), (OVER_FA3, "fail")]
    assert verdicts(row_of(GROUPED, 1e-3, 1.01e-3)) == [(COPY, "pass"), (OVER_FA3, "pass")]
    assert verdicts(row_of(paged, 1.06e-3), row_of(GROUPED, 1e-3))[1] == (OVER_DENSE, "fail")
    assert verdicts(row_of(paged, 1.04e-3), row_of(GROUPED, 1e-3))[1] == (OVER_DENSE, "pass")


def test_what_is_not_judged() -> None:
    assert verdicts(row_of(GROUPED, 1e-3), device="cpu") == []
    assert verdicts(row_of(GROUPED, None, 1e-3)) == []
    assert verdicts(row_of(GROUPED, 1e-3, limit="products")) == []
    assert verdicts(row_of(GROUPED, 2e-5)) == []  # launches are the time
    # Pages of another size, and another shape's dense cache.
    assert OVER_DENSE not in dict(verdicts(row_of(replace(GROUPED, page_size=64), 9.0), row_of(GROUPED, 1e-3)))
    assert OVER_DENSE not in dict(verdicts(row_of(replace(GROUPED, page_size=16, batch=1), 9.0), row_of(GROUPED, 1e-3)))


def test_the_limit_of_a_case() -> None:
    ceilings = Ceilings(copy_gb_s=4000.0, tflops={"bf16": 800.0}, matrix=0)
    grouped, latent = caches._grouped(16, 8192), caches._latent(16, 8192)
    assert (ceilings.limit(grouped), ceilings.limit(latent)) == ("memory", "products")
    assert ceilings.limit(replace(grouped, dtype="fp8")) is None


def test_verdicts_are_in_the_report(tmp_path: Path) -> None:
    rows = row_of(GROUPED, 1e-3, 0.5e-3), row_of(replace(GROUPED, page_size=16), 1.01e-3)
    text = "\n".join(report.criteria_table(run_of(*rows)))
    assert "### Criteria: 3 of 4 pass" in text and f"| {OVER_FA3} | {GROUPED.name} | 0.50 | 1.00 | fail |" in text
    assert report.criteria_table(run_of(*rows, device="cpu")) == []
    assert json.loads(json.dumps(criteria(run_of(*rows))))[0]["verdict"] == "pass"
