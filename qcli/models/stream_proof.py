"""Proof that a model whose structure was discovered runs block by block as it runs by itself."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qcli.models.families import Family
from qcli.models.listed_experts import ListedExperts
from qcli.utils.determinism import any_order
from qcli.utils.errors import UnsupportedError

_TOKENS = 32
_TOLERANCE = {torch.float32: 1e-3}  # of the largest output
_COARSE = 3e-2  # in other dtypes


class BlockStream(Protocol):
    """What of a `qcli.models.stream.ModelStream` is proven."""

    family: Family
    model: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def n_blocks(self) -> int: ...

    @property
    def shared_channels(self) -> slice: ...

    def embed(self, tokens: Tensor) -> Tensor: ...

    def kind_of(self, index: int) -> str: ...

    def load_block(self, index: int) -> nn.Module: ...

    def in_place(self, block: nn.Module, index: int, tokens: Tensor, hidden: Tensor) -> Tensor: ...

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor: ...


@torch.no_grad()
def prove(stream: BlockStream) -> None:
    """Compare the first block of each kind with itself in the model's own forward pass, on two batches of tokens; and
    experts as linears with transformers' fused ones. One block is in memory at a time.

    Raises:
        UnsupportedError: outputs differ; the message names the block and the difference.
    """
    if stream.family.passing.obstacle:
        raise _refused(stream, f"its blocks cannot run one by one: {stream.family.passing.obstacle}")
    if stream.family.passing.shared and stream.dtype == torch.float16:
        raise UnsupportedError(
            f"model type {stream.family.model_type!r}: keys and values that blocks share are too small for float16",
            hint="use --dtype bfloat16 or float32",
        )
    (first, second), entering = probes(stream)
    kinds: set[str] = set()
    for index in range(stream.n_blocks):
        kind = stream.kind_of(index)
        if kind in kinds:
            continue
        kinds.add(kind)
        block = stream.load_block(index)
        given = _Given(block)
        try:
            expected = [stream.in_place(block, index, *pair) for pair in zip((first, second), entering, strict=True)]
        except Exception as error:  # of whatever type the model's code raises
            reason = str(error).strip().partition("\n")[0]
            raise _refused(
                stream, f"block {index} does not run without others ({type(error).__name__}: {reason})"
            ) from error
        given.remove()
        # In the other order, so that a block that keeps anything of its last run does not pass.
        found = [stream.run_block(block, index, hidden) for hidden in reversed(entering)][::-1]
        for own, streamed in zip(expected, found, strict=True):
            _compare(stream, f"block {index}", own, streamed)
        for path, (experts, args, kwargs) in given.experts.items():
            with any_order():
                _compare(stream, f"block {index}: {path}", experts.fused()(*args, **kwargs), experts(*args, **kwargs))


def probes(stream: BlockStream) -> tuple[Tensor, list[Tensor]]:
    """Two batches of random tokens, int64 `[2, 1, length]`, and the hidden states that enter the first block for each,
    with numbers in place of keys and values that blocks share."""
    rows = stream.model.get_input_embeddings().num_embeddings
    drawn = torch.randint(rows, (2, 1, _TOKENS), generator=torch.Generator().manual_seed(0)).to(stream.device)
    entering = [stream.embed(tokens) for tokens in drawn]
    for hidden in entering:
        shared = hidden[..., stream.shared_channels]
        shared.copy_(torch.rand(shared.shape, generator=torch.Generator().manual_seed(1)) / 2**24)
    return drawn, entering


class _Given:
    """Notes what lists of experts in a block are given last, until it is removed."""

    def __init__(self, block: nn.Module) -> None:
        self.experts: dict[str, tuple[ListedExperts, tuple[Any, ...], dict[str, Any]]] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._note(path, module), with_kwargs=True)
            for path, module in block.named_modules()
            if isinstance(module, ListedExperts)
        ]

    def remove(self) -> None:
        """Note no more."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, path: str, module: ListedExperts) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.experts[path] = module, args, kwargs

        return note


def _compare(stream: BlockStream, what: str, expected: Tensor, found: Tensor) -> None:
    difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-20))
    if not difference <= _TOLERANCE.get(stream.dtype, _COARSE):
        raise _refused(
            stream, f"{what} by itself gives other outputs than in the model (they differ by {difference:.1%})"
        )


def _refused(stream: BlockStream, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"model type {stream.family.model_type!r}: {reason}",
        hint="what needs no forward pass works: --method rtn",
    )
