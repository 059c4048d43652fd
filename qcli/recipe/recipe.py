"""The recipe: one frozen record of everything a user asks for, validated as a whole before any work starts.

No torch here: the errors of a recipe are reported within a second, all at once, each with its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method
from qcli.algorithms.refine import Refine
from qcli.algorithms.transform import Transform
from qcli.core.activations import Activations
from qcli.data.begin import Bos
from qcli.data.datasets import is_folder
from qcli.recipe.allocation import Allocation, allocation_of
from qcli.recipe.distillation import Distillation
from qcli.recipe.dump import to_yaml
from qcli.recipe.errors import Issue, invalid, issues
from qcli.recipe.origins import Origins
from qcli.recipe.overrides import name_alone, overridden, override_problems
from qcli.recipe.plugins import build_method, method_from, named_options, transform_from
from qcli.recipe.sections import Calibration, Eval, Override, Pack, Text
from qcli.recipe.vocabulary import Head, VocabularyLayer
from qcli.recipe.yaml import KeyPath, dotted
from qcli.utils.errors import UsageError
from qcli.utils.options import Options, Place
from qcli.utils.placement import SIZE

if TYPE_CHECKING:
    from typing import Self


AnyMethod = Annotated[InstanceOf[Method], BeforeValidator(method_from), PlainSerializer(named_options)]
AnyTransform = Annotated[InstanceOf[Transform], BeforeValidator(transform_from), PlainSerializer(named_options)]


class Recipe(Options):
    """Everything a run depends on.

    `Recipe.model_validate` takes plain data, in which methods and transforms are mappings with a `name`; `load_recipe`
    reads it from a file, `--set` and flags. Errors are one `ValidationError` in words for users. The validation's
    context may hold the `origins` of the values, to which errors about a model refer later.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # the messages quote it

    model: Place = Field(min_length=1, description="hub id, folder or .gguf file")
    revision: str | None = Field(
        default=None,
        pattern=r"^[\w./-]+$",
        description="branch, tag or commit of a hub model; default: the main branch",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="random seed")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        examples=["auto", "cpu", "cuda:0"],
        description="auto, cpu, cuda or cuda:N",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of activations and dense weights during computation"
    )
    deterministic: bool = Field(
        default=True, description="on a GPU, only algorithms that give the same bytes at every run; a CPU has no others"
    )
    bos: Bos = Field(
        default="auto",
        description="whether windows of text begin with a begin token, for calibration, distillation and evaluation; "
        "auto: as the tokenizer does",
    )
    max_memory: str | None = Field(
        default=None,
        pattern=SIZE,
        examples=["8GB", "7.5GiB"],
        description="memory of the device that may be used; default: what is free",
    )
    out: Place | None = Field(default=None, min_length=1, description="output folder")
    resume: Literal["auto", "required", "never"] = Field(
        default="auto", description="resume an interrupted run if there is one, fail without one, or start over"
    )
    calibration: Calibration = Calibration()
    method: AnyMethod = Field(default_factory=lambda: build_method({}))
    allocation: Annotated[SkipJsonSchema[Allocation | None], BeforeValidator(allocation_of)] = Field(
        default=None,
        validation_alias="method",  # both are read from `method: {bits: auto, ...}`
    )
    transforms: list[AnyTransform] = Field(
        default=[], description="function-preserving rewrites of the model before the method, in this order"
    )
    low_rank: LowRankCompensation | None = Field(
        default=None, description="low-rank compensation: a product of two thin matrices added to each quantized weight"
    )
    refine: Refine | None = Field(default=None, description="gradient-based reconstruction after the method")
    lm_head: Head | None = Field(
        default=None, description="quantization of the head; where it shares the embedding's weights, of both"
    )
    embeddings: VocabularyLayer | None = Field(
        default=None, description="quantization of the token embedding; where the head shares its weights, of both"
    )
    activations: Activations | None = Field(
        default=None, description="simulated quantization of the inputs of quantized layers"
    )
    distill: Distillation | None = Field(default=None, description="knowledge distillation from the original model")
    overrides: list[Override] = Field(
        default=[], description="per-layer settings; the first match applies, and each must match a layer"
    )
    pack: Pack | None = None
    eval: Eval | None = None

    _origins: Origins = PrivateAttr(default_factory=Origins)

    def model_post_init(self, context: Any, /) -> None:
        if context is not None:
            self._origins = context["origins"]

    @property
    def source(self) -> str:
        """The model as it is opened: at its revision, if the recipe has one."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @model_validator(mode="wrap")
    @classmethod
    def _worded(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Word all errors, and add those of overrides, which are checked even where the method itself is invalid."""
        try:
            recipe = validate(data)
        except ValidationError as error:
            given = data if isinstance(data, dict) else {}
            problems = issues(error, cls)
            problems += override_problems(name_alone(given.get("method")), given.get("overrides"))
        else:
            problems = override_problems(named_options(recipe.method), recipe.overrides)
        if problems:
            raise invalid(cls.__name__, problems)
        return recipe

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse contradictions between sections that are valid each on their own."""
        problems = [*self._missing_samples(), *self._late_transforms()]
        if problems:
            raise invalid("Recipe", problems)
        return self

    def _missing_samples(self) -> Iterator[Issue]:
        texts: dict[str, Text] = {"calibration": self.calibration} if self.trained else {}
        if self.distill is not None:
            texts["distill" if self.distill.samples is not None else "calibration"] = self.distill_text
        for section, text in texts.items():
            if text.samples <= text.held_out and not is_folder(text.data):  # a folder has as many as it has
                more = self._flag((section, "samples"), text.held_out + 1)
                fewer = f", or --set calibration.held_out={text.samples - 1}" if text.samples > 1 else ""
                yield Issue(
                    (section, "samples"),
                    f"training holds out {text.held_out} of {text.samples} samples: none is left; use {more} or more"
                    f"{fewer}",
                )

    def _flag(self, path: KeyPath, value: int) -> str:
        """`--samples 5` where a flag has set the value at `path`, else `--set calibration.samples=5`."""
        origin = self.origin(path)
        flag = origin.startswith("--") and not origin.startswith("--set ")
        return f"{origin} {value}" if flag else f"--set {dotted(path)}={value}"

    def _late_transforms(self) -> Iterator[Issue]:
        after_blockwise = False
        for path, transform in self.transforms_by_path():
            if after_blockwise and transform.whole_model:
                message = "is trained on the whole model, which transforms block by block have not changed yet"
                yield Issue(path, f"{message}: name it before them")
            after_blockwise |= not transform.whole_model

    @property
    def all_transforms(self) -> list[Transform]:
        """The recipe's transforms, then those of its method."""
        return [*self.transforms, *self.method.transforms]

    def transforms_by_path(self) -> list[tuple[KeyPath, Transform]]:
        """`all_transforms`, each with the key that sets it."""
        own: list[tuple[KeyPath, Transform]] = [(("transforms", i), step) for i, step in enumerate(self.transforms)]
        return own + [(("method",), step) for step in self.method.transforms]

    @property
    def refinement(self) -> Refine | None:
        """The recipe's reconstruction, or that of its method."""
        return self.refine or self.method.refine

    @property
    def trained(self) -> bool:
        """Whether anything is trained by gradient, which takes held-out samples."""
        return self.refinement is not None or bool(self.all_transforms)

    @property
    def distill_text(self) -> Text:
        """The text that distillation trains on: the calibration's, but for what `distill` sets itself."""
        options = self.distill or Distillation()
        own = {"data": options.data, "samples": options.samples, "seq_len": options.seq_len}
        shared = {name: getattr(self.calibration, name) for name in Text.model_fields}
        return Text(**shared | {name: value for name, value in own.items() if value is not None})

    def matching_overrides(self, layer: str) -> list[int]:
        """Indices of the overrides that match a layer's name; the first one applies."""
        return [i for i, rule in enumerate(self.overrides) if fnmatchcase(layer, rule.match)]

    def override_methods(self) -> list[Method | None]:
        """The full method of each override; None where it says `dense`."""
        base = named_options(self.method)
        return [None if rule.method is None else build_method(overridden(base, rule.method)) for rule in self.overrides]

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path` came from, as in `recipe.yaml:6:10`, `--bits` or `default`."""
        return self._origins.of(path)

    @property
    def has_file(self) -> bool:
        """Whether some of its values came from a file."""
        return self._origins.source is not None

    def located(self, problems: Sequence[Issue], hint: str | None = None) -> UsageError:
        """Problems as one error, each with its place in the recipe."""
        return self._origins.error(problems, hint=hint)

    def to_dict(self) -> dict[str, Any]:
        """All values as plain data, without those that are None; `model_validate` makes an equal recipe of it."""
        data = self.model_dump(mode="json", exclude_none=True, exclude={"allocation"})
        if self.allocation is not None:
            data["method"] |= self.allocation.options()
        return {name: data[name] for name in Recipe.model_fields if name in data}

    def to_yaml(self, *, origins: bool = False) -> str:
        """`to_dict` as YAML; with `origins`, that of each value is a comment."""
        return to_yaml(self.to_dict(), self._origins.of) if origins else to_yaml(self.to_dict())

    def fingerprint_fields(self) -> dict[str, Any]:
        """The values that decide the bytes of the quantized model."""
        decisive = {*Recipe.model_fields} - {
            "device",
            "deterministic",
            "max_memory",
            "out",
            "resume",
            "distill",
            "pack",
            "eval",
        }
        return {name: value for name, value in self.to_dict().items() if name in decisive}
