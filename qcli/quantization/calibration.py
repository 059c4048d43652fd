"""The calibration tokens of a run: made once, kept in its folder and, where several runs share them, in a cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli.data.datasets import is_folder
from qcli.data.tokens import Tokens, calibration_tokens, content_key, require_training, text_identity
from qcli.models.manifest import versions
from qcli.models.open import Source
from qcli.quantization.plan import Plan
from qcli.recipe.recipe import Recipe
from qcli.utils.cache import Cache
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import RunFolder

_PART = "tokens"


@dataclass(frozen=True)
class CalibrationTokens:
    """What a run is calibrated on.

    Attributes:
        ids: int64 `[samples, length]`; the last ones are held out where something is trained.
        text_identity: what the text is known by in a manifest.
    """

    ids: Tensor
    text_identity: str | None

    @property
    def sha256(self) -> str:
        """Hash of the ids."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def run_tokens(
    plan: Plan, run: RunFolder, device: torch.device, cache: Cache, progress: Progress
) -> CalibrationTokens | None:
    """The calibration tokens of a run, which keeps them for the case that it is resumed; None: it needs none."""
    if not plan.calibrated:
        return None
    if (file := run.done(_PART)) is None:
        data = plan.recipe.calibration.data
        ids = recipe_tokens(plan.recipe, plan.source, device, cache, progress)
        if plan.held_out:
            require_training(Tokens(ids, data), plan.held_out)
        run.commit(_PART, {"tokens": ids}, text_identity(data))
    else:
        ids = load_file(file)["tokens"]
    return CalibrationTokens(ids, run.report(_PART))


def recipe_tokens(
    recipe: Recipe,
    source: Source,
    device: torch.device,
    cache: Cache,
    progress: Progress = silent,
    judges: int = 0,
) -> Tensor:
    """The recipe's calibration tokens, int64 `[samples + judges, length]`; the cache keeps those made before.

    See `qcli.data.tokens.calibration_tokens`.
    """
    settings = recipe.calibration
    held_out = settings.held_out if recipe.trained else 0

    def make() -> dict[str, Tensor]:
        tokens = calibration_tokens(
            settings.data,
            source,
            samples=settings.samples,
            seq_len=settings.seq_len,
            seed=recipe.seed,
            held_out=held_out,
            judges=judges,
            device=str(device),
            progress=progress,
        )
        return {"ids": tokens.ids}

    if cache.folder is None or is_folder(settings.data):
        return make()["ids"]
    key = {
        "calibration": [settings.samples, settings.seq_len, recipe.seed, held_out, judges],
        "device": device.type,
        **content_key(settings.data, source),
        **versions(),
    }
    return cache.tensors(key, make)["ids"]
