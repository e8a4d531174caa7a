"""The implementations that are measured. One that is absent, or does not cover a case, says why; it never fails a run.

Every implementation gets the same tensors, (batch, seqlen, heads, head_dim) contiguous, and gives out in that shape; a
transposed view, as SDPA wants, costs nothing. Gradients come from torch.autograd.grad for all of them alike. A function
whose result is scaled carries `finish`, which undoes that before the result is checked.
"""

from __future__ import annotations

import importlib.util
import inspect
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_ext

from . import cache_peers, cudnn_fp8, patterns
from .cache_peers import NotCovered
from .caches import CacheCase
from .presets import DTYPES, Case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Implementation:
    """peer: somebody else's work, that ours is compared with. ours: wrong results and crashes fail the run."""

    name = ""
    title = ""
    peer = True

    def absent(self, device: str) -> str | None:
        """Why it cannot be had here, or None."""
        return None

    def bind(self, case: Case, device: str) -> Attend:
        """The function of q, k, v that computes the case. NotCovered where there is none."""
        raise NotImplementedError

    def version(self) -> str:
        return f"torch {torch.__version__}"


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotCovered(reason)


class FlashExt(Implementation):
    """Our compiled kernels. A fallback to the reference is an error here: FLASH_EXT_STRICT makes it one."""

    name, title, peer = "flash_ext", "flash_ext", False

    def version(self) -> str:
        return f"flash_ext {flash_ext.__version__}"

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.dtype in ("bf16", "fp16", "fp8"), f"no kernel takes {case.dtype}")
        if isinstance(case, CacheCase):
            _require(case.dtype != "fp8", "caches are measured in 16 bits")
            return cache_peers.flash_ext_kernels(case, device)
        options = _options_of_ours(case, device)
        if case.dtype == "fp8":
            _require(case.direction == "fwd", "FP8 has no backward")
            options |= self._fp8_options(case, device)
        shapes = [torch.empty(shape, dtype=DTYPES[case.dtype], device=device) for shape in case.shapes()[:3]]
        if case.lengths:
            shapes = [t[0] for t in shapes]
        plan = flash_ext.explain(*shapes, **options)
        reasons = plan.rejected.get("sm90") or plan.rejected.get("sm80") or ("the device is not a GPU",)
        _require(plan.backend != "reference", "; ".join(reasons))

        return _our_call(case, options)

    def _fp8_options(self, case: Case, device: str) -> dict[str, Any]:
        """Scales of sequences and heads, as FlashAttention-3 takes them."""
        scales = torch.ones(len(case.lengths) or case.batch, case.heads_kv, device=device)
        return {"q_descale": scales, "k_descale": scales, "v_descale": scales}


class FlashExtSm80(FlashExt):
    """Our kernels for GPUs without wgmma, on any GPU: on a Hopper through their PTX."""

    name, title = "flash_ext_sm80", "flash_ext, sm80 kernels"

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.dtype in ("bf16", "fp16") and not isinstance(case, CacheCase), f"not measured with {case.dtype} or caches")
        options = _options_of_ours(case, device)
        shapes = [torch.empty(shape, dtype=DTYPES[case.dtype], device=device) for shape in case.shapes()[:3]]
        if case.lengths:
            shapes = [t[0] for t in shapes]
        reasons = flash_ext.supported(*shapes, **options)["sm80"]
        _require(not reasons, "; ".join(reasons))
        return _our_call(case, {**options, "backend": "sm80"})


class FlashExtUnflushed(FlashExt):
    """Our FP8 kernel without its second level of sums: what FlashAttention-3 does."""

    name, title = "flash_ext_unflushed", "flash_ext, never flushed"

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.dtype == "fp8" and not isinstance(case, CacheCase), "flush_every is for FP8 alone")
        return super().bind(case, device)

    def _fp8_options(self, case: Case, device: str) -> dict[str, Any]:
        return super()._fp8_options(case, device) | {"flush_every": 0}


