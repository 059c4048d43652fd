"""`bits: auto`: measure what each layer can do without, choose, and ship nothing worse than all layers alike.

The choice (`solvers.knapsack`) rests on a prediction (`sensitivity`), so it is put to the test: the allocation and
the best uniform recipe are both quantized, and the one with the lower KL divergence on held-out samples becomes the
result. Its recipe says what was chosen, layer by layer; run again, it gives the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from qcli.algorithms.solvers.knapsack import cheapest_loss
from qcli.data.datasets import is_folder
from qcli.evaluation.evaluate import compare
from qcli.evaluation.options import EvalOptions
from qcli.models.manifest import RECIPE, AllocationReport, Manifest, TrialReport
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.allocation_options import Choices, choices
from qcli.quantization.calibration import recipe_tokens
from qcli.quantization.job import quantize_as_written, run_identity
from qcli.quantization.plan import make_plan
from qcli.quantization.result import Result
from qcli.quantization.sensitivity import Losses, sensitivities
from qcli.recipe.errors import Issue
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Calibration
from qcli.utils import shards
from qcli.utils.cache import Cache
from qcli.utils.device import matmul_precision, resolve_device, resolve_dtype
from qcli.utils.files import write_bytes
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunFolder

_LEARNT_TOKENS = 8192  # that sensitivity is measured on, at most
_HELD_OUT = "held-out"


@dataclass(frozen=True)
class _Trial:
    """A recipe without anything left open, and the loss that was predicted for it, nats per token."""

    recipe: Recipe
    predicted: float
    bits_per_weight: float


def allocate(recipe: Recipe, out: str | Path, progress: Progress, cache: Cache) -> Result:
    """Quantize a model whose bits are chosen by measurement. See `qcli.quantization.quantize.quantize`."""
    started = time.monotonic()
    source = open_source(recipe.model)
    found = choices(recipe, source.linears())
    judges = _require_samples(recipe)
    fitted = recipe.calibration.model_copy(update={"samples": recipe.calibration.samples - judges})
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    with RunFolder(Path(out), run_identity(recipe, source, device), recipe.resume) as run:
        shorter = recipe.model_copy(update={"calibration": fitted})
        tokens = recipe_tokens(shorter, source, device, cache, progress, validation=judges).ids
        learnt = tokens[: max(1, min(fitted.samples, _LEARNT_TOKENS // tokens.shape[1]))]
        with matmul_precision(fast=False):
            stream = ModelStream(source, device=device, dtype=dtype)
            losses = sensitivities(found, stream, learnt, _kept(run), progress)
            del stream
        trials = _trials(found, losses, fitted)
        folder = run.path / "trials"
        (folder / _HELD_OUT).mkdir(parents=True, exist_ok=True)
        shards.write_tensors(folder / _HELD_OUT / "tokens.safetensors", {"ids": tokens[-judges:].clone()})
        for name, trial in trials.items():
            if not (folder / name).exists():
                quantize_as_written(trial.recipe.model_copy(update={"resume": "auto"}), folder / name, progress, cache)
        options = EvalOptions([str(folder / _HELD_OUT)], window=tokens.shape[1], device=recipe.device)
        checkpoints = [str(folder / name) for name in trials]
        scores = compare(checkpoints, options, baseline=recipe.model, progress=progress)
        measured = {name: score.kl for name, score in zip(trials, scores, strict=True)}
        best = min(trials, key=lambda name: (measured[name] is None, measured[name]))
        report = AllocationReport(
            target_bpw=recipe.allocation.target_bpw if recipe.allocation else None,
            shipped=best,
            trials={
                name: TrialReport(trial.bits_per_weight, trial.predicted, measured[name])
                for name, trial in trials.items()
            },
            held_out_samples=judges,
            sensitivity={
                name: {_label(found, option): loss if isfinite(loss) else None for option, loss in enumerate(row)}
                for name, row in losses.items()
            },
        )
        final = trials[best].recipe
        manifest = _published(run, folder / best, final, out, report, time.monotonic() - started)
    return Result(
        out=Path(out),
        plan=make_plan(final),
        layers=manifest.layers,
        training={what: asdict(outcome) for what, outcome in manifest.training.items()},
        tokens_sha256=manifest.calibration_tokens_sha256,
        seconds=manifest.seconds,
        peak_memory=peak_memory(device),
        dense=[name for name, why in manifest.dense.items() if why == "recipe override"],
        allocation=asdict(report),
    )


def _require_samples(recipe: Recipe) -> int:
    """How many samples judge; the error if they cannot be spared."""
    settings = recipe.calibration
    if is_folder(settings.data):
        message = "bits: auto holds samples back, a folder's are taken whole: name the text it was made of"
        raise recipe.located([Issue(("calibration", "data"), message)])
    needed = settings.held_out * (2 if recipe.trained else 1)
    if settings.samples <= needed:
        message = f"bits: auto and training hold out {needed} of {settings.samples} samples: none is left"
        raise recipe.located([Issue(("calibration", "samples"), message)])
    return settings.held_out


def _kept(run: RunFolder) -> Callable[[int, Callable[[], Losses]], Losses]:
    """Losses of a block, found once a run."""

    def kept(block: int, find: Callable[[], Losses]) -> Losses:
        part = f"sensitivity-{block:05d}"
        if run.done(part) is None:
            run.commit(part, {}, find())
        return dict(run.report(part))

    return kept


def _trials(found: Choices, losses: Losses, fitted: Calibration) -> dict[str, _Trial]:
    """The allocation of least predicted loss, and the uniform recipe of least, where there is one."""
    names = [layer.name for layer in found.layers]
    costs = {name: [bits or 0 for bits in found.stored[name]] for name in names}
    picked = cheapest_loss(
        [[sum(each) for each in zip(*(losses[name] for name in unit), strict=True)] for unit in found.units],
        [[sum(each) for each in zip(*(costs[name] for name in unit), strict=True)] for unit in found.units],
        found.budget,
    )
    chosen = {name: option for unit, option in zip(found.units, picked, strict=True) for name in unit}
    wanted: dict[str, Mapping[str, int]] = {"allocation": chosen}
    if alike := found.uniform():
        best = min(alike, key=lambda option: sum(losses[name][option] for name in names))
        wanted["uniform"] = dict.fromkeys(names, best)
    if len(wanted) == 2 and wanted["uniform"] == wanted["allocation"]:
        del wanted["allocation"]

    def trial(chosen: Mapping[str, int]) -> _Trial:
        recipe = found.resolved(chosen)
        predicted = sum(losses[name][option] for name, option in chosen.items())
        return _Trial(recipe.model_copy(update={"calibration": fitted}), predicted, found.bits_per_weight(chosen))

    return {name: trial(chosen) for name, chosen in wanted.items()}


def _published(
    run: RunFolder, winner: Path, recipe: Recipe, out: str | Path, report: AllocationReport, seconds: float
) -> Manifest:
    """Move a trial to the run's result, with its own name in its recipe and the report in its manifest."""
    changed = {"recipe": recipe.to_dict(out), "allocation": report, "seconds": seconds}
    manifest = Manifest.read(winner).model_copy(update=changed)
    write_bytes(winner / RECIPE, recipe.to_yaml(out=out).encode())
    manifest.write(winner)
    folder = run.result()
    folder.rmdir()
    winner.rename(folder)
    run.publish()
    return manifest


def _label(found: Choices, option: int) -> str:
    """`3 bits, groups of 64`."""
    fields = found.options[option].model_dump()
    size = fields.get("group_size")
    return f"{fields['bits']} bits" + ("" if size is None else f", groups of {size}" if size > 0 else ", by row")
