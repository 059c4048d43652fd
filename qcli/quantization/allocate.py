"""`bits: auto`: measure each layer's sensitivity, allocate bits, fall back to uniform bits if they score better.

The allocation (`solvers.knapsack`) minimizes a predicted loss (`sensitivity`), so it is put to the test: the allocation
and the best uniform recipe are both quantized, and the one with the lower KL divergence on held-out samples is shipped.
Its recipe names the chosen width of each layer; run again, it gives the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from torch import Tensor

from qcli.algorithms.solvers.knapsack import minimize_loss
from qcli.data.datasets import is_folder
from qcli.evaluation.evaluate import compare
from qcli.evaluation.options import EvalOptions
from qcli.models.manifest import AllocationReport, Manifest, TrialReport, recipe_sha256
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.calibration import recipe_tokens, require_same
from qcli.quantization.job import quantize_as_written, run_identity
from qcli.quantization.plan import make_plan, refuse_images_for_auto
from qcli.quantization.result import Result
from qcli.quantization.search_space import Assignment, SearchSpace, search_space
from qcli.quantization.sensitivity import Losses, sensitivities
from qcli.recipe.errors import Issue
from qcli.recipe.recipe import Recipe
from qcli.recipe.record import portable, write_record
from qcli.recipe.sections import Calibration
from qcli.utils import shards
from qcli.utils.cache import Cache
from qcli.utils.device import local_device, matmul_precision, resolve_dtype
from qcli.utils.distributed import process_group
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress
from qcli.utils.run_folder import Replacing, RunFolder, partial
from qcli.utils.trust import Trust

_SENSITIVITY_TOKENS = 8192  # calibration tokens that sensitivity is measured on, at most
_HELD_OUT = "held-out"


@dataclass(frozen=True)
class _Trial:
    """A recipe with every width decided, and its predicted loss, nats per token."""

    recipe: Recipe
    predicted: float
    bits_per_weight: float


def allocate(
    recipe: Recipe, out: str | Path, progress: Progress, cache: Cache, trust: Trust, existing: Replacing
) -> Result:
    """Quantize a model whose bits are chosen by measurement. See `qcli.quantization.quantize.quantize`.

    Args:
        existing: which results at `out` may be replaced.
    """
    started = time.monotonic()
    refuse_images_for_auto(recipe.calibration.data)
    source = open_source(recipe.source, trust)
    space = search_space(recipe, source.linears())
    held_out = _held_out_samples(recipe)
    calibration = recipe.calibration.model_copy(update={"samples": recipe.calibration.samples - held_out})
    device, dtype = local_device(recipe.device), resolve_dtype(recipe.dtype)
    identity = run_identity(recipe, source, device)
    with process_group(device) as processes, ExitStack() as stack:
        opened: list[RunFolder] = []  # in the main process alone, as sensitivities and scores are

        def measure_sensitivities() -> tuple[Tensor, Losses]:
            opened.append(stack.enter_context(RunFolder(Path(out), identity, recipe.resume, existing)))
            shorter = recipe.model_copy(update={"calibration": calibration})
            found = recipe_tokens(shorter, source, device, cache, progress, validation=held_out)
            require_same(opened[0], calibration.data, found.sha256)
            tokens = found.ids
            samples = max(1, min(calibration.samples, _SENSITIVITY_TOKENS // tokens.shape[1]))
            with matmul_precision(fast=False):
                stream = ModelStream(source, device=device, dtype=dtype)
                return tokens, sensitivities(space, stream, tokens[:samples], _once(opened[0]), progress)

        tokens, losses = processes.broadcast(measure_sensitivities)
        trials, folder = _trials(space, losses, calibration), partial(Path(out)) / "trials"
        for name, trial in trials.items():
            if not processes.broadcast((folder / name).exists):
                step = trial.recipe.model_copy(update={"resume": "auto"})
                quantize_as_written(step, folder / name, progress, cache, trust)
            elif opened:  # of an interrupted run
                Manifest.read(folder / name).require_weights(folder / name)

        def ship() -> tuple[str, AllocationReport, Manifest]:
            measured = _measure(trials, folder, recipe, tokens[-held_out:], progress, trust)
            shipped = min(trials, key=lambda name: (measured[name] is None, measured[name]))
            report = AllocationReport(
                target_bpw=recipe.allocation.target_bpw if recipe.allocation else None,
                shipped=shipped,
                trials={
                    name: TrialReport(trial.bits_per_weight, trial.predicted, measured[name])
                    for name, trial in trials.items()
                },
                held_out_samples=held_out,
                sensitivity={
                    name: {
                        _label(space, candidate): loss if isfinite(loss) else None for candidate, loss in enumerate(row)
                    }
                    for name, row in losses.items()
                },
            )
            seconds = time.monotonic() - started
            manifest = _publish(opened[0], folder / shipped, trials[shipped].recipe, report, seconds)
            return shipped, report, manifest

        shipped, report, manifest = processes.broadcast(ship)
    return Result(
        out=Path(out),
        plan=make_plan(trials[shipped].recipe, trust),
        layers=manifest.layers,
        vocabulary=manifest.vocabulary,
        training={what: asdict(outcome) for what, outcome in manifest.training.items()},
        tokens_sha256=manifest.calibration_tokens_sha256,
        seconds=manifest.seconds,
        peak_memory=peak_memory(device),
        dense=[name for name, why in manifest.dense.items() if why == "recipe override"],
        processes=processes.world_size,
        allocation=asdict(report),
    )


def _held_out_samples(recipe: Recipe) -> int:
    """How many samples the trials are compared on.

    Raises:
        UsageError: the recipe does not have that many.
    """
    settings = recipe.calibration
    if is_folder(settings.data):
        message = "bits: auto holds out samples, but a calibration folder is used whole: name the text it was made from"
        raise recipe.located([Issue(("calibration", "data"), message)])
    needed = settings.held_out * (2 if recipe.trained else 1)
    if settings.samples <= needed:
        message = f"bits: auto and training hold out {needed} of {settings.samples} samples: none is left"
        raise recipe.located([Issue(("calibration", "samples"), message)])
    return settings.held_out


def _once(run: RunFolder) -> Callable[[int, Callable[[], Losses]], Losses]:
    """Computes the losses of a block, or reads what an interrupted run has computed."""

    def once(block: int, compute: Callable[[], Losses]) -> Losses:
        part = f"sensitivity-{block:05d}"
        if run.done(part) is None:
            run.commit(part, {}, compute())
        return dict(run.report(part))

    return once


def _trials(space: SearchSpace, losses: Losses, calibration: Calibration) -> dict[str, _Trial]:
    """The assignment with the lowest predicted loss, and the uniform one with the lowest, where one fits."""
    names = [layer.name for layer in space.layers]
    sizes = {name: [size or 0 for size in space.sizes[name]] for name in names}
    best = minimize_loss(
        [[sum(each) for each in zip(*(losses[name] for name in tied), strict=True)] for tied in space.tied],
        [[sum(each) for each in zip(*(sizes[name] for name in tied), strict=True)] for tied in space.tied],
        space.budget,
    )
    mixed = {name: candidate for tied, candidate in zip(space.tied, best, strict=True) for name in tied}
    assignments: dict[str, Assignment] = {"allocation": mixed}
    if uniform := space.uniform():
        lowest = min(uniform, key=lambda candidate: sum(losses[name][candidate] for name in names))
        assignments["uniform"] = dict.fromkeys(names, lowest)
    if assignments.get("uniform") == mixed:
        del assignments["allocation"]

    def trial(assignment: Assignment) -> _Trial:
        recipe = space.recipe_of(assignment).model_copy(update={"calibration": calibration})
        predicted = sum(losses[name][candidate] for name, candidate in assignment.items())
        return _Trial(recipe, predicted, space.bits_per_weight(assignment))

    return {name: trial(assignment) for name, assignment in assignments.items()}


def _measure(
    trials: Mapping[str, _Trial], folder: Path, recipe: Recipe, held_out: Tensor, progress: Progress, trust: Trust
) -> dict[str, float | None]:
    """KL divergence of every trial from the recipe's model on held-out samples; None: not finite.

    Args:
        folder: of the quantized trials.
        held_out: int64 `[samples, length]`.
    """
    (folder / _HELD_OUT).mkdir(parents=True, exist_ok=True)
    shards.write_tensors(folder / _HELD_OUT / "tokens.safetensors", {"ids": held_out.clone()})
    options = EvalOptions(
        [str(folder / _HELD_OUT)],
        window=held_out.shape[1],
        device=recipe.device,
        max_memory=recipe.max_memory,
        trust=trust,
    )
    checkpoints = [str(folder / name) for name in trials]
    scores = compare(checkpoints, options, baseline=recipe.source, progress=progress)
    return {name: score.kl for name, score in zip(trials, scores, strict=True)}


def _publish(run: RunFolder, winner: Path, recipe: Recipe, report: AllocationReport, seconds: float) -> Manifest:
    """Move a trial to the run's result, with the recipe that led to it and the report in its manifest."""
    fields = portable(recipe.to_dict())
    changed = {"recipe": fields, "recipe_sha256": recipe_sha256(fields), "allocation": report, "seconds": seconds}
    manifest = write_record(Manifest.read(winner).model_copy(update=changed), winner)
    folder = run.result()
    folder.rmdir()
    winner.rename(folder)
    run.publish()
    return manifest


def _label(space: SearchSpace, candidate: int) -> str:
    """`3 bits, groups of 64`."""
    fields = space.candidates[candidate].model_dump()
    size = fields.get("group_size")
    return f"{fields['bits']} bits" + ("" if size is None else f", groups of {size}" if size > 0 else ", by row")
