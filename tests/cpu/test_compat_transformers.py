"""flash_ext as an attention implementation of transformers: tiny models with random weights equal their own implementation."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import sys

import pytest
import torch
from torch import Tensor

import flash_ext.compat.transformers as compat
from flash_ext.compat.transformers_masks import make_mask, read_mask


def test_registering_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers >= 5\.14 is needed"):
        compat.register()


def test_names_that_transformers_takes_for_its_own():
    with pytest.raises(ValueError, match="must not contain 'flash'"):
        compat.register("flash_ext")


transformers = pytest.importorskip("transformers", minversion="5.14", reason="needs transformers >= 5.14 (pip install '.[test]')")
masking_utils = pytest.importorskip("transformers.masking_utils")

NAME = compat.register()


def test_old_versions_are_refused(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.9.1")
    with pytest.raises(ImportError, match=r"5\.14 is needed.*found 5\.9\.1"):
        compat.register()


PAD, SEQLEN, VOCABULARY, WINDOW = 0, 12, 64, 4
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
# name: (configuration, its arguments, model, the implementation that is right for it)
DECODERS = {
    "llama": ("LlamaConfig", GROUPED, "LlamaForCausalLM", "sdpa"),
    "mistral_window": ("MistralConfig", {**GROUPED, "sliding_window": WINDOW}, "MistralForCausalLM", "sdpa"),
    "gemma2_softcap": (
        "Gemma2Config", {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}, "Gemma2ForCausalLM", "eager",
    ),
    "gpt_oss_sinks": (
        "GptOssConfig", {**GROUPED, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
        "GptOssForCausalLM", "eager",
    ),
    "deepseek_mla": (
        "DeepseekV3Config",
        {
            **SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        },
        "DeepseekV3ForCausalLM", "sdpa",
    ),
}  # fmt: skip
PADDINGS = {
    "none": lambda mask: None,
    "left": lambda mask: (mask[1, :5].zero_(), mask[2, :1].zero_()),
    "right": lambda mask: (mask[1, 7:].zero_(), mask[2, 11:].zero_()),
    "holes": lambda mask: (mask[1, 3:6].zero_(), mask[2, 0].zero_()),
}


def pair(name: str, table: dict = DECODERS) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model twice, with its own attention and with flash_ext's."""
    config, arguments, model, implementation = table[name]
    config, model = getattr(transformers, config)(**arguments), getattr(transformers, model)
    torch.manual_seed(0)
    own = model._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # large enough for attention that is far from an average
    ours = model._from_config(copy.deepcopy(config), attn_implementation=NAME).eval()
    ours.load_state_dict(own.state_dict())
    assert ours.config._attn_implementation == NAME
    return own, ours


@pytest.fixture(scope="module")
def decoders() -> dict:
    return {name: pair(name) for name in DECODERS}


@pytest.fixture
def calls(monkeypatch) -> list:
    """The arguments of every call of flash_ext by transformers."""
    seen: list = []
    for name in ("attention", "attention_varlen"):
        function = getattr(compat, name)

        def spy(*arguments, function=function, **options):
            seen.append((function.__name__, options))
            return function(*arguments, **options)

        monkeypatch.setattr(compat, name, spy)
    return seen


