"""Mixtures of experts as lists of linears.

transformers keeps the experts of a layer in one module with a 3-D parameter for each projection. Here every expert is a
module of its own, `experts.3.gate_proj`, as most checkpoints name them: so statistics, codes, packed layers and exports
need nothing of their own for experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qcli.models.experts import DOWN, GATE, GATE_UP, Experts, find_experts


class Expert(nn.Module):
    """The linears of one expert: `up_proj` and `down_proj`, and `gate_proj` where there is a gate.

    Attributes:
        tokens: int64, which tokens of the batch the expert is computing; None: all, in order.
    """

    def __init__(self, layout: Experts, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens: Tensor | None = None
        for name, (rows, columns) in layout.sizes.items():
            self.add_module(name, nn.Linear(columns, rows, layout.has_bias, device="meta", dtype=dtype))


class ListedExperts(nn.Module):
    """Takes the place of a module with fused expert weights, and computes the same from one module for each expert.

    On the meta device, where routing has no values, the first expert stands for all.

    Attributes:
        every_token: whether all experts run on all tokens, whatever the router says; the output stays the same.
        routed: `top_k_index` and `top_k_weights` in place of the router's, such as those of another model's router;
            None: the router decides.

    Args:
        fused: the module of transformers, on the meta device; it loses its weights, and computes the gate.
        layout: of its weights.
    """

    def __init__(self, fused: nn.Module, layout: Experts) -> None:
        super().__init__()
        self.n_experts, self.every_token = layout.count, False
        self.routed: tuple[Tensor, Tensor] | None = None
        self.gated, self.interleaved = GATE in layout.sizes, layout.interleaved
        dtype = fused.get_parameter(DOWN).dtype
        for index in range(layout.count):
            self.add_module(str(index), Expert(layout, dtype))
        if getattr(fused, "has_post_expert_norm", False):
            self.post_expert_norm = fused.get_submodule("post_expert_norm")
        for name in [*fused._parameters]:
            fused._parameters[name] = None
        self._layout, self._fused = layout, (fused,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, hidden: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        """The weighted sum of the experts' outputs.

        Args:
            hidden: `[tokens, hidden]`; without `top_k_index` one such part for each expert in turn.
            top_k_index: int64 `[tokens, k]`; beyond the last expert: the identity where the model has such experts,
                else nothing.
            top_k_weights: `[tokens, k]`.
        """
        if self.routed is not None:
            top_k_index, top_k_weights = self.routed
        if top_k_index is None or top_k_weights is None:
            if hidden.is_meta:
                return self.expert(0, hidden)
            parts = hidden.view(self.n_experts, -1, hidden.shape[-1])
            return torch.cat([self.expert(index, part) for index, part in enumerate(parts)])
        result = torch.zeros_like(hidden)
        identity = hasattr(self._fused[0], "identity_expert")
        if hidden.is_meta:
            weights = top_k_weights.sum(1, keepdim=True).to(hidden.dtype)
            result = result + self.expert(0, hidden) * weights
            return result + hidden * weights if identity else result
        # All tokens of all experts at once: a GPU is waited for twice, whatever the number of experts.
        chosen_by = (top_k_index.unsqueeze(-1) == torch.arange(self.n_experts, device=hidden.device)).any(1)
        counts, tokens_of_all = chosen_by.sum(0).tolist(), chosen_by.T.nonzero()[:, 1]
        for index, tokens in enumerate(tokens_of_all.split(counts)):
            if len(tokens) or self.every_token:
                weights = (top_k_weights[tokens] * (top_k_index[tokens] == index)).sum(1, keepdim=True)
                output = self._of_tokens(index, hidden, tokens)
                result[tokens] += (output * weights).to(result.dtype)  # every token once: the same sums in any order
        if identity:
            weights = (top_k_weights * (top_k_index >= self.n_experts)).sum(1, keepdim=True)
            result += (hidden * weights).to(result.dtype)
        return result

    def fused(self) -> nn.Module:
        """The module of transformers with these experts' weights."""
        fused = copy.copy(self._fused[0])
        own, stacks = dict(self.named_parameters()), dict[str, Tensor]()
        for name, part in self._layout.pieces():
            weight = own[name.removeprefix(f"{self._layout.path}.")].detach()
            stack = part.stack.removeprefix(f"{self._layout.path}.")
            rows = len(weight) * (2 if stack.startswith(GATE_UP) else 1)
            shape = (rows, *weight.shape[1:])
            if stack not in stacks:
                stacks[stack] = weight.new_empty(self.n_experts, *(shape[::-1] if part.transposed else shape))
            matrix = stacks[stack][part.expert]
            (matrix.T if part.transposed else matrix)[part.rows] = weight
        fused._parameters = fused._parameters | {name: nn.Parameter(stack, False) for name, stack in stacks.items()}
        return fused

    def _of_tokens(self, index: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(index))
        expert.tokens = None if self.every_token else tokens
        return self.expert(index, hidden)[tokens] if self.every_token else self.expert(index, hidden[tokens])

    def expert(self, index: int, x: Tensor) -> Tensor:
        """The output of one expert for `[tokens, hidden]`."""
        expert: Any = self.get_submodule(str(index))
        fused: Any = self._fused[0]
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
    for layout in find_experts(model):
        model.set_submodule(layout.path, ListedExperts(model.get_submodule(layout.path), layout))
        around = model.get_submodule(layout.path.rpartition(".")[0])
        vars(around)["_is_hf_initialized"] = True  # or transformers may fill the parameters that are gone with noise
