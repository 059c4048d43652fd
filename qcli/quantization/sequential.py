"""Sequential quantization: calibration text runs through the model, block by block and group by group.

Every group reads the activations of a model in which all earlier groups are quantized already. Where something is
compared with the full-precision model, its activations move along as a second stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcli.algorithms.method import Solution
from qcli.algorithms.training.batches import Sampling, Split
from qcli.algorithms.training.loop import Weights
from qcli.core.weight import QuantizedWeight
from qcli.data.image_samples import Samples, processed
from qcli.models.stream import ModelStream, batches
from qcli.quantization.block_state import BlockGroup, BlockState, CollectedGroup, Streams
from qcli.quantization.layer_report import layer_report
from qcli.quantization.objectives import BlockObjective, LinearObjective
from qcli.quantization.plan import Plan
from qcli.quantization.ranks import ALONE, solve_together
from qcli.quantization.statistics import StagedBlock, Statistics, at_once, collect, collect_experts, mean_square
from qcli.quantization.transforms import TRAINED_TOKENS, BlockTransforms
from qcli.quantization.vocabulary import round_embedding
from qcli.utils.device import linear_dtype, matmul_precision
from qcli.utils.distributed import Processes
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunParts
from qcli.utils.stored_batches import BatchMemory, StoredBatches


class Sequential:
    """The `BlockQuantizer` of everything that reads activations.

    Only the model itself and the input statistics may use `fast` matrix products; what solvers compute from them may
    not.

    Args:
        run: keeps what transforms have fitted.
        samples: the last `plan.held_out` of them are held out.
        fast: whether bf16 or TF32 matrix products are allowed.
        memory: where activations wait for the next block, and targets for the reconstruction.
        processes: that share the work: each runs its own samples through the model.
    """

    def __init__(
        self,
        plan: Plan,
        run: RunParts,
        samples: Samples,
        device: torch.device,
        dtype: torch.dtype,
        *,
        fast: bool,
        memory: BatchMemory,
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        self.processes, self.memory = processes, memory
        self.plan, self.fast, self.refinement, self.progress = plan, fast, plan.recipe.refinement, progress
        self.keep = torch.bfloat16 if fast else dtype
        self.stream = ModelStream(plan.source, device=device, dtype=dtype)
        self.last = plan.last_block
        # Before samples are embedded: folds are proven on tokens, and a stream with images runs its samples alone.
        self.transforms = BlockTransforms(plan, run, self.stream, fast=fast, progress=progress, processes=processes)
        training = len(samples) - plan.held_out
        self.samples: Split[Samples] = Split(samples[:training], samples[training:])
        own = self.samples.map(lambda side: side[_slice(processes.share(len(side)))])
        self.quantized = own.map(self._embedded)
        self.original = self.quantized.map(StoredBatches.copy) if plan.compares else None
        if isinstance(samples, Tensor):
            self.transforms.fit_model(Split(samples[:training], samples[training:]))
        if round_embedding(plan, self.stream):
            self.quantized = own.map(self._embedded)
        self.stream.drop_vocabulary()

    def route(self, unfinished: Sequence[int]) -> Sequence[int]:
        """All blocks up to the last unfinished one: activations pass through the finished ones."""
        return range(max(unfinished, default=-1) + 1)

    def load(self, index: int, saved: dict[str, QuantizedWeight] | None) -> BlockState:
        """The block, its full-precision twin, and the activations that enter both."""
        module = self.stream.load_block(index)
        original = self._twin(index, module) if self.original is not None else None
        for path, method in self.plan.methods_of(index).items():
            linear = module.get_submodule(path)
            method.format.attach(linear)
            if self.plan.recipe.activations is not None:
                self.plan.recipe.activations.simulate(linear)
        saved = saved and {path: weight.to(self.stream.device) for path, weight in saved.items()}
        groups = [
            BlockGroup(number, sets)
            for number, group in enumerate(self.stream.family.groups_of(index))
            for sets in at_once(group, module)
        ]
        block = BlockState(index, groups, self.keep, saved, module, original)
        block.quantized_streams = self._streams(block.index, module, self.quantized, final=False)
        if original is not None and self.original is not None:
            block.original_streams = self._streams(block.index, original, self.original, final=True)
        return block

    def transform(self, block: BlockState) -> None:
        """Transforms change both the block and its twin, so that codes are fitted to the transformed weights."""
        if block.original is None:
            return
        twin = block.original

        def objective(part: str) -> BlockObjective:
            assert self.original is not None
            targets = self.original.map(lambda hidden: self._through(twin, block.index, hidden))
            return self._block_objective(block, targets, TRAINED_TOKENS, part)

        assert block.module is not None
        block.transformed = self.transforms.fold(block.index, block.module, twin, objective)
        block.training |= self.transforms.outcomes(block.index)
        for path in self.stream.family.paths_of(block.index) if self.plan.reconstructs else ():
            block.targets[path] = self.memory.keep(self.stream.weight_of(twin.get_submodule(path)).float())

    def collect(self, block: BlockState, group: BlockGroup) -> list[CollectedGroup]:
        """Both streams reach the group's inputs; of a saved block no statistics are taken on the way."""
        chosen, solving = self.plan.methods_of(block.index), block.saved is None
        methods = [method for path, method in chosen.items() if path in group.paths]
        needs = frozenset[str]().union(*map(self.plan.needs_of, methods if solving else ()))
        assert block.quantized_streams is not None
        quantized, original = block.quantized_streams, block.original_streams

        def collected(own: StagedBlock, reference: StagedBlock | None) -> list[Statistics]:
            with matmul_precision(fast=self.fast, device=self.stream.device):
                if own.groups[group.number].experts:
                    text = self.plan.recipe.calibration
                    return collect_experts(
                        group.number,
                        group.sets,
                        own,
                        reference,
                        needs,
                        self.processes,
                        every_token=text.all_experts,
                        floor=text.expert_tokens,
                    )
                return [Statistics(collect(group.number, own, reference, needs, self.processes))]

        training = collected(quantized.training, None if original is None else original.training)
        if not (solving and methods and self.refinement is not None and self.refinement.scope == "linear"):
            return [CollectedGroup(each.group, fallbacks=each.fallbacks) for each in training]
        held_out = collected(quantized.held_out, None if original is None else original.held_out)
        return [
            CollectedGroup(each.group, other.group, each.fallbacks)
            for each, other in zip(training, held_out, strict=True)
        ]

    def solve(self, block: BlockState, collected: CollectedGroup) -> dict[str, QuantizedWeight]:
        """One solution for all linears of the group that have one method."""
        prefix, weights = self.plan.prefix(block.index), dict[str, QuantizedWeight]()
        chosen = self.plan.methods_of(block.index)
        methods = {path: method for path, method in chosen.items() if path in collected.training.weights}
        for method in dict.fromkeys(methods.values()):
            paths = [path for path in methods if methods[path] == method]
            part = collected.only(paths)
            solutions = solve_together(method, self.plan.recipe.low_rank, part.training, self.processes)
            if part.held_out is not None:
                solutions = self._refine_linears(block, part, solutions)
            for path in paths:
                original = part.training.weights[path]
                solution = replace(solutions[path], fallbacks=[*part.fallbacks, *solutions[path].fallbacks])
                report = layer_report(prefix + path, method, solution, original, part.training)
                block.reports.append(report)
            for path, solution in solutions.items():
                weights[path] = solution.weight
                if solution.target is not None and self.plan.reconstructs:
                    block.targets[path] = self.memory.keep(solution.target)
        return weights

    def advance_original(self, block: BlockState) -> None:
        """Full-precision activations leave the block."""
        if block.original is None or block.original_streams is None or self.original is None:
            return
        with matmul_precision(fast=self.fast, device=self.stream.device):
            block.original_streams.training.advance()
        self._advance(block.original, block.index, self.original.held_out)
        block.release_original()

    def refine(self, block: BlockState) -> None:
        """Reconstruct the block's output, where the recipe or the method says so."""
        if self.refinement is None or not self.plan.reconstructs or not block.weights:
            return
        assert self.original is not None and block.quantized_streams is not None
        block.quantized_streams.release()  # room for training
        block.release_weights()
        self.memory.finish()  # targets are read
        objective = self._block_objective(block, self.original, self.refinement.batch_tokens, "refine")
        refined, block.training["refine"] = self.refinement.refine(
            block.weights, block.targets, objective, self.progress, linear_dtype(fast=self.fast)
        )
        block.replace(refined)

    def advance(self, block: BlockState) -> None:
        """Quantized activations leave the block, unless it is the last one that matters."""
        if block.index >= self.last and not self.plan.reads_final_norm:
            return
        assert block.module is not None and block.quantized_streams is not None
        if self.plan.reconstructs:
            self._advance(block.module, block.index, self.quantized.training)  # staged results are of unrefined weights
        else:
            with matmul_precision(fast=self.fast, device=self.stream.device):
                block.quantized_streams.training.advance()
        self._advance(block.module, block.index, self.quantized.held_out)

    def head_hessian(self) -> Tensor:
        """`E[x^T x]` of what the head reads after the quantized blocks, over all training samples, float32.

        Raises:
            UsageError: it is not finite.
        """
        with matmul_precision(fast=self.fast, device=self.stream.device):
            inputs = (self.stream.head_inputs(hidden) for hidden in self.quantized.training)
            return mean_square(inputs, self.processes)

    def _embedded(self, samples: Samples) -> StoredBatches[Tensor]:
        """What enters the first block."""
        if isinstance(samples, Tensor):
            return self.memory.store(map(self.stream.embed, batches(samples)))
        if not len(samples):
            return self.memory.store()
        return self.memory.store(self.stream.embed_samples(processed(samples, self.plan.source), self.memory))

    def _twin(self, index: int, module: nn.Module) -> nn.Module:
        """A copy of an original block. Where linear layers compute in bf16 anyway, so are its weights, if nothing is
        lost by it."""
        twin, prefix, stored = copy.deepcopy(module), self.plan.prefix(index), self.plan.source.tensors()
        if not self.transforms.transforms:
            for path in self.stream.family.paths_of(index):
                if stored[f"{prefix}{path}.weight"].torch_dtype == self.keep:
                    linear = twin.get_submodule(path)
                    self.stream.new_weight(linear, self.stream.weight_of(linear).to(self.keep))
        return twin

    def _streams(self, index: int, module: nn.Module, hidden: Split[StoredBatches[Tensor]], *, final: bool) -> Streams:
        """Staged forward passes of `module`; `final` where its weights will not change, so that they advance too."""
        return Streams(
            StagedBlock(self.stream, index, module, hidden.training, keep=self.keep, final=final),
            StagedBlock(self.stream, index, module, hidden.held_out, keep=self.keep),
        )

    def _refine_linears(
        self, block: BlockState, collected: CollectedGroup, solutions: dict[str, Solution]
    ) -> dict[str, Solution]:
        assert self.refinement is not None and collected.held_out is not None
        weights = {path: solution.weight for path, solution in solutions.items()}
        targets = {
            path: collected.training.weights[path] if solution.target is None else solution.target
            for path, solution in solutions.items()
        }
        found = None
        if self.processes.is_main:  # all have the same statistics
            objective = LinearObjective(collected.training, collected.held_out)
            found = self.refinement.refine(weights, targets, objective, self.progress)
        found = self.processes.exchange(found)[0]
        assert found is not None
        refined, outcome = found
        block.training[f"refine {' '.join(solutions)}"] = outcome
        return {path: replace(solution, weight=refined[path]) for path, solution in solutions.items()}

    def _block_objective(
        self, block: BlockState, targets: Split[StoredBatches[Tensor]], batch_tokens: int, purpose: str
    ) -> BlockObjective:
        return BlockObjective(
            lambda hidden, weights: self._run(block, hidden, weights),
            self.quantized,
            targets,
            Sampling(batch_tokens, f"{self.plan.recipe.seed}:{block.index}:{purpose}"),
            self.processes,
        )

    def _run(self, block: BlockState, hidden: Tensor, weights: Weights) -> Tensor:
        assert block.module is not None
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return self.stream.run_block(block.module, block.index, hidden, weights)

    def _advance(self, module: nn.Module, index: int, hidden: StoredBatches[Tensor]) -> None:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            self.stream.advance(module, index, hidden)

    def _through(self, module: nn.Module, index: int, hidden: StoredBatches[Tensor]) -> StoredBatches[Tensor]:
        outputs = hidden.copy()
        self._advance(module, index, outputs)
        return outputs


def _slice(share: range) -> slice:
    return slice(share.start, share.stop)
