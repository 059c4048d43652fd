"""A packed embedding, which decodes the rows that are looked up, and a head that reads the same codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear, keep_tables
from qcli.utils.errors import UnsupportedError


class QuantEmbedding(nn.Embedding):
    """An embedding whose rows stay packed; its buffers are the tensors on disk, each with a row for every token.

    Made of the model's own module by `pack_embedding`: subclasses that scale the rows continue to do so.

    Attributes:
        compute_dtype: of the rows that it returns.
    """

    format: Format
    compute_dtype: torch.dtype
    _suffixes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_embeddings, embedding_dim)`."""
        return self.num_embeddings, self.embedding_dim

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors on disk, by suffix."""
        buffers: Mapping[str, Any] = self._buffers
        return {name: buffers[name] for name in self._suffixes}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape and dtype of the decoded weight, without its values: models ask for the dtype in every pass."""
        return torch.empty(self.shape, dtype=self.compute_dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """Rows of tokens: int64 `[...]` -> `[..., embedding_dim]`."""
        tokens = input.flatten()
        rows = {name: tensor.index_select(0, tokens) for name, tensor in self.tensors.items()}
        weight = self.format.from_stored(rows, (len(tokens), self.embedding_dim))
        decoded = self.format.decode_as(weight.codes, weight.tables, self.compute_dtype)
        return decoded.view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """Follow `model.to(device)` but not `model.to(dtype)`: tables keep the precision they were stored in."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        with keep_tables(self, self._suffixes):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.spec()}"


class TiedHead(QuantLinear):
    """A head with the codes of a packed embedding: it has no tensors of its own but a bias."""

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None) -> None:
        rows, columns = embedding.shape
        super().__init__(embedding.format, columns, rows, bias, embedding.compute_dtype, {})
        self._embedding = (embedding,)  # in a tuple, so that it is not registered as a submodule

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of the embedding."""
        return self._embedding[0].tensors


def pack_embedding(module: nn.Module, format: Format, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the weight of an embedding by stored tensors, in place: whatever else its class does stays.

    Args:
        tensors: by suffix, as `Format.stored` describes them.
        dtype: of the rows that it will return.

    Raises:
        UnsupportedError: the module is no embedding.
    """
    if not isinstance(module, nn.Embedding):
        raise UnsupportedError(f"a packed embedding cannot take the place of {type(module).__name__}")
    cls, bases = type(module), (type(module), QuantEmbedding)
    del module._parameters["weight"]
    module.__class__ = QuantEmbedding if cls is nn.Embedding else type(f"Quant{cls.__name__}", bases, {})
    vars(module).update(format=format, compute_dtype=dtype, _suffixes=tuple(tensors))
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)


def share_codes(model: Any) -> None:
    """Let a head that is tied to a packed embedding read its codes; transformers has nothing to tie any more.

    Args:
        model: a model of transformers, with a head or without.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, QuantEmbedding) or head is None:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if model.all_tied_weights_keys.pop(f"{name}.weight", None) is None:
        return
    bias: Tensor | None = None if head.bias is None else head.bias.detach()
    tied = TiedHead(embedding, bias)
    tied.name = name
    model.set_submodule(name, tied)
    model._tied_weights_keys = {key: of for key, of in model._tied_weights_keys.items() if key != f"{name}.weight"}
