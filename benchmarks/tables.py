"""All measured rows as tables: python -m benchmarks.tables -> results/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.common import RESULTS

COLUMNS = {
    "samples": "windows",
    "bits_per_weight": "bits/weight",
    "kl": "KL",
    "perplexity": "perplexity",
    "additions_per_weight": "additions/weight",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
}


def main() -> None:
    lines = [
        "# Every row that was measured",
        "",
        "Made by `python -m benchmarks.tables` from the JSON files beside it.",
    ]
    for file in sorted(RESULTS.glob("*.json")):
        rows = json.loads(file.read_text()).get("rows", [])
        if rows and all("name" in row and "kl" in row for row in rows):
            lines += ["", f"## {file.stem}", "", *_table(rows)]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    known = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    yield f"| | {' | '.join(COLUMNS[name] for name in known)} |"
    yield "|---" * (len(known) + 1) + "|"
    for row in rows:
        cells = [str(row["name"]).replace("|", "\\|"), *(_cell(row.get(name)) for name in known)]
        yield f"| {' | '.join(cells)} |"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
