"""Names on disk and names in the causal LM, where transformers has the two differ.

transformers renames tensors of the hub's checkpoints as it loads them, and joins, divides or turns some
(`transformers.conversion_mapping`); `save_pretrained` does the opposite, so that checkpoints keep the hub's names. So
does this file. It goes further with experts: each is a linear layer of its own, whether files have a tensor for each
expert or one for all of them (`qcli.models.experts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from qcli.models.conversions import Conversion
from qcli.models.derived import SourceTensor, piece
from qcli.models.experts import GATE, UP, Experts, Piece, find_experts
from qcli.models.source import reported
from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

_PARTS = ("weight", "bias")
_NUMBER = r"(\d+)"


class Names:
    """The two sets of names of one model.

    Args:
        model: as transformers builds it, on the meta device; nothing in it changes.

    Attributes:
        experts: modules of the model that hold several experts.
        ignored: stored tensors that transformers does not load, such as heads that predict several tokens, or does
            not use; filled by `in_model`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)  # in the order of `from_pretrained`; old names come last
        self._own = mapping[: len(get_model_conversion_mapping(model, add_legacy=False))]
        self._model = model
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._unexpected = [re.compile(known) for known in model._keys_to_ignore_on_load_unexpected or ()]
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.experts: list[Experts] = find_experts(model)
        self._stacks: dict[str, list[tuple[str, Piece]]] = {}
        for experts in self.experts:
            for name, part in experts.pieces():
                self._stacks.setdefault(part.stack, []).append((name, part))
        # What transformers looks up while it renames: names alone matter.
        self._known = dict.fromkeys([*self._shapes, *(name for stack in self._stacks.values() for name, _ in stack)], 1)
        self.ignored: list[str] = []

    def in_model(self, stored: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """Stored tensors by their names in the causal LM; stacks of experts and fused tensors are taken apart.

        Args:
            stored: by name on disk; tensors of quantized layers (`...weight_packed`) follow their layer.

        Raises:
            UsageError: two tensors get the same name.
        """
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, SourceTensor] = {}
        conversions: dict[str, Conversion] = {}
        # Some renamings depend on what was renamed before, in this order.
        targets = {name: self._target(name) for name in sorted(stored, key=dot_natural_key)}
        for name, tensor in stored.items():
            target, pattern = targets[name]
            if target not in self._known and (
                target in self._unused or any(known.search(target) for known in self._unexpected)
            ):
                self.ignored.append(name)
            elif pattern is None:
                _join(found, self._apart(target, tensor))
            else:
                conversion = conversions.setdefault(target, Conversion(self._by_pattern[pattern], target, self._model))
                conversion.add(pattern, name, tensor)
        for conversion in conversions.values():
            for name, tensor in conversion.results(self._shapes):
                _join(found, self._apart(name, tensor))
        return found

    def name_in_model(self, stored: str) -> str:
        """The name in the causal LM of one stored tensor; of a fused one, that of the first tensor made of it."""
        return self._target(stored)[0]

    def on_disk(self, name: str) -> str:
        """The name that checkpoints on the hub have for a tensor. What they store fused, experts of such models
        included, has the name of its own that it has in the model.

        Args:
            name: in the causal LM, with experts as linear layers; or that of a tensor of a quantized layer.

        Raises:
            UsageError: transformers cannot undo its own renaming.
        """
        from transformers.core_model_loading import apply_renamings

        owner, _, part = name.rpartition(".")
        whole = name if name in self._known or part in _PARTS else f"{owner}.weight"
        with reported("the names of the checkpoint"):
            stored = apply_renamings(self._in_module_list(whole), self._backwards)
        return stored if whole == name else _with_part(stored, part)

    def joins(self, name: str) -> bool:
        """Whether transformers joins a tensor of the causal LM from several, one after the other."""
        from transformers.core_model_loading import Concatenate

        for converter in self._converters:
            match converter.operations:
                case [Concatenate(dim=0)] if name.endswith(converter.target_patterns[0]):
                    return True
        return False

    def stack_of(self, name: str) -> str | None:
        """The tensor in the causal LM, with those of all experts, that checkpoints on the hub store in place of an
        expert's own tensor of this name; None: they store a tensor of this name."""
        return self._stack_of.get(name)

    def members(self, stack: str) -> list[str]:
        """The experts' own tensors that a tensor of all experts is made of, by name."""
        return [name for name, _ in self._stacks[stack]]

    def stacked(self, stack: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of all experts, laid out as in the causal LM.

        Args:
            read: an expert's own tensor by name, `[out, in]` or `[out]`; one at a time is held.
        """
        whole: Tensor | None = None
        for name, part in self._stacks[stack]:
            own = read(name)
            if whole is None:
                whole = own.new_empty(self._shapes[stack])
            one = whole[part.expert]
            (one.T if part.transposed else one)[part.rows] = own
        assert whole is not None
        return whole

    @cached_property
    def _stack_of(self) -> dict[str, str]:
        """Stacks that no converter merges from tensors of single experts, by the names of those."""
        return {
            name: part.stack
            for experts in self.experts
            for name, part in experts.pieces()
            if f"{experts.path}.{name.rsplit('.', 2)[1]}" not in self._module_lists
        }

    @cached_property
    def _unused(self) -> frozenset[str]:
        """Weights of experts that compute nothing with them."""
        return frozenset(
            f"{experts.path}.{experts.count + number}.{projection}.weight"
            for experts in self.experts
            for number in range(experts.unused)
            for projection in experts.sizes
        )

    def _target(self, name: str) -> tuple[str, str | None]:
        """The name in the model of a stored tensor, and the pattern by which a converter takes it."""
        target, pattern = self._renamed(name)
        if target in self._known:
            return self._of_module_list(name, target, pattern)
        owner, _, part = name.rpartition(".")
        layer, pattern = self._renamed(f"{owner}.weight")
        layer, pattern = self._of_module_list(f"{owner}.weight", layer, pattern)
        if part != "weight" and layer in self._known and pattern is None:
            return _with_part(layer, part), None
        return target, None

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        if target not in self._known and name in self._known:  # it has been renamed before
            return name, None
        return target, pattern

    def _of_module_list(self, name: str, target: str, pattern: str | None) -> tuple[str, str | None]:
        """The name of an expert's own tensor, if a converter would merge it with those of other experts."""
        from transformers.core_model_loading import apply_renamings

        if pattern is None or not _merges(converter := self._by_pattern[pattern]) or target not in self._stacks:
            return target, pattern
        found = re.search(pattern.replace("*.", rf"{_NUMBER}\."), apply_renamings(name, self._renamings))
        if found is None:
            return target, pattern
        path, _, stack = target.rpartition(".")
        experts = next(experts for experts in self.experts if experts.path == path)
        projection = experts.stacks[stack][converter.source_patterns.index(pattern)]
        return f"{path}.{found.group(found.lastindex or 0)}.{projection}.weight", None

    def _in_module_list(self, name: str) -> str:
        """The name of an expert's own tensor as a converter takes it; any other name as it is."""
        path, number, projection, part = ("." + name).rsplit(".", 3) if name.count(".") > 2 else ("", "", "", "")
        template = self._module_lists.get(f"{path[1:]}.{projection}")
        return name if template is None else _with_part(template.replace("*", number), part)

    @cached_property
    def _module_lists(self) -> dict[str, str]:
        """How converters name an expert's weight, with `*` for its number, by module of the experts and projection."""
        backwards = [entry.reverse_transform() for entry in self._converters if _merges(entry)]
        templates = {}
        for experts in self.experts:
            for stack, projections in experts.stacks.items():
                for converter in backwards:
                    first, pattern = converter.rename_source_key(f"{experts.path}.{stack}")
                    if pattern is not None:
                        for projection, target in zip(projections, converter.target_patterns, strict=True):
                            template = first.replace(converter.target_patterns[0], target)
                            templates[f"{experts.path}.{projection}"] = template
                        break
        return templates

    @cached_property
    def _backwards(self) -> list[WeightRenaming]:
        """Renamings that undo those of the model, in order. A prefix that may be missing comes back only if it was
        there."""
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        undone = [entry for entry in reversed(self._own) if not isinstance(entry, PrefixChange) or entry.was_used()]
        turned = (entry.reverse_transform() for entry in undone)
        return [entry for entry in turned if isinstance(entry, WeightRenaming)]

    def _apart(self, name: str, tensor: SourceTensor) -> Iterable[tuple[str, SourceTensor]]:
        """The tensors of single experts, if this is a stack of them."""
        if name not in self._stacks or tensor.stored.shape != self._shapes[name]:
            return [(name, tensor)]
        return [
            (own, piece(tensor, part.expert, part.rows, transposed=part.transposed)) for own, part in self._stacks[name]
        ]


def experts_apart(mapping: Iterable[WeightConverter | WeightRenaming]) -> list[WeightConverter | WeightRenaming]:
    """A mapping of transformers for a model whose experts are linear layers of their own: it renames what it would
    merge."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    apart: list[WeightConverter | WeightRenaming] = []
    for entry in mapping:
        if not isinstance(entry, WeightConverter) or not _merges(entry):
            apart.append(entry)
            continue
        path, _, stack = entry.target_patterns[0].rpartition(".")
        projections = (GATE, UP) if len(entry.source_patterns) > 1 else (stack,)
        for pattern, projection in zip(entry.source_patterns, projections, strict=True):
            own = pattern.removesuffix(".weight").replace("*.", rf"{_NUMBER}\.")
            renamed = rf"{path}.\1.{projection}"
            if own != renamed.replace(r"\1.", rf"{_NUMBER}\."):
                apart.append(WeightRenaming(own, renamed))
    return apart


def _merges(converter: WeightConverter) -> bool:
    """Whether a converter makes a stack of the experts' own tensors."""
    from transformers.core_model_loading import MergeModulelist

    return isinstance(converter.operations[0], MergeModulelist)


def _with_part(weight: str, part: str) -> str:
    """The name of another tensor of the module whose weight has this name."""
    return f"{weight.removesuffix('.weight')}.{part}"


def _join(found: dict[str, SourceTensor], parts: Iterable[tuple[str, SourceTensor]]) -> None:
    for name, tensor in parts:
        if name in found:
            raise UsageError(
                f"the checkpoint holds {name} twice, under an old and a new name",
                hint="the folder mixes two checkpoints; download the model again",
            )
        found[name] = tensor
