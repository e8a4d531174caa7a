"""Train a small language model on Python's own standard library, and check flash_ext against torch on the way.

The model is a causal transformer over bytes. It is trained three times side by side, from the same seed and on the same
batches: with flash_ext.attention, with torch's scaled_dot_product_attention, and without attention (each position sees
only itself). The program fails when the first two disagree, or when attention does not earn its place.

    python examples/train_language_model.py                  about two minutes on two CPU cores, in float32
    python examples/train_language_model.py --device cuda    a larger model, in bfloat16 with float32 weights

losses.csv gets the training losses of all three, curves.png the same as a picture. Beside flash_ext and torch it needs tqdm
and matplotlib, pip install 'flash_ext[demo]', or --plain, which goes without progress bar and picture.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_ext

MIN_GAIN = 0.3  # nats of validation loss by which attention must win
# The largest difference between the training losses of flash_ext and torch, in nats, at any step. Both round
# differently, and training amplifies the difference from step to step.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
VALIDATION_WINDOWS = 32

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v: (batch, seqlen, heads, head_dim) -> the same shape


def attend_flash_ext(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_ext.attention(q, k, v, causal=True)


def attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attend_to_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


@dataclass(frozen=True)
class Settings:
    """The size of the model and of the run."""

    layers: int
    width: int
    heads: int
    seqlen: int
    batch: int
    steps: int
    learning_rate: float
    dtype: torch.dtype  # of the activations; weights are float32


CPU = Settings(layers=2, width=128, heads=2, seqlen=256, batch=8, steps=400, learning_rate=2e-3, dtype=torch.float32)
GPU = Settings(layers=6, width=512, heads=4, seqlen=2048, batch=8, steps=300, learning_rate=1e-3, dtype=torch.bfloat16)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary position embedding: turn each pair of features by an angle that grows with the position."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, settings: Settings, attend: Attend) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.attend = settings.heads, attend
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.project(self.attend(rotate(q, angles), rotate(k, angles), v).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, settings: Settings, attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, settings.width)
        self.blocks = nn.ModuleList(Block(settings, attend) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.head = nn.Linear(settings.width, 256, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        half = settings.width // settings.heads // 2
        frequencies = 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("angles", torch.outer(torch.arange(settings.seqlen), frequencies), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, angles = self.embed(tokens), self.angles[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


@dataclass
class Text:
    """The standard library's top-level modules as bytes. Every tenth file is for validation, and never trained on."""

    train: Tensor
    validation: Tensor
    num_files: int

    @classmethod
    def read(cls, seqlen: int) -> Text:
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py"))
        contents = [torch.frombuffer(bytearray(path.read_bytes() + b"\n"), dtype=torch.uint8) for path in files]
        parts = [[c for i, c in enumerate(contents) if (i % 10 == 9) == held_out] for held_out in (False, True)]
        train, validation = (torch.cat(part) if part else torch.empty(0, dtype=torch.uint8) for part in parts)
        if min(len(train), len(validation)) <= VALIDATION_WINDOWS * (seqlen + 1):
            raise SystemExit(f"{folder} holds too little text ({len(files)} files) for --seqlen {seqlen}")
        return cls(train, validation, len(files))

    def batch(self, settings: Settings, seed: int, step: int) -> Tensor:
        """Windows of seqlen + 1 bytes from random places; a function of seed and step alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - settings.seqlen, (settings.batch, 1), generator=generator)
        return self.train[starts + torch.arange(settings.seqlen + 1)].long()

    def validation_windows(self, seqlen: int) -> Tensor:
        starts = torch.linspace(0, len(self.validation) - seqlen - 1, VALIDATION_WINDOWS).long()[:, None]
        return self.validation[starts + torch.arange(seqlen + 1)].long()


class Run:
    """One model in training, with what it has shown so far."""

    def __init__(self, name: str, attend: Attend, settings: Settings, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.name, self.settings, self.device = name, settings, device
        self.model = LanguageModel(settings, attend).to(device)
        # A larger eps than Adam's usual one: a parameter whose gradient is mostly rounding noise does not move.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.learning_rate, (0.9, 0.95), eps=1e-6)
        self.train_losses: list[float] = []
        self.validation_losses: dict[int, float] = {}
        self.seconds = 0.0

    def precision(self) -> AbstractContextManager:
        dtype = self.settings.dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def loss(self, windows: Tensor) -> Tensor:
        with self.precision():
            logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def step(self, windows: Tensor) -> None:
        start = time.perf_counter()
        done = len(self.train_losses) / self.settings.steps
        warm_up = min(1.0, (len(self.train_losses) + 1) / 20)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm_up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = self.loss(windows)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.train_losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def validate(self, windows: Tensor) -> None:
        batches = windows.split(self.settings.batch)
        mean = sum(self.loss(batch).item() * len(batch) for batch in batches) / len(windows)
        self.validation_losses[len(self.train_losses)] = mean

    @property
    def tokens_per_second(self) -> float:
        return len(self.train_losses) * self.settings.batch * self.settings.seqlen / self.seconds

    @property
    def final(self) -> float:
        return self.validation_losses[len(self.train_losses)]


def integer_from(smallest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not smallest <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be at least {smallest} and below 2**31, got {value}")
        return value

    return integer


def read_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cpu or cuda; decides the model's size")
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="folder for losses.csv and curves.png")
    parser.add_argument("--plain", action="store_true", help="no progress bar and no picture: neither tqdm nor matplotlib")
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of the weights and of the batches")
    sizes = ("steps", "batch", "seqlen", "layers", "width", "heads")
    for name in sizes:
        default = f"{getattr(CPU, name)} on the CPU, {getattr(GPU, name)} on a GPU"
        parser.add_argument(f"--{name}", type=integer_from(1), help=default, default=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations", default=argparse.SUPPRESS)
    parser.add_argument("--min-gain", type=float, default=MIN_GAIN, help="nats by which attention must win")
    options = parser.parse_args(arguments)

    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device: torch knows no device {options.device!r}")
    if options.device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device}")
    if options.device.type == "cuda" and (options.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {options.device}: torch finds {torch.cuda.device_count()} GPUs (see python -m flash_ext)")
    given = {name: getattr(options, name) for name in sizes if name in options}
    if "dtype" in options:
        given["dtype"] = getattr(torch, options.dtype)
    settings = replace(GPU if options.device.type == "cuda" else CPU, **given)
    if settings.width % (2 * settings.heads):
        parser.error(f"--width must be a multiple of twice --heads, got {settings.width} and {settings.heads}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options, settings


def train(runs: list[Run], text: Text, settings: Settings, seed: int, device: torch.device, plain: bool) -> None:
    validation = text.validation_windows(settings.seqlen).to(device)
    every = max(1, settings.steps // 10)
    if plain:
        bar: AbstractContextManager = contextlib.nullcontext()
    else:
        from tqdm import tqdm

        bar = tqdm(total=settings.steps, unit="step", dynamic_ncols=True)
    with bar as progress:
        for step in range(settings.steps):
            windows = text.batch(settings, seed, step).to(device)
            for run in runs:
                run.step(windows)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                for run in runs:
                    run.validate(validation)
            if progress is not None:
                progress.set_postfix_str(", ".join(f"{run.name} {run.train_losses[-1]:.3f}" for run in runs))
                progress.update()


def save_losses(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.name for run in runs)])
        for step, losses in enumerate(zip(*(run.train_losses for run in runs), strict=True), 1):
            writer.writerow([step, *(f"{loss:.6f}" for loss in losses)])


def save_curves(runs: list[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(runs, ("-", "--", ":"), strict=True):
        (line,) = left.plot(range(1, len(run.train_losses) + 1), run.train_losses, style, alpha=0.7, label=run.name)
        left.plot(*zip(*run.validation_losses.items(), strict=True), "o", color=line.get_color())
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="training (lines) and validation (dots)")
    left.legend()
    differences = [abs(a - b) or math.nan for a, b in zip(runs[0].train_losses, runs[1].train_losses, strict=True)]
    right.semilogy(range(1, len(differences) + 1), differences, ".", label="flash_ext and torch")
    right.set_ylim(1e-8, 1)
    right.axhline(MAX_DIFFERENCE[runs[0].settings.dtype], color="black", linewidth=1, label="bound")
    right.set(xlabel="step", ylabel="nats per byte", title="difference of the training losses (equal: not drawn)")
    right.legend()
    figure.savefig(path, dpi=120)


def judge(runs: list[Run], settings: Settings, min_gain: float) -> list[str]:
    """What went wrong, a line each."""
    flash, torch_sdpa, without = runs
    complaints = []
    pairs = zip(flash.train_losses, torch_sdpa.train_losses, strict=True)
    # A NaN must count as the largest difference, and fail: hence the key, and "not <=" below.
    step, difference = max(((i, abs(a - b)) for i, (a, b) in enumerate(pairs, 1)), key=lambda p: (p[1] != p[1], p[1]))
    bound = MAX_DIFFERENCE[settings.dtype]
    print(f"flash_ext and torch: training losses differ by at most {difference:.1e}, at step {step} (bound {bound:.0e})")
    if not difference <= bound:
        complaints.append(f"flash_ext and torch differ by {difference:.1e} at step {step}; the bound is {bound:.0e}")
    gain = without.final - flash.final
    print(f"attention lowers the validation loss by {gain:.3f} nats (at least {min_gain:g} is asked)")
    if not gain >= min_gain:
        complaints.append(f"attention lowers the validation loss by {gain:.3f} nats; at least {min_gain:g} is asked")
    return complaints


def main(arguments: list[str] | None = None) -> int:
    options, settings = read_arguments(arguments)
    device = options.device
    text = Text.read(settings.seqlen)
    print(f"text: {text.num_files} files, {len(text.train):,} bytes to train on, {len(text.validation):,} held out")
    shape = (settings.batch, settings.seqlen, settings.heads, settings.width // settings.heads)
    try:
        explanation = flash_ext.explain(*(torch.empty(shape, dtype=settings.dtype, device=device) for _ in range(3)), causal=True)
    except ValueError as error:  # such as a head_dim, width / heads, that is too large
        raise SystemExit(str(error)) from None
    print(f"attention at {shape} in {str(settings.dtype).removeprefix('torch.')} on {device}:\n{explanation}")

    attentions = {"flash_ext": attend_flash_ext, "torch": attend_torch, "no attention": attend_to_itself}
    runs = [Run(name, attend, settings, options.seed, device) for name, attend in attentions.items()]
    num_weights = sum(p.numel() for p in runs[0].model.parameters())
    print(f"{num_weights:,} weights, {settings.steps} steps of {settings.batch} x {settings.seqlen} bytes", flush=True)
    train(runs, text, settings, options.seed, device, options.plain)

    print(f"\n{'':14}{'training':>10}{'validation':>12}{'tokens/s':>12}")
    for run in runs:
        print(f"{run.name:14}{run.train_losses[-1]:10.4f}{run.final:12.4f}{run.tokens_per_second:12,.0f}")
    save_losses(runs, options.out / "losses.csv")
    print(f"losses: {options.out / 'losses.csv'}")
    if not options.plain:
        save_curves(runs, options.out / "curves.png")
        print(f"curves: {options.out / 'curves.png'}")
    complaints = judge(runs, settings, options.min_gain)
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
