"""`qcli run`: every stage a recipe names."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.distill import show_distilled
from qcli.cli.eval import show_evaluation
from qcli.cli.pack import show_packed
from qcli.cli.quantize import show_result
from qcli.cli.ui.session import Session, Tables
from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from qcli.evaluation.tasks import Tasks
    from qcli.quantization.plan import Plan
    from qcli.recipe.recipe import Recipe

QUANTIZED, DISTILLED, PACKED, EVALUATION = "quantized", "distilled", "packed", "eval.json"


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    out: flags.OptionalOut = None,
    device: flags.Device = None,
    set_: flags.Sets = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Run every stage that a recipe names.

    Quantizes, then distills, evaluates and packs where the recipe says so. Results are DIR/quantized,
    DIR/distilled, DIR/eval.json and DIR/packed. What is done already is skipped. A text that is missing or too
    short, and a method that the packed layout cannot hold, are told before anything is quantized. Where a gate fails
    nothing is packed, and the exit code is 4.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, resumable=True) as session:
        from qcli.recipe.gates import require
        from qcli.recipe.load import load_recipe

        resolved, _ = load_recipe(recipe, flags.recipe_fields(device=device, out=out), set_ or ())
        if resolved.out is None:
            raise UsageError("--out: required", hint="name the folder of the results")
        results = _stages(resolved, Path(resolved.out), session)
        session.result(results, show)
        if resolved.eval is not None:
            require(resolved.eval.gates, [results["eval"]])


def _stages(recipe: "Recipe", folder: Path, session: Session) -> dict[str, Any]:

    from qcli.cli._stages import Stages
    from qcli.models.open import open_source
    from qcli.quantization.plan import plan
    from qcli.utils.files import content_hash, read_json, write_json

    planned = plan(recipe)
    inputs: dict[str, Any] = {"source": planned.source.state(), "recipe": recipe.fingerprint_fields()}
    if planned.streamed:
        inputs |= {"text": content_hash(Path(recipe.calibration.data))}
    _require_layout(recipe, planned, folder)
    stages, tasks = Stages(folder), _later_stages(planned, folder, session)
    results: dict[str, Any] = {"out": str(folder), "skipped": []}

    def todo(name: str, inputs: dict[str, Any]) -> bool:
        if not stages.done(name, inputs):
            return True
        results["skipped"].append(name)
        session.note(f"{folder / name}: done already, skipped")
        return False

    if todo(QUANTIZED, inputs):
        from qcli.quantization.quantize import quantize

        results[QUANTIZED] = quantize(recipe, folder / QUANTIZED, session.progress).to_json()
    final = folder / QUANTIZED
    if recipe.distill is not None:
        text = content_hash(Path(recipe.distill_text.data))
        inputs = inputs | {"distill": recipe.distill.model_dump(mode="json"), "distill text": text}
        final = folder / DISTILLED
        if todo(DISTILLED, inputs):
            from qcli.distillation.distill import distill

            results[DISTILLED] = distill(folder / QUANTIZED, recipe, final, session.progress).to_json()
    if recipe.eval is not None:
        read = [*recipe.eval.perplexity, *([recipe.eval.include_path] if recipe.eval.include_path else [])]
        judged = {
            "eval": recipe.eval.model_dump(exclude={"gates"}),
            "eval files": {n: content_hash(Path(n)) for n in read},
        }
        if recipe.eval.baseline is not None:
            judged["baseline"] = open_source(recipe.eval.baseline).state()
        if todo(EVALUATION, inputs | judged):
            from qcli.evaluation.from_recipe import evaluate_as_asked
            from qcli.utils.cache import Cache, default_folder

            evaluation = evaluate_as_asked(recipe, final, tasks, Cache(default_folder()), session.progress)
            write_json(folder / EVALUATION, evaluation.to_json())
        results["eval"] = read_json(folder / EVALUATION)
        if recipe.eval.gates is not None and any(recipe.eval.gates.failures(results["eval"])):
            return results
    if recipe.pack is not None and todo(PACKED, inputs | {"pack": recipe.pack.model_dump()}):
        from qcli.export.pack import pack

        results[PACKED] = pack(
            final,
            folder / PACKED,
            format=recipe.pack.format,
            shard_size=recipe.pack.shard_bytes,
            requantize=recipe.pack.requantize,
            evaluation=results.get("eval"),
            progress=session.progress,
        )
    return results


def _require_layout(recipe: "Recipe", planned: "Plan", folder: Path) -> None:
    """Refuse what `pack` would refuse; where bits have been chosen already, it knows better."""
    chosen = recipe.allocation is not None and (folder / QUANTIZED).exists()
    if recipe.pack is None or chosen or (folder / PACKED).exists():
        return
    from qcli.export.packable import require_packable
    from qcli.quantization.allocation_options import mixed
    from qcli.quantization.plan import plan

    require_packable(planned, folder, recipe.pack.format, recipe.pack.requantize)
    if recipe.allocation is not None:
        require_packable(plan(mixed(recipe, planned.layers)), folder, recipe.pack.format, recipe.pack.requantize)


def _later_stages(planned: "Plan", folder: Path, session: Session) -> "Tasks | None":
    """Refuse what stages after the first would refuse, before work is spent on it; give the tasks to ask."""
    recipe, source, tasks = planned.recipe, planned.source, None
    if recipe.distill is not None and not (folder / DISTILLED).exists():
        from qcli.data.datasets import SELF
        from qcli.distillation.distill import lesson_tokens
        from qcli.distillation.plan import require_possible
        from qcli.export.packable import PlannedCheckpoint

        vocabulary = source.hf_config().get_text_config().vocab_size
        require_possible(recipe, PlannedCheckpoint(planned, folder).packed, vocabulary)
        if recipe.distill_text.data != SELF:
            lesson_tokens(recipe, source)
    if recipe.eval is not None:
        from qcli.evaluation.from_recipe import asked_tasks, require_evaluation_texts

        tasks = asked_tasks(recipe)
        if not (folder / EVALUATION).exists():
            require_evaluation_texts(recipe, source, session.progress)
            if tasks is not None:
                tasks.require_data()
    return tasks


def show(tables: Tables, results: dict[str, Any]) -> None:
    """The result of each stage."""
    if QUANTIZED in results:
        show_result(tables, results[QUANTIZED])
    if DISTILLED in results:
        show_distilled(tables, results[DISTILLED])
    if "eval" in results:
        show_evaluation(tables, results["eval"])
    if PACKED in results:
        show_packed(tables, results[PACKED])
    if results["skipped"]:
        tables.line(f"done before: {', '.join(results['skipped'])}")
