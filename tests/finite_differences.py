"""Gradients against central differences: they follow from the forward alone, so an error that the float64 oracle shared with a
backward would show here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import flash_ext

# What of a call is differentiated, by which input.
DERIVATIVES = tuple(
    (of, name) for of in ("out", "lse") for name in ("sinks", "k_bias", "q", "k", "v") if (of, name) != ("lse", "v")
)


@dataclass(frozen=True)
class Setting:
    """A small call with everything that has a gradient; q, k and v are multiples of 1/16, so that 16-bit steps are exact."""

    dtype: torch.dtype
    causal: bool = False
    softcap: float = 0.0
    head_dim: int = 64
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def grid(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 16).round().div(16).to(self.device, self.dtype)

        return {
            "q": grid(1, 40, 4, self.head_dim),
            "k": grid(1, 72, 2, self.head_dim),
            "v": grid(1, 72, 2, self.head_dim),
            "sinks": torch.randn(4, generator=generator).to(self.device, wide),
            "k_bias": torch.randn((1, 2, 72), generator=generator).to(self.device, wide),
        }

    def result(self, inputs: dict[str, Tensor], of: str) -> Tensor:
        out, lse = flash_ext.attention(**inputs, causal=self.causal, softcap=self.softcap, return_lse=True)
        return (out if of == "out" else lse).double()


def check(setting: Setting, of: str, name: str, *, step: float, tolerance: float) -> None:
    """The derivative by input `name` of a weighted sum of out or lse, along the signs of its gradient, where it is far above the
    rounding of 16-bit results; weights that follow their signs keep what a sink does to all of them from cancelling."""
    inputs = setting.inputs()
    leaf = inputs[name].clone().requires_grad_()
    result = setting.result(inputs | {name: leaf}, of)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(11)).to(result) + result.detach().sign()
    (gradient,) = torch.autograd.grad(result, leaf, weights)
    along = largest_signs(gradient) if name in ("q", "k", "v") else gradient.sign()
    predicted = float((gradient.double() * along.double()).sum())
    ahead, behind = (setting.result(inputs | {name: inputs[name] + side * step * along}, of) for side in (1, -1))
    measured = float(((ahead - behind) * weights).sum()) / (2 * step)
    assert predicted > 0 and abs(measured - predicted) <= tolerance * predicted, (
        f"d {of} / d {name}: the backward says {predicted:.6f}, differences of the forward {measured:.6f}"
    )


def largest_signs(gradient: Tensor) -> Tensor:
    """The signs of the largest of each (row, head), 0 elsewhere: a step along many of one row's numbers bends the softmax."""
    largest = gradient.abs() == gradient.abs().amax(dim=-1, keepdim=True)
    return torch.where(largest, gradient.sign(), torch.zeros_like(gradient))
