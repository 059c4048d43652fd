"""`qcli quantize`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._complete import one_of
from qcli.cli._contents import contents_in_words, smaller_in_words
from qcli.cli._layers import show_layers
from qcli.cli._next import after_checkpoint
from qcli.cli._out import out_of, quantized_name
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, bits, duration, size
from qcli.evaluation.severity import with_word
from qcli.models.facts import facts_in_words
from qcli.recipe.yaml import scalar
from qcli.utils.placement import Placement
from qcli.utils.registry import names
from qcli.utils.text import significant, with_wildcards

if TYPE_CHECKING:
    from qcli.quantization.plan import Plan

METHODS = names("qcli.algorithms.methods")
_SHOWN = 3  # fallbacks that differ only in numbers


def number_or_auto(text: str) -> Any:
    """The value of `--bits` or `--group-size`; what is no number is refused where the recipe is."""
    return scalar(text)


def quantize(
    model: flags.OptionalModel = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=one_of(METHODS),
            help=f"One of {', '.join(METHODS)}. Default: gptq-like.",
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="B",
            parser=number_or_auto,
            help="Bits per code, or auto: chosen for each layer within --target-bpw. Default: 4.",
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(metavar="X", help="With --bits auto: upper bound on bits per weight, tables included."),
    ] = None,
    fused: Annotated[
        bool | None,
        typer.Option(
            "--fused",
            help="With --bits auto: one width for q, k, v and one for gate, up, as compressed-tensors requires.",
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            metavar="G",
            parser=number_or_auto,
            help="Weights per scale; -1: whole rows; auto: chosen along with --bits auto. Default: 64.",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Grids without or with zero points. Default: asymmetric."),
    ] = None,
    group_tail: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            autocompletion=one_of(("error", "ragged")),
            help="Where the group size does not divide a row: error, or ragged (a shorter last group). Default: error.",
        ),
    ] = None,
    revision: flags.Revision = None,
    data: flags.Data = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    bos: flags.Bos = None,
    all_experts: Annotated[
        bool | None,
        typer.Option(
            "--calibrate-all-experts",
            help="Of a mixture of experts: all tokens count for all experts.",
            show_default=False,
        ),
    ] = None,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.DType = None,
    max_memory: flags.MaxMemory = None,
    deterministic: flags.Deterministic = None,
    out: flags.OptionalOut = None,
    force: flags.Force = False,
    recipe: flags.RecipeFile = None,
    set_: flags.Sets = None,
    resume: flags.Resume = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show layers, sizes and memory from the model's headers alone.")
    ] = False,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Quantize a model block by block.

    The result is a checkpoint that transformers loads. Flags override --set, --set overrides --recipe. Options of a
    single method: --set method.NAME=VALUE; `qcli recipe schema` lists them. On several GPUs:
    torchrun --nproc-per-node N -m qcli quantize ...
    """
    with Session(json=json, quiet=quiet, verbose=verbose, resumable=True, distributed=True) as session:
        from qcli.recipe.load import load_recipe
        from qcli.utils.trust import Trust

        given = flags.recipe_fields(
            model=model,
            revision=revision,
            data=data,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            bos=bos,
            device=device,
            dtype=dtype,
            max_memory=max_memory,
            deterministic=deterministic,
            out=out,
        ) | {
            "calibration.all_experts": all_experts,
            "method.name": method,
            "method.bits": bits,
            "method.target_bpw": target_bpw,
            "method.fused": fused,
            "method.group_size": group_size,
            "method.group_tail": group_tail,
            "method.symmetric": symmetric,
            "resume": resume,
        }
        resolved = load_recipe(recipe, given, set_ or ())
        trust = Trust(remote_code=trust_remote_code)
        from qcli.quantization.plan import make_plan, require_fit

        require_fit(resolved, trust)
        if dry_run:
            from qcli.quantization.job import require_start

            plan = make_plan(resolved, trust)
            require_start(plan, resolved, Path(resolved.out or quantized_name(resolved)), force=force)
            report_plan(session, plan, show_plan)
            return
        from qcli.models.open import open_source
        from qcli.quantization.quantize import quantize as run

        out = out_of(session, resolved.out, quantized_name(resolved), lambda: open_source(resolved.source, trust))
        result = run(resolved, out, session.progress, trust=trust, force=force)
        session.result(result.to_json(), show_result)
        session.suggest(lambda: after_checkpoint(out, resolved.source, trust))


