"""`qcli eval`: measure models, alone or against a baseline."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._next import after_evaluation
from qcli.cli._plot import require_plot, write_plot
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, bits, size
from qcli.data.default_text import AUTO, DEFAULT
from qcli.data.names import FILES, set_names
from qcli.evaluation.severity import scale, with_word
from qcli.utils.errors import UsageError
from qcli.utils.paths import portable_name
from qcli.utils.placement import SIZE, Placement
from qcli.utils.text import significant

if TYPE_CHECKING:
    from qcli.recipe.gates import Gates


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Hub ids, folders or .gguf files.")],
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model: KL divergence and top-1 agreement."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help=f"Text: {', '.join(set_names())}, self (sampled from the baseline), a {FILES} file, "
            "or a folder written by `qcli calibrate` that the model was not calibrated on; may be repeated. Default: "
            f"{DEFAULT}; none if --tasks is given.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="W", min=2, help="Tokens per window. Default: the model's context, at most 2048."),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use only the first N windows of each text.")
    ] = None,
    bos: flags.Bos = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="lm-eval tasks, such as arc_easy,piqa; the model must fit in memory; may be repeated.",
        ),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with more task files.")] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use only the first N questions of each task.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Few-shot examples per question. Default: the task's.")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Put the questions of tasks into the model's chat template."),
    ] = False,
    task_batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Questions of tasks that run together. Default: 8.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also report the error of every layer and block against the baseline.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the errors of --layers: a .png, .svg or .pdf; must not exist."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(metavar="X", help="Gate: fail if the mean KL is above X.")] = None,
    max_window_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Gate: fail if the KL of any window is above X.")
    ] = None,
    max_ppl_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Gate: fail if perplexity exceeds X times the baseline's.")
    ] = None,
    min_task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=X", help="Gate: fail if the task's score is below X; may be repeated."),
    ] = None,
    max_task_drop: Annotated[
        float | None, typer.Option(metavar="X", help="Gate: fail if any task scores more than X below the baseline.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check models, texts and tasks, and show what would be measured.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Do not cache the baseline's results, nor use cached ones.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="DEV", help="Compute device: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(metavar="TYPE", help="Compute dtype: auto (float32), float32, bfloat16 or float16."),
    ] = "auto",
    max_memory: flags.MaxMemory = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    trust_tasks: flags.TrustTasks = False,
    json: flags.Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as Markdown tables.")] = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Measure the quality of models, and the loss against a baseline.

    Reports perplexity; against a baseline the KL divergence of the predictions, as a mean and for the worst window, and
    how often both models rank the same token first. Windows do not overlap; where the tokenizer puts a begin token
    before a text, every window begins with it (--bos). Models run block by block and may be larger than memory, except
    for --tasks. If a gate fails, it is named and the exit code is 4. Results of the baseline are cached in $QCLI_CACHE
    (default: ~/.cache/qcli).
    """
    with Session(json=json, quiet=quiet, verbose=verbose, markdown=markdown) as session:
        names = list(dict.fromkeys(name.strip() for given in tasks or [] for name in given.split(",")))
        of_tasks = {
            "limit": limit,
            "fewshot": fewshot,
            "include-path": include_path,
            "apply-chat-template": apply_chat_template or None,
            "task-batch-size": task_batch_size,
        }
        for flag, value in of_tasks.items():
            if value is not None and not names:
                raise UsageError(f"--{flag} needs --tasks")
        if trust_tasks and include_path is None:
            raise UsageError("--trust-tasks needs --include-path", hint="lm-eval's own tasks are trusted anyway")
        if json and markdown:
            raise UsageError("--json and --markdown: choose one")
        if plot is not None and (not layers or len(models) > 1):
            raise UsageError("--plot draws the errors of one model's layers", hint="one MODEL, --layers and --baseline")
        require_plot(plot)
        on_text = {"max_kl": max_kl, "max_window_kl": max_window_kl, "max_ppl_ratio": max_ppl_ratio}
        gates = _gates(baseline, names, on_text, min_task or [], max_task_drop)
        texts = data or ([] if names else [AUTO])
        for name, bound in on_text.items() if not texts else ():
            if bound is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs text", hint="--data wikitext2")
        if max_memory is not None and not re.match(SIZE, max_memory):
            raise UsageError(f"--max-memory: must be written as '8GB' or '7.5GiB', not {max_memory!r}")
        bos = "auto" if bos is None else bos
        if bos not in ("auto", True, False):
            raise UsageError(f"--bos must be auto, true or false, not {bos!r}")
        from qcli.evaluation.evaluate import compare, plan_evaluation
        from qcli.evaluation.options import EvalOptions
        from qcli.models.open import open_source
        from qcli.recipe.gates import require
        from qcli.recipe.texts import text_of_flag
        from qcli.utils.cache import Cache, default_folder
        from qcli.utils.trust import Trust

        trust = Trust(remote_code=trust_remote_code, tasks=trust_tasks)
        lm_eval = None
        if names:
            from qcli.evaluation.task_model import BATCH_SIZE
            from qcli.evaluation.tasks import Tasks

            folder = None if include_path is None else str(include_path)
            lm_eval = Tasks(
                names,
                folder,
                limit,
                fewshot,
                chat=apply_chat_template,
                batch_size=task_batch_size or BATCH_SIZE,
                trusted=trust_tasks,
            )
            lm_eval.require_scores(gates.min_task if gates is not None else ())
            for name in filter(None, [*models, baseline]):
                lm_eval.require_chat(open_source(name, trust))  # a wrong name fails before any data is loaded
            lm_eval.require_data()
        sources = list(map(text_of_flag, texts))
        options = EvalOptions(sources, window, max_windows, lm_eval, layers, device, dtype, max_memory, trust, bos)
        cache = Cache(None if no_cache else default_folder())
        if dry_run:
            plan = plan_evaluation(models, options, baseline=baseline, cache=cache, progress=session.progress)
            session.result(plan, show_plan)
            return
        evaluations = compare(models, options, baseline=baseline, cache=cache, progress=session.progress)
        results = [evaluation.to_json() for evaluation in evaluations]
        if plot is not None and (blocks := results[0]["blocks"]):
            from qcli.evaluation.layer_plot import plot_errors

            write_plot(
                plot, session, partial(plot_errors, blocks, portable_name(models[0]), portable_name(str(baseline)))
            )
        if gates is not None:
            for result in results:
                result["gates"] = [verdict.to_json() for verdict in gates.verdicts(result)]
        if len(results) == 1:
            session.result(results[0], show_evaluation)
        else:
            session.result({"models": results}, show_comparison)
        require(gates, results)
        if len(results) == 1:
            session.suggest(lambda: after_evaluation(Path(models[0]), trust))


