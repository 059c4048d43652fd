"""The main verb: read a model block by block, choose codes, write a checkpoint that loads."""

from __future__ import annotations

from pathlib import Path

from qcli.quantization.job import quantize_as_written, replacing
from qcli.quantization.result import Result
from qcli.recipe.recipe import Recipe
from qcli.utils.cache import Cache
from qcli.utils.determinism import deterministic
from qcli.utils.device import local_device
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust


def quantize(
    recipe: Recipe,
    out: str | Path,
    progress: Progress = silent,
    cache: Cache | None = None,
    *,
    trust: Trust = NOTHING,
    force: bool = False,
) -> Result:
    """Quantize a model as the recipe says; the folder `out` appears complete or not at all.

    Interrupted, it leaves `OUT.partial`; the same call continues there and gives the same bytes.

    Args:
        cache: keeps the calibration tokens for other runs on the same text.
        force: replace a checkpoint of qcli's that is at `out`, once the new one is complete.

    Raises:
        UsageError: the recipe does not fit the model, or the data is not usable.
        StateError: the output exists or belongs to another run.
        ResourceError: no space, or too little memory.
        UnsupportedError: an operation on the GPU has no deterministic algorithm, which the recipe asks for.
    """
    with deterministic(local_device(recipe.device), wanted=recipe.deterministic):
        existing = replacing(recipe, force)
        if recipe.allocation is None:
            return quantize_as_written(recipe, out, progress, cache or Cache(None), trust, existing)
        from qcli.quantization.allocate import allocate  # with evaluation, which other recipes do not need here

        return allocate(recipe, out, progress, cache or Cache(None), trust, existing)