def report_plan(session: Session, plan: "Plan", show: Callable[[Tables, dict[str, Any]], None], **more: Any) -> None:
    """Print a plan at once, then how long it would take, which takes a probe of this machine.

    Args:
        more: further fields of the result.

    Raises:
        ResourceError: what it needs does not fit; the plan is printed before.
    """
    from qcli.quantization.estimate import estimated_seconds
    from qcli.quantization.footprint import memory_hint, planned, quantization_placement

    placement = quantization_placement(plan)
    result = planned(plan, placement) | more
    if session.json:  # one object
        result["seconds_estimate"] = estimated_seconds(plan) if placement.problem is None else None
    session.result(result, show)
    placement.require(memory_hint(plan))
    if not session.json and (seconds := estimated_seconds(plan)) is not None:
        session.result({"seconds_estimate": seconds}, show_time)


def show_time(tables: Tables, estimate: dict[str, Any]) -> None:
    """How long a plan would take."""
    about = duration(estimate["seconds_estimate"])
    line_up = len("bits per weight")  # of the plan's lines above
    tables.pairs({"time": f"about {about}, an estimate from a short probe of this machine"}, least=line_up)


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """The plan of `--dry-run`."""
    choices = plan["choices"]
    show_layers(tables, [*_with_choices(plan["layers"], choices), *plan["vocabulary"]])
    exact = f"{size(plan['bytes'])} ({plan['bytes']} bytes; source {size(plan['source_bytes'])})"
    tables.pairs(
        {
            **(_chosen(choices) if choices else {"bits per weight": bits(plan)}),
            **({f"at uniform {_uniform(plan)}": f"{bits(plan)}, {exact}"} if choices else {"size": exact}),
            **contents_in_words(plan["contents"], plan["source_contents"]),
            **smaller_in_words(plan["smaller"]),
            "source": _source(plan["source_quantized_as"]),
            "peak memory": Placement(**plan["memory"]).in_words(),
            "calibration": "required" if plan["calibrated"] else "not needed",
            "not transformed": _unscaled(plan["unscaled"]),
            "kept in blocks": ", ".join(plan["kept"]) or None,
            "outside blocks": f"{len(plan['outside'])} tensors, unchanged",
            "kept beside blocks": ", ".join(plan["dense_parts"]) or None,
            "left out": _left_out(plan["left_out"]),
        }
    )


