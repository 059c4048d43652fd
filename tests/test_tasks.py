"""lm-eval's tasks on our checkpoints, from files that the test writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.errors import UsageError
from qcli.evaluate import compare
from qcli.tasks import Tasks
from tests.quantizing import run
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("lm-eval")  # one worker alone imports it

QUESTIONS = [
    {
        "question": f"{n} times {n + 1} is",
        "choices": [f" {n * (n + 1) + shift}" for shift in (0, 1, 17)],
        "label": n % 3,
    }
    for n in range(12)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of lm-eval with a choice of three answers."""
    folder = tmp_path / "tasks"
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
    return folder


@torch.no_grad()
def accuracy(model: Path, questions: int) -> float:
    """Which answer's tokens are likeliest after the question, one forward pass each."""
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tiny_tokenizer()
    right = 0
    for entry in QUESTIONS[:questions]:
        scores = []
        for choice in entry["choices"]:  # type: ignore[attr-defined]
            before, whole = (tokenizer(text)["input_ids"] for text in (entry["question"], entry["question"] + choice))
            log = loaded(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(log[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        right += scores.index(max(scores)) == entry["label"]
    return right / questions


def test_scores_are_those_of_the_loaded_models(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    small = tmp_path / "small"
    run(model, small, method__name="rtn", method__bits=2)
    tasks = Tasks(["our_times"], str(folder), limit=10)
    (found,) = compare([str(small)], baseline=str(model), data=[], tasks=tasks, device="cpu")
    told = found.to_json()
    result = told["tasks"]["our_times"]
    assert (result["metric"], result["samples"], result["version"]) == ("acc", 10, "3")
    assert result["score"] == pytest.approx(accuracy(small, 10))
    assert result["baseline"] == pytest.approx(accuracy(model, 10))
    assert result["stderr"] > 0 or result["score"] in (0, 1)
    assert told["kl"] is None and told["perplexity"] == {}


def test_unknown_tasks_offer_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match="task 'our_tims' does not exist") as caught:
        Tasks(["our_tims"], str(folder))
    assert "our_times" in str(caught.value.hint)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        Tasks(["our_times"], "nowhere")
