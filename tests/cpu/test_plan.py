"""The planner, asked through `_host` and through explain/supported, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

import flash_ext
from flash_ext import dispatch

host = pytest.importorskip("flash_ext._host")
BUILD = json.loads(host.build_info_json)
VARIANTS = {row["name"]: row for row in host.variants()}
needs_sm90 = pytest.mark.skipif("fwd_sm90_bf16_d128_causal" not in VARIANTS, reason="this build has no sm90 forward kernels")

# name -> (capability, SMs, shared memory a CTA may opt in to, KiB): NVIDIA's data sheets of A100, 3090, 4090, H100, B200, 5090.
DEVICES = {
    "sm80": (80, 108, 163), "sm86": (86, 82, 99), "sm89": (89, 128, 99), "sm90": (90, 132, 227), "sm100": (100, 148, 227),
    "sm120": (120, 170, 99),
}  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call(
    seqlen_q: int = 1000, seqlen_k: int = 1000, heads: int = 8, heads_kv: int = 8, head_dim: int = 128, dtype=torch.bfloat16
) -> tuple:
    k = meta(2, seqlen_k, heads_kv, head_dim, dtype=dtype)
    return meta(2, seqlen_q, heads, head_dim, dtype=dtype), k, k


def layout(*sizes: int, strides: tuple | None = None, aligned: bool = True) -> tuple:
    contiguous = tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))
    return sizes, strides or contiguous, aligned


def plan(device: str = "sm90", **changes: Any) -> dict:
    arguments = {
        "dtype": "bfloat16", "q": layout(2, 1000, 8, 128), "k": layout(2, 1000, 2, 128), "v": layout(2, 1000, 2, 128),
        "softmax_scale": 0.1, "causal": True, "window_left": -1, "window_right": -1, "softcap": 0.0, "backend": "",
    }  # fmt: skip
    return host.plan_fwd(device=device, **{**arguments, **changes})


# --- devices ---


@pytest.mark.parametrize("name", DEVICES)
def test_named_devices(name: str) -> None:
    arch, sms, kib = DEVICES[name]
    assert host.device_info(name) == (arch, sms, kib * 1024)
    assert host.device_info(f"{name}:78") == (arch, 78, kib * 1024)


def test_a_device_in_full() -> None:
    assert host.device_info("sm103:148:232448") == (103, 148, 232448)
    assert host.device_info("cpu") == (0, 0, 0)


@pytest.mark.parametrize(
    "name", ("", "sm75", "sm91", "sm90:", "sm90:0", "sm90:-4", "sm90:x", "sm90:132:1:1", "cpu:3", "SM90", "sm90 ", "h100")
)
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ValueError, match="device_info must be one of") as info:
        host.device_info(name)
    assert f"got '{name}'" in str(info.value)
    with pytest.raises(ValueError, match=r"device_info must be one of (cpu, )?sm80"):
        flash_ext.explain(*call(), device_info=name)


def test_explain_takes_a_name_only() -> None:
    for wrong in (90, ("sm90",), "cpu"):
        with pytest.raises(ValueError, match="device_info must be one of"):
            flash_ext.explain(*call(), device_info=wrong)
    assert set(dispatch.DEVICES) == set(DEVICES)


# --- the table ---


def test_variants_are_the_table_of_csrc(variants_module: Any) -> None:
    built = set(VARIANTS)
    rows = {row.name: row for row in variants_module.VARIANTS}
    assert built <= set(rows)
    groups = {f"sm{v['arch']}" for v in VARIANTS.values()}
    if built and len(rows) != BUILD["num_variants"]:
        pytest.skip("this build holds a subset (FLASH_EXT_VARIANTS or TORCH_CUDA_ARCH_LIST)")
    assert groups == set(BUILD["architectures"])
    assert BUILD["num_variants"] == len(built)
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "f32": "float32", "e4m3": "float8_e4m3fn"}
    dtypes[""] = "float16"  # a kernel without a dtype
    for name, row in VARIANTS.items():
        source = rows[name]
        assert row == {
            "name": source.name, "op": source.op, "arch": int(source.arch[2:]), "dtype": dtypes[source.dtype],
            "head_dim": source.head_dim, "head_dim_v": source.head_dim_v, "tile": (source.block_m, source.block_n),
        }  # fmt: skip


def test_names_are_unique_and_say_what_they_are(variants_module: Any) -> None:
    names = [row.name for row in variants_module.VARIANTS]
    assert len(names) == len(set(names))
    for row in variants_module.VARIANTS:
        assert row.name.startswith("_".join(filter(None, (row.op, row.arch, row.dtype, f"d{row.head_dim}" * (row.head_dim > 0)))))


# --- the forward's plan ---


@needs_sm90
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256))
@pytest.mark.parametrize("causal", (False, True))
def test_hopper_takes_its_kernels(dtype: str, head_dim: int, causal: bool) -> None:
    q, k = layout(2, 1000, 8, head_dim), layout(2, 1000, 2, head_dim)
    got = plan(dtype=dtype, q=q, k=k, v=k, causal=causal)
    short = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    name = f"fwd_sm90_{short}_d{head_dim}_{'causal' if causal else 'full'}"
    assert (got["backend"], got["variant"], got["copies"], got["workspace_bytes"]) == ("sm90", name, [], 0)
    assert got["tile"] == VARIANTS[name]["tile"]
    tiles = -(-1000 // got["tile"][0]) * 8 * 2
    assert got["grid"] == (min(132, tiles), 1, 1) and plan("sm90:7", dtype=dtype, q=q, k=k, v=k, causal=causal)["grid"] == (7, 1, 1)
    assert set(got["rejected"]) == {"sm80", "reference"}


@needs_sm90
@pytest.mark.parametrize("causal", (False, True))
def test_every_multiple_of_8_takes_the_smallest_row_that_covers_it(causal: bool) -> None:
    rows = [
        v for v in VARIANTS.values() if v["name"].startswith("fwd_sm90_bf16") and v["name"].endswith("causal" if causal else "full")
    ]
    if not {(256, 256), (192, 128)} <= {(v["head_dim"], v["head_dim_v"]) for v in rows}:
        pytest.skip("this build holds a subset of the forward rows")
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            q, k, v = layout(2, 900, 8, head_dim), layout(2, 900, 2, head_dim), layout(2, 900, 2, head_dim_v)
            got = plan(q=q, k=k, v=v, causal=causal)
            covering = [v for v in rows if v["head_dim"] >= head_dim and v["head_dim_v"] >= head_dim_v]
            smallest = min(covering, key=lambda v: v["head_dim"] + v["head_dim_v"])
            assert (got["variant"], got["copies"], got["workspace_bytes"]) == (smallest["name"], [], 0), (head_dim, head_dim_v)


@needs_sm90
@pytest.mark.parametrize(
    ("changes", "mask"),
    [
        ({"causal": False, "window_right": 0}, "causal"),  # the causal mask by another name
        ({"causal": False, "window_left": 999}, "full"),  # a side that hides no key
        ({"causal": False, "window_right": 999}, "full"),
        ({"causal": True, "window_left": 5000}, "causal"),
        ({"q": layout(2, 1, 8, 128)}, "full"),  # one query sees every key
        ({"causal": False}, "full"),
    ],
    ids=str,
)
def test_options_come_to_the_simplest_mask(changes: dict, mask: str) -> None:
    assert plan(**changes)["variant"] == f"fwd_sm90_bf16_d128_{mask}"


MASKS = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "left": {"causal": True, "window_left": 100},
    "right": {"causal": False, "window_right": 30},
    "both": {"causal": False, "window_left": 7, "window_right": 0},
}
ROW_MASKS = ("full", "causal", "local")  # from the least to the most general


@needs_sm90
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("mask", MASKS)
def test_every_combination_has_a_kernel(mask: str, dtype: str) -> None:
    """No combination of masks, scores, sequences and parts falls to the reference: it takes the nearest more general row."""
    rows = {name: row for name, row in VARIANTS.items() if row["op"] == "fwd" and row["arch"] == 90 and row["dtype"] == dtype}
    dims = {(row["head_dim"], row["head_dim_v"]) for row in rows.values()}
    if len(rows) < 4 * 6:
        pytest.skip("this build holds a subset of the forward rows")
    wanted = ROW_MASKS.index(mask) if mask in ROW_MASKS else 2
    for head_dim, head_dim_v in (*dims, (8, 8), (72, 40), (160, 136), (248, 8)):
        for softcap, alibi, k_bias, sinks in itertools.product((0.0, 30.0), *((False, True),) * 3):
            for kind in ("dense", "packed", "parts"):
                sizes = [(8, head_dim), (2, head_dim), (2, head_dim_v)]
                front = (3000,) if kind == "packed" else (2, 1500)
                q, k, v = (layout(*front, *size) for size in sizes)
                extra = {"dense": {}, "packed": {"num_sequences": 7}, "parts": {"num_parts": 3}}[kind]
                got = plan(
                    dtype=dtype, q=q, k=k, v=v, **MASKS[mask], softcap=softcap, alibi=alibi, k_bias=k_bias, sinks=sinks, **extra
                )
                where = (head_dim, head_dim_v, softcap, alibi, k_bias, sinks, kind)
                assert got["backend"] == "sm90" and got["copies"] == [] and got["workspace_bytes"] == 0, (where, got)
                name, row = got["variant"], rows[got["variant"]]
                assert row["head_dim"] >= head_dim and row["head_dim_v"] >= head_dim_v, where
                scored = softcap > 0 or alibi or k_bias
                assert "_scored" in name or not scored, (where, name)
                has = next(m for m in ROW_MASKS if f"_{m}" in name)
                # A plain score gets the mask it asks for; a modified one that or a more general one.
                assert ROW_MASKS.index(has) >= wanted if scored else has == ROW_MASKS[wanted], (where, name)
                assert got["num_splits"] == (3 if kind == "parts" else 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "no compiled kernel takes float32"),
        ({"dtype": "float64"}, "no compiled kernel takes float64"),
        (
            {"q": layout(2, 9, 8, 100), "k": layout(2, 9, 2, 100), "v": layout(2, 9, 2, 100)},
            "no compiled kernel has head_dim 100: they must be multiples of 8",
        ),
        ({"v": layout(2, 1000, 2, 4)}, "no compiled kernel has head_dim 128 with head_dim_v 4: they must be multiples of 8"),
        ({"v": layout(2, 1000, 2, 264)}, "no compiled kernel has head_dim 128 with head_dim_v 264"),
        ({"q": layout(2**29, 1000, 8, 128)}, "batch * num_heads * seqlen is beyond the kernels' 32-bit tile numbers"),
    ],
    ids=str,
)
@needs_sm90
def test_reasons_why_not(changes: dict, reason: str) -> None:
    got = plan(**changes)
    assert got["backend"] == "reference" and got["variant"] == "" and got["rejected"]["sm90"] == [reason]
    assert got["rejections_as_text"].startswith(f"sm90: {reason}; sm80: ")


@needs_sm90
def test_every_reason_is_given() -> None:
    strange = layout(2**29, 1000, 8, 100)
    got = plan("sm80", dtype="float32", q=strange, k=layout(2**29, 9, 2, 100), v=layout(2**29, 9, 2, 100), softcap=3.0)
    assert got["rejected"]["sm90"] == [
        "no compiled kernel takes float32",
        "no compiled kernel has head_dim 100: they must be multiples of 8",
        "needs compute capability 9.0, this GPU has 8.0",
        "batch * num_heads * seqlen is beyond the kernels' 32-bit tile numbers",
    ]


@needs_sm90
@pytest.mark.parametrize("device", ("sm80", "sm86", "sm89", "sm100", "sm120"))
def test_hopper_code_runs_on_hopper_alone(device: str) -> None:
    got = plan(device)
    major, minor = divmod(DEVICES[device][0], 10)
    assert got["rejected"]["sm90"] == [f"needs compute capability 9.0, this GPU has {major}.{minor}"]


def test_cpu_tensors_run_on_the_reference() -> None:
    got = plan("cpu")
    assert got["backend"] == "reference" and got["grid"] == (0, 0, 0)
    assert got["rejected"] == {name: ["the tensors are not on a CUDA device"] for name in ("sm90", "sm80")}


@needs_sm90
@pytest.mark.parametrize(
    ("sizes", "strides", "aligned", "copied"),
    [
        ((2, 1000, 8, 128), (1024000, 1024, 128, 1), True, False),
        ((2, 1000, 8, 128), (1024000, 1024, 128, 1), False, True),
        ((2, 1000, 8, 128), (1032000, 1032, 129, 1), True, True),
        ((2, 1000, 8, 128), (8 * 1000 * 136, 8 * 136, 136, 1), True, False),  # rows of 272 bytes: a multiple of 16
        ((2, 1000, 8, 128), (0, 1024, 128, 1), True, False),  # expanded
        ((2, 1000, 8, 128), (1024000, 1024, 0, 1), True, False),
        ((1, 1000, 8, 128), (3, 1024, 128, 1), True, False),  # the stride of a dimension of one element
        ((2, 1000, 8, 128), (1024001, 1024, 128, 1), True, True),
    ],
    ids=str,
)
def test_copies(sizes: tuple, strides: tuple, aligned: bool, copied: bool) -> None:
    k = layout(sizes[0], 1000, 8, 128)
    got = plan(q=layout(*sizes, strides=strides, aligned=aligned), k=k, v=k)
    assert [c.split(":")[0] for c in got["copies"]] == (["q"] if copied else [])
    assert got["workspace_bytes"] == (2 * 2 * 1000 * 8 * 128 if copied else 0)


@needs_sm90
def test_huge_problems_are_planned() -> None:
    """More than 2^31 elements, and a batch beyond 65535: sizes stay 64-bit and the grid stays one-dimensional."""
    big = plan(q=layout(70000, 4096, 32, 128), k=layout(70000, 4096, 8, 128), v=layout(70000, 4096, 8, 128))
    assert (big["backend"], big["grid"]) == ("sm90", (132, 1, 1))
    odd = plan(q=layout(64, 65536, 32, 128, aligned=False), k=layout(64, 8, 8, 128), v=layout(64, 8, 8, 128))
    assert odd["workspace_bytes"] == 64 * 65536 * 32 * 128 * 2
    nothing = plan(q=layout(0, 5, 8, 128), k=layout(0, 5, 2, 128), v=layout(0, 5, 2, 128))
    assert nothing["backend"] == "sm90" and min(nothing["grid"]) == 1


def test_a_backend_asked_for() -> None:
    assert plan(backend="reference")["backend"] == "reference"
    assert plan("cpu", backend="sm90")["backend"] == ""
    assert plan("sm86", backend="sm90")["backend"] == ""
    assert plan(backend="sm80")["backend"] in ("", "sm80")


def test_plan_bwd_names_its_reasons() -> None:
    k = layout(2, 9, 2, 128)
    got = host.plan_bwd(
        device="cpu", dtype="bfloat16", q=layout(2, 9, 8, 128), k=k, v=k, softmax_scale=0.1, causal=False, window_left=-1,
        window_right=-1, softcap=0.0, backend="",
    )  # fmt: skip
    assert got["backend"] == "reference" and set(got["rejected"]) == {"sm90", "sm80"}


# --- the backward: which gradients, and how much memory ---

GRADIENTS = {"q": 1, "k": 2, "v": 4, "sinks": 8, "k_bias": 16}
needs_sm90_bwd = pytest.mark.skipif(
    not {f"bwd_sm90_bf16_d128_{kind}" for kind in ("causal", "full", "local_dq", "local_dkv", "local_scored")} <= set(VARIANTS),
    reason="this build lacks sm90 backward kernels",
)


def wanting(names: str, tensors: tuple = ()) -> tuple:
    return tuple(t.clone().requires_grad_(name in names) for name, t in zip("qkv", tensors or call(), strict=True))


@needs_sm90_bwd
@pytest.mark.parametrize(
    "names,row", (("", "full"), ("qkv", "full"), ("qk", "full"), ("q", "local_dq"), ("kv", "local_dkv"), ("v", "local_dkv"))
)
def test_explain_tells_the_backward_of_the_gradients_wanted(names: str, row: str) -> None:
    found = flash_ext.explain(*wanting(names), device_info="sm90").backward
    assert found.backend == "sm90" and found.variant == f"bwd_sm90_bf16_d128_{row}" and found.tile == (64, 128)
    assert found.wanted == tuple(names or "qkv")
    assert f"backward   {found.variant}, workspace {found.workspace_bytes} bytes" in str(
        flash_ext.explain(*wanting(names), device_info="sm90")
    )


@needs_sm90_bwd
def test_gradients_of_scores_take_the_row_of_all() -> None:
    bias = meta(2, 8, 1000, dtype=torch.float32).requires_grad_()
    found = flash_ext.explain(*call(), device_info="sm90", k_bias=bias).backward
    assert found.variant == "bwd_sm90_bf16_d128_local_scored" and found.wanted == ("k_bias",)
    sinks = meta(8, dtype=torch.float32).requires_grad_()
    assert flash_ext.explain(*call(), device_info="sm90", sinks=sinks).backward.wanted == ("sinks",)


@needs_sm90_bwd
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("head_dim", (64, 72, 128, 256))
def test_the_backwards_memory_is_linear_in_the_length(head_dim: int, deterministic: bool) -> None:
    """Two float32 statistics a row, a float32 sum of dq in whole blocks of 64 rows and columns, a turn for each block."""
    columns = {64: 64, 72: 128, 128: 128, 256: 256}[head_dim]
    if f"bwd_sm90_bf16_d{columns}_causal" not in VARIANTS or "bwd_sm90_bf16_d96_causal" not in VARIANTS:
        pytest.skip("this build holds a subset of the backward rows")
    for seqlen in (1, 1000, 1024, 131072):
        rows = 2 * 8 * -(-seqlen // 128) * 128
        blocks = rows // 64 * columns // 64
        for names in ("q", "kv", "qkv"):
            tensors = wanting(names, call(seqlen, 3 * seqlen, 8, 2, head_dim))
            found = flash_ext.explain(*tensors, device_info="sm90", causal=True, deterministic=deterministic).backward
            expected = 8 * rows + ("q" in names) * blocks * (64 * 64 * 4 + 4 * deterministic)
            assert found.workspace_bytes == expected, (seqlen, names)


# --- the backward on pairs of CTAs ---

needs_pairs = pytest.mark.skipif(
    not {f"bwd_sm90_bf16_d{d}_{mask}{kind}" for d in (128, 256) for mask in ("causal", "full") for kind in ("", "_pair")}
    <= set(VARIANTS),
    reason="this build lacks rows of pairs",
)


def bwd_plan(**changes: Any) -> dict:
    k = layout(1, 4096, 2, 256)
    arguments = {
        "device": "sm90", "dtype": "bfloat16", "q": layout(1, 4096, 4, 256), "k": k, "v": k, "softmax_scale": 0.1, "causal": True,
        "window_left": -1, "window_right": -1, "softcap": 0.0, "backend": "",
    }  # fmt: skip
    return host.plan_bwd(**{**arguments, **changes})


def keys(rows: int, heads: int = 2, dim: int = 256) -> dict:
    return {"k": layout(1, rows, heads, dim), "v": layout(1, rows, heads, dim)}


@needs_pairs
@pytest.mark.parametrize(
    "changes,variant",
    (
        # 32 pairs of 2 x 64 keys for each of 2 heads: 128 CTAs.
        ({"device": "sm90:128"}, "d256_causal_pair"),
        ({"device": "sm90:129"}, "d256_causal"),  # some SM would be idle
        ({"device": "sm90:128", "causal": False}, "d256_full_pair"),
        ({"device": "sm90:64", **keys(2048)}, "d256_causal_pair"),
        ({"device": "sm90:64", **keys(2047)}, "d256_causal"),
        ({"device": "sm90:1"}, "d256_causal"),
        ({"device": "sm90:64", "num_sequences": 3}, "d256_causal"),  # lengths are not known
        ({"device": "sm90:64", "window_left": 100}, "d256_local"),
        ({"device": "sm90:64", "k_bias": True}, "d256_local_scored"),
        ({"device": "sm90:64", "wanted": 1}, "d256_local_dq"),
        ({"q": layout(1, 4096, 4, 128), **keys(4096, 4, 128)}, "d128_causal"),
        ({"q": layout(1, 4096, 4, 128), **keys(4096, 4, 128), "pairs": "always"}, "d128_causal_pair"),
        ({"device": "sm90:128", "pairs": "never"}, "d256_causal"),
        ({**keys(70), "pairs": "always"}, "d256_causal_pair"),
    ),
)
def test_which_backwards_take_pairs(changes: dict, variant: str) -> None:
    if f"bwd_sm90_bf16_{variant}" not in VARIANTS:
        pytest.skip("not in this build")
    assert bwd_plan(**changes)["variant"] == f"bwd_sm90_bf16_{variant}"


@needs_pairs
@pytest.mark.parametrize(
    "sms,rows,grid", ((132, 4096, 128), (100, 4096, 100), (7, 4096, 6), (1, 4096, 2), (132, 129, 8), (132, 1, 4))
)
def test_pairs_are_launched_whole(sms: int, rows: int, grid: int) -> None:
    assert bwd_plan(device=f"sm90:{sms}", **keys(rows), pairs="always")["grid"] == (grid, 1, 1)


@needs_pairs
def test_pairs_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant() -> str:
        return flash_ext.explain(*call(), causal=True, device_info="sm90").backward.variant

    assert variant() == "bwd_sm90_bf16_d128_causal"
    monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", "always")
    assert variant() == "bwd_sm90_bf16_d128_causal_pair"
    monkeypatch.setenv("FLASH_EXT_BWD_PAIRS", "yes")
    with pytest.raises(ValueError, match="FLASH_EXT_BWD_PAIRS must be auto, never or always, got 'yes'"):
        variant()


def test_the_reference_explains_its_backward() -> None:
    found = flash_ext.explain(*call(), device_info="sm90", backend="reference").backward
    assert (found.backend, found.variant, found.workspace_bytes) == ("reference", "reference_bwd", 0)
    assert set(found.rejected) == {"sm90", "sm80"}


# --- the backward's first step ---


@pytest.mark.skipif(not any(v["op"] == "bwd_preprocess" for v in VARIANTS.values()), reason="this build has no kernels")
@pytest.mark.parametrize(("head_dim_v", "row"), [(8, 64), (64, 64), (72, 128), (128, 128), (136, 256), (256, 256), (264, None)])
def test_plan_bwd_preprocess(head_dim_v: int, row: int | None) -> None:
    for dtype, short in (("bfloat16", "bf16"), ("float16", "fp16")):
        for device in DEVICES:
            arch = "sm90" if device == "sm90" else "sm80"
            expected = f"bwd_preprocess_{arch}_{short}_d{row}" if row else ""
            if expected and expected not in VARIANTS:
                continue
            assert host.plan_bwd_preprocess(device=device, dtype=dtype, head_dim_v=head_dim_v) == expected
    assert host.plan_bwd_preprocess(device="sm90", dtype="float32", head_dim_v=64) == ""
    assert host.plan_bwd_preprocess(device="cpu", dtype="bfloat16", head_dim_v=64) == ""


# --- explain and supported ---


@needs_sm90
def test_explain_an_imagined_h200() -> None:
    e = flash_ext.explain(*call(heads_kv=2), causal=True, device_info="sm90")
    assert (e.backend, e.variant, e.tile, e.grid) == ("sm90", "fwd_sm90_bf16_d128_causal", (128, 128), (128, 1, 1))
    assert (e.num_splits, e.workspace_bytes, e.copies) == (1, 0, ())
    assert set(e.rejected) == {"sm80", "reference"} and all(e.rejected.values())
    text = str(e)
    for word in (
        "backend    sm90",
        "variant    fwd_sm90_bf16_d128_causal",
        "128 x 128",
        "128 x 1 x 1",
        "not sm80:",
        "not reference:",
    ):
        assert word in text
    assert flash_ext.explain(*call(heads_kv=2), causal=True, device_info="sm90:78").grid == (78, 1, 1)


@needs_sm90
def test_explain_takes_every_call() -> None:
    """Sequences, parts, sinks and biases through the public function, on tensors without data."""
    q, k, v = call(heads_kv=2)
    wide = torch.float32
    scores = {"sinks": meta(8, dtype=wide), "alibi_slopes": meta(2, 8, dtype=wide), "k_bias": meta(2, 2, 1000, dtype=wide)}
    e = flash_ext.explain(q, k, v, **scores, causal=True, return_max_logit=True, device_info="sm90")
    assert e.variant == "fwd_sm90_bf16_d128_local_scored" and e.heads_per_tile == 1
    assert flash_ext.explain(q, k, v, sinks=scores["sinks"], device_info="sm90").variant == "fwd_sm90_bf16_d128_full"
    parts = flash_ext.explain(q, k, v, split_boundaries=(0, 500, 700, 1000), causal=True, device_info="sm90")
    assert (parts.variant, parts.num_splits) == ("fwd_sm90_bf16_d128_causal", 3)
    flat, lengths = [t.flatten(0, 1) for t in (q, k, v)], meta(3, dtype=torch.int32)
    sequences = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 1200, "leftpad_k": meta(2, dtype=torch.int32)}
    packed = flash_ext.explain(*flat, **sequences, window_size=(128, 0), device_info="sm90")
    assert packed.variant == "fwd_sm90_bf16_d128_local" and packed.copies == ()
    assert flash_ext.supported(*flat, **sequences)["reference"] == []
    few = flash_ext.explain(q[:, :1], k, v, device_info="sm90")  # decoding: the query heads of a key head share a tile
    assert few.heads_per_tile == 4 and "heads      4 query heads" in str(few)


@needs_sm90
def test_explain_lists_copies() -> None:
    q = torch.empty(2, 1000, 8, 129, device="meta", dtype=torch.bfloat16)[..., :128]
    _, k, v = call()
    e = flash_ext.explain(q, k, v, device_info="sm90")
    assert e.copies == ("q: base and strides must be multiples of 16 bytes",) and e.workspace_bytes == 2 * 1000 * 8 * 128 * 2
    assert "copies     q: base" in str(e)
    shifted = torch.empty(2 * 1000 * 8 * 128 + 1, device="meta", dtype=torch.bfloat16)[1:].view(2, 1000, 8, 128)
    assert len(flash_ext.explain(shifted, k, v, device_info="sm90").copies) == 1


def test_explain_here() -> None:
    q = torch.zeros(2, 300, 8, 16)
    e = flash_ext.explain(q, q[:, :, :2], q[:, :, :2])
    assert (e.backend, e.variant, e.workspace_bytes) == ("reference", "reference_fwd", 0)
    assert e.grid == (-(-300 // e.tile[0]), 8, 2)
    assert e.rejected == {name: ("the tensors are not on a CUDA device",) for name in ("sm90", "sm80")}


def test_explanation_is_a_frozen_dataclass() -> None:
    e = flash_ext.explain(*call())
    fields = [f.name for f in dataclasses.fields(flash_ext.Explanation)]
    expected = [
        "backend", "variant", "tile", "heads_per_tile", "grid", "num_splits", "workspace_bytes", "copies", "rejected", "backward",
    ]  # fmt: skip
    assert fields == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.backend = "sm90"
    assert len(str(e).splitlines()) == 9 + sum(map(len, e.rejected.values()))


def test_explain_and_supported_touch_no_data() -> None:
    q = meta(64, 2**20, 128, 128)
    assert flash_ext.explain(q, q, q, device_info="sm90", causal=True).num_splits == 1
    assert flash_ext.supported(q, q, q)["reference"] == []


def test_explain_of_empty_problems() -> None:
    for shape in ((0, 5, 2, 128), (2, 0, 2, 128)):
        for device in (None, "sm90"):
            assert flash_ext.explain(meta(*shape), meta(*shape), meta(*shape), device_info=device).num_splits == 1


def test_supported() -> None:
    q = torch.zeros(1, 4, 2, 64)
    reasons = flash_ext.supported(q, q, q, causal=True)
    absent = ["the tensors are not on a CUDA device"]
    assert reasons == {"sm90": absent, "sm80": absent, "reference": []}
    assert list(reasons) == ["sm90", "sm80", "reference"]  # in the order of preference


def test_explain_refuses_a_backend_that_cannot_run() -> None:
    for device, reason in (
        ("sm86", "sm90: needs compute capability 9.0, this GPU has 8.6"),
        (None, "sm90: the tensors are not on a CUDA device"),
    ):
        with pytest.raises(ValueError, match="backend 'sm90' cannot run this call") as info:
            flash_ext.explain(*call(), backend="sm90", device_info=device)
        assert reason in str(info.value) and "sm80: " in str(info.value)


# --- python -m flash_ext ---


def test_doctor() -> None:
    result = subprocess.run([sys.executable, "-m", "flash_ext"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = {line[:11].strip(): line[12:] for line in result.stdout.splitlines() if line[:11].strip()}
    assert rows["torch"].startswith(torch.__version__) and rows["flash_ext"] == flash_ext.__version__
    assert int(rows["variants"]) == len(VARIANTS) and all(f"{name} " in result.stdout for name in VARIANTS)
    assert rows["to do"]
    if not torch.cuda.is_available():
        assert rows["GPUs"] == "none"
