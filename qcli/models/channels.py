"""Which channels of a block can be divided by positive factors in one module and multiplied by them in the next, found
in the model's own forward pass on the meta device.

What a norm or a linear layer computes is followed element by element: a map beside a tensor holds the number of the
output channel that each element is proportional to. Moves of data move the map; a product with something else keeps it;
a sum keeps it where all terms have one channel; a matrix product with a weight reads the channels, which is where
factors can be multiplied in. Where anything else reads an element, its channel cannot be scaled: an operation without a
rule ends all channels that it reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qcli.models.families import Fold, Places
from qcli.models.listed_experts import ListedExperts

_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias")
_COPIES = ("clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "abs", "neg", "relu")  # by element
_MOVES: tuple[str, ...] = (
    "transpose",
    "t",
    "permute",
    "expand",
    "slice",
    "select",
    "squeeze",
    "unsqueeze",
    "split",
    "unbind",
    "flip",
)
_MOVES += ("split_with_sizes", "chunk", "narrow", "repeat", "roll", "unfold")
_SHAPES = ("new_", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_NORMS = {"native_layer_norm": (2, 3), "_fused_rms_norm": (2, None), "rms_norm": (2, None)}  # weight, bias

_Maps = dict[str, Tensor]
"""By producer: int32 of the shape of a tensor, one more than the channel of each element; 0: none of it."""


class Operation(NamedTuple):
    """An operation on tensors: a function of aten, its arguments, and what it has returned."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any


@dataclass(frozen=True)
class _Weight:
    """A tensor that is a parameter in all but layout and dtype.

    Attributes:
        name: in the block.
        turned: whether its dimensions are exchanged.
        offset: what has been added to it.
    """

    name: str
    turned: bool = False
    offset: float = 0.0


@dataclass
class _Producer:
    """A norm's weight or a linear layer.

    Attributes:
        size: number of output channels.
        offset: what is added to a norm's weight.
        ended: maps of what reads channels in another way than a weight does, and the operations.
    """

    size: int
    offset: float = 0.0
    ended: list[tuple[Tensor, str]] = field(default_factory=list)

    def alive(self) -> Tensor:
        """Which channels nothing else reads: bool `[size]`."""
        alive = torch.ones(self.size + 1, dtype=torch.bool)
        for channels, _ in self.ended:
            alive[_narrow(channels).flatten().long()] = False
        return alive[1:]


