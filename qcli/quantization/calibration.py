"""The calibration tokens of a run: made once, kept in its folder and, where several runs share them, in a cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli.data.identity import text_identity
from qcli.data.tokens import TokenRequest, Tokens, calibration_tokens, require_training_samples
from qcli.models.open import ModelSource
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
        bos: whether samples begin with a begin token.
    """

    ids: Tensor
    text_identity: str | None
    bos: bool

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
        tokens = recipe_tokens(plan.recipe, plan.source, device, cache, progress)
        if plan.held_out:
            require_training_samples(tokens, plan.held_out)
        ids = tokens.ids
        run.commit(_PART, {"tokens": ids}, {"text_identity": text_identity(tokens.data), "bos": tokens.bos})
    else:
        ids = load_file(file)["tokens"]
    return CalibrationTokens(ids, **run.report(_PART))


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
