"""Calls over KV caches of each implementation that has one: functions of (q, k_cache, v_cache) for a CacheCase.

Page tables, lengths and what the others call plans are made beforehand; only the call itself is timed. SDPA has no cache: it
gathers pages into dense tensors first, and that is timed, as whoever uses it pays for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash_ext

from .caches import CacheCase
from .presets import DTYPES

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WORKSPACE_BYTES = 2**28  # FlashInfer's, for partial results


class NotCovered(Exception):
    """This implementation does not compute this case; the message says why."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotCovered(reason)


def _tables(case: CacheCase, device: str) -> dict[str, Tensor | None]:
    return {"cache_seqlens": case.lengths_of_cache(device), "page_table": case.page_table(device)}


def flash_ext_kernels(case: CacheCase, device: str) -> Attend:
    """Ours; NotCovered with the planner's reasons where no kernel takes the case."""
    tables = _tables(case, device)
    q, k, v = (torch.empty(shape, dtype=DTYPES[case.dtype], device="meta") for shape in case.shapes()[:3])
    v = k[..., : case.head_dim_v] if case.shares_values else v
    on_meta = {name: None if t is None else t.to("meta") for name, t in tables.items()}
    here = flash_ext.dispatch.device_name(torch.empty(0, device=device))
    plan = flash_ext.explain_with_kvcache(q, k, v, **on_meta, device_info=None if here == "cpu" else here)
    reasons = plan.rejected.get("sm90") or plan.rejected.get("sm80") or ("the device is not a GPU",)
    _require(plan.backend != "reference", "; ".join(reasons))
    return lambda q, k, v: flash_ext.attention_with_kvcache(q, k, v, **tables)


def flash_ext_reference(case: CacheCase, device: str) -> Attend:
    tables = _tables(case, device)
    return lambda q, k, v: flash_ext.attention_with_kvcache(q, k, v, **tables, backend="reference")


def gathered(case: CacheCase, device: str, attend: Attend) -> Attend:
    """attend over dense tensors, made from the pages at each call; without pages, over the caches themselves."""
    table = case.page_table(device)
    if table is None:
        return attend
    pages = table.long()
    return lambda q, k, v: attend(q, k[pages].flatten(1, 2), v[pages].flatten(1, 2))


def flash_attention_3(case: CacheCase, device: str, forward: Callable[..., list[Tensor]]) -> Attend:
    """forward: FlashAttention-3's op in vllm's library. Latent attention: the 512 columns go as qv and v, the rest as q and k."""
    tables, split = _tables(case, device), case.head_dim_v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qv = None
        if case.shares_values:
            q, qv, k = q[..., split:], q[..., :split], k[..., split:]
        return forward(
            q, k, v, None, None, qv, None,  # k_new, v_new, q_v, out
            None, None, None, None, tables["cache_seqlens"],  # cu_seqlens q, k, k_new; seqused q, k
            None, None, tables["page_table"], None, None,  # max_seqlen q, k; page_table, kv_batch_idx, leftpad_k
            None, None, None, None, None, None,  # rotary cos, sin; seqlens_rotary; descales of q, k, v
            case.head_dim**-0.5, True, -1, 0, 0.0,  # scale, causal, window, softcap
            False, None, 0, None, 0, None,  # is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, s_aux
            1, 0, None,  # cp_world_size, cp_rank, cp_tot_seqused_k
        )[0]  # fmt: skip

    return attend


def flash_attention_2(case: CacheCase, device: str, package: Any) -> Attend:
    """flash_attn.flash_attn_with_kvcache of the flash-attn package."""
    _require(not case.shares_values, "its head dims must be equal, at most 256")
    _require(case.page_size == 0 or case.page_size % 256 == 0, "its pages are multiples of 256 rows")
    tables = _tables(case, device)
    options = {"cache_seqlens": tables["cache_seqlens"], "block_table": tables["page_table"], "causal": True}
    return lambda q, k, v: package.flash_attn_with_kvcache(q, k, v, **options)


def _pages_of(case: CacheCase, device: str, dense_page: int) -> tuple[int, Tensor]:
    """(page size, page table): a dense cache counts as pages of dense_page rows in order."""
    table = case.page_table(device)
    if table is not None:
        return case.page_size, table
    pages = case.seqlen_k // dense_page
    return dense_page, torch.arange(case.batch * pages, dtype=torch.int32, device=device).view(case.batch, pages)


def flash_infer(case: CacheCase, device: str, package: Any) -> Attend:
    """FlashInfer's wrappers over paged caches: BatchDecodeWithPagedKVCacheWrapper, BatchMLAPagedAttentionWrapper."""
    page, table = _pages_of(case, device, 16)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    indptr, lengths = starts * table.shape[1], case.lengths_of_cache(device)
    if case.shares_values:
        latent, rest = case.head_dim_v, case.head_dim - case.head_dim_v
        wrapper = package.mla.BatchMLAPagedAttentionWrapper(workspace)
        wrapper.plan(
            starts, indptr, table.flatten(), lengths, case.heads, latent, rest, page, False, case.head_dim**-0.5,
            torch.bfloat16, torch.bfloat16,
        )  # fmt: skip

        def attend_latent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = k.view(-1, page, case.head_dim)
            q = q[:, 0]
            return wrapper.run(q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])[:, None]

        return attend_latent
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    last = torch.full_like(lengths, page)
    wrapper.plan(
        indptr, table.flatten(), last, case.heads, case.heads_kv, case.head_dim, page,
        q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.view(-1, page, case.heads_kv, case.head_dim) for t in (k, v))
        return wrapper.run(q[:, 0], (k, v))[:, None]

    return attend


def flash_mla(case: CacheCase, device: str, package: Any) -> Attend:
    """FlashMLA's dense decoding: pages of 64 rows."""
    _require(case.shares_values, "it is for latent attention alone")
    page, table = _pages_of(case, device, 64)
    _require(page == 64, "its pages have 64 rows")
    lengths = case.lengths_of_cache(device)
    plan, splits = package.get_mla_metadata(lengths, case.seqlen_q * case.heads // case.heads_kv, case.heads_kv)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = k.view(-1, page, case.heads_kv, case.head_dim)
        return package.flash_mla_with_kvcache(
            q, cache, table, lengths, case.head_dim_v, plan, splits, softmax_scale=case.head_dim**-0.5, causal=True
        )[0]

    return attend


# Packages that may be installed: name -> (title, module, call).
PACKAGES: dict[str, tuple[str, str, Callable[[CacheCase, str, Any], Attend]]] = {
    "flash_attn": ("flash-attn 2", "flash_attn", flash_attention_2),
    "flashinfer": ("FlashInfer", "flashinfer", flash_infer),
    "flashmla": ("FlashMLA", "flash_mla", flash_mla),
}


def why_no_package(module: str, device: str) -> str | None:
    """Why a package cannot be had here, or None."""
    if importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed"
    return None if device == "cuda" else "it needs a CUDA GPU"


def load(module: str) -> Any:
    return importlib.import_module(module)
