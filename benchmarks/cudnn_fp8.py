"""cuDNN's FP8 forward, which torch does not offer, through nvidia-cudnn-frontend (1.18 needs nothing beside cuDNN itself).

On Hopper its result is e4m3 too. P and the result are scaled into e4m3's range as a user would: P by 2^8, since it is at
most 1, and the result by 2^6, since averages of normal values are small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .presets import Case

P_SCALE = 256.0
OUT_SCALE = 64.0


def why_not(case: Case) -> str:
    """Why cuDNN's FP8 attention on Hopper does not take a case; '' where it does."""
    if case.direction != "fwd":
        return "the FP8 backward is not set up here"
    if not case.plain or (case.causal and case.seqlen_q != case.seqlen_k):
        return f"no {case.mask} mask in FP8"
    if max(case.head_dim, case.head_dim_v) > 256 or case.head_dim % 16 or case.head_dim_v % 16:
        return "head dims must be multiples of 16"
    return ""


def bind(case: Case, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of q, k, v in e4m3 that gives OUT_SCALE times the result in e4m3; its attribute `finish` undoes that."""
    import cudnn

    handle = cudnn.create_handle()
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)

    def described(shape: tuple[int, int, int, int]) -> dict[str, Any]:
        batch, seqlen, heads, dim = shape
        return {"dim": [batch, heads, seqlen, dim], "stride": [seqlen * heads * dim, dim, heads * dim, 1]}

    one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    *inputs, out_shape = case.shapes()
    q, k, v = (graph.tensor(**described(shape), data_type=fp8) for shape in inputs)
    scales = {
        "descale_q": 1.0,
        "descale_k": 1.0,
        "descale_v": 1.0,
        "descale_s": 1 / P_SCALE,
        "scale_s": P_SCALE,
        "scale_o": OUT_SCALE,
    }
    scalars = {name: graph.tensor(**one, data_type=fp32) for name in scales}
    out, _, *largest = graph.sdpa_fp8(
        q=q, k=k, v=v, **scalars, is_inference=True, attn_scale=case.head_dim**-0.5, use_causal_mask=case.causal
    )
    layout = described(out_shape)
    out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(fp8)
    for tensor in largest:
        tensor.set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(fp32)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])

    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
    values = {scalars[name]: torch.full((1, 1, 1, 1), value, device=device) for name, value in scales.items()}
    values |= {tensor: torch.zeros(1, 1, 1, 1, device=device) for tensor in largest}

    def attend(q_data: Tensor, k_data: Tensor, v_data: Tensor) -> Tensor:
        result = torch.empty(out_shape, dtype=torch.float8_e4m3fn, device=device)
        tensors = {q: q_data, k: k_data, v: v_data, out: result, **values}
        if device == "cuda":
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute({tensor: data.data_ptr() for tensor, data in tensors.items()}, workspace.data_ptr(), handle=handle)
        return result

    attend.finish = lambda result: result.float() / OUT_SCALE
    return attend