class Channels:
    """Follows the channels of one block.

    Args:
        block: on the meta device.
        shared: names in it of parameters that other blocks have, too.
    """

    def __init__(self, block: nn.Module, shared: Iterable[str] = ()) -> None:
        self._block = block
        self._weights = {id(parameter): _Weight(name) for name, parameter in block.named_parameters()}
        self._maps: dict[int, _Maps] = {}
        self._kept: list[Tensor] = []  # of all tensors that are known by their id
        self._producers: dict[str, _Producer] = {}  # by name of the weight, in order of computation
        self._reads: dict[str, list[_Maps]] = defaultdict(list)  # by name of a weight: rows of what it multiplies
        self._strange = dict.fromkeys(shared, "it is shared")  # weights that are read in other ways
        # Each follows an operation, or says no to one that it does not know after all.
        self._rules: dict[str, Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], bool]] = {
            **dict.fromkeys((*_VIEWS, *_COPIES, *_MOVES), self._moved),
            **dict.fromkeys(_NORMS, self._normed),
            **dict.fromkeys(("mm", "bmm", "addmm"), self._product),
            **dict.fromkeys(("add", "sub"), self._plus),
            **dict.fromkeys(("cat", "stack"), self._joined),
            **dict.fromkeys(("sum", "mean"), self._summed),
            **dict.fromkeys(("index", "index_select"), self._chosen),
            "mul": self._times,
            "div": self._divided,
        }

    def signature(self, operations: Iterable[Operation], given_away: Iterable[Tensor]) -> Hashable:
        """All that folds depend on: blocks with equal ones have the same folds.

        Args:
            operations: of the block, in order.
            given_away: tensors that others may read.
        """
        numbers: dict[int, int] = {}

        def signed(value: Any) -> Hashable:
            if isinstance(value, Tensor):
                number = numbers.setdefault(id(value), len(numbers))
                weight = self._weights.get(id(value))
                return number if weight is None else weight.name, tuple(value.shape), value.dtype
            if isinstance(value, list | tuple):
                return tuple(map(signed, value))
            return str(value)

        return tuple(
            (each.func, signed(each.args), signed([*each.kwargs.items()]), signed(each.out)) for each in operations
        ), signed([*given_away])

    def follow(self, operation: Operation) -> None:
        """Follow one operation inside of the block."""
        func, args, kwargs, out = operation
        inputs = list(_tensors((args, kwargs)))
        if not any(id(tensor) in self._maps or id(tensor) in self._weights for tensor in inputs):
            return
        name = func.overloadpacket.__name__
        if name.startswith(_SHAPES):
            return
        rule = None if func._schema.is_mutable else self._rules.get(name)
        if rule is None or not rule(func, args, kwargs, out):
            self.end(inputs, name)

    def end(self, tensors: Iterable[Tensor], by: str) -> None:
        """Something reads these tensors in a way that factors do not pass."""
        for tensor in tensors:
            for producer, channels in self._maps.get(id(tensor), {}).items():
                self._producers[producer].ended.append((channels, by))
            if weight := self._weights.get(id(tensor)):
                self._strange.setdefault(weight.name, f"{by} reads it")

    def folds(self, linears: Sequence[str]) -> tuple[tuple[Fold, ...], dict[str, str]]:
        """The folds of the block, in order of computation; and what keeps the other norms from having one, by path.

        Args:
            linears: paths of its quantizable linears; of experts in a list, the first stand for all.
        """
        known = set(linears)
        found: dict[str, Fold] = {}
        reasons: dict[str, str] = {}
        taken: dict[str, Tensor] = {}  # columns of weights that have a scale
        for name in reversed(self._producers):  # of two factors of a product, the second is scaled
            path, _, attribute = name.rpartition(".")
            if attribute != "weight" or (self._is_matrix(name) and path not in known):
                continue
            fold = self._fold(name, known, taken)
            if isinstance(fold, Fold):
                found[name] = fold
            elif not self._is_matrix(name):
                reasons[path] = fold
        order = [found[name] for name in self._producers if name in found]
        return tuple(each for fold in order for each in self._of_experts(fold)), reasons

    def _fold(self, name: str, linears: set[str], taken: dict[str, Tensor]) -> Fold | str:
        """The fold of one producer, or why there is none."""
        producer, path = self._producers[name], name.removesuffix(".weight")
        if reason := self._strange.get(name) or self._strange.get(f"{path}.bias"):
            return f"{reason}, as its weight or bias"
        alive = producer.alive()
        columns: dict[str, Tensor] = {}
        for reader, reads in self._reads.items():
            rows = [maps.get(name) for maps in reads]
            if any(row is not None for row in rows):
                first = rows[0]
                if first is None or not all(row is not None and torch.equal(row, first) for row in rows):
                    return f"{reader} reads it and something else"
                columns[reader] = torch.where(torch.cat([alive.new_zeros(1), alive])[first.long()], first, 0)
        readers = [reader for reader in columns if reader.removesuffix(".weight") in linears]
        if not readers:
            return "no linear layer reads it"
        inputs = columns[readers[0]]
        if not bool(inputs.any()):
            return f"{producer.ended[0][1]} reads it beside linear layers" if producer.ended else "no channel is left"
        for reader, others in columns.items():
            if not torch.equal(others, inputs):
                return f"{reader} and {readers[0]} read different channels"
            if reader in self._strange:
                return f"{self._strange[reader]}: {reader}"
        for unread in self._unread(len(inputs)):
            return f"it is not known what {unread} reads"
        free = torch.zeros_like(inputs)
        for reader in columns:
            if bool((taken.get(reader, free) * inputs).any()):
                return f"{reader} has factors from elsewhere"
        taken.update((reader, taken.get(reader, free) + inputs) for reader in columns)
        numbers = torch.full((producer.size + 1,), -1)
        rows = inputs.unique().long()
        rows = rows[rows > 0]
        numbers[rows] = torch.arange(len(rows))
        return Fold(
            path,
            tuple(reader.removesuffix(".weight") for reader in readers),
            norm_offset=producer.offset,
            dense=tuple(reader for reader in columns if reader not in readers),
            places=Places(_listed(numbers[1:]), _listed(numbers[inputs.long()])),
        )

    def _unread(self, width: int) -> Iterator[str]:
        """Matrices with this many inputs that were not used; experts after the first aside."""
        for name, shape in self._matrices.items():
            if width in shape and name not in self._reads and name not in self._strange:
                yield name

    def _of_experts(self, fold: Fold) -> Iterator[Fold]:
        """The fold with all experts in place of the first: as readers, or one for each."""
        owner = self._list_of(fold.producer)
        if owner is None:
            readers = tuple(path for reader in fold.readers for path in self._all_experts(reader))
            yield replace(fold, readers=readers)
            return
        for path in self._all_experts(fold.producer):
            here = path.removeprefix(f"{owner}.").partition(".")[0]
            yield replace(
                fold,
                producer=path,
                readers=tuple(reader.replace(f"{owner}.0.", f"{owner}.{here}.", 1) for reader in fold.readers),
            )

    def _all_experts(self, path: str) -> list[str]:
        owner = self._list_of(path)
        if owner is None:
            return [path]
        experts: Any = self._block.get_submodule(owner)
        rest = path.removeprefix(f"{owner}.0.")
        return [f"{owner}.{index}.{rest}" for index in range(experts.n_experts)]

    def _list_of(self, path: str) -> str | None:
        """The path of the list of experts that a linear belongs to."""
        owner = path.rpartition(".")[0].rpartition(".")[0]
        return owner if owner and isinstance(self._block.get_submodule(owner), ListedExperts) else None

    def _moved(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        name, given = func.overloadpacket.__name__, args[0]
        if weight := self._weights.get(id(given)):
            turned = name in ("t", "transpose", "permute") and given.ndim == 2 and out.shape == given.shape[::-1]
            if not (turned or name in ("_to_copy", "detach", "alias", "clone")):
                return False
            self._weights[self._id(out)] = replace(weight, turned=weight.turned != turned)
            return True
        if id(given) not in self._maps or not next(_tensors(out)).is_floating_point():
            return False
        moved: dict[int, _Maps] = defaultdict(dict)
        for producer, channels in self._maps[id(given)].items():
            if name in _COPIES:
                results = [channels]
            elif name in _VIEWS:
                results = [channels.reshape(out.shape)]
            else:
                found = func(channels, *args[1:], **kwargs)
                results = list(found) if isinstance(found, list | tuple) else [found]
            for tensor, result in zip(_tensors(out), results, strict=True):
                moved[self._id(tensor)][producer] = result
        self._maps |= moved
        return True

    def _times(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A product of numbers: by a norm's weight, by a constant, or by something that depends on other channels."""
        a, b = args[:2]
        if not isinstance(b, Tensor):
            return id(a) in self._maps and self._keep(out, self._maps[id(a)])
        weights = [each for each in (a, b) if id(each) in self._weights]
        if len(weights) == 1 and weights[0].shape == out.shape[-1:]:
            self.end([a if weights[0] is b else b], "mul")
            return self._produces(self._weights[id(weights[0])], out)
        self.end(weights, "mul")
        first, second = self._maps.get(id(a), {}), self._maps.get(id(b), {})
        return not first.keys() & second.keys() and self._keep(out, first | second)

    def _divided(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        a, b = args[:2]
        if isinstance(b, Tensor) and (id(b) in self._maps or id(b) in self._weights):
            return False
        return id(a) in self._maps and self._keep(out, self._maps[id(a)])

    def _plus(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A sum: with what has the same channels, with the producer's own bias, or of a norm's weight and a number."""
        a, b = args[:2]
        plus = func.overloadpacket.__name__ == "add" and not kwargs
        if not isinstance(b, Tensor):
            weight = self._weights.get(id(a))
            if weight is None or not plus or weight.offset or a.ndim != 1:
                return False
            self._weights[self._id(out)] = replace(weight, offset=float(b))
            return True
        for bias, other in ((a, b), (b, a)):
            if known := self._weights.get(id(bias)):
                maps = self._maps.get(id(other), {})
                return plus and self._biased(known, maps) and self._keep(out, maps)
        first, second = self._maps.get(id(a), {}), self._maps.get(id(b), {})
        if first.keys() != second.keys():
            return False
        if not all(torch.equal(first[key].expand(out.shape), second[key].expand(out.shape)) for key in first):
            return False
        return self._keep(out, first)

    def _biased(self, bias: _Weight, maps: _Maps) -> bool:
        """Whether this is the bias of the one producer, whose outputs are all there, in order."""
        if len(maps) != 1:
            return False
        ((producer, channels),) = maps.items()
        size = self._producers[producer].size
        own = bias.name == f"{producer.rpartition('.')[0]}.bias" and not bias.turned and not bias.offset
        rows = _narrow(channels)
        return own and rows.numel() == size and torch.equal(rows.flatten(), _numbers(size))

    def _product(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A matrix product: with a weight, which reads channels and has its own; or a sum over other dimensions."""
        bias, a, b = args if len(args) == 3 else (None, *args)
        if kwargs or id(a) in self._weights:
            return False
        own = self._maps.get(id(a), {})
        if weight := self._weights.get(id(b)):
            return self._linear(weight, None if bias is None else self._weights.get(id(bias)), bias, own, out)
        if bias is not None:
            return False
        maps: _Maps = {}
        for producer, channels in own.items():
            if not _equal_along(channels, -1):
                return False
            maps[producer] = channels[..., :1].expand(out.shape)
        for producer, channels in self._maps.get(id(b), {}).items():
            if producer in maps or not _equal_along(channels, -2):
                return False
            maps[producer] = channels[..., :1, :].expand(out.shape)
        return self._keep(out, maps)

    def _linear(self, weight: _Weight, own: _Weight | None, bias: Tensor | None, maps: _Maps, out: Tensor) -> bool:
        path = weight.name.rpartition(".")[0]
        conv = isinstance(self._block.get_submodule(path), Conv1D)
        fitting = weight.turned != conv and not weight.offset
        if not fitting or (bias is not None and (own is None or own.name != f"{path}.bias" or own.offset)):
            return False
        rows: _Maps = {}
        for producer, channels in maps.items():
            if not _equal_along(channels, 0):
                return False
            rows[producer] = channels[0].clone()
        self._reads[weight.name].append(rows)
        return self._produces(weight, out)

    def _produces(self, weight: _Weight, out: Tensor) -> bool:
        """The output of a norm or a linear layer, all of whose channels are in the last dimension."""
        size = out.shape[-1]
        known = self._producers.setdefault(weight.name, _Producer(size, weight.offset))
        if known.offset != weight.offset:
            return False
        return self._keep(out, {weight.name: _numbers(size).expand(out.shape)})

    def _normed(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """A norm that is one operation."""
        at, bias_at = _NORMS[func.overloadpacket.__name__]
        weight = self._weights.get(id(args[at])) if len(args) > at else None
        if weight is None or args[at].ndim != 1:
            return False
        first = next(_tensors(out))
        self.end([args[0]], func.overloadpacket.__name__)
        if bias_at is not None and isinstance(args[bias_at], Tensor):
            bias = self._weights.get(id(args[bias_at]))
            if bias is None or bias.name != f"{weight.name.rpartition('.')[0]}.bias" or bias.offset:
                return False
        return self._produces(weight, first)

    def _joined(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        parts, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if any(id(part) in self._weights for part in parts):
            return False
        maps = [self._maps.get(id(part), {}) for part in parts]
        result: _Maps = {}
        for producer in {key: None for each in maps for key in each}:
            none = torch.zeros((), dtype=torch.int32)
            whole = [each.get(producer, none).expand(part.shape) for each, part in zip(maps, parts, strict=True)]
            result[producer] = func(whole, dim)
        return self._keep(out, result)

    def _summed(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        given, dims = args[0], args[1] if len(args) > 1 else None
        if id(given) in self._weights or not dims:
            return False
        result: _Maps = {}
        for producer, channels in self._maps[id(given)].items():
            if not all(_equal_along(channels, dim) for dim in dims):
                return False
            result[producer] = channels.amax(dims, keepdim=out.ndim == given.ndim)
        return self._keep(out, result)

    def _chosen(self, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Tokens are chosen: what is in the last dimension stays."""
        given, at = args[0], args[1]
        if id(given) in self._weights or id(given) not in self._maps:
            return False
        whole_rows = at % given.ndim != given.ndim - 1 if isinstance(at, int) else len(at) < given.ndim
        result: _Maps = {}
        for producer, channels in self._maps[id(given)].items():
            if not whole_rows or not all(_equal_along(channels, dim) for dim in range(given.ndim - 1)):
                return False
            result[producer] = channels[(0,) * (given.ndim - 1)].expand(out.shape)
        return self._keep(out, result)

    def _keep(self, out: Tensor, maps: _Maps) -> bool:
        if maps:
            self._maps[self._id(out)] = {producer: each.expand(out.shape) for producer, each in maps.items()}
        return True

    def _id(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return id(tensor)

    @cached_property
    def _matrices(self) -> dict[str, torch.Size]:
        """The shapes of all matrices by name, without those of experts after the first."""
        found = {name: parameter.shape for name, parameter in self._block.named_parameters() if parameter.ndim == 2}
        lists = [path for path, module in self._block.named_modules() if isinstance(module, ListedExperts)]
        own, first = tuple(f"{path}." for path in lists), tuple(f"{path}.0." for path in lists)
        return {name: shape for name, shape in found.items() if name.startswith(first) or not name.startswith(own)}

    def _is_matrix(self, name: str) -> bool:
        return self._block.get_parameter(name).ndim > 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _equal_along(channels: Tensor, dim: int) -> bool:
    """Whether a map repeats itself along a dimension."""
    if channels.shape[dim] < 2 or channels.stride(dim) == 0:
        return True
    return bool((channels == channels.narrow(dim, 0, 1)).all())


def _narrow(channels: Tensor) -> Tensor:
    """A map without its repetitions, as far as these take no memory."""
    return channels[tuple(slice(1) if step == 0 else slice(None) for step in channels.stride())]


@cache
def _numbers(size: int) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.int32)


def _listed(numbers: Tensor) -> Sequence[int]:
    """The numbers, as a range if they are one from 0."""
    every = torch.equal(numbers, torch.arange(len(numbers)))
    return range(len(numbers)) if every else tuple(numbers.tolist())
