"""Write text with the demo's language model, from a paged cache of keys and values.

Trains the model of train_language_model.py for a moment, then continues prompts of different lengths from its held-out
text, greedily, in two ways: with a cache, where a step works on one new token a sequence (flash_ext.attention_with_kvcache),
and without, where every step works on everything so far. Both must write the same tokens; the program fails otherwise.

    python examples/generate.py                  half a minute on two CPU cores, in float32
    python examples/generate.py --device cuda    a larger model, in bfloat16

Beside flash_ext and torch it needs what the demo needs: pip install 'flash_ext[demo]'.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from train_language_model import CPU, GPU, LanguageModel, Run, Settings, Text, attend_flash_ext, integer_from

import flash_ext

# The largest difference between the logits with and without a cache. Where the two largest logits are closer than that,
# rounding decides between their tokens.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


class PagedCache:
    """Keys and values of every layer, in pages of a few rows that are handed out as sequences grow.

    A page holds its rows of all layers: (pages, layers, 2, page_size, heads, head_dim). So a layer's cache is a view whose
    pages lie far apart, which attention_with_kvcache takes as it is, and moving or freeing a sequence is a list of pages.
    """

    def __init__(self, model: LanguageModel, settings: Settings, batch: int, page_size: int, device: torch.device) -> None:
        self.page_size, self.dtype = page_size, settings.dtype
        pages_per_sequence = -(-settings.seqlen // page_size)
        num_pages = batch * pages_per_sequence
        head_dim = settings.width // settings.heads
        shape = (num_pages, settings.layers, 2, page_size, settings.heads, head_dim)
        self.memory = torch.zeros(shape, dtype=settings.dtype, device=device)
        self.free = list(range(num_pages))
        random.Random(0).shuffle(self.free)  # a server's free list is in no order after a while
        self.owned = [[] for _ in range(batch)]
        self.page_table = torch.zeros(batch, pages_per_sequence, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.cos, self.sin = model.angles.cos(), model.angles.sin()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k_cache, v_cache) of a layer, each (pages, page_size, heads, head_dim)."""
        return self.memory[:, index, 0], self.memory[:, index, 1]

    def reserve(self, rows: list[int]) -> None:
        """Pages for this many rows of each sequence."""
        for b, needed in enumerate(rows):
            while len(self.owned[b]) * self.page_size < needed:
                page = self.free.pop()
                self.page_table[b, len(self.owned[b])] = page
                self.owned[b].append(page)


def step_with_cache(model: LanguageModel, cache: PagedCache, tokens: Tensor) -> Tensor:
    """Logits (batch, n, 256) of tokens (batch, n), which come behind what the cache holds; their keys and values join it."""
    x = model.embed(tokens)
    for index, block in enumerate(model.blocks):
        q, k, v = block.qkv(block.norm_attention(x)).unflatten(-1, (3, block.heads, -1)).unbind(2)
        q, k, v = (t.to(cache.dtype) for t in (q, k, v))
        attended = flash_ext.attention_with_kvcache(
            q, *cache.layer(index), k, v, cache_seqlens=cache.lengths, page_table=cache.page_table,
            rotary_cos=cache.cos, rotary_sin=cache.sin, rotary_interleaved=False, causal=True,
        )  # fmt: skip
        x = x + block.project(attended.flatten(2))
        x = x + block.mlp(block.norm_mlp(x))
    return model.head(model.norm(x))


@dataclass
class Written:
    """tokens: (batch, longest prompt + count), a sequence's own first, zeros behind. logits: (batch, count, 256), of the new."""

    tokens: Tensor
    logits: Tensor
    seconds: float


def _put(tokens: Tensor, lengths: Tensor, new: Tensor) -> None:
    tokens[torch.arange(len(tokens), device=tokens.device), lengths] = new


@torch.no_grad()
def write_with_cache(run: Run, prompts: Tensor, lengths: Tensor, count: int, page_size: int) -> Written:
    """count tokens behind each prompt: one pass over the prompts, then a step a token."""
    batch, longest = prompts.shape
    cache = PagedCache(run.model, run.settings, batch, page_size, run.device)
    tokens = torch.cat((prompts, prompts.new_zeros(batch, count)), 1)
    ends, steps = lengths.clone(), []
    start = time.perf_counter()
    for i in tqdm(range(count), desc="with a cache", unit="step", leave=False):
        with run.precision():
            if i == 0:
                # Short prompts leave rows of padding behind their ends, which the next tokens overwrite.
                cache.reserve([longest] * batch)
                logits = step_with_cache(run.model, cache, prompts)[torch.arange(batch, device=run.device), lengths - 1]
                cache.lengths = lengths.int()
            else:
                cache.reserve([n + i for n in lengths.tolist()])
                logits = step_with_cache(run.model, cache, tokens.gather(1, ends[:, None] - 1))[:, 0]
                cache.lengths = cache.lengths + 1
        steps.append(logits)
        _put(tokens, ends, logits.argmax(-1))
        ends = ends + 1
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return Written(tokens, torch.stack(steps, 1).float(), time.perf_counter() - start)


