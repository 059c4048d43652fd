"""One recipe through all its stages: quantize, distill, evaluate, pack. `qcli run` and `qcli study` share it.

Every stage has one result in the pipeline's folder; a result that is there already, made from the same inputs, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qcli.data.datasets import is_sampled
from qcli.data.default_text import default_text
from qcli.data.identity import content_of
from qcli.data.source import label, text_paths
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.pipeline.record import DISTILLED, EVALUATION, PACKED, QUANTIZED, StageRecord
from qcli.quantization.plan import make_plan
from qcli.recipe.auto_text import auto_fields, flags_for, with_text
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval, Pack
from qcli.utils.cache import Cache
from qcli.utils.files import json_bytes, parse_json
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import refuse_read, remove_remainder
from qcli.utils.trust import NOTHING, Trust

if TYPE_CHECKING:
    from qcli.distillation.result import DistillationResult
    from qcli.evaluation.tasks import Tasks
    from qcli.export.result import PackResult
    from qcli.quantization.result import Result
    from qcli.utils.distributed import Processes

T = TypeVar("T")


@dataclass
class PipelineResult:
    """What each stage gave; None where the recipe has no such stage, or its result was there already.

    Attributes:
        evaluation: `Evaluation.to_json`, from a file if it was made before.
        skipped: results that were there already.
    """

    out: Path
    skipped: list[str] = field(default_factory=list)
    quantized: Result | None = None
    distilled: DistillationResult | None = None
    evaluation: dict[str, Any] | None = None
    packed: PackResult | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, a key for each stage that has a result."""
        stages = {
            "quantized": self.quantized and self.quantized.to_json(),
            "distilled": self.distilled and self.distilled.to_json(),
            "eval": self.evaluation,
            "packed": self.packed and self.packed.to_json(),
        }
        present = {name: result for name, result in stages.items() if result is not None}
        return {"out": str(self.out), "skipped": self.skipped, **present}


