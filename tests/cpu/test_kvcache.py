"""attention_with_kvcache on the CPU: the reference against the oracle, the laws of a cache, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import cases
import kvcache_cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvcache_cases import CASES, Case

import flash_ext
from flash_ext import attention_with_kvcache


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    kvcache_cases.check_case(CASES[name], "cpu", dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("decode", "chunk", "leftpad", "sinks"))])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    kvcache_cases.check_case(CASES[name], "cpu", dtype)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(0, 3))
    lengths = tuple(draw(st.integers(0, 40)) for _ in range(batch))
    seqlen_new = draw(st.one_of(st.none(), st.integers(0, 9)))
    paged = draw(st.booleans())
    head_dim = draw(st.integers(1, 24))
    causal, heads_kv = draw(st.booleans()), draw(st.integers(1, 3))
    window = (-1, -1) if draw(st.booleans()) else (draw(st.integers(-1, 20)), draw(st.integers(-1, 20)))
    return Case(
        "drawn",
        lengths,
        seqlen_q=draw(st.integers(0, 9)),
        seqlen_new=seqlen_new,
        num_heads=heads_kv * draw(st.integers(1, 3)),
        num_heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.integers(1, 24)),
        capacity=draw(st.integers(0, 60)),
        page_size=draw(st.integers(1, 20)) if paged else None,
        page_gap=draw(st.integers(0, 2)),
        leftpad=tuple(draw(st.integers(0, n)) for n in lengths) if draw(st.booleans()) else None,
        batch_idx=None if paged or draw(st.booleans()) else tuple(draw(st.permutations(range(batch + 1)))[:batch]),
        rotary=draw(st.sampled_from(("none", "interleaved", "halves"))) if seqlen_new is not None and head_dim > 1 else "none",
        rotary_dim=2 * draw(st.integers(1, max(1, head_dim // 2))),
        options={"causal": causal, "window_size": window, "softcap": draw(st.sampled_from((0.0, 3.0)))},
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(drawn_cases())
def test_any_small_case(case: Case) -> None:
    kvcache_cases.check_case(case, "cpu", torch.float32)


# --- laws ---


def call(made: dict, **changes):
    return attention_with_kvcache(**{**made, **changes}, return_lse=True)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("page_size", (1, 2, 16, 37, 64, 128, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_paged_gives_the_bits_of_dense(page_size: int, dtype: torch.dtype) -> None:
    dense = Case("law", (200, 0, 77), seqlen_q=3, seqlen_new=3, rotary="halves", capacity=260)
    made = kvcache_cases.build(dense, "cpu", dtype)
    paged = replace(dense, page_size=page_size)
    pages = kvcache_cases.build(paged, "cpu", dtype)
    for name in ("k_cache", "v_cache"):
        for b, length in enumerate(dense.lengths):
            for j in range(length):
                pages[name][kvcache_cases.slot(paged, pages["page_table"], None, b, j)] = made[name][b, j]
    given = {name: value for name, value in made.items() if name not in ("k_cache", "v_cache", "page_table")}
    expected = call(made)
    assert same(call({**given, **{n: pages[n] for n in ("k_cache", "v_cache", "page_table")}}), expected)
    assert torch.isfinite(expected[0]).all()


@pytest.mark.parametrize("name", [n for n in CASES if "new" in n and "no_" not in n])
def test_appending_then_attending_is_attending_over_the_longer_cache(name: str) -> None:
    case = CASES[name]
    made = kvcache_cases.build(replace(case, rotary="none"), "cpu", torch.bfloat16)
    expected = call(made)
    longer = {n: value for n, value in made.items() if n not in ("k", "v")}
    assert same(call(longer, cache_seqlens=made["cache_seqlens"] + case.seqlen_new), expected)


def test_rows_one_by_one_are_rows_at_once() -> None:
    """Decoding token by token and one prefill give the same cache bit for bit, and the same results up to rounding."""
    case = Case("law", (3, 11), seqlen_q=6, seqlen_new=6, page_size=4, rotary="interleaved")
    once, stepwise = (kvcache_cases.build(case, "cpu", torch.float32) for _ in range(2))
    out, _ = call(once)
    steps = []
    for i in range(6):
        rows = {name: stepwise[name][:, i : i + 1] for name in ("q", "k", "v")}
        steps.append(call(stepwise, **rows, cache_seqlens=stepwise["cache_seqlens"] + i)[0])
    torch.testing.assert_close(torch.cat(steps, 1), out)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(once[name].nan_to_num(), stepwise[name].nan_to_num())


def test_shared_pages_and_any_order() -> None:
    """A common prefix is stored once; the order of the pages in memory does not matter."""
    case = Case("law", (48, 48), page_size=16)
    made = kvcache_cases.build(case, "cpu", torch.float32)
    made["page_table"][1, :2] = made["page_table"][0, :2]
    own = made["k_cache"][made["page_table"].long()].flatten(1, 2), made["v_cache"][made["page_table"].long()].flatten(1, 2)
    expected = call(made, k_cache=own[0].clone(), v_cache=own[1].clone(), page_table=None)
    assert same(call(made), expected)
    order = torch.randperm(made["k_cache"].shape[0], generator=torch.Generator().manual_seed(1))
    shuffled = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).int()
    moved = {name: made[name][order] for name in ("k_cache", "v_cache")}
    assert same(call(made, **moved, page_table=shuffled[made["page_table"].long()]), expected)


def test_table_entries_beyond_a_sequence_may_hold_anything() -> None:
    case = Case("law", (17, 0), seqlen_new=1, page_size=16, capacity=80)
    made = kvcache_cases.build(case, "cpu", torch.float32)
    again = kvcache_cases.build(case, "cpu", torch.float32)
    expected = call(made)
    again["page_table"][0, 2:], again["page_table"][1, 1:] = -1, 2**31 - 1
    assert same(call(again), expected)


def test_values_may_be_columns_of_the_keys() -> None:
    """Multi-head latent attention, absorbed: one cache of 512 + 64 columns for both."""
    made = kvcache_cases.build(
        Case("law", (17, 5), seqlen_new=1, num_heads=8, num_heads_kv=1, head_dim=576, head_dim_v=512), "cpu", torch.float32
    )
    made["v_cache"], made["v"] = made["k_cache"][..., :512].clone(), made["k"][..., :512]
    expected = call({**made, "k_cache": made["k_cache"].clone()})
    assert same(call(made, v_cache=made["k_cache"][..., :512]), expected)


def test_batch_invariance() -> None:
    """A sequence gives the same bits alone and beside others."""
    case = Case("law", (170, 3, 65), seqlen_q=2, page_size=16)
    made = kvcache_cases.build(case, "cpu", torch.float32)
    out, lse = call(made)
    for b in range(3):
        alone = {n: made[n][b : b + 1] for n in ("q", "cache_seqlens", "page_table")}
        assert same(call(made, **alone), (out[b : b + 1], lse[b : b + 1]))


def test_an_int_is_every_length() -> None:
    made = kvcache_cases.build(Case("law", (9, 9)), "cpu", torch.float32)
    assert same(call(made, cache_seqlens=9), call(made))


def test_a_wrong_result_is_found() -> None:
    """The checks can fail: a key too many, a page swapped, a row lost."""
    case = CASES["paged_200x1x77_q1_h4kv2_d64_new1_page16_halves"]
    right = flash_ext.kvcache.reference_kvcache.attend

    def one_key_less(q, k_cache, v_cache, cache, *rest):
        return right(q, k_cache, v_cache, replace(cache, length=cache.length - 1), *rest)

    def pages_swapped(q, k_cache, v_cache, cache, *rest):
        return right(q, k_cache, v_cache, replace(cache, page_table=cache.page_table.flip(1)), *rest)

    for wrong in (one_key_less, pages_swapped):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(flash_ext.kvcache.reference_kvcache, "attend", wrong)
            kvcache_cases.check_case(case, "cpu", torch.float32)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(flash_ext.kvcache.reference_kvcache, "append", lambda cache, targets: None)
        kvcache_cases.check_case(case, "cpu", torch.float32)


# --- values out of range ---


def raw(made: dict, **changes):
    """The op without its checks, as a GPU without validate=True runs it."""
    a = {"k": None, "v": None, "leftpad_k": None, "rotary_cos": None, "rotary_sin": None, "sinks": None, **made, **changes}
    return torch.ops.flash_ext.kvcache(
        a["q"], a["k_cache"], a["v_cache"], a["k"], a["v"], a["cache_seqlens"], a["cache_batch_idx"], a["leftpad_k"],
        a["page_table"], a["rotary_cos"], a["rotary_sin"], True, a["sinks"], None, 0.125, True, -1, -1, 0.0, 0, False, None,
    )  # fmt: skip


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("page_size", (None, 4))
def test_without_checks_values_are_clamped(page_size: int | None) -> None:
    case = Case("clamp", (8, 5), seqlen_new=2, page_size=page_size, capacity=12)

    def fresh() -> dict:
        made = kvcache_cases.build(case, "cpu", torch.float32)
        for name in ("k_cache", "v_cache"):
            made[name].nan_to_num_(0.5)
        return made

    # A length beyond the capacity is the capacity, and no row is appended; a negative one is 0.
    made = fresh()
    before = made["k_cache"].clone()
    out, _ = raw(made, cache_seqlens=int32(1000, 12))
    assert torch.equal(made["k_cache"], before)
    assert torch.equal(out, raw(made, k=None, v=None, cache_seqlens=int32(12, 12))[0])
    made, other = fresh(), fresh()
    assert same(raw(made, cache_seqlens=int32(-7, 3)), raw(other, cache_seqlens=int32(0, 3)))
    assert torch.equal(made["k_cache"], other["k_cache"])
    # The row that fits is written, the one that does not is dropped.
    made = fresh()
    raw(made, cache_seqlens=int32(11, 0))
    assert torch.equal(made["k_cache"][kvcache_cases.slot(case, made["page_table"], None, 0, 11)], made["k"][0, 0])
    # Padding longer than the sequence hides all of it.
    out, lse = raw(fresh(), leftpad_k=int32(99, -5))
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and same((out[1],), (raw(fresh())[0][1],))
    # Indices out of range: read somewhere in the cache, written nowhere.
    made = fresh()
    before = {name: made[name].clone() for name in ("k_cache", "v_cache")}
    if page_size is None:
        out, _ = raw(made, cache_batch_idx=int32(-1, 77))
    else:
        out, _ = raw(made, page_table=torch.full_like(made["page_table"], 2**31 - 1).index_fill_(0, torch.tensor([1]), -9))
    assert torch.isfinite(out).all()
    assert all(torch.equal(made[name], before[name]) for name in before)


def test_a_dropped_row_does_not_disturb_another() -> None:
    """Sequence 0's page does not exist; clamped it would be sequence 1's, whose new row must arrive."""
    made = kvcache_cases.build(Case("clamp", (4, 4), seqlen_new=1, page_size=8), "cpu", torch.float32)
    table = torch.tensor([[-1], [0]], dtype=torch.int32)
    raw(made, page_table=table)
    assert torch.equal(made["k_cache"][0, 4], made["k"][1, 0])


def refused(made: dict, **changes) -> str:
    with pytest.raises(ValueError) as error:
        attention_with_kvcache(**{**made, **changes})
    return str(error.value)


def test_values_out_of_range_are_refused() -> None:
    paged = kvcache_cases.build(Case("bad", (8, 5), seqlen_new=2, page_size=4, capacity=12), "cpu", torch.float32)
    table = paged["page_table"].clone()
    table[1, 0] = 99
    angles = torch.zeros(6, 4)
    message = refused(
        paged, cache_seqlens=int32(11, -1), page_table=table, leftpad_k=int32(-1, 7), rotary_cos=angles, rotary_sin=angles
    )
    for part in (
        "cache_seqlens must be at least 0, got -1",
        "cache_seqlens with 2 new rows must not exceed the capacity 12 (3 pages of 4 rows), got 11",
        "leftpad_k must be at least 0, got -1",
        "leftpad_k must not exceed its sequence's length with 2 new rows, got 6 more",
        "page_table entries of pages in use must lie in [0, num_pages) = [0, 9), got",
        "rotary_cos must have a row for every position, got 6 rows and position 12",
    ):
        assert part in message, message
    dense = kvcache_cases.build(Case("bad", (8, 5), seqlen_new=2, batch_idx=(0, 1)), "cpu", torch.float32)
    assert "cache_batch_idx must lie in [0, k_cache.batch) = [0, 3), got -1 to 3" in refused(dense, cache_batch_idx=int32(-1, 3))
    assert "go to the same" in refused(dense, cache_batch_idx=int32(1, 1), cache_seqlens=int32(3, 4))
    assert "must not exceed the capacity 10 (the cache's seqlen), got 9" in refused(dense, cache_seqlens=int32(0, 9))


def test_bad_arguments_come_in_one_message() -> None:
    made = kvcache_cases.build(Case("bad", (8, 5), seqlen_new=2), "cpu", torch.float32)
    message = refused(
        made, q=made["q"][:1], v=None, cache_seqlens=torch.zeros(2), softcap=-1.0, window_size=(-2, 0), num_splits=-1,
        rotary_cos=torch.zeros(4, 99), sinks=torch.zeros(3), page_table=torch.zeros(2, 2, dtype=torch.int32),
        cache_batch_idx=int32(0, 1),
    )  # fmt: skip
    for part in (
        "k and v must be given together", "cache_seqlens.dtype must be int32",
        "softcap must be finite", "window_size left", "num_splits must lie in [0, 256]", "rotary_cos and rotary_sin",
        "rotary_cos.shape[1] must lie in [1, head_dim / 2]", "sinks must have shape (num_heads,) = (4,)",
        "cache_batch_idx must be None with a page_table",
    ):  # fmt: skip
        assert part in message, (part, message)
    with pytest.raises(TypeError, match=r"cache_seqlens must be an int or a torch\.Tensor, got float; .*causal must be a bool"):
        attention_with_kvcache(**{**made, "cache_seqlens": 3.0}, causal=1)
    with pytest.raises(ValueError, match="backend 'sm90' cannot run this call"):
        attention_with_kvcache(**made, backend="sm90")
    with pytest.raises(NotImplementedError, match="it has no gradient"):
        attention_with_kvcache(**{**made, "q": made["q"].requires_grad_()})


# --- PyTorch ---


@pytest.mark.parametrize("page_size", (None, 8))
def test_compile(page_size: int | None) -> None:
    case = Case("compiled", (17, 5), seqlen_q=2, seqlen_new=2, page_size=page_size, capacity=40, rotary="halves")
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((17, 5), (3, 38)):
        made, other = (kvcache_cases.build(case, "cpu", torch.float32) for _ in range(2))
        for each in (made, other):
            each["cache_seqlens"] = int32(*lengths)
            for name in ("k_cache", "v_cache"):
                each[name].nan_to_num_(0.5)
        assert same(compiled(**made, return_lse=True), attention_with_kvcache(**other, return_lse=True))
        for name in ("k_cache", "v_cache"):
            assert torch.equal(made[name], other[name])
    with pytest.raises(ValueError, match="must not exceed the capacity"):
        compiled(**{**made, "cache_seqlens": int32(0, 39)})


def test_opcheck() -> None:
    made = kvcache_cases.build(Case("opcheck", (17, 5), seqlen_new=1, page_size=8), "cpu", torch.float32)
    for name in ("k_cache", "v_cache"):
        made[name].nan_to_num_(0.5)
    a = {"k": None, "v": None, "leftpad_k": None, **made}
    arguments = (
        a["q"], a["k_cache"], a["v_cache"], a["k"], a["v"], a["cache_seqlens"], None, None, a["page_table"], None, None, True,
        None, None, 0.125, True, -1, -1, 0.0, 0, True, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.flash_ext.kvcache.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_results_do_not_depend_on_fresh_memory() -> None:
    made = kvcache_cases.build(Case("poison", (0, 30), seqlen_q=2), "cpu", torch.float32)
    expected = call(made)
    with cases.poisoned_memory():
        assert same(call(made), expected)