class FlashExtBlockScales(FlashExt):
    """Our FP8 kernel with a scale for every 64 rows."""

    name, title = "flash_ext_block", "flash_ext, scales of 64 rows"

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.dtype == "fp8" and not isinstance(case, CacheCase), "scales are for FP8 alone")
        _require(not case.lengths, "scales of 64 rows are measured on whole batches")
        return super().bind(case, device)

    def _fp8_options(self, case: Case, device: str) -> dict[str, Any]:
        def ones(rows: int, heads: int) -> Tensor:
            return torch.ones(case.batch, heads, -(-rows // 64), device=device)

        keys = ones(case.seqlen_k, case.heads_kv)
        return {"q_descale": ones(case.seqlen_q, case.heads), "k_descale": keys, "v_descale": keys}


def _options_of_ours(case: Case, device: str) -> dict[str, Any]:
    """The keyword arguments of flash_ext.attention, or of attention_varlen where sequences are packed."""
    options = {"causal": case.causal, "window_size": case.window, "softcap": case.softcap, "sinks": case.sink_logits(device)}
    if case.pattern:
        options["block_mask"] = patterns.block_mask(case.pattern, case.seqlen_q, device)
    if case.prefix:
        _require(case.seqlen_q == case.seqlen_k, "prefix_lm_mask is for as many queries as keys")
        options |= {"block_mask": flash_ext.prefix_lm_mask(case.prefix, case.seqlen_k, device=device), "causal": False}
    if case.lengths:
        ends = _cumulative(case.lengths, device)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    return options


# Where sequences are shorter than this on average, they share tiles: what a user is told to do.
_SHORT = 64


def _our_call(case: Case, options: dict[str, Any]) -> Attend:
    if not case.lengths:
        return lambda q, k, v: flash_ext.attention(q, k, v, **options)
    if sum(case.lengths) < _SHORT * len(case.lengths) and not case.changes_scores and "backend" not in options:
        ends = options["cu_seqlens_q"]
        groups = flash_ext.jagged_groups(ends, total_q=sum(case.lengths), causal=case.causal)
        return lambda q, k, v: flash_ext.attention_jagged(q[0], k[0], v[0], ends, groups=groups, causal=case.causal)[None]
    return lambda q, k, v: flash_ext.attention_varlen(q[0], k[0], v[0], **options)[None]


class Reference(Implementation):
    """The tiled reference of flash_ext, on any device."""

    name, title, peer = "reference", "flash_ext reference", False

    def version(self) -> str:
        return f"flash_ext {flash_ext.__version__}"

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.dtype != "fp8", "it takes no fp8")
        if isinstance(case, CacheCase):
            return cache_peers.flash_ext_reference(case, device)
        return _our_call(case, {**_options_of_ours(case, device), "backend": "reference"})


def _each_sequence(case: Case, attend: Attend) -> Attend:
    if not case.lengths:
        return attend

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(list(case.lengths), 1) for t in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 1)

    return each


class Sdpa(Implementation):
    """scaled_dot_product_attention with one of torch's backends."""

    def __init__(self, name: str, title: str, backend: SDPBackend, masks: bool) -> None:
        self.name, self.title, self._backend, self._masks = name, title, backend, masks

    def absent(self, device: str) -> str | None:
        if device == "cpu" and self._backend == SDPBackend.CUDNN_ATTENTION:
            return "it needs a CUDA GPU"
        return None

    def version(self) -> str:
        cudnn = torch.backends.cudnn.version() if self.name == "cudnn" else None
        return f"torch {torch.__version__}" + (f", cuDNN {cudnn}" if cudnn else "")

    def bind(self, case: Case, device: str) -> Attend:
        if case.dtype == "fp8" and self.name == "cudnn":
            return _cudnn_fp8(case, device)
        _require(case.dtype != "fp8", "torch's SDPA takes no fp8")
        if isinstance(case, CacheCase):
            return cache_peers.gathered(case, device, self._call(False, None))
        _require(not case.changes_scores, "torch's SDPA has neither softcap nor sinks")
        _require(not case.causal or case.seqlen_q == case.seqlen_k, "torch's is_causal is aligned to the top left")
        if case.lengths and self.name == "fa2" and device == "cuda":
            return _torch_varlen(case)
        if case.lengths and self.name == "math":
            return _each_sequence(case, self._call(case.causal, None))
        _require(case.plain or self._masks, f"it has no {case.mask} mask")
        if case.plain:
            return self._call(case.causal, None)
        return self._call(False, case.visible(torch.arange(case.seqlen_q, device=device)))

    def _call(self, causal: bool, mask: Tensor | None) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self._backend):
                out = scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal,
                    enable_gqa=q.shape[2] != k.shape[2],
                )  # fmt: skip
            return out.transpose(1, 2)

        return attend


