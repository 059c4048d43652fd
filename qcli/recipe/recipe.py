"""What the user wants: one frozen record, checked as a whole before any work starts.

No torch here: every error of a recipe is told within a second, all of them at once, each with its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd
from pathlib import Path
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
from qcli.recipe.allocation import Allocation, allocation_of
from qcli.recipe.distillation import Distillation
from qcli.recipe.dump import to_yaml
from qcli.recipe.errors import Issue, Origins, invalid, issues
from qcli.recipe.plugins import (
    DEFAULT_METHOD,
    METHODS,
    build_method,
    derived,
    method_from,
    named_options,
    transform_from,
)
from qcli.recipe.sections import Calibration, Eval, Override, Pack
from qcli.recipe.yaml import KeyPath
from qcli.utils import registry
from qcli.utils.errors import UsageError
from qcli.utils.options import Options

if TYPE_CHECKING:
    from typing import Self

    from qcli.models.families import Linear

AnyMethod = Annotated[InstanceOf[Method], BeforeValidator(method_from), PlainSerializer(named_options)]
AnyTransform = Annotated[InstanceOf[Transform], BeforeValidator(transform_from), PlainSerializer(named_options)]


class Recipe(Options):
    """Everything a run depends on; `load_recipe` makes it from a file, `--set` and flags."""

    model_config = ConfigDict(hide_input_in_errors=True)  # it stands in the messages

    model: str = Field(min_length=1, description="hub id, folder or .gguf file")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of every random choice")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        examples=["auto", "cpu", "cuda:0"],
        description="auto, cpu, cuda or cuda:N",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of activations and dense weights while computing"
    )
    out: str | None = Field(default=None, min_length=1, description="folder of the result")
    resume: Literal["auto", "required", "never"] = Field(
        default="auto", description="continue an interrupted run: if there is one, only if, never"
    )
    calibration: Calibration = Calibration()
    method: AnyMethod = Field(default_factory=lambda: build_method({}))
    allocation: Annotated[SkipJsonSchema[Allocation | None], BeforeValidator(allocation_of)] = Field(
        default=None,
        validation_alias="method",  # `method: {bits: auto, ...}` says both
    )
    transforms: list[AnyTransform] = Field(
        default=[], description="rewrites that leave the model's function as it is, before the method, in this order"
    )
    low_rank: LowRankCompensation | None = Field(
        default=None, description="a product of two thin matrices beside each quantized weight"
    )
    refine: Refine | None = Field(default=None, description="reconstruction by gradient after the method")
    activations: Activations | None = Field(
        default=None, description="simulated quantization of what quantized layers read"
    )
    distill: Distillation | None = Field(default=None, description="training of the whole model against the original")
    overrides: list[Override] = Field(default=[], description="first match wins; each must match a layer")
    pack: Pack | None = None
    eval: Eval | None = None

    _origins: Origins = PrivateAttr(default_factory=Origins)

    def model_post_init(self, context: Any, /) -> None:
        """Take the `origins` of the values from the context of the validation, if it has any."""
        if context is not None:
            self._origins = context["origins"]

    @model_validator(mode="wrap")
    @classmethod
    def _worded(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Everything that is wrong at once, in a recipe's words: overrides are checked even where the method fails."""
        try:
            recipe = validate(data)
        except ValidationError as error:
            given = data if isinstance(data, dict) else {}
            problems = [
                *issues(error, cls),
                *_override_problems(_name_alone(given.get("method")), given.get("overrides")),
            ]
        else:
            problems = _override_problems(named_options(recipe.method), recipe.overrides)
        if problems:
            raise invalid(cls.__name__, problems)
        return recipe

    @property
    def all_transforms(self) -> list[Transform]:
        """The recipe's own, and what the method begins with."""
        return [*self.transforms, *self.method.transforms]

    @property
    def refinement(self) -> Refine | None:
        """The recipe's own, or what the method ends with."""
        return self.refine or self.method.refine

    @property
    def trained(self) -> bool:
        """Whether anything is trained by gradient, which takes held-out samples."""
        return self.refinement is not None or bool(self.all_transforms)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse what is wrong between sections that are right each on their own."""
        problems = []
        texts = {"calibration": self.calibration} if self.trained else {}
        if self.distill is not None:
            texts["distill" if self.distill.samples is not None else "calibration"] = self.distill_text
        for section, text in texts.items():
            if text.samples <= text.held_out and not Path(text.data).is_dir():  # a folder has as many as it has
                message = f"training holds out {text.held_out} of {text.samples} samples: none is left"
                problems.append(Issue((section, "samples"), message))
        whole = [transform.whole_model for transform in self.all_transforms]
        for i, late in enumerate(whole):
            if late and not all(whole[:i]):
                path: KeyPath = ("transforms", i) if i < len(self.transforms) else ("method",)
                message = "is trained on the whole model, which transforms block by block have not changed yet"
                problems.append(Issue(path, f"{message}: name it before them"))
        if problems:
            raise invalid("Recipe", problems)
        return self

    def override_methods(self) -> list[Method | None]:
        """The full method of each override; None where it says `dense`."""
        base = named_options(self.method)
        return [None if rule.method is None else build_method(derived(base, rule.method)) for rule in self.overrides]

    def assign(self, layers: Sequence[Linear]) -> dict[str, Method | None]:
        """The method of every layer by name, None where it stays dense.

        Raises:
            UsageError: overrides that match nothing and layers that their method cannot quantize, all of them.
        """
        rules = [self.rules(layer.name) for layer in layers]
        others = self.override_methods()
        assigned = {
            layer.name: others[matching[0]] if matching else self.method
            for layer, matching in zip(layers, rules, strict=True)
        }
        problems = [*self._idle_overrides(rules), *_misfits(layers, assigned, self.low_rank)]
        problems += [*self._unfit_formats(assigned), *self._overrides_of_blocks(others)]
        if layers and not any(assigned.values()):
            problems.append(Issue(("overrides",), "every layer stays dense: nothing to quantize"))
        if problems:
            raise self._origins.error(problems, hint=_assign_hint(layers, problems))
        return assigned

    def located(self, problems: Sequence[Issue]) -> UsageError:
        """Problems as one error, each with its place in the recipe."""
        return self._origins.error(problems)

    def to_dict(self, out: str | Path | None = None) -> dict[str, Any]:
        """All values as plain data, without those that are None.

        Args:
            out: the folder that a result is written to, which its record names in place of the recipe's own `out`.
        """
        data = self.model_dump(mode="json", exclude_none=True, exclude={"allocation"})
        if self.allocation is not None:
            data["method"] |= self.allocation.options()
        if out is not None:
            data["out"] = str(out)
        return {name: data[name] for name in Recipe.model_fields if name in data}

    def to_yaml(self, origins: Origins | None = None, out: str | Path | None = None) -> str:
        """`to_dict` as YAML, which `load_recipe` reads back to an equal recipe; `origins` become comments."""
        return to_yaml(self.to_dict(out), origins)

    @property
    def distill_text(self) -> Calibration:
        """What distillation trains on."""
        asked = self.distill or Distillation()
        own = {"data": asked.data, "samples": asked.samples, "seq_len": asked.seq_len}
        return self.calibration.model_copy(update={name: value for name, value in own.items() if value is not None})

    def fingerprint_fields(self) -> dict[str, Any]:
        """The values that decide the bytes of the quantized model."""
        decisive = {*Recipe.model_fields} - {"device", "out", "resume", "distill", "pack", "eval"}
        return {name: value for name, value in self.to_dict().items() if name in decisive}

    def rules(self, name: str) -> list[int]:
        """The overrides that match a layer, the one that counts first."""
        return [i for i, rule in enumerate(self.overrides) if fnmatchcase(name, rule.match)]

    def _overrides_of_blocks(self, others: Sequence[Method | None]) -> list[Issue]:
        """Overrides that name another transform or reconstruction than the block they are in can have."""
        found = []
        for i, method in enumerate(others):
            if method is None:
                continue
            wanted, given = (method.transforms, method.refine), (self.method.transforms, self.method.refine)
            if wanted != given and (any(wanted) or method.name == self.method.name):
                message = f"{method.name} transforms or reconstructs whole blocks, not single layers"
                found.append(Issue(("overrides", i, "method"), f"{message}: set its steps in the recipe's method"))
        return found

    def _unfit_formats(self, assigned: Mapping[str, Method | None]) -> list[Issue]:
        """Formats that a transform or the reconstruction cannot work on."""
        formats = dict.fromkeys(method.format for method in assigned.values() if method is not None)
        steps: list[tuple[KeyPath, Transform | Refine]] = [
            (("transforms", i) if i < len(self.transforms) else ("method",), transform)
            for i, transform in enumerate(self.all_transforms)
        ]
        if self.refinement is not None:
            steps.append((("refine",), self.refinement))
        return [Issue(path, reason) for path, step in steps for format in formats if (reason := step.misfit(format))]

    def _idle_overrides(self, rules: Sequence[Sequence[int]]) -> list[Issue]:
        matched = {i for matching in rules for i in matching}
        taken = {matching[0] for matching in rules if matching}
        return [
            Issue(
                ("overrides", i, "match"),
                f"{rule.match!r} matches "
                + ("only layers that earlier overrides take" if i in matched else "no layer"),
            )
            for i, rule in enumerate(self.overrides)
            if i not in taken
        ]


def _override_problems(base: Mapping[str, Any] | None, overrides: Any) -> list[Issue]:
    """What is wrong with the methods of overrides, which may be no valid ones themselves.

    Args:
        base: options of the recipe's method; None: it has no valid name, and overrides that name none are not checked.
    """
    problems = []
    for i, rule in enumerate(overrides if isinstance(overrides, list) else []):
        partial = rule.method if isinstance(rule, Override) else rule.get("method") if isinstance(rule, dict) else None
        if not isinstance(partial, dict) or (base is None and "name" not in partial):
            continue
        try:
            build_method(derived(base or {}, partial))
        except ValidationError as error:
            problems += [
                Issue(("overrides", i, "method", *issue.path), issue.message) for issue in issues(error, Method)
            ]
    return problems


def _name_alone(method: Any) -> dict[str, Any] | None:
    """The name of a method whose options may be invalid; None if there is no such method."""
    if isinstance(method, Method):
        return {"name": method.name}
    name = (
        DEFAULT_METHOD if method is None else method.get("name", DEFAULT_METHOD) if isinstance(method, dict) else None
    )
    return {"name": name} if name in registry.names(METHODS) else None


def _misfits(
    layers: Sequence[Linear], assigned: Mapping[str, Method | None], low_rank: LowRankCompensation | None
) -> list[Issue]:
    """One line for layers that differ only in the number of their block."""
    reasons: Counter[tuple[str, KeyPath, str]] = Counter()
    for layer in layers:
        method = assigned[layer.name]
        if method is None:
            continue
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        if reason := method.misfit(layer.shape):
            reasons[kind, ("method",), reason] += 1
        if low_rank is not None and (reason := low_rank.misfit(layer.shape)):
            reasons[kind, ("low_rank", "rank"), reason] += 1
    return [
        Issue(path, f"{reason}: {kind} ({count} layer{'s' if count > 1 else ''})")
        for (kind, path, reason), count in reasons.items()
    ]


def _assign_hint(layers: Sequence[Linear], problems: Sequence[Issue]) -> str | None:
    if any(problem.path == ("method",) for problem in problems):
        divisor = gcd(*(layer.shape[1] for layer in layers))
        return f"groups of {divisor & -divisor} divide every row; group_tail ragged allows a shorter last group"
    if layers and any(problem.path[0] == "overrides" for problem in problems):
        return f"layers are named as {layers[0].name}"
    return None
