"""The finished checkpoint of a run: shards, config, companions, recipe, and the manifest last of all."""

from __future__ import annotations

from collections.abc import Mapping

from qcli.algorithms.training.outcome import Outcome
from qcli.models.license import license_of
from qcli.models.manifest import Manifest, OriginalModel, recipe_sha256, versions
from qcli.models.native import guard_extent, guard_name, quantization_config, with_guard
from qcli.quantization.block_parts import BlockParts
from qcli.quantization.calibration import CalibrationTokens
from qcli.quantization.result import Result
from qcli.recipe.record import portable, write_record
from qcli.utils import shards
from qcli.utils.files import write_json
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunFolder
from qcli.utils.safetensors import Extent, read_header


def publish_checkpoint(
    result: Result, parts: BlockParts, run: RunFolder, tokens: CalibrationTokens | None, progress: Progress
) -> None:
    """Assemble the checkpoint in the run's folder and give it its name in one step."""
    plan = result.plan
    folder = run.result()
    progress("write", 0, 1)
    stored: list[Mapping[str, Extent]] = [
        {
            stored: own
            for name, extent in read_header(run.file(part)).items()
            for stored, own in plan.source.as_on_disk(name, extent, extent.rows).items()
        }
        for part in parts.names()
    ]
    guard = guard_extent(run.file(parts.names()[-1]))
    shards.join(with_guard(stored, plan.source.on_disk(guard_name(plan.formats)), guard), folder, shards.SHARD_SIZE)
    config = plan.source.config_to_write()
    config["quantization_config"] = quantization_config(
        plan.layers,
        plan.formats,
        plan.recipe.activations,
        plan.vocabulary_storage,
        outside={name.removesuffix(".weight") for name in plan.source.tensors()} - plan.formats.keys(),
    )
    write_json(folder / "config.json", config)
    plan.source.copy_companions(folder)
    recipe = portable(plan.recipe.to_dict())
    manifest = Manifest(
        recipe_sha256=recipe_sha256(recipe),
        versions=versions(),
        recipe=recipe,
        source=OriginalModel(
            model=plan.recipe.model if (hub := plan.source.hub) is None else hub.repository,
            fingerprint=plan.source.fingerprint(),
            quantized_as=plan.source.quantized_as,
            revision=None if hub is None else hub.commit,
            license=license_of(plan.source.path),
        ),
        calibration_tokens_sha256=result.tokens_sha256,
        calibration_text_identity=None if tokens is None else tokens.text_identity,
        calibration_bos=None if tokens is None else tokens.bos,
        seed=plan.recipe.seed,
        bits_per_weight=plan.bits_per_weight,
        model_bits_per_weight=plan.model_bits_per_weight,
        bytes=plan.bytes,
        layers=result.layers,
        training={what: Outcome.from_json(outcome) for what, outcome in result.training.items()},
        unscaled=plan.unscaled,
        dense=dict.fromkeys(result.dense, "recipe override")
        | dict.fromkeys(plan.dense_outside, "not a linear layer of a block"),
        seconds=result.seconds,
        peak_memory=result.peak_memory,
    )
    if result.vocabulary:
        manifest = manifest.model_copy(update={"vocabulary": result.vocabulary})
    if facts := result.facts:
        manifest = manifest.model_copy(update={"facts": facts})
    if result.processes > 1:
        manifest = manifest.model_copy(update={"processes": result.processes})
    if tokens is not None and tokens.images_sha256 is not None:
        manifest = manifest.model_copy(update={"calibration_images_sha256": tokens.images_sha256})
    write_record(manifest, folder)
    run.publish()
    progress("write", 1, 1)