def _with_choices(layers: Sequence[Mapping[str, Any]], choices: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The layers, with the range of what `bits: auto` chooses from in place of what the uniform recipe has."""
    if choices is None:
        return [*layers]
    searched = set(choices["layers"])
    left_open = {"bits": _range(choices["bits"]), "bits_per_weight": None, "divides_tensor_parallel": None}
    if len(choices["group_sizes"]) > 1:
        left_open["group_size"] = _range(choices["group_sizes"])
    return [{**layer, **left_open} if layer["name"] in searched else layer for layer in layers]


def _chosen(choices: Mapping[str, Any]) -> dict[str, str]:
    sizes = choices["group_sizes"]
    groups = f" and groups of {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
    return {
        "bits per weight": f"at most {choices['target_bpw']:g}, the target",
        "chosen": f"by measurement, for each of {len(choices['layers'])} layers: "
        f"{_range(choices['bits'])} bits{groups}",
    }


def _uniform(plan: Mapping[str, Any]) -> str:
    """What the allocation is compared with, in words."""
    widths = sorted({layer["bits"] for layer in plan["layers"] if layer["name"] in set(plan["choices"]["layers"])})
    return f"{_range(widths)} bits"


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def show_result(tables: Tables, result: dict[str, Any]) -> None:
    """Layers and their errors, sizes, and what did not go as configured."""
    layers = [*result["layers"], *result["vocabulary"]]
    show_layers(tables, [{**layer, **layer["spec"], **layer["facts"]} for layer in layers])
    peak = ", ".join(f"{size(used)} {kind}" for kind, used in result["peak_memory"].items()) or None
    tables.pairs(
        {
            "written": result["out"],
            "bits per weight": bits(result),
            **facts_in_words(result["facts"]),
            **_allocation(result["allocation"]),
            "size": f"{size(result['bytes'])} (was {size(result['source_bytes'])})",
            **contents_in_words(result["contents"], result["source_contents"]),
            **smaller_in_words(result["smaller"]),
            "source": _source(result["source_quantized_as"]),
            "time": duration(result["seconds"]),
            "peak memory": peak,
            "resumed": f"{result['resumed_blocks']} blocks" if result["resumed_blocks"] else None,
            "stayed dense": f"{len(result['dense'])} layers, by override" if result["dense"] else None,
            "not transformed": _unscaled(result["unscaled"]),
            "fallbacks": len(result["fallbacks"]) or "none",
        }
        | _training(result["training"])
    )
    for line in _fallbacks(result["fallbacks"]):
        tables.line(f"  {line}")


def _fallbacks(found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line for each layer; of many layers that differ only in numbers, such as those of experts, one for all."""
    alike: dict[str, list[str]] = {}
    for name, steps in found.items():
        line = f"{name}: {'; '.join(steps)}"
        alike.setdefault(with_wildcards(line), []).append(line)
    for pattern, lines in alike.items():
        if len(lines) > _SHOWN:
            yield f"{pattern.partition(': ')[0]}, {len(lines)} layers, such as {lines[0]}"
        else:
            yield from lines


def _left_out(names: Sequence[str]) -> str | None:
    """Tensors that the result does not have."""
    return f"{len(names)} tensors that transformers does not load, such as {names[0]}" if names else None


def _source(quantized_as: str | None) -> str | None:
    """That the model was quantized before."""
    return None if quantized_as is None else f"quantized already ({quantized_as}), decoded as it is read"


def _unscaled(paths: Sequence[str]) -> str | None:
    """Layers that no transform can scale."""
    return f"{', '.join(paths)}: no layer before them can absorb the inverse scale" if paths else None


def _allocation(report: Mapping[str, Any] | None) -> dict[str, str]:
    """The target and the measured trials of `bits: auto`."""
    if report is None:
        return {}
    lines = {
        f"{name}{', shipped' if name == report['shipped'] else ''}": f"KL {_measured(trial['measured_kl'])} on "
        f"{report['held_out_samples']} held-out samples (predicted {_kl(trial['predicted_kl'])}), "
        f"{trial['bits_per_weight']:.4g} bits per weight"
        for name, trial in report["trials"].items()
    }
    return {"target": f"{report['target_bpw']:g} bits per weight", **lines}


def _measured(kl: float | None) -> str:
    """The KL and its word; None: not finite."""
    return with_word(math.nan if kl is None else kl)


def _kl(value: float | None) -> str:
    return "not finite" if value is None else significant(value)


def _training(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A line for each kind of training: held-out losses, averaged over blocks."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, outcome in outcomes.items():  # named `block 3 refine`
        kinds.setdefault(name.split()[2], []).append(outcome)
    lines = {}
    for kind, members in kinds.items():
        before, after = (sum(outcome[key] for outcome in members) / len(members) for key in ("before", "after"))
        unchanged = sum(outcome["best_step"] == 0 for outcome in members)
        lines[kind] = f"held-out loss {before:.3g} -> {after:.3g}" + (
            f"; {unchanged} of {len(members)} kept their initial weights" if unchanged else ""
        )
    return lines
