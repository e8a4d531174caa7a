"""flash_ext.compat on the emulated kernels: what the interfaces hand over is taken as it is, without a copy or a fallback.

A fallback to the reference is a FallbackWarning, and with that an error here.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flash_ext
import flash_ext.compat as compat


def reference_alone() -> bool:
    """Whether the emulated device has no kernel for something that the tests here call."""
    device = os.environ["FLASH_EXT_EMULATE"]
    q = torch.empty(1, 8, 1, 64, dtype=torch.bfloat16, device="meta")
    scores = {"sinks": torch.empty(1, device="meta"), "k_bias": torch.empty(1, 1, 8, device="meta"), "window_size": (1, 0)}
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    dense = flash_ext.explain(q, q, q, device_info=device, softcap=1.0, **scores)
    packed = flash_ext.explain(*(3 * (q[0],)), device_info=device, cu_seqlens_q=lengths, cu_seqlens_k=lengths, softcap=1.0)
    return "reference" in (dense.backend, packed.backend)


pytestmark = pytest.mark.skipif(reference_alone(), reason="this build's kernels for the emulated device lack features used here")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == torch.bfloat16
    assert float((out.double() - expected).norm()) < 8e-3 * float(expected.norm())


Q, K, V = random(2, 4, 40, 64, seed=0), random(2, 2, 70, 64, seed=1), random(2, 2, 70, 64, seed=2)
KEYS = torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(3)) > 0.3


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": KEYS}], ids=["full", "causal", "keys"])
def test_scaled_dot_product_attention(options):
    with torch.no_grad():
        out = compat.scaled_dot_product_attention(Q, K, V, enable_gqa=True, **options)
        close(out, F.scaled_dot_product_attention(Q.double(), K.double(), V.double(), enable_gqa=True, **options))


def test_more_queries_than_keys_from_the_top_left():
    query, key = random(1, 2, 70, 64, seed=4), random(1, 2, 40, 64, seed=5)
    out = compat.scaled_dot_product_attention(query, key, key, is_causal=True)
    close(out, F.scaled_dot_product_attention(query.double(), key.double(), key.double(), is_causal=True))


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flash_attn(options):
    q, k, v = (t.transpose(1, 2) for t in (Q, K, V))
    out = compat.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **options)
    close(out, flash_ext.attention(q.double(), k.double(), v.double(), backend="reference", **options))
    q, k, v = (t[0] for t in (q, k, v))
    cu_seqlens = {f"cu_seqlens_{t}": torch.tensor(ends, dtype=torch.int32) for t, ends in (("q", [0, 13, 40]), ("k", [0, 30, 70]))}
    out = compat.flash_attn_varlen_func(q, k, v, **cu_seqlens, max_seqlen_q=27, max_seqlen_k=40, **options)
    close(out, flash_ext.attention_varlen(q.double(), k.double(), v.double(), backend="reference", **cu_seqlens, **options))


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt_oss_sinks"])
def test_transformers(name):
    """Logits of a padded batch in bfloat16, on kernels, against float32."""
    transformers = pytest.importorskip("transformers", minversion="5.14", reason="needs transformers >= 5.14")
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0,
    }  # fmt: skip
    config, model = {
        "llama": (transformers.LlamaConfig(**sizes), transformers.LlamaForCausalLM),
        "mistral_window": (transformers.MistralConfig(**sizes, sliding_window=8), transformers.MistralForCausalLM),
        "gpt_oss_sinks": (
            transformers.GptOssConfig(**sizes, sliding_window=8, num_local_experts=1, num_experts_per_tok=1),
            transformers.GptOssForCausalLM,
        ),
    }[name]
    torch.manual_seed(0)
    model = model._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, mask = torch.randint(1, 64, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    expected = model(tokens, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(compat.transformers.register())
    out = model.bfloat16()(tokens, attention_mask=mask).logits[mask.bool()]
    assert float((out.float() - expected).norm()) < 0.03 * float(expected.norm())
