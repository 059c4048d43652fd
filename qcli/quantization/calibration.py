"""The calibration samples of a run. Token windows are made once, kept in its folder and, where several runs share them,
in a cache; samples of text and images are made anew where they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from qcli.data.identity import text_identity
from qcli.data.image_samples import ImageSamples, Samples, image_samples
from qcli.data.source import Data, label
from qcli.data.tokens import TokenRequest, Tokens, calibration_tokens, require_training_samples
from qcli.models.open import ModelSource
from qcli.quantization.plan import Plan
from qcli.recipe.recipe import Recipe
from qcli.utils.cache import Cache
from qcli.utils.errors import StateError
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import RunFolder

_PART = "tokens"


@dataclass(frozen=True)
class CalibrationTokens:
    """What a run is calibrated on.

    Attributes:
        samples: the last ones are held out where something is trained.
        text_identity: what the text is known by in a manifest.
        bos: whether samples begin with a begin token; None: as the model's processor has it.
    """

    samples: Samples
    text_identity: str | None
    bos: bool | None

    @property
    def sha256(self) -> str:
        """Hash of the ids, or of all that the model's processor makes of text and images."""
        if isinstance(self.samples, ImageSamples):
            return self.samples.sha256
        return hashlib.sha256(self.samples.numpy().tobytes()).hexdigest()

    @property
    def images_sha256(self) -> str | None:
        """Hash of the hashes of the images; None: there are none."""
        return self.samples.images_sha256 if isinstance(self.samples, ImageSamples) else None


def run_tokens(
    plan: Plan, run: RunFolder, device: torch.device, cache: Cache, progress: Progress
) -> CalibrationTokens | None:
    """The calibration tokens of a run, which keeps them for the case that it is resumed; None: it needs none."""
    if not plan.calibrated:
        return None
    if plan.sees_images:
        return _with_images(plan, run)
    if (file := run.done(_PART)) is None:
        tokens = recipe_tokens(plan.recipe, plan.source, device, cache, progress)
        if plan.held_out:
            require_training_samples(tokens, plan.held_out)
        ids = tokens.ids
        run.commit(
            _PART, {"tokens": ids}, {"text_identity": text_identity(tokens.data, calibration=True), "bos": tokens.bos}
        )
    else:
        ids = load_file(file)["tokens"]
    return CalibrationTokens(ids, **run.report(_PART))


def _with_images(plan: Plan, run: RunFolder) -> CalibrationTokens:
    """Samples of text and images, which are the same whenever a run is resumed.

    Raises:
        UsageError, UnsupportedError: as `image_samples`.
        StateError: an interrupted run had others.
    """
    recipe, text = plan.recipe, plan.recipe.calibration
    samples = image_samples(label(text.data), plan.source, samples=text.samples, seq_len=text.seq_len, seed=recipe.seed)
    report = require_same(run, text.data, samples.sha256, {"text_identity": text_identity(text.data, calibration=True)})
    return CalibrationTokens(samples, report["text_identity"], None)


def require_same(run: RunFolder, data: Data, sha256: str, report: dict[str, Any] | None = None) -> dict[str, Any]:
    """Note what a run is calibrated on where the samples themselves are not kept.

    Args:
        sha256: of the samples.
        report: more to note.

    Returns:
        What was noted when the run began.

    Raises:
        StateError: the samples were others then.
    """
    if run.done(_PART) is None:
        run.commit(_PART, {}, {**(report or {}), "sha256": sha256})
    noted: dict[str, Any] = run.report(_PART)
    if noted["sha256"] != sha256:
        raise StateError(
            f"{label(data)} gives other samples than when the run began", hint=f"remove {run.path} to start over"
        )
    return noted


def recipe_tokens(
    recipe: Recipe,
    source: ModelSource,
    device: torch.device,
    cache: Cache,
    progress: Progress = silent,
    *,
    validation: int = 0,
) -> Tokens:
    """The recipe's calibration samples, and behind them `validation` more; see `calibration_tokens`.

    Samples are only held out from the others where something is trained.
    """
    text = recipe.calibration
    held_out = text.held_out if recipe.trained else 0
    request = TokenRequest(text.data, text.samples, text.seq_len, recipe.seed, held_out, validation, recipe.bos)
    return calibration_tokens(request, source, device=device, cache=cache, progress=progress)