@torch.no_grad()
def write_without_cache(run: Run, prompts: Tensor, lengths: Tensor, count: int) -> Written:
    """The same, by the model's own forward pass over everything so far."""
    tokens = torch.cat((prompts, prompts.new_zeros(len(prompts), count)), 1)
    ends, steps = lengths.clone(), []
    start = time.perf_counter()
    for i in tqdm(range(count), desc="without", unit="step", leave=False):
        with run.precision():
            logits = run.model(tokens[:, : prompts.shape[1] + i])[torch.arange(len(tokens), device=run.device), ends - 1]
        steps.append(logits)
        _put(tokens, ends, logits.argmax(-1))
        ends = ends + 1
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return Written(tokens, torch.stack(steps, 1).float(), time.perf_counter() - start)


@torch.no_grad()
def judge(run: Run, cached: Written, plain: Written, lengths: Tensor) -> str | None:
    """What is wrong with the cached run, or None. The first token that differs must be one that rounding decided."""
    bound, count = MAX_DIFFERENCE[run.settings.dtype], cached.logits.shape[1]
    positions = lengths[:, None] - 1 + torch.arange(count, device=run.device)
    with run.precision():
        logits = run.model(cached.tokens)[torch.arange(len(lengths), device=run.device)[:, None], positions].float()
    difference = (cached.logits - logits).abs().max().item()
    print(f"logits with and without a cache differ by at most {difference:.1e} (bound {bound:.0e})")
    if not difference <= bound:
        return f"logits differ by {difference:.1e}; the bound is {bound:.0e}"
    differing = (cached.tokens != plain.tokens).any(1).nonzero().flatten().tolist()
    for b in differing:
        first = (cached.tokens[b] != plain.tokens[b]).nonzero()[0].item()
        before = plain.logits[b, first - lengths[b]]
        gap = (before.max() - before[cached.tokens[b, first]]).item()
        if not gap <= bound:
            return f"sequence {b} has another token at {first}, {gap:.2g} below the most likely one"
    print(f"{len(lengths) - len(differing)} of {len(lengths)} sequences have the same tokens with and without a cache")
    return None


def read_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=integer_from(1), default=150, help="of training")
    parser.add_argument("--prompts", type=integer_from(1), default=4, help="sequences written at once")
    parser.add_argument("--tokens", type=integer_from(1), default=96, help="written behind each prompt")
    parser.add_argument("--page-size", type=integer_from(1), default=16, help="rows of a page of the cache")
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of the weights and of the batches")
    sizes = ("batch", "seqlen", "layers", "width", "heads")
    for name in sizes:
        parser.add_argument(f"--{name}", type=integer_from(1), help="of the model and its training", default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU (see python -m flash_ext)")
    given = {name: getattr(options, name) for name in sizes if name in options}
    settings = replace(GPU if options.device == "cuda" else CPU, steps=options.steps, **given)
    if settings.width % (2 * settings.heads):
        parser.error(f"--width must be a multiple of twice --heads, got {settings.width} and {settings.heads}")
    if options.tokens >= settings.seqlen:
        parser.error(f"--tokens must be below --seqlen, got {options.tokens} and {settings.seqlen}")
    return options, settings


def prompts_of(text: Text, settings: Settings, number: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(prompts (number, longest), lengths): held-out text in pieces of different lengths, zeros behind."""
    longest = settings.seqlen - tokens
    lengths = torch.tensor([max(1, longest * (b + 1) // number) for b in range(number)])
    windows = text.validation_windows(settings.seqlen)
    prompts = windows[torch.arange(number) * len(windows) // number % len(windows), :longest].clone()
    prompts[torch.arange(longest) >= lengths[:, None]] = 0
    return prompts, lengths


def main(arguments: list[str] | None = None) -> int:
    options, settings = read_arguments(arguments)
    device = torch.device(options.device)
    text = Text.read(settings.seqlen)
    run = Run("flash_ext", attend_flash_ext, settings, options.seed, device)
    for step in tqdm(range(settings.steps), desc="training", unit="step", leave=False):
        run.step(text.batch(settings, options.seed, step).to(device))
    print(f"trained for {settings.steps} steps, loss {run.train_losses[-1]:.3f} nats per byte")

    prompts, lengths = (t.to(device) for t in prompts_of(text, settings, options.prompts, options.tokens))
    plain = write_without_cache(run, prompts, lengths, options.tokens)
    cached = write_with_cache(run, prompts, lengths, options.tokens, options.page_size)
    shown, end = cached.tokens[-1].cpu(), int(lengths[-1])
    as_text = [bytes(part.tolist()).decode(errors="replace") for part in (shown[max(0, end - 200) : end], shown[end:])]
    print(f"--- the end of a prompt ---\n{as_text[0]}\n--- and what follows ---\n{as_text[1]}\n---")
    for name, result in (("with a cache", cached), ("without", plain)):
        print(f"{name:14}{options.prompts * options.tokens / result.seconds:12,.0f} tokens/s")
    complaint = judge(run, cached, plain, lengths)
    if complaint:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if complaint else 0


if __name__ == "__main__":
    sys.exit(main())
