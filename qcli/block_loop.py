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
from safetensors.torch import load_file
from torch import Tensor, nn

from qcli.compute import matmul_precision
from qcli.errors import QcliError
from qcli.format import Format
from qcli.method import CROSS, RESIDUAL_CROSS, LinearGroup, Method, Solution
from qcli.models.arch import Linear
from qcli.models.folding import channel_scales, fold
from qcli.models.moments import StagedBlock, gather
from qcli.models.objectives import BlockObjective, LinearObjective, ModelObjective
from qcli.models.stream import ModelStream
from qcli.plan import Plan
from qcli.progress import Progress
from qcli.quantized import QuantizedWeight
from qcli.run_folder import RunFolder
from qcli.training import Outcome
from qcli.transform import ChannelScale, Transform

BATCH_TOKENS = 4096  # tokens that run through a block at a time
_TRANSFORM_TOKENS = 1024  # of a transform's training step


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        error: relative squared error of what the method chose, before a block is refined as a whole; of the output
            on the layer's real inputs against what it was asked to give (`measure: output`), or of the weight itself
            where no data was used (`measure: weight`).
        fallbacks: every step that did not go as configured.
    """

    name: str
    method: str
    spec: dict[str, Any]
    bits_per_weight: float
    error: float
    measure: str
    fallbacks: list[str]


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
            solved.layers.append(_report(layer.name, method, solution, group))
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
        self.todo, self.run, self.fast, self.refine, self.progress = todo, run, fast, todo.recipe.refine, progress
        self.keep = torch.bfloat16 if fast else dtype
        self.stream = ModelStream(todo.source, device=device, dtype=dtype)
        self.batch = max(1, BATCH_TOKENS // tokens.shape[1])
        last = len(tokens) - todo.held_out
        self.tokens, self.held_tokens = tokens[:last], tokens[last:]
        self.quantized, self.held = self._embedded(self.tokens), self._embedded(self.held_tokens)
        compares = todo.recipe.trained or todo.needs & {CROSS, RESIDUAL_CROSS}
        self.original = list(self.quantized) if compares else None
        self.held_original = list(self.held)
        self.transforms = [
            (f"transform-{number}", transform) for number, transform in enumerate(todo.recipe.all_transforms)
        ]
        for part, transform in self.transforms:
            if transform.whole_model and run.done(part) is None:
                self._fit_model(part, transform)

    def solve(self, block: int) -> SolvedBlock:
        """Quantize a block whose inputs come through the blocks before it."""
        stage, solved = self._stage(block), SolvedBlock()
        prefix = f"{self.stream.family.blocks}.{block}."
        for index, members in enumerate(self._groups(block)):
            for layer, solution in self._solve_group(index, members, stage, solved).items():
                stage.set_weight(self._path(layer), solution.weight.dense())
                solved.weights[layer] = solution.weight
                if solution.target is not None:
                    stage.targets[self._path(layer)] = solution.target
        self._advance_original(stage)
        if self.refine is not None and self.refine.scope == "block" and solved.weights:
            self._refine_block(stage, solved)
        self._advance(stage)
        dense = {prefix + name: tensor for name, tensor in stage.changed.items()}
        solved.dense = {
            name: tensor for name, tensor in dense.items() if name.removesuffix(".weight") not in solved.weights
        }
        for part, transform in self.transforms:
            report = self.run.report(part if transform.whole_model else f"{block:05d}-{part}")
            solved.training |= {what: Outcome(**outcome) for what, outcome in report.items()}
        return solved

    def replay(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Take the streams through a finished block exactly as `solve` did."""
        stage = self._stage(block)
        for index, members in enumerate(self._groups(block)):
            self._gather(index, stage.quantized, stage.original, frozenset())
            for layer in members:
                if layer.name in weights:
                    dense = weights[layer.name].to(self.stream.device).dense()
                    stage.set_weight(self._path(layer.name), dense)
        self._advance_original(stage)
        self._advance(stage)

    def _embedded(self, tokens: Tensor) -> list[Tensor]:
        return [self.stream.embed(part) for part in torch.split(tokens, self.batch)] if len(tokens) else []

    def _stage(self, block: int) -> _Stage:
        module = self.stream.load_block(block)
        twin = copy.deepcopy(module) if self.original is not None else None
        for path in self._methods(block):
            if self.todo.recipe.activations is not None:
                self.todo.recipe.activations.simulate(module.get_submodule(path))
        changed = self._transform(block, module, twin) if twin is not None else {}
        return _Stage(self, block, module, twin, changed)

    def _transform(self, block: int, module: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
        """Fold every transform into the block and its twin; returns the tensors that changed, by path."""
        scales = channel_scales(module, self.stream.family, self.stream.config)
        stored = self.todo.stored_dtypes(block)
        changed: dict[str, None] = {}
        for part, transform in self.transforms:
            alphas = self._alphas(part, transform, block, module, twin, scales)
            changed |= dict.fromkeys(fold(module, scales, alphas, stored))
            fold(twin, scales, alphas, stored)
        return {name: module.get_parameter(name) for name in changed}

    def _alphas(
        self,
        part: str,
        transform: Transform,
        block: int,
        module: nn.Module,
        twin: nn.Module,
        scales: list[ChannelScale],
    ) -> list[Tensor]:
        """One for each scale of the block: what an earlier run found, or newly fitted."""
        part = part if transform.whole_model else f"{block:05d}-{part}"
        if self.run.done(part) is None:
            assert self.original is not None
            targets = self._through(twin, block, self.original)
            held_targets = self._through(twin, block, self.held_original)
            objective = self._block_objective(block, module, targets, held_targets, _TRANSFORM_TOKENS, part)
            paths = [path for group in self.stream.family.groups for path in group.linears]
            weights = {path: self.stream.weight_of(module.get_submodule(path)).float() for path in paths}
            formats = {path: method.format for path, method in self._methods(block).items()}
            alphas, outcome = transform.fit(weights, formats, scales, objective, self.progress)
            found = {f"{block}.{number}": alpha for number, alpha in enumerate(alphas)}
            self.run.commit(part, found, {transform.name: asdict(outcome)})
        found = load_file(self.run.file(part))
        return [found[f"{block}.{number}"].to(self.stream.device) for number in range(len(scales))]

    def _fit_model(self, part: str, transform: Transform) -> None:
        """Train the alphas of all blocks together, for what the whole model predicts; it is held in memory."""
        blocks = [self.stream.load_block(block) for block in range(self.stream.n_blocks)]
        weights: dict[str, Tensor] = {}
        formats: dict[str, Format | None] = {}
        scales: list[ChannelScale] = []
        names: list[str] = []
        for block, module in enumerate(blocks):
            methods = self._methods(block)
            for path in (path for group in self.stream.family.groups for path in group.linears):
                weights[f"{block}.{path}"] = self.stream.weight_of(module.get_submodule(path)).float()
                formats[f"{block}.{path}"] = methods[path].format if path in methods else None
            for number, scale in enumerate(channel_scales(module, self.stream.family, self.stream.config)):
                names.append(f"{block}.{number}")
                scales.append(scale.within(f"{block}."))
        objective = ModelObjective(
            self.stream,
            blocks,
            self.tokens,
            self.held_tokens,
            predictions=transform.loss == "kl",
            batch_tokens=_TRANSFORM_TOKENS,
            seed=f"{self.todo.recipe.seed}:{part}",
            fast=self.fast,
        )
        alphas, outcome = transform.fit(weights, formats, scales, objective, self.progress)
        self.run.commit(part, dict(zip(names, alphas, strict=True)), {transform.name: asdict(outcome)})

    def _methods(self, block: int) -> dict[str, Method]:
        """Of the layers of a block that are quantized, by path."""
        members = (layer for layer in self.todo.layers if layer.block == block)
        return {
            self._path(layer.name): method for layer in members if (method := self.todo.methods[layer.name]) is not None
        }

    def _gather(
        self, index: int, quantized: StagedBlock, original: StagedBlock | None, needs: frozenset[str]
    ) -> LinearGroup:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return gather(index, quantized, original, needs)

    def _solve_group(
        self, index: int, members: list[Linear], stage: _Stage, solved: SolvedBlock
    ) -> dict[str, Solution]:
        methods = {layer.name: method for layer in members if (method := self.todo.methods[layer.name]) is not None}
        needs = frozenset[str]().union(*(self.todo.needs_of(method) for method in methods.values()))
        gathered = self._gather(index, stage.quantized, stage.original, needs)
        group = _renamed(gathered, {self._path(layer.name): layer.name for layer in members})
        if self.refine is not None and self.refine.scope == "linear" and methods:
            held = self._gather(index, stage.held, stage.held_original, needs)
            held = _renamed(held, {self._path(layer.name): layer.name for layer in members})
        else:
            held = None
        solutions: dict[str, Solution] = {}
        for method in dict.fromkeys(methods.values()):
            names = [name for name in methods if methods[name] == method]
            part = _part(group, names)
            found = _solutions(self.todo, method, part)
            if held is not None:
                found = self._refine_linears(index, part, _part(held, names), found, solved)
            solved.layers += [_report(name, method, solution, part) for name, solution in found.items()]
            solutions |= found
        return solutions

    def _refine_linears(
        self, index: int, group: LinearGroup, held: LinearGroup, solutions: dict[str, Solution], solved: SolvedBlock
    ) -> dict[str, Solution]:
        assert self.refine is not None
        weights = {name: solution.weight for name, solution in solutions.items()}
        targets = {name: group.weights[name] if s.target is None else s.target for name, s in solutions.items()}
        refined, outcome = self.refine.refine(weights, targets, LinearObjective(group, held), self.progress)
        solved.training[f"refine {' '.join(self._path(name) for name in solutions)}"] = outcome
        return {name: replace(solution, weight=refined[name]) for name, solution in solutions.items()}

    def _refine_block(self, stage: _Stage, solved: SolvedBlock) -> None:
        assert self.refine is not None and self.original is not None
        objective = self._block_objective(
            stage.block, stage.module, self.original, self.held_original, self.refine.batch_tokens, "refine"
        )
        names = {self._path(name): name for name in solved.weights}
        weights = {path: solved.weights[name] for path, name in names.items()}
        refined, outcome = self.refine.refine(weights, stage.targets, objective, self.progress)
        solved.training["refine"] = outcome
        for path, weight in refined.items():
            solved.weights[names[path]] = weight
            stage.set_weight(path, weight.dense())

    def _block_objective(
        self,
        block: int,
        module: nn.Module,
        targets: list[Tensor],
        held_targets: list[Tensor],
        batch_tokens: int,
        purpose: str,
    ) -> BlockObjective:
        return BlockObjective(
            self.stream,
            block,
            module,
            self.quantized,
            targets,
            self.held,
            held_targets,
            batch_tokens=batch_tokens,
            seed=f"{self.todo.recipe.seed}:{block}:{purpose}",
            fast=self.fast,
        )

    def _advance_original(self, stage: _Stage) -> None:
        """The full-precision streams leave the block."""
        if stage.original is None or stage.twin is None:
            return
        with matmul_precision(fast=self.fast, device=self.stream.device):
            self.original = list(stage.original.outputs())
        self.held_original = self._through(stage.twin, stage.block, self.held_original)

    def _advance(self, stage: _Stage) -> None:
        """The quantized streams leave the block; what its stages know is of no use once it has been refined."""
        if self.refine is not None and self.refine.scope == "block":
            self.quantized = self._through(stage.module, stage.block, self.quantized)
        else:
            with matmul_precision(fast=self.fast, device=self.stream.device):
                self.quantized = list(stage.quantized.outputs())
        self.held = self._through(stage.module, stage.block, self.held)

    def _through(self, module: nn.Module, block: int, hidden: list[Tensor]) -> list[Tensor]:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return [self.stream.run_block(module, block, batch) for batch in hidden]

    def _groups(self, block: int) -> list[list[Linear]]:
        groups: list[list[Linear]] = [[] for _ in self.stream.family.groups]
        for layer in self.todo.layers:
            if layer.block == block:
                groups[layer.group].append(layer)
        return groups

    def _path(self, layer: str) -> str:
        """Inside its block."""
        return layer.removeprefix(f"{self.stream.family.blocks}.").partition(".")[2]


class _Stage:
    """A block on its way: the module that becomes quantized, its full-precision twin, and the streams inside.

    Attributes:
        changed: tensors of the module that transforms have rewritten, by path.
        targets: what each linear's codes are fitted to, by path; the original weight where a method names nothing.
    """

    def __init__(
        self, loop: Streamed, block: int, module: nn.Module, twin: nn.Module | None, changed: dict[str, Tensor]
    ) -> None:
        self.block, self.module, self.twin, self.changed = block, module, twin, changed
        stream, keep = loop.stream, loop.keep

        def staged(of: nn.Module, hidden: list[Tensor], *, final: bool) -> StagedBlock:
            return StagedBlock(stream, block, of, hidden, keep=keep, final=final)

        self.quantized = staged(module, loop.quantized, final=False)
        self.held = staged(module, loop.held, final=False)
        self.original = self.held_original = None
        if twin is not None and loop.original is not None:
            self.original = staged(twin, loop.original, final=True)
            self.held_original = staged(twin, loop.held_original, final=False)
        self.targets: dict[str, Tensor] = {}
        if twin is not None:
            paths = [path for group in stream.family.groups for path in group.linears]
            self.targets = {path: stream.weight_of(twin.get_submodule(path)).float() for path in paths}

    def set_weight(self, path: str, weight: Tensor) -> None:
        """Let the block go on with these values."""
        ModelStream.set_weight(self.module.get_submodule(path), weight)


def _solutions(todo: Plan, method: Method, group: LinearGroup) -> dict[str, Solution]:
    """What the method chooses, with what low-rank compensation adds."""
    solutions, low_rank = method.quantize(group), todo.recipe.low_rank
    return solutions if low_rank is None else low_rank.compensate(method, group, solutions)


def _renamed(group: LinearGroup, names: Mapping[str, str]) -> LinearGroup:
    return replace(group, weights={names[path]: weight for path, weight in group.weights.items()})


def _part(group: LinearGroup, names: Sequence[str]) -> LinearGroup:
    return replace(group, weights={name: group.weights[name] for name in names})


def _report(name: str, method: Method, solution: Solution, group: LinearGroup) -> LayerReport:
    weight = solution.weight
    try:
        weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    target = group.weights[name] if solution.target is None else solution.target
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