def tokens(batch: int = 3, seqlen: int = SEQLEN, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def padding(kind: str, batch: int = 3, seqlen: int = SEQLEN) -> Tensor:
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    PADDINGS[kind](mask)
    return mask


def close(ours: Tensor, own: Tensor) -> None:
    size = float(own.detach().abs().max())
    assert size > 1e-2
    torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-5 * size)


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_padded_batches(decoders, calls, name, kind):
    """Logits at tokens, and the gradients of all weights."""
    mask, results = padding(kind), []
    for model in decoders[name]:
        model.zero_grad()
        logits = model(tokens(), attention_mask=mask).logits * mask[..., None]
        logits.square().mean().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (own, own_grads), (ours, our_grads) = results
    close(ours, own)
    assert own_grads.keys() == our_grads.keys()
    for parameter, grad in own_grads.items():
        bound = max(2e-4 * float(grad.norm()), 1e-7)
        assert float((our_grads[parameter] - grad).norm()) < bound, parameter
    assert [f for f, _ in calls] == ["attention"] * 2
    assert all((options["k_bias"] is None) == (kind == "none") for _, options in calls)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache(decoders, calls, name, cache, kind):
    results = [
        model.generate(
            tokens(), attention_mask=padding(kind), max_new_tokens=10, min_new_tokens=10, do_sample=False,
            cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
        )
        for model in decoders[name]
    ]  # fmt: skip
    own, ours = results
    assert len(calls) == 2 * 10
    assert torch.equal(own.sequences, ours.sequences)
    for a, b in zip(ours.logits, own.logits, strict=True):
        close(a, b)


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt_oss_sinks"])
def test_a_cache_that_is_continued_by_several_tokens(decoders, name, cache):
    """Prefill in three parts equals one pass."""
    for kind in ("none", "left"):
        mask, results = padding(kind), []
        for model in decoders[name]:
            options = {} if cache == "DynamicCache" else {"max_cache_len": 16}
            past = getattr(transformers, cache)(config=model.config, **options)
            parts = []
            for start, end in ((0, 5), (5, 8), (8, 12)):
                with torch.no_grad():
                    part = model(tokens()[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
                parts.append(part.logits * mask[:, start:end, None])
            results.append(torch.cat(parts, 1))
        close(results[1], results[0])


POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2_softcap"])
def test_several_sequences_in_a_row_by_their_positions(decoders, calls, name, batch):
    own, ours = (model(tokens(batch), position_ids=POSITIONS.expand(batch, -1), use_cache=False).logits for model in decoders[name])
    close(ours, own)
    assert [f for f, _ in calls] == ["attention_varlen"] * 2
    alone = decoders[name][1](tokens(batch)[:, 5:8], use_cache=False).logits
    close(ours[:, 5:8], alone)


def test_several_sequences_in_a_row_by_cu_seqlens(decoders, calls):
    lengths = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    own, ours = decoders["llama"]
    expected = own(tokens(1), position_ids=POSITIONS, use_cache=False).logits
    out = ours(
        tokens(1),
        position_ids=POSITIONS,
        use_cache=False,
        cu_seq_lens_q=lengths,
        cu_seq_lens_k=lengths,
        max_length_q=5,
        max_length_k=5,
    ).logits
    close(out, expected)
    assert [f for f, _ in calls] == ["attention_varlen"] * 2 and calls[0][1]["max_seqlen_q"] == 5


ENCODERS = {
    "bert": ("BertConfig", SIZES, "BertModel", "sdpa"),
    "modernbert_window": (
        "ModernBertConfig",
        {**SIZES, "local_attention": WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        "ModernBertModel", "sdpa",
    ),
    "decoder_made_bidirectional": ("LlamaConfig", {**GROUPED, "is_causal": False}, "LlamaModel", "sdpa"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("name", ENCODERS)
def test_bidirectional_models(calls, name, kind):
    mask = padding(kind)
    own, ours = (model(tokens(), attention_mask=mask)[0] * mask[..., None] for model in pair(name, ENCODERS))
    close(ours, own)
    assert not any(options["causal"] for _, options in calls)


def test_cross_attention():
    sizes = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 6,
        "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    table = {"whisper": ("WhisperConfig", sizes, "WhisperForConditionalGeneration", "sdpa")}
    features = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    own, ours = (model(input_features=features, decoder_input_ids=tokens()).logits for model in pair("whisper", table))
    close(ours, own)


@pytest.mark.parametrize("kind", [None, "none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_compiled_without_a_graph_break(decoders, name, kind):
    """kind None: no padding mask, where transformers must expect several sequences in a row."""
    own, ours = decoders[name]
    mask = None if kind is None else padding(kind)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected, out = (model(tokens(), attention_mask=mask, use_cache=False).logits for model in (own, compiled))
    keep = 1 if mask is None else mask[..., None]
    close(out * keep, expected * keep)


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_several_sequences_in_a_row_compiled(decoders, name):
    own, ours = decoders[name]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected, out = (model(tokens(), position_ids=POSITIONS.expand(3, -1), use_cache=False).logits for model in (own, compiled))
    close(out, expected)


@pytest.mark.parametrize("name", ["mistral_window", "gpt_oss_sinks"])
def test_generation_compiled(decoders, name):
    """transformers compiles the steps of decoding over a static cache, with masks made outside of the graph."""
    own, ours = decoders[name]
    options = {"attention_mask": padding("left"), "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    compilation = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compilation._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = ours.generate(tokens(), cache_implementation="static", compile_config=compilation, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(out, own.generate(tokens(), **options))


def test_exported(decoders):
    own, ours = decoders["llama"]
    mask = padding("left")
    program = torch.export.export(ours, (tokens(),), {"attention_mask": mask, "use_cache": False}, strict=False)
    out = program.module()(tokens(), attention_mask=mask, use_cache=False).logits
    close(out * mask[..., None], own(tokens(), attention_mask=mask).logits * mask[..., None])


def test_half_precision(decoders):
    """bfloat16 weights, and float32 weights under autocast, against float32."""
    mask = padding("left")
    expected = decoders["gemma2_softcap"][0](tokens(), attention_mask=mask).logits * mask[..., None]
    ours = copy.deepcopy(decoders["gemma2_softcap"][1])
    with torch.autocast("cpu", torch.bfloat16):
        first = ours(tokens(), attention_mask=mask).logits
    for logits in (first, ours.bfloat16()(tokens(), attention_mask=mask).logits):
        error = (logits.float() * mask[..., None] - expected).norm() / expected.norm()
        assert error < 0.03, error


def test_loading_and_switching(decoders, tmp_path, calls):
    own, _ = decoders["llama"]
    own.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=compat.register())
    mask = padding("left")
    expected = own(tokens(), attention_mask=mask).logits * mask[..., None]
    close(loaded(tokens(), attention_mask=mask).logits * mask[..., None], expected)
    assert len(calls) == 2
    loaded.set_attn_implementation("sdpa")
    loaded.set_attn_implementation(NAME)
    close(loaded(tokens(), attention_mask=mask).logits * mask[..., None], expected)
    assert len(calls) == 4


def test_the_readme(root, calls):
    example = re.search(r"```python\n(import torch\nfrom transformers.*?)```", (root / "README.md").read_text(), re.DOTALL)[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue() == "torch.Size([2, 16, 512])\n" and len(calls) == 2


# The mask function and what the attention function reads


def mask_of(function=None, q_length: int = 6, kv_length: int = 6, **options) -> Tensor:
    return make_mask(masking_utils, batch_size=2, q_length=q_length, kv_length=kv_length, mask_function=function, **options)


def read(mask, q_length: int = 6, kv_length: int = 6, causal: bool = True, window: int | None = None):
    return read_mask(mask, torch.empty(2, 4, q_length, 8), torch.empty(2, 2, kv_length, 8), causal, window)


def test_a_mask_takes_no_memory_for_queries():
    visible = torch.tensor([[True] * 60, [False] * 30 + [True] * 30])
    mask = mask_of(masking_utils.sliding_window_causal_mask_function(7), 60, 60, attention_mask=visible)
    assert mask.dim() == 4 and mask.untyped_storage().nbytes() == 2 * 60 * 4
    structure = read(mask, 60, 60, window=7)
    assert structure.causal and structure.window_size == (6, -1) and structure.seqlen_k == 60
    assert torch.equal(structure.key_bias, torch.zeros(2, 60).masked_fill(~visible, -torch.inf))
    mask = mask_of(masking_utils.sliding_window_causal_mask_function(7), 60, 60)
    assert mask.numel() == 0 and read(mask, 60, 60, window=7).window_size == (6, -1)


def nothing_hidden(mask: Tensor, **options) -> bool:
    structure = read(mask, **options)
    return structure.causal and structure.window_size == (-1, -1) and structure.key_bias is None and structure.seqlen_k is None


def test_no_key_bias_where_none_is_needed():
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert nothing_hidden(mask_of())
    assert nothing_hidden(mask_of(q_length=3, kv_length=9, q_offset=6, attention_mask=everything), q_length=3, kv_length=9)
    step = read(mask_of(q_length=1, kv_length=9, q_offset=torch.tensor(6)), 1, 9)
    assert step.key_bias[0].tolist() == [0] * 7 + [-torch.inf] * 2, "the end is not known on the host"
    assert nothing_hidden(mask_of(masking_utils.sliding_window_causal_mask_function(6)), window=6), "the window holds every key"
    assert read(None, causal=True).causal and not read(None, causal=False).causal
    structure = read(mask_of(masking_utils.bidirectional_mask_function, allow_is_bidirectional_skip=True), causal=True)
    assert not structure.causal and structure.key_bias is None


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", ["bloom", "xglm", "codegen", "longformer"])
def test_models_with_an_attention_of_their_own_stop(name, kind):
    """They ask no attention interface, but get their masks from it: without a mask they would not be causal."""
    table = {
        "bloom": ("BloomConfig", SIZES, "BloomForCausalLM", "eager"),
        "xglm": (
            "XGLMConfig",
            {**SIZES, "d_model": 32, "attention_heads": 4, "num_layers": 1, "ffn_dim": 32},
            "XGLMForCausalLM",
            "eager",
        ),
        "codegen": (
            "CodeGenConfig",
            {**SIZES, "n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4},
            "CodeGenForCausalLM",
            "eager",
        ),
    }
    table["longformer"] = ("LongformerConfig", {**SIZES, "attention_window": WINDOW}, "LongformerModel", "eager")
    own, theirs = pair(name, table)
    own(tokens(), attention_mask=padding(kind))
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=r"size|shape|mask"):
        theirs(tokens(), attention_mask=padding(kind))


def test_a_static_cache_is_cut():
    structure = read(mask_of(q_length=2, kv_length=9, q_offset=3), 2, 9)
    assert structure.seqlen_k == 5 and structure.causal and structure.key_bias.eq(0).all()
    structure = read(mask_of(q_length=2, kv_length=9, q_offset=torch.tensor(3)), 2, 9)
    assert structure.seqlen_k == 5


def test_a_mask_shorter_than_the_keys_hides_the_rest():
    padding = torch.ones(2, 4, dtype=torch.bool)
    structure = read(mask_of(masking_utils.bidirectional_mask_function, attention_mask=padding, allow_is_bidirectional_skip=True))
    assert structure.key_bias[0].tolist() == [0, 0, 0, 0, -torch.inf, -torch.inf]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keys, counts", [(4, False), (5, True)])
def test_when_a_window_counts(keys, counts, compiled):
    """A causal window of 4 keys, and a two-sided one of 3 on each side."""
    config = transformers.MistralConfig(sliding_window=4)

    def causal() -> Tensor:
        function = masking_utils.sliding_window_causal_mask_function(4)
        return mask_of(function, keys, keys, local_size=4, config=config)

    def two_sided() -> Tensor:
        function = masking_utils.sliding_window_bidirectional_mask_function(3)
        return mask_of(function, keys, keys, local_size=3, config=two_sided_config, allow_is_bidirectional_skip=True)

    two_sided_config = transformers.MistralConfig(sliding_window=3)
    for function, windows in ((causal, [(3, -1), (-1, -1)]), (two_sided, [(3, 3), (-1, -1)])):
        torch._dynamo.reset()
        mask = torch.compile(function, fullgraph=True, backend="eager")() if compiled else function()
        assert read(mask, keys, keys, window=4).window_size == windows[not counts], function


def test_a_window_that_the_layer_does_not_tell():
    """Models whose attention is not given sliding_window would attend to everything."""
    mask = mask_of(masking_utils.sliding_window_causal_mask_function(3))
    with pytest.raises(NotImplementedError, match="sliding window"):
        read(mask)
    assert read(mask, window=3).window_size == (2, -1)
    config = transformers.MistralConfig(sliding_window=3)
    assert read_mask(mask, Q, Q, True, None, config).window_size == (2, -1)
    mask = mask_of(masking_utils.sliding_window_bidirectional_mask_function(3), allow_is_bidirectional_skip=True)
    assert read_mask(mask, Q, Q, True, None, config).window_size == (3, 3)


@pytest.mark.parametrize("kind", ["none", "left"])
def test_a_model_that_does_not_tell_its_layers_the_window(kind):
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}
    own, ours = pair("phimoe", {"phimoe": ("PhimoeConfig", sizes, "PhimoeForCausalLM", "sdpa")})
    mask = padding(kind)
    own, ours = (model(tokens(), attention_mask=mask).logits * mask[..., None] for model in (own, ours))
    close(ours, own)


@pytest.mark.parametrize("q_length", [1, 4])
def test_masks_of_the_models_own(q_length):
    """One query may have any mask; several may not."""
    offset = 6 - q_length
    images = torch.tensor([[0, 0, 0, 0, -1, -1], [-1, 0, 0, 0, 0, 0]])
    functions = {
        "blockwise": (masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(images)), False),
        "own": (lambda b, h, q, k: (k <= q) & (k != 2), True),
        "chunked": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), False),
    }
    for name, (function, use_vmap) in functions.items():
        options = {"q_length": q_length, "q_offset": offset, "use_vmap": use_vmap, "allow_is_causal_skip": False}
        if q_length > 1:
            word = "attention_chunk_size=4" if name == "chunked" else "mask_function="
            with pytest.raises(NotImplementedError, match=word):
                mask_of(function, **options)
            continue
        structure = read(mask_of(function, **options), 1)
        drawn = masking_utils.sdpa_mask(2, 1, 6, offset, mask_function=function, allow_is_causal_skip=False, use_vmap=use_vmap)
        assert torch.equal(structure.key_bias == 0, drawn[:, 0, 0].expand(2, 6)), name
    short = masking_utils.chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.long))
    assert nothing_hidden(mask_of(short)), "one chunk is plain causal attention"


@pytest.mark.parametrize("name", ["causal", "bidirectional"])
def test_masks_that_callers_compute_with(name):
    function, skip = getattr(masking_utils, f"{name}_mask_function"), f"allow_is_{name}_skip"
    with pytest.raises(NotImplementedError, match="computes with its mask"):
        mask_of(function, **{skip: False})
    assert read(mask_of(function, q_length=1, q_offset=5, **{skip: False}), 1).key_bias is None, "a step of a compiled decoder"


def test_masks_between_queries_and_keys():
    mask = masking_utils.sdpa_mask(2, 6, 6, allow_is_causal_skip=False)
    with pytest.raises(NotImplementedError, match=r"attention_mask=bool tensor of shape \(2, 1, 6, 6\) for 6 queries"):
        read(mask)


def test_masks_that_models_hand_over_themselves():
    keys = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    bias = torch.zeros(2, 6).masked_fill(keys == 0, -torch.inf)
    structure = read(keys, causal=True)
    assert structure.causal and torch.equal(structure.key_bias, bias)
    for mask in (keys.bool()[:, None, None], bias[:, None, None], keys.bool()[:, None, None].expand(2, 1, 6, 6)):
        structure = read(mask, causal=True)
        assert not structure.causal and torch.equal(structure.key_bias, bias)
    smallest = torch.finfo(torch.float16).min
    structure = read(bias.half().clamp_min(smallest)[:, None, None])
    assert structure.key_bias.dtype == torch.float32 and structure.key_bias[0, 5] == smallest


class Layer(torch.nn.Module):
    is_causal = True


Q = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "dropout": ({"dropout": 0.1}, r"dropout=0\.1"),
    "weights": ({"output_attentions": True}, "output_attentions=True"),
    "paged": ({"cache": object()}, "cache='object'"),
    "bias": ({"position_bias": torch.zeros(1, 4, 6, 6)}, r"position_bias=float32 tensor of shape \(1, 4, 6, 6\)"),
    "sparse": ({"indices": torch.zeros(2, 6, 3)}, "indices="),
    "padding_and_sequences": (
        {
            "attention_mask": torch.ones(2, 6), "cu_seq_lens_q": torch.tensor([0, 12], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 12], dtype=torch.int32),
        },
        "a padding mask together with cu_seq_lens_q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    options, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        compat.attention_forward(Layer(), Q, Q, Q, options.pop("attention_mask", None), **options)


def test_dropout_while_training():
    model = pair("llama", {"llama": ("LlamaConfig", {**GROUPED, "attention_dropout": 0.1}, "LlamaForCausalLM", "sdpa")})[1]
    model(tokens())
    with pytest.raises(NotImplementedError, match=r"dropout=0\.1"):
        model.train()(tokens())


def test_half_of_cu_seqlens():
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        compat.attention_forward(Layer(), Q, Q, Q, None, cu_seq_lens_q=torch.tensor([0, 12], dtype=torch.int32))
