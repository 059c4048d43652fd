"""What the blocks of a model are given for samples of text and images.

The model's own forward pass says it: stand-ins take the place of the blocks and record their arguments, so that
positions, masks and whatever else depends on images are those of the model. What a model adds to the hidden states
between two blocks, such as features of an image, is recorded as what enters a block when nothing left the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qcli.models.families import Family
from qcli.models.source import first_line
from qcli.utils.errors import QcliError, UnsupportedError
from qcli.utils.stored_batches import BatchMemory

# Inputs that processors make of text; all others are of images.
OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_TOLERANCE = {torch.float32: 1e-3}  # of the largest value
_COARSE = 3e-2  # in other dtypes


@dataclass(frozen=True)
class Call:
    """The arguments that the model passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class GivenSample:
    """What all blocks are given for one sample.

    Attributes:
        hidden: what enters the first one, as the model has it.
        calls: arguments, by block.
        added: what the model adds to the hidden states before a block, in their shape; None: nothing. By block.
    """

    hidden: Tensor
    calls: list[Call]
    added: list[Tensor | None]


class GivenSamples:
    """What blocks are given for each of several samples, kept until they run.

    Args:
        memory: where tensors wait.
    """

    def __init__(self, memory: BatchMemory) -> None:
        self._memory = memory
        self._samples: dict[int, tuple[list[Any], list[tuple[Any, Any]]]] = {}

    def keep(self, number: int, sample: GivenSample) -> None:
        """Keep a sample by its number, in place of an earlier one. Tensors that several blocks are given count once."""
        places: dict[int, int] = {}
        tensors: list[Tensor] = []

        def place(tensor: Tensor) -> _Place:
            if id(tensor) not in places:
                places[id(tensor)] = len(tensors)
                tensors.append(tensor)
            return _Place(places[id(tensor)])

        blocks = [
            tree_map_only(Tensor, place, ((call.args, call.kwargs), added))
            for call, added in zip(sample.calls, sample.added, strict=True)
        ]
        self._samples[number] = [self._memory.keep(tensor) for tensor in tensors], blocks

    def of_block(self, number: int, block: int) -> tuple[Call, Tensor | None]:
        """The arguments of a block for a sample, and what is added to the hidden states before it."""
        tensors, blocks = self._samples[number]
        given, added = tree_map_only(_Place, lambda place: self._memory.fetch(tensors[place.number]), blocks[block])
        self._memory.arrived()
        return Call(*given), added


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor of a sample."""

    number: int


class SampleRecorder:
    """Runs samples through a model whose blocks are stand-ins; within it as a context.

    Args:
        model: with all its parts.
        text: the part of it that runs on text alone; perhaps the model itself.
        stand_ins: its blocks.
        family: its row.
    """

    def __init__(self, model: Any, text: nn.Module, stand_ins: Sequence[Any], family: Family) -> None:
        self._model: Any = model.base_model if text is model else model
        self._stand_ins, self._family = stand_ins, family
        self._parts = [model.get_submodule(path) for path in family.dense_parts]
        self._hooks = ExitStack()
        self._entered: list[int] = []
        self._seen = self._proven = False

    def __enter__(self) -> SampleRecorder:
        for index, stand_in in enumerate(self._stand_ins):
            self._hooks.callback(stand_in.register_forward_pre_hook(self._enters(index)).remove)
        for part in self._parts:
            for module in part.modules():
                self._hooks.callback(module.register_forward_pre_hook(self._sees).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def record(self, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> GivenSample:
        """What blocks are given for a sample.

        The first one with an image is run twice, with other hidden states between the blocks: what the model makes of
        them besides a sum is refused.

        Args:
            inputs: what the model's processor gives, on the model's device.
            dtype: of the stream.

        Raises:
            UnsupportedError: the model does not run on this, or its blocks cannot run one by one.
        """
        found = self._follow(inputs, torch.zeros_like)
        has_images = bool(inputs.keys() - OF_TEXT)
        if has_images and not self._seen:
            raise self._refused("its forward pass does not look at the images that its processor gives")
        if has_images and not self._proven:
            self._prove(inputs, found, _TOLERANCE.get(dtype, _COARSE))
            self._proven = True
        hidden, *between = [entering for entering, _ in found]
        some = torch.stack([each.any() for each in between]).tolist() if between else []  # a GPU is waited for once
        added = [None, *(each if adds else None for each, adds in zip(between, some, strict=True))]
        return GivenSample(hidden, [call for _, call in found], added)

    def _follow(self, inputs: Mapping[str, Tensor], output: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Call]]:
        """By block, the hidden states and arguments that reach it where blocks give `output`."""
        self._entered, self._seen = [], False
        for stand_in in self._stand_ins:
            stand_in.output = output
        try:
            self._model(**inputs, use_cache=False)
        except (QcliError, MemoryError):
            raise
        except Exception as error:  # of whatever type the model's code raises
            if isinstance(error, RuntimeError) and "memory" in str(error):
                raise
            raise self._refused(f"its forward pass fails on text and images ({first_line(error)})") from error
        finally:
            for stand_in in self._stand_ins:
                stand_in.output = None
        if self._entered != [*range(len(self._stand_ins))]:
            raise self._refused("its blocks do not run once each, in their order")
        found = [(stand_in.hidden, stand_in.call) for stand_in in self._stand_ins]
        for stand_in in self._stand_ins:
            stand_in.hidden, stand_in.call = None, Call((), {})
        return found

    def _prove(self, inputs: Mapping[str, Tensor], found: list[tuple[Tensor, Call]], tolerance: float) -> None:
        """Compare what reaches the blocks with what reaches them when they give something else."""
        first = found[0][0]
        size = float(first.float().square().mean().sqrt())
        drawn = torch.Generator().manual_seed(0)
        other = size * torch.randn(first.shape, generator=drawn).to(first)
        again = self._follow(inputs, lambda _: other)
        for block, ((entering, call), (entered, called)) in enumerate(zip(found, again, strict=True)):
            expected = entering + other if block else entering
            pairs = [(expected, entered), *zip(_tensors(call), _tensors(called), strict=True)]
            if not all(_alike(*pair, tolerance) for pair in pairs):
                raise self._refused(f"something else than a sum is computed before block {block} with images")

    def _refused(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"model type {self._family.model_type!r}: {reason}", hint="calibrate with text: rows without images"
        )

    def _enters(self, index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...]) -> None:
            self._entered.append(index)

        return hook

    def _sees(self, _: nn.Module, __: Any) -> None:
        self._seen = True


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    one, other = one.float(), other.float()
    finite = one.isfinite()
    if not torch.equal(one[~finite], other[~finite]):
        return False
    one, other = one[finite], other[finite]
    return not one.numel() or float((one - other).abs().max()) <= tolerance * float(one.abs().max().clamp(min=1e-20))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Call):
        yield from _tensors((value.args, value.kwargs))
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
