"""A model that is not quantized, as a GGUF file in llama.cpp's K-quants, with importance from our statistics.

llama.cpp chooses types and codes: the weights go to it in the model's own precision. What it wrote is read back.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcli.export.gguf import llama_quantize
from qcli.export.gguf.importance import Importance
from qcli.export.model_card import model_card
from qcli.export.readback import difference, probed
from qcli.export.result import PackPlan, PackResult, Proof
from qcli.export.target import dense_config
from qcli.export.targets.gguf import GGUF
from qcli.models.card import CARD
from qcli.models.license import license_of
from qcli.models.loadable import loading_code
from qcli.models.manifest import LayerReport, Manifest, OriginalModel, recipe_sha256, require_own_checkpoint, versions
from qcli.models.native import NativeSource
from qcli.models.open import PACKED_GGUF, ModelSource, open_source
from qcli.recipe.dump import to_yaml
from qcli.recipe.record import portable_manifest
from qcli.utils import run_folder
from qcli.utils.dtypes import WEIGHT_DTYPES
from qcli.utils.errors import UnsupportedError, UsageError, VerificationError
from qcli.utils.files import write_bytes, write_json
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import Replacing, RunFolder
from qcli.utils.trust import NOTHING, Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.core.weight import Format, QuantizedWeight
    from qcli.models.families import Family, Linear
    from qcli.models.quantized import LayerStorage
    from qcli.utils.dtypes import StoredTensor

_METHOD = "llama.cpp"
_SUPERBLOCK = 256  # weights of a row that a K-quant stores together
_MAX_ERROR = 0.5  # relative squared error of a matrix; two bits have a tenth, other weights two


class Unquantized:
    """A model as export targets see it: nothing in it is quantized."""

    activations = None
    quantized: Mapping[str, LayerStorage] = {}
    vocabulary: Mapping[str, LayerStorage] = {}

    def __init__(self, source: ModelSource) -> None:
        self._source, self.path = source, source.path

    @property
    def family(self) -> Family:
        return self._source.family

    def formats(self) -> Mapping[str, Format]:
        return {}

    def linears(self) -> list[Linear]:
        return self._source.linears()

    def tensors(self) -> dict[str, StoredTensor]:
        return self._source.tensors()

    def hf_config(self) -> PreTrainedConfig:
        return self._source.hf_config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return self._source.read(names)

    def read_quantized(self, layer: str) -> QuantizedWeight:
        raise NotImplementedError


def plan_k_quants(model: str, *, type: str, statistics: Path | None = None, trust: Trust = NOTHING) -> PackPlan:
    """Check what `pack_k_quants` checks before it writes; errors as there."""
    source, target, importance = _prepared(model, type, statistics, trust)
    return PackPlan(source.path, target.name, len(source.linears()), len(source.linears()), _notes(type, importance))


def pack_k_quants(
    model: str,
    out: Path,
    *,
    type: str,
    statistics: Path | None = None,
    progress: Progress = silent,
    trust: Trust = NOTHING,
    force: bool = False,
) -> PackResult:
    """Write a GGUF file, config, tokenizer, manifest and model card to `out`.

    Args:
        model: a folder, a file or a hub id; not quantized by qcli.
        type: of `llama_quantize.TYPES`.
        statistics: folder of `qcli calibrate` on the same model; None: all inputs count alike.
        force: replace a checkpoint of qcli's that is at `out`, once the new one is complete.

    Raises:
        UsageError: `model` is a checkpoint of qcli, or `statistics` are no statistics of it.
        UnsupportedError: a package is missing, or llama.cpp does not compute the model.
        StateError: `out` exists, or an interrupted run of it has finished parts.
        VerificationError: what was written is another model.
    """
    began = time.monotonic()
    source, target, importance = _prepared(model, type, statistics, trust)
    reads = (model,) if statistics is None else (model, str(statistics))
    existing = Replacing(require_own_checkpoint, force, reads)
    run_folder.refuse_existing(out, existing)
    run_folder.refuse_interrupted(out)
    with RunFolder(out, {"pack": type}, "never", existing) as run:
        try:
            folder = run.result()
            full, packed = folder / "full-precision.gguf", folder / PACKED_GGUF
            target.write_file(Unquantized(source), full, model, progress)
            progress("quantize", 0, 1)
            moments = {} if importance is None else importance.of_tensors(target.named)
            llama_quantize.quantize(full, packed, type, moments, torch.get_num_threads())
            progress("quantize", 1, 1)
            full.unlink()
            write_json(folder / "config.json", dense_config(source))
            source.copy_companions(folder)
            written = target.open(folder, trust)
            layers = _compare(source, written, target, progress)
            result = _result(out, source, written, layers, _notes(type, importance, written))
            _record(folder, source, model, type, result, layers, importance, time.monotonic() - began)
            run.publish()
        except BaseException:
            run.remove()
            raise
    return result


def _prepared(
    model: str, type: str, statistics: Path | None, trust: Trust
) -> tuple[ModelSource, GGUF, Importance | None]:
    """Everything that can be refused before any work."""
    llama_quantize.require()
    source = open_source(model, trust)
    if isinstance(source, NativeSource):
        original = Manifest.read(source.path).source.model
        raise UsageError(
            f"{model} is quantized: {type} rounds the weights of a model that is not",
            hint=f"give the model that it was made from, {original}; or pack the checkpoint without --type",
        )
    importance = None if statistics is None else Importance(statistics, source)
    target = GGUF()
    source.companions()
    try:
        target.check(Unquantized(source))
    except UnsupportedError as problem:
        raise UnsupportedError(problem.message, hint="quantize it with `qcli quantize`") from None
    return source, target, importance


def _notes(type: str, importance: Importance | None, written: ModelSource | None = None) -> dict[str, str]:
    notes = {"type": f"{type}, by {llama_quantize.PACKAGE} {llama_quantize.require()}"}
    if importance is None:
        notes["importance"] = "none: all inputs count alike"
    else:
        record = importance.record
        notes["importance"] = f"mean squares of inputs on {record['samples']} x {record['seq_len']} tokens"
    if written is not None:
        matrices = (name for name, tensor in written.tensors().items() if len(tensor.shape) > 1)
        counts = Counter(written.stored_as(name) for name in matrices).most_common()
        notes["matrices"] = ", ".join(f"{count} {kind}" for kind, count in counts)
    return notes


def _compare(source: ModelSource, written: ModelSource, target: GGUF, progress: Progress) -> list[LayerReport]:
    """Compare every tensor; how each linear layer was stored, and with what error.

    Raises:
        VerificationError: one of them is not the model's.
    """
    names, errors = list(source.tensors()), dict[str, float]()
    for number, name in enumerate(names):
        progress("compare", number, len(names))
        expected, actual = source.read([name])[name].float(), written.read([name])[name].float()
        if expected.ndim == 1:
            close = bool((expected - actual).abs().max() <= target.tolerance(name, expected))
        else:
            errors[name] = float((expected - actual).square().sum() / expected.square().sum().clamp(min=1e-30))
            close = errors[name] <= _MAX_ERROR
        if not close:
            raise VerificationError(
                f"{name} does not read back", hint=f"try another version of {llama_quantize.PACKAGE}"
            )
    progress("compare", len(names), len(names))
    return [_report(written, linear, errors[f"{linear.name}.weight"]) for linear in source.linears()]


def _report(written: ModelSource, linear: Linear, error: float) -> LayerReport:
    layer, inputs, kind = linear.name, linear.shape[1], written.stored_as(f"{linear.name}.weight")
    bits = re.search(r"\d+", kind)
    assert bits is not None
    odd = [f"{inputs} inputs are no multiple of {_SUPERBLOCK}: {kind}"] if inputs % _SUPERBLOCK else []
    spec = {"format": "gguf", "bits": int(bits[0]), "type": kind}
    return LayerReport(layer, _METHOD, spec, written.bits_of([layer]), error, "weight", odd)


def _result(
    out: Path, source: ModelSource, written: ModelSource, layers: list[LayerReport], notes: dict[str, str]
) -> PackResult:
    maximum, kl = difference(probed(source, torch.float32), probed(written, torch.float32))
    return PackResult(
        out=out,
        format="gguf",
        files=1,
        bits_per_weight=written.bits_of(layer.name for layer in layers),
        model_bits_per_weight=written.model_bits_per_weight(),
        bytes=written.bytes(),
        rounded=sum(written.stored_as(name) not in WEIGHT_DTYPES for name in written.tensors()),
        max_logit_difference=maximum,
        kl=kl,
        notes=notes,
        proof=Proof(None, "llama.cpp wrote it; it was read back with the package gguf and transformers' converters"),
        loading=GGUF.loading,
    )


def _record(
    folder: Path,
    source: ModelSource,
    model: str,
    type: str,
    result: PackResult,
    layers: list[LayerReport],
    importance: Importance | None,
    seconds: float,
) -> None:
    """Write card and manifest, the last files."""
    record = {} if importance is None else importance.record
    recipe: dict[str, Any] = {"model": model, "method": {"name": _METHOD, "type": type}}
    if importance is not None:
        recipe["calibration"] = {key: record[key] for key in ("data", "samples", "seq_len")}
    hub = source.hub
    manifest = Manifest(
        recipe_sha256=recipe_sha256(recipe),
        versions={**versions(), llama_quantize.PACKAGE: llama_quantize.require()},
        recipe=recipe,
        source=OriginalModel(
            model if hub is None else hub.repository,
            source.fingerprint(),
            quantized_as=source.quantized_as,
            revision=None if hub is None else hub.commit,
            license=license_of(source.path),
        ),
        calibration_tokens_sha256=record.get("tokens_sha256"),
        calibration_text_identity=record.get("text_identity"),
        calibration_bos=record.get("bos"),
        seed=record.get("seed", 0),
        bits_per_weight=result.bits_per_weight,
        model_bits_per_weight=result.model_bits_per_weight,
        bytes=result.bytes,
        layers=layers,
        dense={},
        seconds=seconds,
        peak_memory=peak_memory(torch.device("cpu")),
        packed_as="gguf",
        notes=result.notes,
    )
    manifest = portable_manifest(manifest)
    loading = loading_code(GGUF.loading, source.config)
    described = model_card(
        manifest, result, loading, to_yaml(manifest.recipe), library=GGUF.hub_library, compared="the model"
    )
    write_bytes(folder / CARD, described.encode())
    manifest.write(folder)
