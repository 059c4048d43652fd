"""A task of lm-eval with a choice of three answers."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {
        "question": f"{n} times {n + 1} is",
        "choices": [f" {n * (n + 1) + shift}" for shift in (0, 1, 17)],
        "label": n % 3,
    }
    for n in range(12)
]


def write_task(folder: Path) -> None:
    """Write the task `our_times` into a new folder."""
    folder.mkdir()
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "times.jsonl").write_text(lines)
    (folder / "times.yaml").write_text(
        f"""
task: our_times
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "times.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: label
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3}}
"""
    )