class Pipeline:
    """The stages of one recipe, in order.

    Args:
        folder: of the results.
        cache: keeps what the baseline of an evaluation gives.
        calibration_cache: keeps calibration tokens that several recipes share.
        skip: called with the path of each result that is there already.
        trust: code of models and tasks that may run.
        processes: of `torchrun`: all quantize and distill, the main one evaluates, packs and writes. None: one.
        force: replace results that were made with other settings, each once the new one is complete.

    Raises:
        UsageError: the recipe does not fit its model.
        StateError: the folder's record is damaged.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        cache: Cache,
        calibration_cache: Cache | None = None,
        progress: Progress = silent,
        skip: Callable[[Path], None] = lambda _: None,
        trust: Trust = NOTHING,
        processes: Processes | None = None,
        force: bool = False,
    ) -> None:
        self.processes, self.force = processes, force
        self.recipe, self.folder, self.progress, self.skip = recipe, folder, progress, skip
        self.cache, self.calibration_cache = cache, calibration_cache or Cache(None)
        progress("reading the model", 0, 0)
        self.plan, self.record, self.result = (
            make_plan(recipe, trust),
            StageRecord(folder, force),
            PipelineResult(folder),
        )
        self.trust = trust
        self.inputs: dict[str, Any] = {"source": self.plan.source.state(), "recipe": recipe.fingerprint_fields()}
        if self.plan.calibrated:
            self.inputs["text"] = content_of(recipe.calibration.data)
        self.model = folder / QUANTIZED

    def run(self) -> PipelineResult:
        """Every stage that the recipe names; where a gate fails, nothing is packed.

        Raises:
            QcliError: as the stages do; what can be checked beforehand is checked before the first of them.
        """
        self._in_main(self.check)
        self.quantize()
        self.distill()
        gates = None
        if self.recipe.eval is not None:
            evaluation, gates = self._in_main(self.evaluate), self.recipe.eval.gates
        if gates is None or not any(gates.failures(evaluation)):
            self._in_main(self.pack)
        return self.result

    def check(self) -> None:
        """Refuse what any stage that is still to be done would refuse, before work is spent on the first."""
        stays = self._staying()
        self._check_layout(stays)
        if QUANTIZED not in stays:
            from qcli.quantization.job import require_calibration_text

            require_calibration_text(self.plan, self.recipe)
        if DISTILLED not in stays:
            self._check_distillation()
        if self.recipe.eval is not None:
            from qcli.evaluation.from_recipe import require_evaluation_texts

            tasks = self.tasks
            if EVALUATION not in stays:
                require_evaluation_texts(self._with_text(), self.plan.source, self.progress, trust=self.trust)
                if tasks is not None:
                    tasks.require_chat(self.plan.source)
                    tasks.require_data()

    def quantize(self) -> None:
        """Quantize the recipe's model."""
        recipe = self._in_main(self._with_text)
        if self._in_main(lambda: self._is_missing(QUANTIZED, self.inputs)):
            from qcli.quantization.quantize import quantize

            self.result.quantized = quantize(
                recipe, self.model, self.progress, self.calibration_cache, trust=self.trust, force=self.force
            )
            self._in_main(lambda: self.record.finish(QUANTIZED))

    def distill(self) -> None:
        """Train the quantized model, if the recipe says so; the result is what later stages read."""
        if self.recipe.distill is None:
            return
        student, self.model = self.model, self.folder / DISTILLED
        self.inputs = self._distilled_from()
        recipe = self._in_main(self._with_text)
        if self._in_main(lambda: self._is_missing(DISTILLED, self.inputs)):
            from qcli.distillation.distill import distill

            self.result.distilled = distill(
                student, recipe, self.model, self.progress, trust=self.trust, force=self.force
            )
            self._in_main(lambda: self.record.finish(DISTILLED))

    def evaluate(self) -> dict[str, Any]:
        """Measure the model as the recipe's `eval` says, or by its defaults: `Evaluation.to_json`, portable."""
        recipe = self._with_text()
        if self._is_missing(EVALUATION, self._evaluated_from(self.inputs)):
            from qcli.evaluation.from_recipe import evaluate_recipe
            from qcli.evaluation.results import portable

            evaluation = evaluate_recipe(recipe, self.model, self.tasks, self.cache, self.progress, trust=self.trust)
            self.record.write(EVALUATION, json_bytes(portable(evaluation.to_json())))
        self.result.evaluation = parse_json(self.record.read(EVALUATION))
        return self.result.evaluation

    def pack(self) -> None:
        """Pack the model, if the recipe says so."""
        options = self.recipe.pack
        if options is not None and self._is_missing(PACKED, _packed_from(self.inputs, options)):
            from qcli.export.pack import pack

            self.result.packed = pack(
                self.model,
                self.folder / PACKED,
                format=options.format,
                shard_size=options.shard_bytes,
                requantize=options.requantize,
                allow_refused=options.allow_refused,
                evaluation=self.result.evaluation,
                progress=self.progress,
                trust=self.trust,
                force=self.force,
            )
            self.record.finish(PACKED)

    @cached_property
    def tasks(self) -> Tasks | None:
        """The tasks that the recipe names, checked; None: none."""
        from qcli.evaluation.from_recipe import recipe_tasks

        return recipe_tasks(self.recipe, self.trust)

    def _in_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process; all get its result."""
        return work() if self.processes is None else self.processes.broadcast(work)

    def _is_missing(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a stage has to run."""
        if not self.record.done(name, inputs):
            return True
        if name != EVALUATION:  # a checkpoint
            Manifest.read(self.folder / name).require_weights(self.folder / name)
            remove_remainder(self.folder / name)
        self.result.skipped.append(name)
        self.skip(self.folder / name)
        return False

    def _with_text(self) -> Recipe:
        """The recipe as the stages do it: `auto` is the text that the folder's first stage has chosen. Main process.

        What results are recorded to be made from is the recipe as it was written.
        """
        fields = auto_fields(self.recipe, calibrated=self.plan.calibrated or self.recipe.allocation is not None)
        if not fields:
            return self.recipe
        self.record.text = self.record.text or self.record.text_before() or default_text(flags_for(fields))
        return with_text(self.recipe, self.record.text)

    def _distilled_from(self) -> dict[str, Any]:
        """What the distilled model is made from, and with it what comes after."""
        assert self.recipe.distill is not None
        text = content_of(self.recipe.distill_text.data)
        return self.inputs | {"distill": self.recipe.distill.model_dump(mode="json"), "distill text": text}

    def _evaluated_from(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """What the evaluation of a model is made from, which is made from `model` itself."""
        options = self.recipe.eval or Eval()
        texts = [*options.perplexity, *([options.include_path] if options.include_path else [])]
        inputs = {
            **model,
            "eval": options.model_dump(exclude={"gates"}),
            "eval files": {label(name): content_of(name) for name in texts},
        }
        if options.baseline is not None:
            inputs["baseline"] = open_source(options.baseline, self.trust).state()
        return inputs

    def _staying(self) -> set[str]:
        """The results that are there and not to be replaced.

        Raises:
            StateError: one was made with other settings, and nobody asked to replace it, or it has what a stage reads.
            QcliError: one is to be replaced, and is not as qcli wrote it; see `require_own_checkpoint`.
        """
        present = [name for name in (QUANTIZED, DISTILLED, EVALUATION, PACKED) if (self.folder / name).exists()]
        recipe, made_from = self.recipe, {QUANTIZED: self.inputs}
        model = self.inputs if recipe.distill is None else self._distilled_from()
        if recipe.distill is not None:
            made_from[DISTILLED] = model
        if recipe.eval is not None and EVALUATION in present:
            made_from[EVALUATION] = self._evaluated_from(model)
        if recipe.pack is not None:
            made_from[PACKED] = _packed_from(model, recipe.pack)
        stays, earlier = set[str](), False
        for name in present:
            earlier = name in made_from and (earlier or self.record.replaces(name, made_from[name]))
            if earlier:
                refuse_read(self.folder / name, self._reads())
                self.record.require_own(name)
            else:
                stays.add(name)
        return stays

    def _reads(self) -> list[str]:
        """The models and texts that any stage reads."""
        recipe, options = self.recipe, self.recipe.eval
        reads = [recipe.model, *text_paths(recipe.calibration.data)]
        if recipe.distill is not None:
            reads += text_paths(recipe.distill_text.data)
        if options is not None:
            texts = [path for data in options.perplexity for path in text_paths(data)]
            reads += [*texts, *(path for path in (options.baseline, options.include_path) if path is not None)]
        return reads

    @property
    def stages(self) -> dict[str, str]:
        """What would become of each result that the recipe names, in words; errors as of `check`."""
        recipe, stays = self.recipe, self._staying()
        named = {QUANTIZED: True, DISTILLED: recipe.distill, EVALUATION: recipe.eval, PACKED: recipe.pack}
        otherwise = {True: "to be replaced", False: "to be made"}
        return {
            name: "done already" if name in stays else otherwise[(self.folder / name).exists()]
            for name, section in named.items()
            if section is not None
        }

    def _check_layout(self, stays: Container[str]) -> None:
        """Refuse what `pack` would refuse; where bits have been chosen already, it knows better."""
        options, chosen = self.recipe.pack, self.recipe.allocation is not None and QUANTIZED in stays
        if options is None or chosen or PACKED in stays:
            return
        from qcli.export.packable import require_packable
        from qcli.quantization.search_space import mixed_recipe

        plans = [self.plan]
        if self.recipe.allocation is not None:
            plans.append(make_plan(mixed_recipe(self.recipe, self.plan.layers), self.trust))
        for plan in plans:
            require_packable(plan, self.folder, options.format, options.requantize, allow_refused=options.allow_refused)

    def _check_distillation(self) -> None:
        if self.recipe.distill is None:
            return
        from qcli.distillation.distill import distillation_tokens
        from qcli.distillation.plan import require_feasible
        from qcli.export.packable import PlannedCheckpoint

        student = PlannedCheckpoint(self.plan, self.folder).quantized
        require_feasible(self.recipe, student, self.plan.source, shared=True)
        if not is_sampled(self.recipe.distill_text.data):
            distillation_tokens(self._with_text(), self.plan.source)


def _packed_from(model: Mapping[str, Any], options: Pack) -> dict[str, Any]:
    """What a packed model is made from, where it is packed from one that is made from `model`."""
    return {**model, "pack": options.model_dump()}
