"""Findings and reports of a few made-up rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcli.study.findings import (
    best_within,
    findings,
    gains,
    group_size,
    method_comparisons,
    method_name,
    other_axes,
    pareto,
)
from qcli.study.report import write_report
from qcli.study.report_files import write_in_place
from qcli.utils.errors import StateError


def row(bits: float, kl: float | None, perplexity: float | None, **point: Any) -> dict[str, Any]:
    score = {"value": perplexity, "windows": 4, "window": 32, "sha256": "4"}
    return {
        "address": f"{point}",
        "status": "done",
        "point": point,
        "recipe": f"model: {point}\n",
        "bits_per_weight": bits,
        "kl": kl,
        "worst_window_kl": kl,
        "top1_agreement": 0.9,
        "perplexity": {"a": score, "b": score},
        "baseline": {"model": "<script>alert(1) $x$", "perplexity": {"a": 10.0, "b": 12.0}},
        "seconds": {"quantize": 3.0},
    }


def on_two_windows(row: dict[str, Any]) -> dict[str, Any]:
    texts = {text: score | {"windows": 2, "sha256": "2"} for text, score in row["perplexity"].items()}
    return row | {"perplexity": texts}


ROWS = [
    row(4.0, 0.1, 11.05, method={"name": "rtn", "bits": 4}, low_rank=None),
    row(4.2, 0.05, 11.4, method={"name": "rtn", "bits": 4}, low_rank={"rank": 8}),
    row(3.0, 0.5, 14.0, method={"name": "rtn", "bits": 3}, low_rank=None),
    row(3.2, 0.6, 13.0, method={"name": "rtn", "bits": 3}, low_rank={"rank": 8}),
    row(2.0, None, None, method={"name": "rtn", "bits": 2}, low_rank=None),
    {"address": "x", "status": "failed", "point": {"method": "|broken|"}, "recipe": "", "error": "no <b>text</b>"},
]


def test_classes_front_gains_and_budgets() -> None:
    runs = findings(ROWS)
    assert [run.sensitivity[0] for run in runs] == ["A", "B", "C", "C", "C"]
    assert [run.label for run in runs[:2]] == ["rtn, bits 4", "rtn, bits 4, low_rank (rank 8)"]
    assert runs[0].increase == pytest.approx(0.05)
    assert [run.bits for run in pareto(runs)] == [3.0, 4.0, 4.2]
    assert [run.bits for run in pareto(runs, "perplexity")] == [3.0, 3.2, 4.0]
    mostly_dense = row(2.5, 0.1, 11.0, method={"name": "rtn"}) | {"linear_bits_per_weight": 29.5}
    assert findings([mostly_dense])[0].bits == 29.5
    point = {"method": "GPTQ", "method.zero_point": "float", "method.name": "rtn", "refine": None}
    assert findings([row(4.0, 0.1, 11.0, **point)])[0].label == "GPTQ, zero_point float, rtn"
    pairs = [(before.bits, after.bits) for before, after in gains(runs, "low_rank")]
    assert pairs == [(4.0, 4.2), (3.0, 3.2)]
    assert method_comparisons(runs) == []
    best = [best_within(runs, bits) for bits in (2.5, 3.1, 4.1, 9.0)]
    assert [run and run.bits for run in best] == [None, 3.0, 4.0, 4.2]


def test_methods_are_compared_at_equal_bits_and_all_else_equal() -> None:
    rows = [
        row(4.02, 0.2, 11.0, **{"method": "RTN", "method.bits": 4, "refine": None}),
        row(4.03, 0.1, 11.0, **{"method": "GPTQ", "method.bits": 4, "refine": None}),
        row(4.02, 0.05, 11.0, **{"method": "GPTQ", "method.bits": 4, "refine": {"steps": 1}}),
        row(3.02, None, None, **{"method": "RTN", "method.bits": 3}),
        row(3.02, 0.7, 11.0, **{"method": "GPTQ", "method.bits": 3}),
        row(2.0, 0.9, 11.0, method={"name": "rtn", "bits": 2}),
        row(2.0, 0.8, 11.0, method={"name": "lcq", "bits": 2}),
        row(2.2, 0.7, 11.0, method={"name": "dbllm"}),
    ]
    compared = method_comparisons(findings(rows))
    assert [{name: each.kl for name, each in row.items()} for row in compared] == [
        {"lcq": 0.8, "rtn": 0.9},
        {"GPTQ": 0.7, "RTN": None},
        {"RTN": 0.2, "GPTQ": 0.1},
    ]
    assert [other_axes(next(iter(row.values())).row["point"]) for row in compared] == ["base", "bits 3", "bits 4"]
    assert method_name({"refine": None}) == "base"
    points = ({"method.group_size": 64}, {"method": {"name": "rtn", "group_size": -1}}, {"method": "rtn"})
    assert [group_size(point) for point in points] == ["64", "row", None]


@pytest.mark.slow
def test_reports_are_complete_and_escape_names(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is not a study"):
        write_report(tmp_path)
    (tmp_path / "study.json").write_text('{"version": 1}')
    with pytest.raises(StateError, match="no run has succeeded"):
        write_report(tmp_path)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in ROWS))
    html, markdown, *recipes = write_report(tmp_path)
    page, text = html.read_text(), markdown.read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "no &lt;b&gt;text" in page
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/png;base64,") == 2
    assert r"\|broken\|" in text and r"\<script\>" in text
    assert all((tmp_path / "report" / f"figure-{n}.png").read_bytes()[:4] == b"\x89PNG" for n in (0, 2))
    assert [file.name for file in recipes] == ["recipe-3bpw.yaml", "recipe-4bpw.yaml", "recipe-4.25bpw.yaml"]
    assert recipes[0].read_text() == ROWS[2]["recipe"]
    budgets = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| at ")}
    assert [line.split(" | ")[4] for line in budgets.values()] == ["noticeable", "mild", "mild"]
    assert "[recipe-3bpw.yaml](recipe-3bpw.yaml)" in text and '<a href="recipe-3bpw.yaml">' in page
    first = html.read_bytes()
    write_report(tmp_path)
    assert html.read_bytes() == first


def test_reports_replace_what_a_report_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_in_place(folder, {"report.md": b"1", "recipe-9bpw.yaml": b"1"})
    (folder / "recipe-mine.yaml").write_text("mine")
    write_in_place(folder, {"report.md": b"2", "recipe-8bpw.yaml": b"2"})
    names = {"report.md": b"2", "recipe-8bpw.yaml": b"2", "recipe-mine.yaml": b"mine"}
    assert {file.name: file.read_bytes() for file in folder.glob("r*")} == names
    for name in ("recipe-mine.yaml", "recipe-8bpw.yaml"):
        (folder / name).write_text("mine")
        with pytest.raises(StateError, match=f"{name} was edited or is not of a report"):
            write_in_place(folder, {"report.md": b"3", "recipe-mine.yaml": b"3"})
        assert (folder / name).read_text() == "mine" and (folder / "report.md").read_bytes() == b"2"
        (folder / name).unlink()
    write_in_place(folder, {"report.md": b"3"})
    assert [file.name for file in folder.glob("r*")] == ["report.md"]
    (folder / ".qcli-report.json").write_text("{}")
    with pytest.raises(StateError, match="has no checksum"):
        write_in_place(folder, {"report.md": b"3"})


@pytest.mark.slow
def test_other_texts_and_windows_are_reported_apart(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"version": 1}')
    others = [row(4.0, 0.05, 11.0, method={"name": "lcq<b>"}), row(4.0, 0.2, 11.0, method={"name": "rtn"})]
    others[1]["fitted_to"] = ["b"]
    rows = [ROWS[0], *map(on_two_windows, others)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    html, markdown, *recipes = write_report(tmp_path)
    text = markdown.read_text()
    assert text.count("## All runs") == 2
    assert "1 runs on a: 4 windows of 32 tokens, b: 4 windows" in text
    assert "2 runs on a: 2 windows of 32 tokens" in text
    assert text.count("Runs were calibrated on b: on other text they lose more") == 1
    assert "| run | bits/weight | lcq\\<b\\> | rtn |" in text and "lcq&lt;b&gt;" in html.read_text()
    assert [file.name for file in recipes] == ["recipe-4bpw.yaml", "recipe-1-4bpw.yaml"]


@pytest.mark.slow
def test_headings_are_names_and_a_severe_loss_is_a_warning(tmp_path: Path) -> None:
    baselines = {"down/there/tiny": 12.0, "x/same": None, "y/same": 12.0}
    rows = [
        row(bits, kl, 30.0, method={"name": "rtn", "group_size": 32})
        | {"baseline": {"model": model, "perplexity": {"a": 10.0, "b": other}}, "recipe": f"{model} {bits}"}
        for model, other in baselines.items()
        for bits, kl in ((2.0, 0.6), (3.0, 0.2))
    ]
    (tmp_path / "study.json").write_text('{"version": 1}')
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    _, markdown, *_ = write_report(tmp_path)
    text = markdown.read_text()
    headings = [line for line in text.splitlines() if line.endswith(": loss by size")]
    assert headings == [f"## {name}: loss by size" for name in ("tiny", "x/same", "y/same")]
    assert "perplexity a 10, b not finite." in text
    losses = [line.split(" | ")[4] for line in text.splitlines() if line.startswith("| at ")]
    assert losses == ["severe: take more bits, or distill", "noticeable"] * 3
