"""How the blocks of a model are solved, one after another: what `quantize` loops over.

`Alone` needs nothing but weights. `Streamed` sends calibration text through the model block by block, in two streams
where something compares them: through the model as it was and as it becomes. Inside a block: transforms, then group by
group the method and low-rank compensation, then refinement.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcli.algorithms.layer_group import CROSS, RESIDUAL_CROSS, LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.algorithms.training.loop import Outcome
from qcli.core.weight import QuantizedWeight
from qcli.models.families import Linear
from qcli.models.stream import ModelStream
from qcli.quantization.block_transforms import TRAINED_TOKENS, BlockTransforms
from qcli.quantization.objectives import BlockObjective, LinearObjective
from qcli.quantization.plan import Plan
from qcli.quantization.statistics import StagedBlock, gather
from qcli.utils.device import matmul_precision
from qcli.utils.errors import QcliError
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunFolder

BATCH_TOKENS = 4096  # tokens that run through a block at a time


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        error: relative squared error of what the method chose, before a block is refined as a whole; of the output
            on the layer's real inputs, before any norm, against what it was asked to give (`measure: output`), or of
            the weight itself where no data was used (`measure: weight`).
        fallbacks: every step that did not go as configured.
        facts: what the format tells of the finished weight.
    """

    name: str
    method: str
    spec: dict[str, Any]
    bits_per_weight: float
    error: float
    measure: str
    fallbacks: list[str]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class SolvedBlock:
    """The quantized weights of a block by layer name, and how they came to be.

    Attributes:
        dense: tensors that stay dense but are not the source's any more, by full name.
        training: held-out losses of everything that was trained, by what it was: `refine`, or `refine GROUP`.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    training: dict[str, Outcome] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """All but the weights, as plain data."""
        training = {what: asdict(outcome) for what, outcome in self.training.items()}
        return {"layers": [asdict(layer) for layer in self.layers], "training": training}


class Alone:
    """Weights are all that the methods need: no text, no activations, one layer in memory at a time."""

    def __init__(self, todo: Plan, device: torch.device) -> None:
        self.todo, self.device = todo, device

    def solve(self, block: int) -> SolvedBlock:
        """Quantize the layers of a block."""
        source, solved = self.todo.source, SolvedBlock()
        for layer in self.todo.layers:
            method = self.todo.methods[layer.name]
            if layer.block != block or method is None:
                continue
            weight = source.read([f"{layer.name}.weight"])[f"{layer.name}.weight"].to(self.device)
            weight = (weight.T if source.family.conv1d else weight).float().contiguous()
            group = LinearGroup({layer.name: weight})
            solution = _solutions(self.todo, method, group)[layer.name]
            solved.weights[layer.name] = solution.weight
            solved.layers.append(_report(layer.name, method, solution, weight, group))
        return solved

    def replay(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Nothing depends on earlier blocks."""


