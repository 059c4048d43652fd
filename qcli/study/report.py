"""The report of a study: Markdown, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qcli.study.findings import Finding, against_each_other, best_within, findings, gains, pareto, rest_of
from qcli.study.plots import plot_front, plot_gains
from qcli.study.rows import read_rows
from qcli.utils.environment import can_plot
from qcli.utils.errors import StateError, UnsupportedError
from qcli.utils.files import write_bytes
from qcli.utils.markdown import plain

# Bits per weight that recommendations are given for: quarters up to 4.5, where choices are many.
_BUDGETS = (*(quarters / 4 for quarters in range(4, 19)), 5.0, 6.0, 7.0, 8.0, 9.0)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; min-width: 6rem }
img { max-width: 100% } h2 { margin-top: 2.5rem } .front td { background: #eef5ff } code, pre { font-size: 12px }
"""


@dataclass(frozen=True)
class Table:
    """Rows under a header; `marked` are drawn apart."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Part:
    """A heading and what stands under it; `picture` is a PNG."""

    title: str
    text: str = ""
    table: Table | None = None
    picture: bytes | None = None


def write_report(out: Path) -> list[Path]:
    """Write `report.html`, `report.md` with its pictures, and a recipe for each recommendation into `out`/report, in
    place of those that an earlier report left there.

    Raises:
        StateError: no study, or no run of it ended well.
        UnsupportedError: matplotlib is not installed.
    """
    rows = read_rows(out)
    found = findings(rows)
    if not found:
        raise StateError(f"{out}: no run has ended well", hint=f"`qcli study STUDY.yaml --out {out}` makes rows")
    if not can_plot():
        raise UnsupportedError("matplotlib is not installed", hint="pip install matplotlib")
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("recipe-*.yaml"), *folder.glob("figure-*.png")):
        old.unlink()
    parts: list[Part] = []
    recipes: dict[str, str] = {}
    for number, key in enumerate(dict.fromkeys((each.model, each.texts) for each in found)):
        members = [each for each in found if (each.model, each.texts) == key]
        parts += [*_of_model(key[0], members, recipes, f"{number}-" if number else "")]
    failed = [row for row in rows if row["status"] == "failed"]
    if failed:
        told = [(str(row["point"]), row["error"]) for row in failed]
        parts.append(Part("Runs that failed", table=Table(("run", "error"), told)))
    for name, text in recipes.items():
        write_bytes(folder / name, text.encode())
    pictures = {f"figure-{n}.png": part.picture for n, part in enumerate(parts) if part.picture is not None}
    for name, picture in pictures.items():
        write_bytes(folder / name, picture)
    write_bytes(folder / "report.md", _markdown(parts).encode())
    write_bytes(folder / "report.html", _html(parts).encode())
    return [folder / "report.html", folder / "report.md", *(folder / name for name in recipes)]


def _of_model(model: str, found: Sequence[Finding], recipes: dict[str, str], prefix: str) -> list[Part]:
    front = pareto(found)
    baseline = found[0].row["baseline"]["perplexity"]
    told = ", ".join(f"{data} {value:.2f}" for data, value in baseline.items())
    fitted = sorted({text for each in found for text in each.row.get("fitted_to", [])})
    warned = f" Runs were calibrated on {', '.join(fitted)}: on other text they lose more." if fitted else ""
    ordered = sorted(found, key=lambda each: (round(each.bits, 1), math.inf if each.kl is None else each.kl))
    parts = [
        Part(
            f"{model}: loss by size",
            f"{len(found)} runs on {found[0].protocol}. Full precision: perplexity {told}. The line joins runs that no "
            f"other beats by KL.{warned}",
            picture=plot_front(found, front),
        ),
        Part(
            "All runs",
            "The best first among those of equal bits. Worst window: KL of the one that lost most. Classes by the "
            "increase of the mean perplexity.",
            Table(
                ("run", "bits/weight", "KL", "worst window", "perplexity", "increase", "class", "top-1", "seconds"),
                [_row(each) for each in ordered],
                frozenset(number for number, each in enumerate(ordered) if each in front),
            ),
        ),
    ]
    for axis in dict.fromkeys(axis for each in found for axis in each.row["point"]):
        pairs = [(before, after) for before, after in gains(found, axis) if None not in (before.kl, after.kl)]
        if pairs:
            rows = [
                (after.label, before.kl, after.kl, (after.kl or 0) / (before.kl or 1), after.bits - before.bits)
                for before, after in pairs
            ]
            columns = ("run", "KL without", "KL with", "ratio", "bits added")
            parts.append(Part(f"The effect of {axis}", table=Table(columns, rows), picture=plot_gains(pairs, axis)))
    if rows_of_methods := against_each_other(found):
        parts.insert(2, _methods(rows_of_methods))
    parts.append(_recommended(found, recipes, prefix))
    return parts


def _methods(rows: Sequence[Mapping[str, Finding]]) -> Part:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        one = next(iter(row.values()))
        losses = (row[name].kl if name in row else "" for name in names)
        cells.append((rest_of(one.row["point"]), one.bits, *losses))
    text = "KL of runs that differ in the method alone and take the same bits, to a tenth."
    return Part("Method against method", text, Table(("run", "bits/weight", *names), cells))


def _recommended(found: Sequence[Finding], recipes: dict[str, str], prefix: str) -> Part:
    rows, last = [], None
    for bits in _BUDGETS:
        best = best_within(found, bits)
        if best is None or best == last:
            continue
        last = best
        name = f"recipe-{prefix}{bits:g}bpw.yaml"
        recipes[name] = best.row["recipe"]
        rows.append((f"at {bits:g} bits per weight or less", best.label, best.bits, best.kl, best.perplexity, name))
    columns = ("budget", "take", "bits/weight", "KL", "perplexity", "recipe")
    return Part("Recommendations", "The run of least KL within each budget.", Table(columns, rows))


def _row(each: Finding) -> tuple[Any, ...]:
    seconds = each.row["seconds"].get("quantize", 0.0) + each.row["seconds"].get("distill", 0.0)
    agreed = each.row["top1_agreement"]
    worst = each.row.get("worst_window_kl", "")  # rows of earlier versions have none
    return each.label, each.bits, each.kl, worst, each.perplexity, each.increase, each.sensitivity, agreed, seconds


def _markdown(parts: Sequence[Part]) -> str:
    lines = []
    for number, part in enumerate(parts):
        lines += [f"## {plain(part.title)}", ""]
        lines += [plain(part.text), ""] if part.text else []
        lines += [f"![{plain(part.title)}](figure-{number}.png)", ""] if part.picture is not None else []
        if part.table is not None:
            lines += [f"| {' | '.join(map(plain, part.table.columns))} |", "|---" * len(part.table.columns) + "|"]
            lines += [f"| {' | '.join(plain(_shown(cell)) for cell in row)} |" for row in part.table.rows]
            lines.append("")
    return "\n".join(lines)


def _html_table(table: Table) -> str:
    words = [
        any(isinstance(row[column], str) and row[column] for row in table.rows) for column in range(len(table.columns))
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=text' if word else ''}>{escape(_shown(cell))}</{tag}>"
            for word, cell in zip(words, cells, strict=True)
        )

    rows = []
    for number, row in enumerate(table.rows):
        kind = ' class="front"' if number in table.marked else ""
        rows.append(f"<tr{kind}>{line('td', row)}</tr>")
    head = line("th", table.columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _html(parts: Sequence[Part]) -> str:
    body = []
    for part in parts:
        body.append(f"<h2>{escape(part.title)}</h2>")
        if part.text:
            body.append(f"<p>{escape(part.text)}</p>")
        if part.picture is not None:
            data = base64.b64encode(part.picture).decode()
            body.append(f'<img alt="{escape(part.title)}" src="data:image/png;base64,{data}">')
        if part.table is not None:
            body.append(_html_table(part.table))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qcli study</title>'
        f"<style>{_STYLE}</style></head><body><h1>Study</h1>{''.join(body)}</body></html>\n"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