def _gates(
    baseline: str | None,
    tasks: Sequence[str],
    on_text: Mapping[str, float | None],
    min_task: Sequence[str],
    max_task_drop: float | None,
) -> "Gates | None":
    from qcli.recipe.gates import Gates
    from qcli.recipe.load import from_flags

    least = dict(_least(bound) for bound in min_task)
    bounds = {**on_text, "max_task_drop": max_task_drop}
    given = {name: value for name, value in bounds.items() if value is not None}
    if not given and not least:
        return None
    if given and baseline is None:
        flag = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{flag} needs a baseline", hint="--baseline MODEL")
    missing = [task for task in least if task not in tasks]
    if missing:
        raise UsageError(f"--min-task names {missing[0]}, which is not among --tasks")
    if max_task_drop is not None and not tasks:
        raise UsageError("--max-task-drop needs --tasks")
    return from_flags(Gates, {**given, **({"min_task": least} if least else {})})


def _least(bound: str) -> tuple[str, float]:
    task, _, value = bound.partition("=")
    try:
        return task, float(value)
    except ValueError:
        raise UsageError(
            f"--min-task: {bound!r} is not TASK=NUMBER", hint="for example --min-task arc_easy=0.40"
        ) from None


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """What `--dry-run` reports: the models, the baseline last; windows of each text; memory."""
    tables.table(
        ("model", "bits/weight", "whole model", "size", "baseline"),
        [
            (
                *(model["model"], model["bits_per_weight"], model["model_bits_per_weight"]),
                *(size(model["bytes"]), model["baseline"]),
            )
            for model in plan["models"]
        ],
    )
    for text in plan["texts"]:
        windows = f"{text['windows']} windows of {text['window']} tokens" if text["windows"] else "sampled as it runs"
        tables.line(f"{text['text']}: {windows}")
    tables.pairs(
        {
            "tasks": ", ".join(plan["tasks"]) or None,
            "peak memory": None if plan["memory"] is None else Placement(**plan["memory"]).in_words(),
        }
    )