def _cudnn_fp8(case: Case, device: str) -> Attend:
    _require(importlib.util.find_spec("cudnn") is not None, "fp8 needs cuDNN's frontend: pip install nvidia-cudnn-frontend==1.18.0")
    reason = cudnn_fp8.why_not(case)
    _require(not reason, reason)
    return cudnn_fp8.bind(case, device)


def _cumulative(lengths: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _torch_varlen(case: Case) -> Attend:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise NotCovered(f"torch {torch.__version__} has no varlen_attn") from None
    ends, longest = _cumulative(case.lengths, "cuda"), max(case.lengths)
    # torch 2.10 has is_causal, later ones a window.
    window = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
    options = window if case.causal else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, **options)[None]

    return attend


class Flex(Implementation):
    """FlexAttention, compiled for each case; its mask is a BlockMask made beforehand."""

    name, title = "flex", "FlexAttention"
    compiler: Callable[..., Any] = staticmethod(torch.compile)

    def absent(self, device: str) -> str | None:
        if device != "cuda":
            return "its compiled kernels need a CUDA GPU"
        return None if importlib.util.find_spec("triton") else "Triton is not installed"

    def bind(self, case: Case, device: str) -> Attend:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _require(case.dtype != "fp8", "FlexAttention takes no fp8")
        _require(not isinstance(case, CacheCase), "FlexAttention is not measured over caches")
        _require(not case.sinks, "FlexAttention has no sinks of its own")
        config.donated_buffer = False  # lets the backward run twice over one forward, as it is timed
        torch._dynamo.reset()  # each case is compiled anew; past a few of them dynamo would stop compiling
        visible = _mask_mod(case, device)
        block_mask = None
        if visible is not None:
            block_mask = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device=device)
        compiled = self.compiler(flex_attention, dynamic=False)
        gqa = case.heads != case.heads_kv
        score_mod = None
        if case.softcap > 0:

            def score_mod(score: Tensor, *_: Tensor) -> Tensor:
                return case.softcap * torch.tanh(score / case.softcap)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            return compiled(*heads_first, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa).transpose(1, 2)

        return attend


def _mask_mod(case: Case, device: str) -> Callable[..., Tensor] | None:
    if not (case.causal or case.lengths or case.prefix or case.pattern or case.window != (-1, -1)):
        return None
    if case.pattern:
        dense = case.visible(torch.arange(case.seqlen_q, device=device))
        return lambda b, h, row, key: dense[row, key]
    offset = case.seqlen_k - case.seqlen_q
    owner = case.owners(device) if case.lengths else None
    (left, right), prefix, causal = case.window, case.prefix, case.causal

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = key - row - offset
        keep = distance <= (0 if causal else right) if causal or right >= 0 else key >= 0
        if left >= 0:
            keep = keep & (distance >= -left)
        if prefix:
            keep = keep | (key < prefix)
        if owner is not None:
            keep = keep & (owner[row] == owner[key])
        return keep

    return visible


FA3_VARIABLE = "FLASH_EXT_BENCH_FA3"
FA3_LIBRARY = "_vllm_fa3_C.abi3.so"


def _unpacked(path: Path) -> Path:
    """A library that travelled as .xz (a tenth of its size) is unpacked beside the build."""
    if path.suffix != ".xz" or not path.is_file():
        return path
    target = Path(__file__).resolve().parent.parent / "build" / path.stem
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        target.parent.mkdir(exist_ok=True)
        with lzma.open(path) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return target


