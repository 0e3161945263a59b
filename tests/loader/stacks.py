"""Stacks of random experts in any format, small enough for the interpreter."""

from __future__ import annotations

import torch

from gatekeeper import load_rules
from loader.activation import ExpertConfig
from loader.formats import layout_of
from loader.kernels.eager import eager
from loader.moe import Experts


def stack(
    format_name: str,
    *,
    slots: int,
    hidden: int,
    width: int,
    seed: int = 0,
    config: ExpertConfig | None = None,
    biased: bool = False,
    laid_out: bool = False,
) -> Experts:
    """Experts whose gates and outputs are of about the size of one, so that relative errors mean something.

    `laid_out`: with scales of groups in runs.
    """
    with torch.device("meta"):
        experts = Experts(
            layout_of(load_rules().formats[format_name]),
            n_experts=slots,
            hidden_size=hidden,
            width=width,
            kernel=eager,
            config=config,
            biases={name: torch.float32 for name in ("w13_bias", "w2_bias") if biased},
        )
    experts.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    size = hidden**-0.5
    for name, parameter in experts.named_parameters():
        numbers = parameter.data
        if numbers.dtype in (torch.uint8, torch.float8_e8m0fnu):
            low, high = (122, 125) if "scale" in name else (0, 256)
            numbers.view(torch.uint8).random_(low, high, generator=generator)
        elif numbers.dtype == torch.int32:
            numbers.random_(-(2**31), 2**31 - 1, generator=generator)
        elif "scale" in name:
            numbers.copy_((0.5 + torch.rand(numbers.shape, generator=generator)) * size / 4)
        else:
            scale = 1.0 if numbers.dtype == torch.float8_e4m3fn else size
            numbers.copy_(torch.randn(numbers.shape, generator=generator) * scale)
    if laid_out:
        experts.lay_out()
    return experts
