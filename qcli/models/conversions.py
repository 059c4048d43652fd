"""What transformers computes from stored tensors as it loads them: joined, divided, permuted or turned ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qcli.models.derived import Derived, SourceTensor, read
from qcli.models.source import reported
from qcli.utils.dtypes import StoredTensor
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass
class Conversion:
    """One use of a converter of transformers.

    Attributes:
        converter: what is done; it stays as it is.
        target: name of the first tensor that results.
        model: on the meta device.
        sources: the stored tensors, by pattern of the converter and name.
    """

    converter: WeightConverter
    target: str
    model: PreTrainedModel
    sources: dict[str, dict[str, SourceTensor]] = field(default_factory=dict)

    def add(self, pattern: str, name: str, tensor: SourceTensor) -> None:
        """Let a stored tensor be one of those converted."""
        self.sources.setdefault(pattern, {})[name] = tensor

    def results(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, SourceTensor]]:
        """The tensors that result, by name in the model.

        Args:
            shapes: of the model's tensors.
        """
        from transformers.core_model_loading import Transpose, dot_natural_key

        # As transformers does it: joined in this order, whatever that in the files.
        sources = {
            pattern: tuple(tensors[name] for name in sorted(tensors, key=dot_natural_key))
            for pattern, tensors in self.sources.items()
        }
        first, converter = next(iter(sources.values()))[0], self.converter
        match converter.operations:
            case [Transpose(check_dims=True) as turn]:  # which looks at the shape whether it is needed
                if first.stored.shape == shapes.get(self.target):
                    yield self.target, first
                    return
                converter = copy.deepcopy(converter)
                converter.operations = [Transpose(turn.dim0, turn.dim1)]
        for pattern in converter.target_patterns:
            name = self.target.replace(converter.target_patterns[0], pattern)
            shape = shapes.get(name, first.stored.shape)  # of a tensor that the model lacks, it will be refused
            yield (
                name,
                _Converted(
                    name,
                    converter,
                    self.target,
                    self.model,
                    sources,
                    StoredTensor(first.stored.dtype, shape),
                    names={pattern: tuple(sorted(own, key=dot_natural_key)) for pattern, own in self.sources.items()},
                ),
            )


@dataclass(frozen=True)
class _Converted(Derived):
    """A tensor that a converter makes.

    Attributes:
        stacked: whether sources are single tensors of stacks, as is the result.
        names: of the stored tensors, as `sources` has them.
    """

    name: str
    converter: WeightConverter
    target: str
    model: PreTrainedModel
    sources: Mapping[str, tuple[SourceTensor, ...]]
    stored: StoredTensor
    stacked: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def joined(self) -> tuple[tuple[str, SourceTensor], ...]:
        from transformers.core_model_loading import Concatenate

        match self.converter.operations:
            case [Concatenate(dim=0)] if not self.stacked:
                known = [pattern for pattern in self.converter.source_patterns if pattern in self.names]
                pairs = (zip(self.names[pattern], self.sources[pattern], strict=True) for pattern in known)
                return tuple(pair for group in pairs for pair in group)
        return ()

    @property
    def origins(self) -> tuple[Extent, ...]:
        tensors = (tensor for group in self.sources.values() for tensor in group)
        return tuple(
            extent for tensor in tensors for extent in ((tensor,) if isinstance(tensor, Extent) else tensor.origins)
        )

    @property
    def bytes(self) -> int:
        return super().bytes // len(self.converter.target_patterns)

    def read(self) -> Tensor:
        converter: Any = copy.deepcopy(self.converter)
        for pattern, tensors in self.sources.items():
            for tensor in tensors:
                value = read(tensor)
                converter.add_tensor(self.target, "", pattern, value.unsqueeze(0) if self.stacked else value)
        with reported(f"{self.name} cannot be made of the stored tensors"):
            results: dict[str, Any] = converter.convert(self.target, model=self.model, config=self.model.config)
        result = results[self.name]
        made: Tensor = result[0] if isinstance(result, list) else result
        return (made[0] if self.stacked else made).clone()

    def item(self, index: int) -> SourceTensor:
        if not all(map(_leaves_first, self.converter.operations)):
            return super().item(index)
        items = {pattern: tuple(tensor.item(index) for tensor in group) for pattern, group in self.sources.items()}
        stored = StoredTensor(self.stored.dtype, self.stored.shape[1:])
        return replace(self, sources=items, stored=stored, stacked=True)


def _leaves_first(operation: Any) -> bool:
    """Whether an operation does the same to every tensor of a stack."""
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, Transpose

    match operation:
        case Chunk() | Concatenate() | Interleave():
            return bool(operation.dim > 0)
        case Transpose():
            return 0 not in (operation.dim0, operation.dim1)
    return False
