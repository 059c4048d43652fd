"""Where tensors go in a model's forward pass on the meta device: what reads what, and what passes between blocks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import KVSharingDict
from transformers.pytorch_utils import Conv1D

from qcli.models.channels import Channels, Operation
from qcli.models.families import Fold, Group, Passing
from qcli.models.listed_experts import ListedExperts

BATCH, LENGTH = 2, 32  # of the tokens that are followed: numbers that tell the two apart

_SMALLEST = 16  # rows or columns of a linear that is worth quantizing; smaller ones are gates
_NO_VALUES = ("new_", "zeros_like", "ones_like", "full_like", "empty_like")  # operations that read shapes alone
_SAME_VALUES = ("_to_copy", "clone", "alias", "detach", "contiguous")


@dataclass
class _Traced:
    """What the flow knows of a block.

    Attributes:
        called: paths of its linears by the values that they read, in order of the first calls.
        sources: by path, the linears whose outputs reach its input without passing another linear.
        joins: by path, the tensor of the residual stream that its output is added to.
        readers: by tensor, the first module without parts that reads it.
        leaves: linears whose outputs reach the block's output, likewise.
        stores: whether it leaves keys and values for later blocks: no part of it can be skipped.
        operations: all that it computes, in order.
        given_away: tensors that others may read.
    """

    called: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    joins: dict[str, int] = field(default_factory=dict)
    readers: dict[int, str] = field(default_factory=dict)
    leaves: frozenset[str] = frozenset()
    stores: bool = False
    operations: list[Operation] = field(default_factory=list)
    given_away: list[Tensor] = field(default_factory=list)


class Flow(TorchDispatchMode):
    """Follows tensors through the blocks during a forward pass on the meta device.

    A tensor is known by its storage, so that views and changes in place are followed too.

    Args:
        model: the model.
        blocks: of the model.
        dense: number of the block and path of linears that stay dense.
        shared: of each block: names of parameters that another module has, too.

    Attributes:
        passed: the modules of the model that ran.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        dense: Set[tuple[int, str]] = frozenset(),
        shared: Sequence[Iterable[str]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks, self.dense = list(blocks), dense
        self.passed: set[nn.Module] = set()
        self._model = model
        self.traced = [_Traced() for _ in self.blocks]
        self._shared_names = shared or [()] * len(blocks)
        self._folds: dict[Hashable, tuple[tuple[Fold, ...], dict[str, str]]] = {}  # of blocks that compute the same
        self.outputs: list[Any] = []
        self._kept: list[Tensor] = []  # all tensors seen: a freed storage's number would be given to another
        self._taint: dict[int, frozenset[str]] = {}
        self._pure: dict[int, frozenset[str]] = {}  # outputs of linears, unchanged, and sums of them
        self._inside = -1
        self._hooks = ExitStack()
        self._of_tokens: set[int] = set()  # what depends on the tokens, and was not computed in a block
        self._made: dict[int, int] = {}  # the block that computed a tensor
        self._hidden: Tensor | None = None  # hidden states that last entered or left a block
        self._entered: list[int] = []  # blocks, in order
        self._tokens_read = False
        self._shared: dict[str, tuple[Tensor, ...]] = {}  # keys and values for later blocks
        self._obstacle = ""

    def follow(self, tokens: Tensor) -> None:
        """Note what is computed from these."""
        self._of_tokens.add(self._key(tokens))

    def __enter__(self) -> Flow:
        for module in self._model.modules():
            self._hooks.callback(module.register_forward_pre_hook(self._passes).remove)
        for index, block in enumerate(self.blocks):
            self._hooks.callback(block.register_forward_pre_hook(self._enters(index), with_kwargs=True).remove)
            self._hooks.callback(block.register_forward_hook(self._leaves(index), with_kwargs=True).remove)
            for path, module in block.named_modules():
                if path:
                    self._hooks.callback(
                        module.register_forward_pre_hook(self._reads(index, path), with_kwargs=True).remove
                    )
                if isinstance(module, nn.Linear | Conv1D):
                    self._hooks.callback(module.register_forward_hook(self._computed(path)).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # a question about values: masks and the like
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        inputs = [self._key(tensor) for tensor in _tensors((args, kwargs))]
        name = func.overloadpacket.__name__
        if not name.startswith(_NO_VALUES):
            self._pass_on(inputs, out)
        if self._inside < 0:
            return out
        self.traced[self._inside].operations.append(Operation(func, args, kwargs or {}, out))
        if name in ("add", "add_") and len(args) > 1 and isinstance(args[1], Tensor):
            self._add(args[0], args[1], out)
        taint = frozenset[str]().union(*(self._taint.get(key, frozenset()) for key in inputs))
        for tensor in _tensors(out):
            key = self._key(tensor)
            self._taint[key] = self._taint.get(key, frozenset()) | taint
            if name in _SAME_VALUES and inputs and inputs[0] != key:
                if inputs[0] in self._pure:
                    self._pure[key] = self._pure[inputs[0]]
            elif func._schema.is_mutable and name != "add_":
                self._pure.pop(key, None)
        return out

    def passing(self) -> Passing:
        """What blocks are given."""
        obstacle = self._obstacle
        if not obstacle and self._entered != [*range(len(self.blocks))]:
            obstacle = "its blocks do not run once each, in their order"
        before, after = tuple[int, ...](), tuple[int, ...]()
        if self._hidden is not None and not obstacle:
            shape = tuple(self._hidden.shape)
            at = next((at for at in (0, 1) if shape[at : at + 2] == (BATCH, LENGTH)), -1)
            if at < 0 or len(shape) < at + 3:
                obstacle = f"hidden states between its blocks have the shape {list(shape)}"
            else:
                before, after = shape[:at], shape[at + 2 : -1]
        shared: dict[str, tuple[tuple[int, int], ...]] = {}
        for kind, states in self._shared.items():
            if any(state.shape[::2] != (BATCH, LENGTH) or state.ndim != 4 for state in states):
                obstacle = obstacle or "keys and values that blocks share have an unknown layout"
            shared[kind] = tuple((state.shape[1], state.shape[-1]) for state in states)
        n_outputs = max((len(output) for output in self.outputs if isinstance(output, tuple | list)), default=1)
        return Passing(self._tokens_read, before, after, shared, obstacle, n_outputs)

    def groups(self, index: int) -> tuple[Group, ...]:
        """The groups of a block, in order of computation."""
        traced, block = self.traced[index], self.blocks[index]
        called = ([path for path in paths if (index, path) not in self.dense] for paths in traced.called.values())
        sets = [part for paths in called for part in _by_experts(block, paths)]
        number = {path: at for at, paths in enumerate(sets) for path in paths}
        readers: list[set[int]] = [set() for _ in sets]
        for path, sources in traced.sources.items():
            for source in sources & number.keys():
                readers[number[source]].add(number.get(path, -1))
        leaves = [not traced.leaves.isdisjoint(paths) for paths in sets]
        ends: list[int | None] = [None] * len(sets)
        groups: list[Group] = []
        for at in reversed(range(len(sets))):
            experts = _experts_around(block, sets[at][0])
            inner = not leaves[at] and bool(readers[at])
            out = experts is None and not inner and len(sets[at]) == 1 and _replayable(sets[at][0], at, sets)
            reached = [ends[reader] if reader > at else None for reader in readers[at]]
            last = None
            if traced.stores:
                out = inner = False
            if out:
                ends[at] = at
            elif inner and experts is None and None not in reached:
                last = ends[at] = max(end for end in reached if end is not None)
            alone = len(sets[at]) == 1 and sets[at][0] in traced.joins
            residual = traced.readers.get(traced.joins[sets[at][0]]) if alone else None
            groups.append(
                Group(sets[at], residual, leads_out=out, last_reader=last)
                if experts is None
                else Group(sum(parts := _of_all_experts(block, experts, sets[at]), ()), experts=parts)
            )
        return tuple(reversed(groups))

    def folds(self, index: int, groups: Iterable[Group]) -> tuple[tuple[Fold, ...], dict[str, str]]:
        """The folds of a block with these groups, and what keeps other norms from having one, by path."""
        traced, shared = self.traced[index], tuple(self._shared_names[index])
        linears = tuple(path for group in groups for path in group.linears)
        channels = Channels(self.blocks[index], shared)
        key = channels.signature(traced.operations, traced.given_away), shared, linears
        if key not in self._folds:
            for operation in traced.operations:
                channels.follow(operation)
            channels.end(traced.given_away, "what comes after the block")
            self._folds[key] = channels.folds(linears)
        return self._folds[key]

    def linears(self) -> Iterator[nn.Module]:
        """All linears that were called."""
        for block, traced in zip(self.blocks, self.traced, strict=True):
            for paths in traced.called.values():
                yield from map(block.get_submodule, paths)

    def _pass_on(self, inputs: list[int], out: Any) -> None:
        """Follow what depends on the tokens, and what leaves a block other than by the hidden states."""
        hidden = -1 if self._hidden is None else self._key(self._hidden)
        known = {hidden, *(self._key(state) for states in self._shared.values() for state in states)}
        foreign = [key for key in inputs if key not in known and self._made.get(key, self._inside) != self._inside]
        if foreign:
            maker = self._made[foreign[0]]
            reader = f"block {self._inside}" if self._inside >= 0 else "the model"
            self._obstacle = self._obstacle or f"{reader} reads what block {maker} computed, besides its hidden states"
        outputs = [self._key(tensor) for tensor in _tensors(out)]
        if self._inside >= 0:
            self._made.update((key, self._inside) for key in outputs if key not in inputs)
        elif any(key in self._of_tokens for key in inputs):
            self._of_tokens.update(outputs)

    def _add(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        keys, result = (self._key(a), self._key(b)), self._key(out)
        pure = [self._pure.get(key) if a.shape == b.shape else None for key in keys]
        for other, added, also in ((keys[0], pure[1], pure[0]), (keys[1], pure[0], pure[1])):
            if added is not None and also is None:
                # Of several linears that are added at once, the first makes up for the stream, the others find it done.
                order = [path for paths in self.traced[self._inside].called.values() for path in paths]
                if known := added.intersection(order):
                    self.traced[self._inside].joins.setdefault(min(known, key=order.index), other)
        if pure[0] is not None and pure[1] is not None:
            self._pure[result] = pure[0] | pure[1]
        else:
            self._pure.pop(result, None)

    def _passes(self, module: nn.Module, _: Any) -> None:
        self.passed.add(module)

    def _enters(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside = index
            self._taint.clear()
            self._pure.clear()
            hidden, *others = _tensors((args, kwargs))
            if index in self._entered:
                self._obstacle = self._obstacle or f"block {index} runs more than once"
            elif self._hidden is not None and self._key(hidden) != self._key(self._hidden):
                self._obstacle = self._obstacle or f"something is computed between blocks {index - 1} and {index}"
            self._entered.append(index)
            self._hidden = hidden
            self._tokens_read |= any(self._key(tensor) in self._of_tokens for tensor in others)

        return hook

    def _leaves(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = next(_tensors(output), None)
            key = None if hidden is None else self._key(hidden)
            self.traced[index].leaves = frozenset() if key is None else self._taint.get(key, frozenset())
            self.outputs.append(output)
            self._hidden, self._inside = hidden, -1
            self.traced[index].given_away = list(_tensors((output, kwargs)))
            for given in kwargs.values():
                if isinstance(given, KVSharingDict):
                    self._shared |= given
                    kept = [self._key(state) for states in given.values() for state in states]
                    self.traced[index].stores |= any(self._made.get(key) == index for key in kept)

        return hook

    def _reads(self, index: int, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
            if not isinstance(given, Tensor):
                return
            key = self._key(given)
            traced = self.traced[index]
            if not any(module.children()):
                traced.readers.setdefault(key, path)
            if isinstance(module, nn.Linear | Conv1D):
                if any(path in paths for paths in traced.called.values()):
                    return
                values = key, int(given.storage_offset()), given.numel(), given._version
                traced.called.setdefault(values, []).append(path)
                traced.sources[path] = self._taint.get(key, frozenset())

        return hook

    def _computed(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = next(_tensors(args), None)
            if not isinstance(output, Tensor):  # a router that is a linear and more
                self._drop(path)
                return
            rows = module.get_parameter("weight").shape[isinstance(module, Conv1D)]
            if given is not None and output.shape != (*given.shape[:-1], rows):  # several linears in one
                self._drop(path)
            key = self._key(output)
            self._taint[key] = self._pure[key] = frozenset({path})

        return hook

    def _drop(self, path: str) -> None:
        """Leave a linear dense that computes something else than a linear layer."""
        for paths in self.traced[self._inside].called.values():
            paths[:] = [other for other in paths if other != path]

    def _key(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return int(tensor.untyped_storage()._cdata)


def _by_experts(block: nn.Module, paths: list[str]) -> list[tuple[str, ...]]:
    """Linears that are worth quantizing among those that read one tensor; those of experts by themselves."""
    routers = {*_routers(block)}
    parts: dict[str | None, list[str]] = {}
    for path in paths:
        shape = block.get_submodule(path).get_parameter("weight").shape
        owner = _experts_around(block, path)
        if min(shape) >= _SMALLEST and path not in routers:
            parts.setdefault(owner, []).append(path)
    return [tuple(part) for part in parts.values()]


def _routers(block: nn.Module) -> Iterator[str]:
    """Paths of linears with an output for each expert that stand by themselves beside the experts, at any depth."""
    for beside, experts in block.named_modules():
        while beside and isinstance(experts, ListedExperts):
            beside, _, inner = beside.rpartition(".")
            for name, child in block.get_submodule(beside).named_children():
                linears = [path for path, module in child.named_modules() if isinstance(module, nn.Linear)]
                if name != inner and len(linears) == 1:
                    path = ".".join(filter(None, (beside, name, *linears)))
                    if block.get_submodule(path).out_features == experts.n_experts:
                        yield path


def _experts_around(block: nn.Module, path: str) -> str | None:
    """The path of the list of experts that a linear belongs to."""
    owner = path.rpartition(".")[0].rpartition(".")[0]
    return owner if owner and isinstance(block.get_submodule(owner), ListedExperts) else None


def _of_all_experts(block: nn.Module, experts: str, first: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The linears of each expert, like those of the first, which stands for all on the meta device."""
    module = block.get_submodule(experts)
    assert isinstance(module, ListedExperts)
    names = [path.rpartition(".")[2] for path in first]
    return tuple(tuple(f"{experts}.{index}.{name}" for name in names) for index in range(module.n_experts))


def _replayable(path: str, at: int, sets: list[tuple[str, ...]]) -> bool:
    """Whether the module around a linear has no linear of a later group, so that its output can be replayed."""
    parent = path.rpartition(".")[0]
    return not parent or not any(other.startswith(f"{parent}.") for paths in sets[at + 1 :] for other in paths)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value:
            yield from _tensors(part)