def show_comparison(tables: Tables, result: dict[str, Any]) -> None:
    """One row per model: size, perplexities, losses, task scores; the baseline first."""
    models = result["models"]
    first = models[0]
    texts, tasks = list(first["perplexity"]), list(first["tasks"])
    columns = [
        "model",
        "bits/weight",
        "size",
        *(f"perplexity {text}" for text in texts),
        "KL",
        "worst window",
        "top-1",
        *tasks,
    ]
    rows = []
    if (baseline := first["baseline"]) is not None:
        scores = [first["tasks"][task]["baseline"] for task in tasks]
        rows.append([baseline["model"], None, None, *baseline["perplexity"].values(), None, None, None, *scores])
    for model in models:
        values = [score["value"] for score in model["perplexity"].values()]
        scores = [model["tasks"][task]["score"] for task in tasks]
        rows.append(
            [
                *(model["model"], model["bits_per_weight"], size(model["bytes"])),
                *(*values, model["kl"], model["worst_window_kl"], model["top1_agreement"], *scores),
            ]
        )
    tables.table(columns, rows)
    if first["baseline"] is not None and texts:
        tables.line(scale())
    for model in models:
        if warning := fitted(model):
            tables.line(f"{model['model']} was fitted to {warning}")
        if "gates" in model:
            tables.line(f"{model['model']} {_passed(model['gates'])}")
    for text, score in first["perplexity"].items():
        begin = ", each behind a begin token" if score["bos"] else ""
        tables.line(f"{text}: {score['windows']} windows of {score['window']} tokens{begin}, {score['tokens']} scored")


def _passed(gates: Sequence[Mapping[str, Any]]) -> str:
    failed = sum(not gate["ok"] for gate in gates)
    return f"fails {failed} of {len(gates)} gates" if failed else f"passes all {len(gates)} gates"


def show_evaluation(tables: Tables, evaluation: dict[str, Any]) -> None:
    """Perplexity by text, loss against the baseline, tasks, layer errors, size."""
    before = evaluation["baseline"]["perplexity"] if evaluation["baseline"] else {}
    scores = evaluation["perplexity"].values()
    columns = ("text", "perplexity", "baseline", "ratio", "windows", "of tokens", "scored")
    rows = []
    for data, score in evaluation["perplexity"].items():
        value, reference = score["value"], before.get(data)
        ratio = value / reference if value and reference else None
        rows.append((data, value, reference, ratio, score["windows"], score["window"], score["tokens"]))
    if rows:
        tables.table(columns, rows)
    show_tasks(tables, evaluation["tasks"])
    if evaluation["blocks"]:
        show_blocks(tables, evaluation["blocks"])
    tables.pairs(
        {
            "KL to baseline": None if evaluation["kl"] is None else with_word(evaluation["kl"]),
            "of the worst window": _worst(evaluation),
            "top-1 agreement": evaluation["top1_agreement"],
            "bits per weight": bits(evaluation),
            "size": size(evaluation["bytes"]),
            "begin token": "before every window" if any(score["bos"] for score in scores) else None,
            "fitted to": fitted(evaluation),
        }
    )
    if "gates" in evaluation:
        show_gates(tables, evaluation["gates"])


def show_gates(tables: Tables, gates: Sequence[Mapping[str, Any]]) -> None:
    """Each gate, its limit and what was measured."""
    rows = [(gate["name"], gate["of"], gate["limit"], gate["value"], gate["ok"]) for gate in gates]
    tables.table(("gate", "of", "limit", "value", "passed"), rows)


def fitted(evaluation: dict[str, Any]) -> str | None:
    """A warning if a model was evaluated on text that it was calibrated or distilled on."""
    texts = ", ".join(evaluation.get("fitted_to", []))  # absent from evaluations of earlier versions
    return f"{texts}: on other text it loses more" if texts else None


def _worst(evaluation: dict[str, Any]) -> str | None:
    """The highest KL of any window, and which window it is."""
    if evaluation["worst_window_kl"] is None:
        return None
    data, score = max(evaluation["perplexity"].items(), key=lambda item: item[1]["worst_window_kl"])
    return f"{significant(score['worst_window_kl'])} (window {score['worst_window']} of {data})"


def show_tasks(tables: Tables, tasks: dict[str, Any]) -> None:
    """The main metric of each task."""
    rows = [
        (task, result["metric"], result["score"], result["stderr"], result["baseline"], result["samples"])
        for task, result in tasks.items()
    ]
    if rows:
        tables.table(("task", "metric", "score", "+-", "baseline", "questions"), rows)


def show_blocks(tables: Tables, blocks: list[dict[str, Any]]) -> None:
    """Output errors by block, each with its worst layer, and by kind of layer."""
    from qcli.evaluation.layer_errors import by_kind

    rows = []
    for block in blocks:
        worst = max(block["layers"], key=block["layers"].get)
        rows.append((block["block"], block["own"], block["accumulated"], worst, block["layers"][worst]))
    tables.table(("block", "own error", "accumulated", "worst layer", "its error"), rows)
    tables.table(("layers", "mean error"), list(by_kind(blocks).items()))
