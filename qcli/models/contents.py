"""What a model's bytes are: linear layers of the blocks, embedding, head, and everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from qcli.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

LINEARS, EMBEDDING, HEAD, OTHER = "linears", "embedding", "head", "other"


def contents(sizes: Mapping[str, int], total: int, linears: Iterable[str], vocabulary: Vocabulary) -> dict[str, int]:
    """Bytes by kind, together `total`.

    Args:
        sizes: bytes of the stored tensors by name, each below its module: `LAYER.weight`, or what a format stores.
        total: size of the files; headers count as other.
        linears: names of the linear layers of the blocks, quantized or not.
        vocabulary: of the model; a head that shares the embedding's weights has no bytes of its own.
    """
    owners = {**dict.fromkeys(linears, LINEARS), vocabulary.embedding: EMBEDDING}
    if vocabulary.head is not None and not vocabulary.tied:
        owners[vocabulary.head] = HEAD
    found = dict.fromkeys((LINEARS, EMBEDDING, HEAD, OTHER), 0)
    for name, size in sizes.items():
        module = name
        while module and module not in owners:
            module = module.rpartition(".")[0]
        found[owners.get(module, OTHER)] += size
    found[OTHER] += total - sum(sizes.values())
    return found


def stored_contents(source: ModelSource, vocabulary: Vocabulary) -> dict[str, int]:
    """`contents` of a model as its files store it."""
    sizes = {name: source.stored_bytes(name) for name in source.tensors()}
    return contents(sizes, source.bytes(), [layer.name for layer in source.linears()], vocabulary)
