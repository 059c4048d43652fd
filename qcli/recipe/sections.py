"""The sections of a recipe that belong to no method: text, overrides, packing, evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from qcli.recipe.errors import unknown
from qcli.recipe.gates import Gates
from qcli.recipe.plugins import EXPORTS
from qcli.utils import registry
from qcli.utils.options import Options


class Calibration(Options):
    """Text that shows the method the model's usual inputs."""

    data: str = Field(
        default="wikitext2",
        min_length=1,
        description="wikitext2, c4, ptb, self (sampled from the model), a .txt/.jsonl/.parquet file, "
        "or a folder written by `qcli calibrate`",
    )
    samples: int = Field(default=128, ge=1, description="token sequences")
    seq_len: int = Field(default=2048, ge=2, description="tokens of a sequence")
    held_out: int = Field(
        default=4, ge=1, description="of these samples, for choosing the best step; used where something is trained"
    )


class Override(Options):
    """Another treatment for the layers that `match` names."""

    match: str = Field(min_length=1, description="layer names, with * ? [abc] as in file names")
    method: dict[str, JsonValue] | None = Field(
        default=None, description="what differs from the recipe's method; `name` switches it"
    )
    dense: bool = Field(default=False, description="leave these layers as they are")

    @model_validator(mode="after")
    def _method_or_dense(self) -> Override:
        if self.dense == (self.method is not None):
            raise ValueError("needs either `method: {...}` or `dense: true`")
        return self


class Pack(Options):
    """The deployable checkpoint that `qcli run` packs."""

    format: str = Field(default="qcli", description="layout of the checkpoint")
    shard_size: str = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(MB|GB)$", examples=["500MB", "5GB"], description="largest file"
    )

    requantize: Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"] | None = Field(
        default=None, description="gguf: the type for layers that none holds exactly; default: refuse them"
    )

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (known := registry.names(EXPORTS)):
            raise ValueError(unknown(f"format {name!r}", name, known))
        return name

    @property
    def shard_bytes(self) -> int:
        """`shard_size` as a number."""
        return int(self.shard_size[:-2]) * {"MB": 10**6, "GB": 10**9}[self.shard_size[-2:]]


class Eval(Options):
    """What `qcli run` measures."""

    perplexity: list[str] = Field(default=["wikitext2"], min_length=1, description="texts, as calibration.data")
    window: int | None = Field(default=None, ge=2, description="tokens of a window; default: the model's, up to 2048")
    max_windows: int | None = Field(default=None, ge=1, description="windows of each text; default: all")
    baseline: str | None = Field(default=None, description="compared with; default: the recipe's model")
    tasks: list[str] = Field(default=[], description="lm-eval tasks, as arc_easy, piqa")
    include_path: str | None = Field(default=None, description="folder of more task files")
    limit: int | None = Field(default=None, ge=1, description="questions of each task; default: all")
    fewshot: int | None = Field(default=None, ge=0, description="examples before each question; default: the task's")
    gates: Gates | None = Field(default=None, description="what fails the run with exit code 4")

    @model_validator(mode="after")
    def _gates_of_tasks(self) -> Eval:
        unasked = [] if self.gates is None else [task for task in self.gates.min_task if task not in self.tasks]
        if unasked:
            raise ValueError(f"gates.min_task names {', '.join(unasked)}, tasks does not")
        if self.gates is not None and self.gates.max_task_drop is not None and not self.tasks:
            raise ValueError("gates.max_task_drop needs tasks")
        return self