class Streamed:
    """Calibration text runs through the model.

    Only the model itself and the moments may use `fast` matrix products; what solvers compute from them may not.

    Args:
        run: keeps what transforms have found.
        tokens: int64 `[samples, length]`; the last ones are held out where something is trained.
    """

    def __init__(
        self,
        todo: Plan,
        run: RunFolder,
        tokens: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        fast: bool,
        progress: Progress,
    ) -> None:
        self.todo, self.run, self.fast, self.refine, self.progress = todo, run, fast, todo.recipe.refinement, progress
        self.last = max(layer.block for layer in todo.layers if todo.methods[layer.name] is not None)
        self.keep = torch.bfloat16 if fast else dtype
        self.stream = ModelStream(todo.source, device=device, dtype=dtype)
        self.batch = max(1, BATCH_TOKENS // tokens.shape[1])
        last = len(tokens) - todo.held_out
        self.tokens, self.held_tokens = tokens[:last], tokens[last:]
        self.quantized, self.held = self._embedded(self.tokens), self._embedded(self.held_tokens)
        compares = todo.recipe.trained or todo.needs & {CROSS, RESIDUAL_CROSS}
        self.original = list(self.quantized) if compares else None
        self.held_original = list(self.held)
        self.transforms = BlockTransforms(todo, run, self.stream, fast=fast, progress=progress)
        self.transforms.fit_model(self.tokens, self.held_tokens)
        self.stream.drop_vocabulary()

    def solve(self, block: int) -> SolvedBlock:
        """Quantize a block whose inputs come through the blocks before it; nothing runs behind the last such block."""
        if block > self.last:
            return SolvedBlock()
        stage = self._stage(block)
        for index, members in enumerate(self._groups(block)):
            for path, solution in self._solve_group(index, members, stage).items():
                stage.set_weight(path, solution.weight)
                if solution.target is not None:
                    stage.targets[path] = solution.target
        self._advance_original(stage)
        if self.refine is not None and self.refine.scope == "block" and stage.weights:
            stage.release()
            self._refine_block(stage)
        if block < self.last:
            self._advance(stage)
        return stage.solved(f"{self.stream.family.blocks}.{block}.", self.transforms.outcomes(block))

    def replay(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Take the streams through a finished block exactly as `solve` did."""
        if block >= self.last:
            return
        stage = self._stage(block)
        for index, members in enumerate(self._groups(block)):
            self._gather(index, stage.quantized, stage.original, frozenset())
            for layer in members:
                if layer.name in weights:
                    stage.set_weight(layer.path, weights[layer.name].to(self.stream.device))
        self._advance_original(stage)
        self._advance(stage)

    def _embedded(self, tokens: Tensor) -> list[Tensor]:
        return [self.stream.embed(part) for part in torch.split(tokens, self.batch)] if len(tokens) else []

    def _stage(self, block: int) -> _Stage:
        module = self.stream.load_block(block)
        twin = copy.deepcopy(module) if self.original is not None else None
        for path, method in self.todo.methods_of(block).items():
            linear = module.get_submodule(path)
            method.format.attach(linear)
            if self.todo.recipe.activations is not None:
                self.todo.recipe.activations.simulate(linear)
        stage = _Stage(self, block, module, twin)
        if twin is not None:

            def objective(part: str) -> BlockObjective:
                assert self.original is not None
                targets = self._through(twin, block, self.original)
                held_targets = self._through(twin, block, self.held_original)
                return self._block_objective(stage, targets, held_targets, TRAINED_TOKENS, part)

            stage.changed = self.transforms.fold(block, module, twin, objective)
            paths = self.transforms.paths
            stage.targets = {path: self.stream.weight_of(twin.get_submodule(path)).float() for path in paths}
        return stage

    def _gather(
        self, index: int, quantized: StagedBlock, original: StagedBlock | None, needs: frozenset[str]
    ) -> LinearGroup:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return gather(index, quantized, original, needs)

    def _solve_group(self, index: int, members: list[Linear], stage: _Stage) -> dict[str, Solution]:
        """By path, for the layers of the group that are quantized."""
        names = {layer.path: layer.name for layer in members}
        methods = {path: method for path, method in self.todo.methods_of(stage.block).items() if path in names}
        needs = frozenset[str]().union(*(self.todo.needs_of(method) for method in methods.values()))
        group, held = self._gather(index, stage.quantized, stage.original, needs), None
        if self.refine is not None and self.refine.scope == "linear" and methods:
            held = self._gather(index, stage.held, stage.held_original, needs)
        solutions: dict[str, Solution] = {}
        for method in dict.fromkeys(methods.values()):
            paths = [path for path in methods if methods[path] == method]
            part = _part(group, paths)
            found = _solutions(self.todo, method, part)
            if held is not None:
                found = self._refine_linears(part, _part(held, paths), found, stage)
            stage.layers += [_report(names[path], method, found[path], part.weights[path], part) for path in paths]
            solutions |= found
        return solutions

    def _refine_linears(
        self, group: LinearGroup, held: LinearGroup, solutions: dict[str, Solution], stage: _Stage
    ) -> dict[str, Solution]:
        assert self.refine is not None
        weights = {path: solution.weight for path, solution in solutions.items()}
        targets = {path: group.weights[path] if s.target is None else s.target for path, s in solutions.items()}
        refined, outcome = self.refine.refine(weights, targets, LinearObjective(group, held), self.progress)
        stage.training[f"refine {' '.join(solutions)}"] = outcome
        return {path: replace(solution, weight=refined[path]) for path, solution in solutions.items()}

    def _refine_block(self, stage: _Stage) -> None:
        assert self.refine is not None and self.original is not None
        tokens = self.refine.batch_tokens
        objective = self._block_objective(stage, self.original, self.held_original, tokens, "refine")
        refined, stage.training["refine"] = self.refine.refine(stage.weights, stage.targets, objective, self.progress)
        for path, weight in refined.items():
            stage.set_weight(path, weight)

    def _block_objective(
        self, stage: _Stage, targets: list[Tensor], held_targets: list[Tensor], batch_tokens: int, purpose: str
    ) -> BlockObjective:
        return BlockObjective(
            self.stream,
            stage.block,
            stage.module,
            self.quantized,
            targets,
            self.held,
            held_targets,
            batch_tokens=batch_tokens,
            seed=f"{self.todo.recipe.seed}:{stage.block}:{purpose}",
            fast=self.fast,
        )

    def _advance_original(self, stage: _Stage) -> None:
        """The full-precision streams leave the block."""
        if stage.original is None or stage.twin is None:
            return
        with matmul_precision(fast=self.fast, device=self.stream.device):
            stage.original.advance()
        self._move(stage.twin, stage.block, self.held_original)

    def _advance(self, stage: _Stage) -> None:
        """The quantized streams leave the block; what its stages know is of no use once it has been refined."""
        if self.refine is not None and self.refine.scope == "block":
            self._move(stage.module, stage.block, self.quantized)
        else:
            with matmul_precision(fast=self.fast, device=self.stream.device):
                stage.quantized.advance()
        self._move(stage.module, stage.block, self.held)

    def _move(self, module: nn.Module, block: int, hidden: list[Tensor]) -> None:
        """Batch by batch, what leaves the block takes the place of what entered: a stream is never held twice."""
        with matmul_precision(fast=self.fast, device=self.stream.device):
            for batch, entered in enumerate(hidden):
                hidden[batch] = self.stream.run_block(module, block, entered)

    def _through(self, module: nn.Module, block: int, hidden: list[Tensor]) -> list[Tensor]:
        moved = list(hidden)
        self._move(module, block, moved)
        return moved

    def _groups(self, block: int) -> list[list[Linear]]:
        groups: list[list[Linear]] = [[] for _ in self.stream.family.groups]
        for layer in self.todo.layers:
            if layer.block == block:
                groups[layer.group].append(layer)
        return groups


class _Stage:
    """A block on its way: the module that becomes quantized, its full-precision twin, and the streams inside.

    Attributes:
        changed: tensors of the module that transforms have rewritten, by path.
        weights: what has been quantized so far, by path.
        targets: what each linear's codes are fitted to, by path; the original weight where a method names nothing.
        layers, training: as in `SolvedBlock`.
    """

    def __init__(self, loop: Streamed, block: int, module: nn.Module, twin: nn.Module | None) -> None:
        self.block, self.module, self.twin = block, module, twin
        stream, keep = loop.stream, loop.keep

        def staged(of: nn.Module, hidden: list[Tensor], *, final: bool) -> StagedBlock:
            return StagedBlock(stream, block, of, hidden, keep=keep, final=final)

        self.quantized = staged(module, loop.quantized, final=False)
        self.held = staged(module, loop.held, final=False)
        self.original = self.held_original = None
        self.targets: dict[str, Tensor] = {}
        if twin is not None and loop.original is not None:
            self.original = staged(twin, loop.original, final=True)
            self.held_original = staged(twin, loop.held_original, final=False)
        self.changed: dict[str, Tensor] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.layers: list[LayerReport] = []
        self.training: dict[str, Outcome] = {}

    def set_weight(self, path: str, weight: QuantizedWeight) -> None:
        """Let the block go on with what has been chosen for a layer."""
        self.weights[path] = weight
        ModelStream.set_weight(self.module.get_submodule(path), weight.dense())

    def release(self) -> None:
        """Forget what the streams kept inside the block: room for training."""
        for staged in (self.quantized, self.held, self.original, self.held_original):
            if staged is not None:
                staged.release()

    def solved(self, prefix: str, transforms: dict[str, Outcome]) -> SolvedBlock:
        """The finished block; `prefix` stands before every path."""
        dense = {
            name: tensor for name, tensor in self.changed.items() if name.removesuffix(".weight") not in self.weights
        }
        layers = [
            replace(layer, facts=(weight := self.weights[layer.name.removeprefix(prefix)]).format.facts(weight))
            for layer in self.layers
        ]
        return SolvedBlock(
            {prefix + path: weight for path, weight in self.weights.items()},
            {prefix + name: tensor for name, tensor in dense.items()},
            layers,
            transforms | self.training,
        )


def _solutions(todo: Plan, method: Method, group: LinearGroup) -> dict[str, Solution]:
    """What the method chooses, with what low-rank compensation adds."""
    solutions, low_rank = method.quantize(group), todo.recipe.low_rank
    return solutions if low_rank is None else low_rank.compensate(method, group, solutions)


def _part(group: LinearGroup, paths: Sequence[str]) -> LinearGroup:
    return replace(group, weights={path: group.weights[path] for path in paths})


def _report(name: str, method: Method, solution: Solution, original: Tensor, group: LinearGroup) -> LayerReport:
    weight = solution.weight
    try:
        weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    target = original if solution.target is None else solution.target
    difference = target - weight.dense()
    if group.hessian is not None:
        error = ((difference @ group.hessian) * difference).sum()
        size, measure = ((target @ group.hessian) * target).sum(), "output"
    else:
        error, size, measure = difference.square().sum(), target.square().sum(), "weight"
    return LayerReport(
        name=name,
        method=method.name,
        spec=weight.format.spec(),
        bits_per_weight=weight.format.bits_per_weight(weight.shape),
        error=float(error / size) if float(size) else 0.0,
        measure=measure,
        fallbacks=solution.fallbacks,
    )
