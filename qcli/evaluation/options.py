"""What an evaluation measures, and how it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcli.data.begin import Bos
from qcli.data.source import TextSource
from qcli.utils.trust import NOTHING, Trust

if TYPE_CHECKING:
    from qcli.evaluation.tasks import Tasks

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class EvalOptions:
    """What `compare` measures, and how it computes.

    Attributes:
        texts: as `evaluation_tokens` takes them; `self` is sampled from the baseline, or without one from the only
            model.
        window: tokens per window; None: 2048, or the models' context or the calibration folder's windows, if shorter.
        max_windows: of each text, use only the first ones.
        bos: whether windows, and the prompts of tasks, begin with a begin token; `auto`: as the tokenizer does.
        tasks: lm-eval tasks, for which a model is in memory as a whole.
        layers: also measure the error of every block and layer against the baseline, on the first text.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: of weights and activations: `auto` (float32, with exact matrix products), `float32`, `bfloat16`,
            `float16`.
        max_memory: a size that bounds the memory of the device (see `placement.SIZE`); None: what is free.
        trust: whether Python files of the models may run.
    """

    texts: Sequence[str | TextSource]
    window: int | None = None
    max_windows: int | None = None
    tasks: Tasks | None = None
    layers: bool = False
    device: str = "auto"
    dtype: str = "auto"
    max_memory: str | None = None
    trust: Trust = NOTHING
    bos: Bos = "auto"
