"""Mixtures of experts as lists of linears.

transformers keeps the experts of a layer in one module with a 3-D parameter for each projection. Here every expert is a
module of its own, `experts.3.gate_proj`, as most checkpoints name them: so statistics, codes, packed layers and exports
need nothing of their own for experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class Expert(nn.Module):
    """The linears of one expert: `up_proj` and `down_proj`, and `gate_proj` where there is a gate."""

    def __init__(self, hidden: int, inner: int, out: int, *, gated: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device("meta"):
            if gated:
                self.gate_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
            self.up_proj = nn.Linear(hidden, inner, bias=bias, dtype=dtype)
            self.down_proj = nn.Linear(inner, out, bias=bias, dtype=dtype)


class ListedExperts(nn.Module):
    """Takes the place of a module with fused expert weights, and computes the same from one module for each expert.

    On the meta device, where routing has no values, the first expert stands for all.

    Attributes:
        every_token: whether all experts run on all tokens, whatever the router says; the output stays the same.

    Args:
        fused: the module of transformers; it computes the gate.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        first, down = fused.get_parameter(_first_name(fused)), fused.get_parameter(DOWN)
        self.gated = _first_name(fused) != UP
        self.interleaved = not getattr(fused, "is_concatenated", True)
        transposed = is_transposed(fused)
        n_experts, inner, out = (len(down), *(down.shape[1:] if transposed else down.shape[:0:-1]))
        hidden = first.shape[1 if transposed else 2]
        bias = getattr(fused, f"{DOWN}_bias", None) is not None
        for index in range(n_experts):
            self.add_module(
                str(index), Expert(hidden, inner, out, gated=self.gated, bias=bias, dtype=down.dtype)
            )
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.get_submodule("post_expert_norm")
        for name in [*fused._parameters]:
            fused._parameters[name] = None
        self._fused = (fused,)  # in a tuple, so that it is not registered as a submodule
        self.n_experts, self.every_token = n_experts, False

    def forward(
        self, hidden: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the experts' outputs.

        Args:
            hidden: `[tokens, hidden]`; without `top_k_index` one such part for each expert in turn.
            top_k_index: int64 `[tokens, k]`; beyond the last expert: the identity where the model has such experts,
                else nothing.
            top_k_weights: `[tokens, k]`.
        """
        if top_k_index is None or top_k_weights is None:
            if hidden.is_meta:
                return self.expert(0, hidden)
            parts = hidden.view(self.n_experts, -1, hidden.shape[-1])
            return torch.cat([self.expert(index, part) for index, part in enumerate(parts)])
        result = torch.zeros_like(hidden)
        if hidden.is_meta:
            return result + self.expert(0, hidden) * top_k_weights.sum(1, keepdim=True).to(hidden.dtype)
        chosen = range(self.n_experts) if self.every_token else top_k_index.unique().tolist()
        for index in chosen:
            tokens, place = torch.where(top_k_index == index)
            if index < self.n_experts:
                output = self.expert(index, hidden)[tokens] if self.every_token else self.expert(index, hidden[tokens])
            elif hasattr(self._fused[0], "identity_expert"):
                output = hidden[tokens]
            else:
                continue
            weighted = output * top_k_weights[tokens, place, None]
            result[tokens] += weighted.to(result.dtype)  # every token once: the same sums in any order
        return result

    def expert(self, index: int, x: Tensor) -> Tensor:
        """The output of one expert for `[tokens, hidden]`."""
        expert, fused = self.get_submodule(str(index)), self._fused[0]
        if not self.gated:
            inner = fused.act_fn(expert.up_proj(x))
        else:
            gate, up = expert.gate_proj(x), expert.up_proj(x)
            both = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
            inner = fused._apply_gate(both) if hasattr(fused, "_apply_gate") else fused.act_fn(gate) * up
        output: Tensor = expert.down_proj(inner)
        return self.post_expert_norm(output) if hasattr(self, "post_expert_norm") else output


def list_experts(model: nn.Module) -> None:
    """Replace all fused experts of a model, on the meta device, by lists."""
    for path, module in [*model.named_modules()]:
        if is_fused(module):
            model.set_submodule(path, ListedExperts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in 3-D parameters that `ListedExperts` understands."""
    down = module._parameters.get(DOWN)
    return down is not None and down.ndim == 3 and any(name in module._parameters for name in ("gate_up_proj", UP)) and (
        GATE not in module._parameters
    )


def is_transposed(fused: Any) -> bool:
    """Whether fused weights are `[experts, in, out]`."""
    if hasattr(fused, "is_transposed"):
        return bool(fused.is_transposed)
    first, down = fused.get_parameter(_first_name(fused)), fused.get_parameter(DOWN)
    return bool(first.shape[1] == down.shape[2] and first.shape[2] % down.shape[1] == 0)


def _first_name(fused: nn.Module) -> str:
    return UP if UP in fused._parameters else "gate_up_proj"
