"""The report of a study: Markdown with figures, and one self-contained HTML file."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from qcli.evaluation.severity import SEVERE, kl_word, scale
from qcli.study.findings import Finding, best_within, findings, gains, method_comparisons, other_axes, pareto
from qcli.study.plots import plot_front, plot_gains
from qcli.study.report_files import write_in_place
from qcli.study.rows import read_rows
from qcli.utils.environment import can_plot
from qcli.utils.errors import StateError, UnsupportedError
from qcli.utils.markdown import plain, plain_html
from qcli.utils.paths import portable_name

# Bits per weight that recommendations are given for: in quarters up to 4.5, where most runs are.
_BUDGETS = (*(quarters / 4 for quarters in range(4, 19)), 5.0, 6.0, 7.0, 8.0, 9.0)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; min-width: 6rem }
img { max-width: 100% } h2 { margin-top: 2.5rem } .front td { background: #eef5ff } code, pre { font-size: 12px }
"""


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file of the report."""

    file: str


@dataclass(frozen=True)
class Table:
    """Rows under a header; `highlighted` are indices of rows."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    highlighted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A heading with its content; `figure` is a PNG."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: bytes | None = None


def write_report(out: Path) -> list[Path]:
    """Write `report.html`, `report.md` with its figures, and the recipe of each recommendation to `out`/report; those
    of an earlier report are replaced.

    Raises:
        StateError: `out` is not a study, none of its runs succeeded, or a file of the report was edited.
        UnsupportedError: matplotlib is not installed.
        QcliError: a file cannot be written; see `os_problem`.
    """
    rows = read_rows(out)
    runs = findings(rows)
    if not runs:
        raise StateError(f"{out}: no run has succeeded", hint=f"run the study: qcli study STUDY.yaml --out {out}")
    if not can_plot():
        raise UnsupportedError("matplotlib is not installed", hint="pip install matplotlib")
    sections: list[Section] = []
    recipes: dict[str, str] = {}
    titles = _titles({run.model for run in runs})
    for number, key in enumerate(dict.fromkeys((run.model, run.texts) for run in runs)):
        comparable = [run for run in runs if (run.model, run.texts) == key]
        sections += _model_sections(titles[key[0]], comparable, recipes, f"{number}-" if number else "")
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        errors = [(str(row["point"]), row["error"]) for row in failed]
        sections.append(Section("Runs that failed", table=Table(("run", "error"), errors)))
    files = {name: text.encode() for name, text in recipes.items()}
    files |= {f"figure-{n}.png": section.figure for n, section in enumerate(sections) if section.figure is not None}
    files |= {"report.md": _markdown(sections).encode(), "report.html": _html(sections).encode()}
    folder = out / "report"
    write_in_place(folder, files)
    return [folder / "report.html", folder / "report.md", *(folder / name for name in recipes)]


def _titles(models: Collection[str]) -> dict[str, str]:
    """The last part of each model's name, or all of it where several end alike."""
    names = {model: PurePath(portable_name(model)).name for model in models}
    return {model: name if [*names.values()].count(name) == 1 else model for model, name in names.items()}


def _model_sections(title: str, runs: Sequence[Finding], recipes: dict[str, str], prefix: str) -> list[Section]:
    """Sections on the runs of one model; the recipes that they recommend are added to `recipes`."""
    front = pareto(runs)
    baseline = runs[0].row["baseline"]["perplexity"]
    known = None not in baseline.values()
    full_precision = sum(baseline.values()) / len(baseline) if known else None
    perplexities = ", ".join(f"{portable_name(data)} {_shown(value)}" for data, value in baseline.items())
    fitted = sorted({portable_name(text) for run in runs for text in run.row.get("fitted_to", [])})
    warning = f" Runs were calibrated on {', '.join(fitted)}: on other text they lose more." if fitted else ""
    ordered = sorted(runs, key=lambda run: (round(run.bits, 1), math.inf if run.kl is None else run.kl))
    sections = [
        Section(
            f"{title}: loss by size",
            f"{len(runs)} runs on {runs[0].protocol}. Full precision: perplexity {perplexities}. Lines join runs "
            f"that no other beats by KL, and by perplexity. {scale()}.{warning}",
            figure=plot_front(runs, front, pareto(runs, "perplexity"), full_precision),
        ),
        Section(
            "All runs",
            "The best first among those of equal bits. Worst window: KL of the one that lost most. Classes by the "
            "increase of the mean perplexity.",
            Table(
                ("run", "bits/weight", "KL", "worst window", "perplexity", "increase", "class", "top-1", "seconds"),
                [_row(run) for run in ordered],
                frozenset(number for number, run in enumerate(ordered) if run in front),
            ),
        ),
    ]
    for axis in dict.fromkeys(axis for run in runs for axis in run.row["point"]):
        pairs = [(before, after) for before, after in gains(runs, axis) if None not in (before.kl, after.kl)]
        if pairs:
            rows = [
                (after.label, before.kl, after.kl, (after.kl or 0) / (before.kl or 1), after.bits - before.bits)
                for before, after in pairs
            ]
            columns = ("run", "KL without", "KL with", "ratio", "bits added")
            sections.append(
                Section(f"The effect of {axis}", table=Table(columns, rows), figure=plot_gains(pairs, axis))
            )
    if comparisons := method_comparisons(runs):
        sections.insert(2, _comparisons(comparisons))
    sections.append(_recommendations(runs, recipes, prefix))
    return sections


