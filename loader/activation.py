"""What an expert does between its projections, and where a token's weight comes in: data, the same for all kernels.

Shapes: P pairs of token and expert, F intermediate size of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def _silu(x: Tensor) -> Tensor:
    from torch.nn.functional import silu  # to plan takes no torch

    return silu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    from torch.nn.functional import gelu

    return gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"silu": _silu, "gelu_pytorch_tanh": _gelu_tanh}
)
"""By `hidden_act` of config.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """``down(act(gate) * (up + up_offset))``, gate and up clamped to `limit` before."""

    hidden_act: str = "silu"
    """One of `ACTIVATIONS`; with `alpha` its place is taken by ``gate * sigmoid(alpha * gate)``."""
    limit: float | None = None
    """``min(gate, limit)`` and ``-limit <= up <= limit``: 7.0; None: neither is clamped."""
    alpha: float | None = None
    """1.702 in gpt-oss."""
    up_offset: float = 0.0
    """1.0 in gpt-oss."""
    weighed: Literal["output", "input"] = "output"
    """What a token's weight multiplies: ``input`` is before gate and up (Llama 4)."""

    def gated(self, gate_PF: Tensor, up_PF: Tensor) -> Tensor:
        """What goes into down, ``(P, F)`` in the dtype of gate and up.

        Source of limit, alpha and offset: ``swiglu`` in https://github.com/openai/gpt-oss, ``gpt_oss/torch/model.py``.
        """
        if self.limit is not None:
            gate_PF, up_PF = gate_PF.clamp(max=self.limit), up_PF.clamp(-self.limit, self.limit)
        if self.alpha is None:
            act_PF = ACTIVATIONS[self.hidden_act](gate_PF)
        else:
            act_PF = gate_PF * (self.alpha * gate_PF).sigmoid()
        return act_PF * (up_PF + self.up_offset if self.up_offset else up_PF)

    @property
    def roundings(self) -> int:
        """Roundings to the compute dtype beyond those of SiLU, for a layer's tolerance."""
        return 2 * (self.alpha is not None) + (self.up_offset != 0) + (self.weighed == "input")

    def weigh(self, experts: Callable[[Tensor], Tensor], x_PD: Tensor, weight_P1: Tensor) -> Tensor:
        """`experts` of `x_PD` in float32, ``(P, D)``, weighed with `weight_P1` in float32 at the right end."""
        if self.weighed == "input":
            return experts((x_PD.float() * weight_P1).to(x_PD.dtype)).float()
        return experts(x_PD).float() * weight_P1
