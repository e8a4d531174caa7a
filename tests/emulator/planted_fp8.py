"""Planted bugs in the FP8 forwards: calls that wrap the rings of K, V and transposed V, and the edits that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from survivor import Survivor

# (num_heads, num_heads_kv, seqlen_q, seqlen_k, softmax_scale), as planted.SHAPES for tiles of 64 to 224 keys: items of one tile,
# of several, and of none; a last tile that is full (384 of 192 and 128) or holds a few keys; a negative scale.
SHAPES = (
    (2, 1, 300, 900, None),
    (2, 1, 385, 514, None),
    (3, 1, 100, 384, None),
    (7, 1, 100, 100, None),
    (5, 1, 100, 250, None),
    (2, 1, 200, 300, -0.1),
    (2, 2, 5, 1, None),
    (2, 1, 450, 100, None),
    (3, 1, 300, 0, None),
)
PACKED = (((100, 300), (0, 5), (230, 150), (3, 0)), ((3, 90), (1, 40), (0, 2), (5, 130)))
WINDOW = (150, 60)


def _scales(kind: str, x: Any, cu_seqlens: Any, generator: Any) -> Any:
    """A scale of its own for each head of a sequence, or for each 64 rows."""
    import torch

    batch, heads = (x.shape[0], x.shape[2]) if x.dim() == 4 else (len(cu_seqlens) - 1, x.shape[1])
    shape: tuple[int, ...] = (batch, heads)
    if kind == "block":
        shape = (batch, heads, -(-x.shape[1] // 64)) if x.dim() == 4 else (1, heads, x.shape[0] // 64 + batch)
    return torch.rand(shape, generator=generator) + 0.5


def fp8_call(kernel: str) -> Callable[[], list[Any]]:
    """A call of flash_ext.attention on e4m3 tensors that launches this kernel; returns its results."""
    import torch

    import flash_ext

    _, _, _, _, head_dim, mask, *rest = kernel.split("_")
    dim, scored, kind = int(head_dim[1:]), "scored" in rest, "block" if "block" in rest else "head"
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)

    def options_of(heads: int, bias_shape: tuple[int, ...]) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": mask == "causal", "out_dtype": torch.float16}
        if "unflushed" in rest:
            options["flush_every"] = 0
        if mask == "local":
            options["window_size"] = WINDOW
        if scored:
            slopes, bias = torch.linspace(0.1, 0.5, heads), torch.randn(bias_shape, generator=generator)
            options |= {"softcap": 5.0, "alibi_slopes": slopes, "k_bias": bias}
        return options

    calls = []
    for heads, heads_kv, seqlen_q, seqlen_k, scale in SHAPES:
        tensors = tensor(1, seqlen_q, heads, dim), tensor(1, seqlen_k, heads_kv, dim), tensor(1, seqlen_k, heads_kv, dim)
        scales = {f"{n}_descale": _scales(kind, t, None, generator) for n, t in zip("qkv", tensors, strict=True)}
        calls.append((tensors, {"softmax_scale": scale, **scales, **options_of(heads, (1, heads_kv, seqlen_k))}))
    for lengths in PACKED:
        ends_q, ends_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
        total_q, total_k = int(ends_q[-1]), int(ends_k[-1])
        tensors = tensor(total_q, 2, dim), tensor(total_k, 1, dim), tensor(total_k, 1, dim)
        boundaries = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k}
        scales = {
            f"{n}_descale": _scales(kind, t, ends_q if n == "q" else ends_k, generator) for n, t in zip("qkv", tensors, strict=True)
        }
        calls.append((tensors, {**boundaries, **scales, "sinks": torch.ones(2), **options_of(2, (1, total_k))}))

    def call() -> list[torch.Tensor]:
        results = []
        for tensors, options in calls:
            attend = flash_ext.attention_varlen if "cu_seqlens_q" in options else flash_ext.attention
            results.append(attend(*tensors, **options, return_lse=True))
        return [part for out, lse in results for part in (out.view(torch.int16), lse.view(torch.int32))]

    return call


# Of Hopper's rows, beside those of planted.SURVIVORS: nothing survives in the rows for other GPUs.
SURVIVORS = (
    Survivor(
        "drop_wgmma_fence",
        "issue_output(0);",
        "in a step, the fence of the scores comes just before: no instruction touches the weights or the sums between the two",
        "fwd_fp8_sm90",
        after="issue_scores();",
    ),
    Survivor(
        "skip_wait",
        "load(shared.v_ring, v_state, shared.v[0], params.v_tma, 0);",
        "two stages: the wait for the only Q implies that all tiles of V but the last of the item before have been transposed",
        "fwd_fp8_sm90",
    ),
    Survivor(
        "drop_warp_sync",
        "__syncwarp();",
        "the emulator runs the lanes' proxy fences together; formally they need it before lane 0 hands on the transposed tile",
        "fwd_fp8_sm90",
        after="each lane its own stores, before wgmma reads them",
    ),
)