def _comparisons(groups: Sequence[Mapping[str, Finding]]) -> Section:
    methods = list(dict.fromkeys(method for group in groups for method in group))
    rows: list[tuple[Any, ...]] = []
    for group in groups:
        first = next(iter(group.values()))
        losses = (group[method].kl if method in group else "" for method in methods)
        rows.append((other_axes(first.row["point"]), first.bits, *losses))
    text = "KL of runs that differ in the method alone and take the same bits, to a tenth."
    return Section("Method against method", text, Table(("run", "bits/weight", *methods), rows))


def _recommendations(runs: Sequence[Finding], recipes: dict[str, str], prefix: str) -> Section:
    rows, previous = [], None
    for bits in _BUDGETS:
        best = best_within(runs, bits)
        if best is None or best == previous:
            continue
        previous = best
        name = f"recipe-{prefix}{bits:g}bpw.yaml"
        recipes[name] = best.row["recipe"]
        kl = best.kl or 0.0
        rows.append(
            (
                f"at {bits:g} bits per weight or less",
                best.label,
                best.bits,
                kl,
                _warned(kl),
                best.perplexity,
                Link(name),
            )
        )
    columns = ("budget", "take", "bits/weight", "KL", "loss", "perplexity", "recipe")
    return Section("Recommendations", "The run of least KL within each budget.", Table(columns, rows))


def _warned(kl: float) -> str:
    """The word for a loss; a severe one with a warning."""
    return f"{kl_word(kl)}: take more bits, or distill" if kl > SEVERE else kl_word(kl)


def _row(run: Finding) -> tuple[Any, ...]:
    seconds = run.row["seconds"].get("quantize", 0.0) + run.row["seconds"].get("distill", 0.0)
    top1 = run.row["top1_agreement"]
    worst = run.row.get("worst_window_kl", "")  # absent from rows of earlier versions
    return run.label, run.bits, run.kl, worst, run.perplexity, run.increase, run.sensitivity, top1, seconds


def _markdown(sections: Sequence[Section]) -> str:
    lines = []
    for number, section in enumerate(sections):
        lines += [f"## {plain(section.title)}", ""]
        lines += [plain(section.text), ""] if section.text else []
        lines += [f"![{plain(section.title)}](figure-{number}.png)", ""] if section.figure is not None else []
        if section.table is not None:
            lines += [f"| {' | '.join(map(plain, section.table.columns))} |", "|---" * len(section.table.columns) + "|"]
            lines += [f"| {' | '.join(_markdown_cell(cell) for cell in row)} |" for row in section.table.rows]
            lines.append("")
    return "\n".join(lines)


def _markdown_cell(cell: Any) -> str:
    text = plain(_shown(cell))
    return f"[{text}]({cell.file})" if isinstance(cell, Link) else text


def _html_cell(cell: Any) -> str:
    text = plain_html(_shown(cell))
    return f'<a href="{plain_html(cell.file)}">{text}</a>' if isinstance(cell, Link) else text


def _html_table(table: Table) -> str:
    is_text = [
        any(isinstance(row[column], str | Link) and row[column] for row in table.rows)
        for column in range(len(table.columns))
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=text' if text else ''}>{_html_cell(cell)}</{tag}>"
            for text, cell in zip(is_text, cells, strict=True)
        )

    rows = []
    for number, row in enumerate(table.rows):
        attribute = ' class="front"' if number in table.highlighted else ""
        rows.append(f"<tr{attribute}>{line('td', row)}</tr>")
    head = line("th", table.columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _html(sections: Sequence[Section]) -> str:
    body = []
    for section in sections:
        body.append(f"<h2>{plain_html(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{plain_html(section.text)}</p>")
        if section.figure is not None:
            data = base64.b64encode(section.figure).decode()
            body.append(f'<img alt="{plain_html(section.title)}" src="data:image/png;base64,{data}">')
        if section.table is not None:
            body.append(_html_table(section.table))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qcli study</title>'
        f"<style>{_STYLE}</style></head><body><h1>Study</h1>{''.join(body)}</body></html>\n"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, Link):
        return value.file
    return f"{value:.4g}" if isinstance(value, float) else str(value)
