"""Sections of a recipe: calibration text, overrides, packing and evaluation."""

from __future__ import annotations

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from qcli.data.default_text import AUTO, DEFAULT
from qcli.data.names import FILES, set_names
from qcli.recipe.errors import unknown
from qcli.recipe.gates import Gates
from qcli.recipe.plugins import EXPORTS
from qcli.recipe.texts import AnyText, SingleText
from qcli.utils import registry
from qcli.utils.options import Options, Place


class Text(Options):
    """Text to fit something to."""

    data: AnyText = Field(
        default=AUTO,
        description=f"{', '.join(set_names())}, `org/name` of a data set on the hub, self (sampled from the model), a "
        f"{FILES} file, a folder written by `qcli calibrate`, or auto: {DEFAULT}; or a mapping that says more of a "
        "text; or a list of such, which share the samples by weight",
    )
    samples: int = Field(default=128, ge=1, description="number of sequences")
    seq_len: int = Field(default=2048, ge=2, description="tokens per sequence")
    held_out: int = Field(
        default=4, ge=1, description="samples held out to pick the best step, where anything is trained"
    )


class Calibration(Text):
    """Calibration text."""

    all_experts: bool = Field(
        default=False, description="of a mixture of experts: all tokens count for all experts, wherever they are routed"
    )
    expert_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens that an expert's statistics need; the mean of all experts makes up for missing ones; "
        "default: the number of its inputs",
    )


class Override(Options):
    """Settings for the layers whose names match a pattern."""

    match: str = Field(min_length=1, description="pattern of layer names, with * ? [abc] as for file names")
    method: dict[str, JsonValue] | None = Field(
        default=None, description="options that differ from the recipe's method; `name` selects another method"
    )
    dense: bool = Field(default=False, description="leave these layers unquantized")

    @model_validator(mode="after")
    def _method_or_dense(self) -> Override:
        if self.dense == (self.method is not None):
            raise ValueError("needs either `method: {...}` or `dense: true`")
        return self


class Pack(Options):
    """The deployable checkpoint that `qcli run` writes."""

    format: str = Field(default="qcli", description="layout of the checkpoint")
    shard_size: str = Field(
        default="5GB", pattern=r"^[1-9][0-9]*(MB|GB)$", examples=["500MB", "5GB"], description="maximum size of a file"
    )
    requantize: str | None = Field(
        default=None, description="gguf: type for layers that no GGUF type holds exactly; default: refuse them"
    )
    allow_refused: bool = Field(
        default=False, description="write also what an engine that the format is meant for does not load"
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in (known := registry.names(EXPORTS)):
            raise ValueError(unknown(f"format {name!r}", name, known))
        return name

    @field_validator("requantize")
    @classmethod
    def _known_type(cls, type: str | None, info: ValidationInfo) -> str | None:
        if type is None or "format" not in info.data:
            return type
        format = info.data["format"]
        types: tuple[str, ...] = registry.load(EXPORTS, format).requantize_types
        if not types:
            raise ValueError(f"format {format} cannot requantize layers")
        if type not in types:
            raise ValueError(unknown(f"type {type!r}", type, types))
        return type

    @property
    def shard_bytes(self) -> int:
        """`shard_size` as a number."""
        return int(self.shard_size[:-2]) * {"MB": 10**6, "GB": 10**9}[self.shard_size[-2:]]


class Eval(Options):
    """The evaluation of `qcli run`."""

    perplexity: list[SingleText] = Field(
        default=[AUTO], min_length=1, description="texts, named as in calibration.data, each scored on its own"
    )
    window: int | None = Field(
        default=None, ge=2, description="tokens per window; default: the model's context length, up to 2048"
    )
    max_windows: int | None = Field(default=None, ge=1, description="windows per text; default: all")
    baseline: Place | None = Field(default=None, description="model to compare with; default: the recipe's")
    tasks: list[str] = Field(default=[], description="lm-eval tasks, such as arc_easy and piqa")
    include_path: Place | None = Field(default=None, description="folder with additional task files")
    limit: int | None = Field(default=None, ge=1, description="questions per task; default: all")
    fewshot: int | None = Field(default=None, ge=0, description="few-shot examples per question; default: the task's")
    apply_chat_template: bool = Field(
        default=False, description="put the questions of tasks into the model's chat template"
    )
    task_batch_size: int = Field(default=8, ge=1, description="questions of tasks that run together")
    gates: Gates | None = Field(default=None, description="bounds that fail the run with exit code 4")

    @model_validator(mode="after")
    def _gates_of_tasks(self) -> Eval:
        missing = [] if self.gates is None else [task for task in self.gates.min_task if task not in self.tasks]
        if missing:
            raise ValueError(f"gates.min_task names {', '.join(missing)}, tasks does not")
        if self.gates is not None and self.gates.max_task_drop is not None and not self.tasks:
            raise ValueError("gates.max_task_drop needs tasks")
        return self
