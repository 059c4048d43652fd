"""The recipe's transforms: fitted once, kept in the run's folder, folded into the blocks.

A fit is a part of the run like a finished block, so a resumed run folds exactly the same scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from safetensors.torch import load_file
from torch import Tensor, nn

from qcli.algorithms.training.batches import Sampling, Split
from qcli.algorithms.training.loop import Objective
from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.transform import ChannelScale
from qcli.core.weight import Format
from qcli.models.stream import ModelStream
from qcli.quantization.fold_proof import prove_folds
from qcli.quantization.folding import channel_scales, fold
from qcli.quantization.objectives import ModelObjective
from qcli.quantization.plan import Plan
from qcli.quantization.ranks import ALONE
from qcli.utils.device import linear_dtype
from qcli.utils.distributed import Processes
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunParts

TRAINED_TOKENS = 1024  # of a training step


class BlockTransforms:
    """All transforms of a run, in order.

    Args:
        fast: whether the model may use bf16 or TF32 matrix products.
        processes: that fit together.
    """

    def __init__(
        self,
        plan: Plan,
        run: RunParts,
        stream: ModelStream,
        *,
        fast: bool,
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.run, self.stream, self.fast, self.progress = plan, run, stream, fast, progress
        self.processes, self.dtype = processes, linear_dtype(fast=fast)
        self.transforms = plan.recipe.all_transforms
        if self.transforms and stream.family.discovered:
            prove_folds(stream)

    def fit_model(self, tokens: Split[Tensor]) -> None:
        """Fit the transforms that look at the whole model, which is held in memory meanwhile.

        Args:
            tokens: int64 `[samples, length]`.
        """
        for number, transform in enumerate(self.transforms):
            if transform.whole_model and self.run.done(self._part(number, 0)) is None:
                self._fit_model(number, tokens)

    def fold(
        self, block: int, module: nn.Module, twin: nn.Module, objective: Callable[[str], Objective]
    ) -> dict[str, Tensor]:
        """Fold every transform into the block and its twin.

        Args:
            module: will be quantized; weights are the original's.
            twin: the same, and stays in full precision.
            objective: judges weights of `module` by path; called with a name for the seed.

        Returns:
            The tensors of `module` that changed, by path.
        """
        scales = self._scales(block, module)
        stored = self.plan.stored_dtypes(block)
        changed: dict[str, None] = {}
        for number in range(len(self.transforms)):
            part = self._part(number, block)
            if self.run.done(part) is None:
                self._fit_block(number, block, module, scales, objective(part))
            alphas = self._fitted(number, block, len(scales))
            changed |= dict.fromkeys(fold(module, scales, alphas, stored))
            fold(twin, scales, alphas, stored)
        return {name: module.get_parameter(name) for name in changed}

    def outcomes(self, block: int) -> dict[str, Outcome]:
        """How the fits that this block was folded with went, by name of the transform."""
        reports = [self.run.report(self._part(number, block)) for number in range(len(self.transforms))]
        return {what: Outcome.from_json(outcome) for report in reports for what, outcome in report.items()}

    def _scales(self, block: int, module: nn.Module) -> list[ChannelScale]:
        return channel_scales(module, self.stream.family.folds_of(block), self.stream.config)

    def _part(self, number: int, block: int) -> str:
        """Where the run keeps what a transform has found for a block."""
        name = f"transform-{number}"
        return name if self.transforms[number].whole_model else f"{block:05d}-{name}"

    def _label(self, number: int) -> str:
        """Name of a transform in reports; a second one of the same name is told apart."""
        name = self.transforms[number].name
        again = sum(transform.name == name for transform in self.transforms[:number])
        return f"{name}-{again + 1}" if again else name

    def _fitted(self, number: int, block: int, count: int) -> list[Tensor]:
        """The alphas of the `count` scales of a block."""
        alphas = load_file(self.run.file(self._part(number, block)))
        return [alphas[_key(block, place)].to(self.stream.device) for place in range(count)]

    def _fit_block(
        self, number: int, block: int, module: nn.Module, scales: list[ChannelScale], objective: Objective
    ) -> None:
        weights = {path: self._weight(module, path) for path in self.stream.family.paths_of(block)}
        formats = {path: method.format for path, method in self.plan.methods_of(block).items()}
        alphas, outcome = self.transforms[number].fit(weights, formats, scales, objective, self.progress, self.dtype)
        named = {_key(block, place): alpha for place, alpha in enumerate(alphas)}
        self._commit(number, block, named, outcome)

    def _fit_model(self, number: int, tokens: Split[Tensor]) -> None:
        """Fit on the model as earlier transforms, which are of the whole model too, have left it."""
        blocks = [self.stream.load_block(block) for block in range(self.stream.n_blocks)]
        weights: dict[str, Tensor] = {}
        formats: dict[str, Format | None] = {}
        scales: dict[str, ChannelScale] = {}
        quantized: list[nn.Module] = []
        for block, module in enumerate(blocks):
            own = self._scales(block, module)
            for earlier in range(number):
                fold(module, own, self._fitted(earlier, block, len(own)), self.plan.stored_dtypes(block))
            methods = self.plan.methods_of(block)
            quantized += [module.get_submodule(path) for path in methods]
            paths = self.stream.family.paths_of(block)
            weights |= {f"{block}.{path}": self._weight(module, path) for path in paths}
            formats |= {f"{block}.{path}": method.format for path, method in methods.items()}
            for place, scale in enumerate(own):
                scales[_key(block, place)] = scale.within(f"{block}.")
        transform = self.transforms[number]
        objective = ModelObjective(
            self.stream,
            blocks,
            tokens,
            Sampling(TRAINED_TOKENS, f"{self.plan.recipe.seed}:{self._part(number, 0)}"),
            predictions=transform.loss == "kl",
            fast=self.fast,
            simulate=lambda: self._simulated(quantized),
            processes=self.processes,
        )
        fitted = transform.fit(weights, formats, list(scales.values()), objective, self.progress, self.dtype)
        alphas, outcome = fitted
        self._commit(number, 0, dict(zip(scales, alphas, strict=True)), outcome)

    def _commit(self, number: int, block: int, alphas: dict[str, Tensor], outcome: Outcome) -> None:
        """Keep a fit, which every process has made, until all can read it."""
        self.run.commit(self._part(number, block), alphas, {self._label(number): asdict(outcome)})
        self.processes.barrier()

    @contextmanager
    def _simulated(self, linears: list[nn.Module]) -> Iterator[None]:
        """Within: these linears see their inputs quantized, where the recipe quantizes activations."""
        activations = self.plan.recipe.activations
        with ExitStack() as hooks:
            if activations is not None:
                for linear in linears:
                    hooks.callback(activations.simulate(linear).remove)
            yield

    def _weight(self, module: nn.Module, path: str) -> Tensor:
        return self.stream.weight_of(module.get_submodule(path)).float()


def _key(block: int, place: int) -> str:
    return f"{block}.{place}"
