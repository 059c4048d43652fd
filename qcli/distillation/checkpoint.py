"""The distilled checkpoint: the student's, with new codes and tables, a new recipe and a longer manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcli.distillation.job import DistillationJob
from qcli.distillation.plots import plot_training
from qcli.distillation.result import DistillationResult
from qcli.distillation.student import StoredTensors
from qcli.models.facts import mean_facts
from qcli.models.manifest import DistillationReport, LayerReport, Manifest
from qcli.recipe.recipe import Recipe
from qcli.recipe.record import write_record
from qcli.utils import shards
from qcli.utils.files import write_json
from qcli.utils.run_folder import RunFolder
from qcli.utils.safetensors import read_header

_WEIGHTS = "weights"


def publish_checkpoint(
    job: DistillationJob,
    recipe: Recipe,
    trained: StoredTensors,
    result: DistillationResult,
    text: Mapping[str, Any],
    run: RunFolder,
) -> None:
    """Assemble the checkpoint in the run's folder, the manifest last, and give it its name in one step.

    Args:
        trained: stored tensors that replace the student's.
        text: `text_identity` and `bos` of what it was trained on.
    """
    run.commit(_WEIGHTS, trained)
    folder, header = run.result(), read_header(run.file(_WEIGHTS))
    shards.join(job.student.parts_to_write(header), folder, shards.SHARD_SIZE)
    write_json(folder / "config.json", job.student.config_to_write())
    job.student.copy_companions(folder)
    if result.plot is not None:
        plot_training(result.outcome, result.measure, result.blocks, folder / result.plot)
    manifest = Manifest.read(Path(result.student))
    fields = manifest.recipe | {"distill": job.options.model_dump(mode="json", exclude_none=True)}
    report = DistillationReport(
        teacher=recipe.source,
        text=recipe.distill_text.model_dump(mode="json"),
        text_identity=text["text_identity"],
        bos=text["bos"],
        tokens_sha256=hashlib.sha256(job.tokens.numpy().tobytes()).hexdigest(),
        seed=recipe.seed,
        measure=result.measure,
        outcome=result.outcome,
        blocks=result.blocks,
        seconds=result.seconds,
        peak_memory=result.peak_memory,
    )
    changed: dict[str, Any] = {"recipe": fields, "distilled": [*manifest.distilled, report]}
    layers = [_remeasured(layer, job, trained) for layer in manifest.layers]
    if facts := mean_facts(layers, {name: storage.shape for name, storage in job.student.quantized.items()}):
        changed |= {"layers": layers, "facts": facts}
    write_record(manifest.model_copy(update=changed), folder)
    run.publish()


def _remeasured(layer: LayerReport, job: DistillationJob, trained: StoredTensors) -> LayerReport:
    """The report with the facts of the trained weight; codes have changed."""
    storage = job.student.quantized[layer.name]
    if not layer.facts or not storage.stored(layer.name).keys() <= trained.keys():
        return layer
    return replace(layer, facts=storage.format.facts(storage.restore(layer.name, trained)))