class FlashAttention3(Implementation):
    """FlashAttention-3's forward from the library that vllm's wheel carries; nothing else of vllm is imported."""

    name, title = "fa3", "FlashAttention-3"

    def __init__(self) -> None:
        self._forward: Callable[..., list[Tensor]] | None = None

    def library(self) -> Path | None:
        given = os.environ.get(FA3_VARIABLE)
        if given:
            return _unpacked(Path(given))
        spec = importlib.util.find_spec("vllm")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder) / "vllm_flash_attn" / FA3_LIBRARY
            if path.is_file():
                return path
        return None

    def absent(self, device: str) -> str | None:
        if self._forward is not None:
            return None
        path = self.library()
        if path is None:
            return f"no library: point {FA3_VARIABLE} at {FA3_LIBRARY} (or .xz) of the vllm wheel, or install vllm"
        if not path.is_file():
            return f"{FA3_VARIABLE}={path} is not a file"
        if device != "cuda":
            return "it needs a CUDA GPU"
        try:
            torch.ops.load_library(str(path))
            self._forward = torch.ops._vllm_fa3_C.fwd
        except (OSError, AttributeError, RuntimeError) as error:
            return f"{path.name} cannot be loaded: {str(error).splitlines()[0]}"
        return None

    def version(self) -> str:
        path = self.library()
        return path.name if path else ""

    def bind(self, case: Case, device: str) -> Attend:
        _require(case.direction == "fwd", "this library has no backward")
        _require(case.dtype != "fp32", "it takes no fp32")
        _require(not case.prefix and not case.pattern, f"it has no {case.mask} mask")
        forward = self._forward
        if isinstance(case, CacheCase):
            _require(case.dtype != "fp8", "caches are measured in 16 bits")
            return cache_peers.flash_attention_3(case, device, forward)
        ends = _cumulative(case.lengths, device) if case.lengths else None
        longest = max(case.lengths) if case.lengths else None
        sequences = len(case.lengths) or case.batch
        descale = None
        if case.dtype == "fp8":
            descale = torch.ones(sequences, case.heads_kv, device=device)
        left, right = case.window
        sinks = case.sink_logits(device)
        sinks = None if sinks is None else sinks.to(DTYPES[case.dtype])  # it takes them in q's dtype
        splits = 0 if case.seqlen_q == 1 else 1  # 0: as many as its own heuristic finds good

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if case.lengths:
                q, k, v = q[0], k[0], v[0]
            out = forward(
                q, k, v, None, None, None, None,  # k_new, v_new, q_v, out
                ends, ends, None, None, None,  # cu_seqlens q, k, k_new; seqused q, k
                longest, longest, None, None, None,  # max_seqlen q, k; page_table, kv_batch_idx, leftpad_k
                None, None, None,  # rotary cos, sin; seqlens_rotary
                descale, descale, descale,
                case.head_dim**-0.5, case.causal, left, 0 if case.causal else right, case.softcap,  # scale, causal, window, softcap
                False, None,  # is_rotary_interleaved, scheduler_metadata
                splits, None, 0, sinks,  # num_splits, pack_gqa, sm_margin, s_aux
                1, 0, None,  # cp_world_size, cp_rank, cp_tot_seqused_k
            )[0]  # fmt: skip
            return out[None] if case.lengths else out

        return attend


class CachePackage(Implementation):
    """Another library's decoding, where its package is installed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.title, self._module, self._call = cache_peers.PACKAGES[name]

    def absent(self, device: str) -> str | None:
        return cache_peers.why_no_package(self._module, device)

    def version(self) -> str:
        if importlib.util.find_spec(self._module) is None:
            return ""
        return f"{self._module} {getattr(cache_peers.load(self._module), '__version__', '(no version)')}"

    def bind(self, case: Case, device: str) -> Attend:
        _require(isinstance(case, CacheCase), "measured over KV caches alone")
        _require(case.dtype == "bf16", "measured in bf16 alone")
        return self._call(case, device, cache_peers.load(self._module))


def implementations() -> dict[str, Implementation]:
    found = (
        FlashExt(),
        FlashExtSm80(),
        FlashExtUnflushed(),
        FlashExtBlockScales(),
        Sdpa("cudnn", "cuDNN", SDPBackend.CUDNN_ATTENTION, masks=True),
        Sdpa("fa2", "FlashAttention-2", SDPBackend.FLASH_ATTENTION, masks=False),
        FlashAttention3(),
        Flex(),
        *(CachePackage(name) for name in cache_peers.PACKAGES),
        Sdpa("math", "unfused", SDPBackend.MATH, masks=True),
        Reference(),
    )
    return {each.name: each for each in found}
