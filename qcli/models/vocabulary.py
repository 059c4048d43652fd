"""The modules of a causal LM that are as large as its vocabulary: where the embedding and the head are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcli.utils.dtypes import StoredTensor


@dataclass(frozen=True)
class Vocabulary:
    """Names of the two modules.

    Attributes:
        head: None: the model has none.
        tied: whether the head has no weight of its own, but the embedding's.
    """

    embedding: str
    head: str | None
    tied: bool

    @classmethod
    def of(cls, model: Any, stored: Mapping[str, StoredTensor]) -> Vocabulary:
        """Of a causal LM, loaded or a skeleton.

        Args:
            stored: the tensors that its checkpoint has, by name, those of quantized layers as their weights.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        name = None if head is None else names[head]
        tied = name is not None and f"{name}.weight" not in stored
        return cls(names[embedding], name, tied)
