"""lm-eval's tasks on our checkpoints, from files that the test writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcli.data.begin import Bos
from qcli.evaluation.evaluate import compare
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.task_results import TaskResult, task_results
from qcli.evaluation.tasks import Tasks
from qcli.models.open import open_source
from qcli.utils.errors import UsageError
from qcli.utils.progress import silent
from tests.evaluation.questions import QUESTIONS, write_task
from tests.quantizing import run
from tests.tiny import tiny_model, tiny_tokenizer, with_bos

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lm-eval")]  # one worker alone imports it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks")
    return tmp_path / "tasks"


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


def measure(tasks: Tasks, model: Path) -> dict[str, TaskResult]:
    return tasks.run(str(model), open_source(str(model)), torch.device("cpu"), torch.float32, silent)


def test_scores_are_those_of_the_loaded_models(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    small = tmp_path / "small"
    run(model, small, method__name="rtn", method__bits=2)
    tasks = Tasks(["our_times"], str(folder), limit=10)
    (evaluation,) = compare([str(small)], EvalOptions([], tasks=tasks, device="cpu"), baseline=str(model))
    output = evaluation.to_json()
    result = output["tasks"]["our_times"]
    assert (result["metric"], result["samples"], result["version"]) == ("acc", 10, "3")
    assert result["score"] == pytest.approx(accuracy(small, 10))
    assert result["baseline"] == pytest.approx(accuracy(model, 10))
    assert result["stderr"] > 0 or result["score"] in (0, 1)
    assert output["kl"] is None and output["perplexity"] == {}


def test_questions_are_put_into_the_chat_template(folder: Path, tmp_path: Path) -> None:
    """The likeliest answer after the template's own prompt; a model without one is refused before it is loaded."""
    model = tiny_model("llama", tmp_path)
    tasks = Tasks(["our_times"], str(folder), limit=10, chat=True, batch_size=3)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    right = 0
    for entry in QUESTIONS[:10]:
        chat = [{"role": "user", "content": entry["question"]}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in entry["choices"]:  # type: ignore[attr-defined]
            before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + choice))
            log = loaded(torch.tensor([whole])).logits[0].detach().log_softmax(-1)
            scores.append(sum(float(log[i - 1, whole[i]]) for i in range(len(before), len(whole))))
        right += scores.index(max(scores)) == entry["label"]
    result = measure(tasks, model)["our_times"]
    assert result.chat and result.score == pytest.approx(right / 10)
    assert tasks.key != Tasks(["our_times"], str(folder), limit=10).key
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template"):
        measure(tasks, model)
    assert not measure(Tasks(["our_times"], str(folder), limit=1), model)["our_times"].chat


def test_prompts_begin_as_bos_says(folder: Path, tmp_path: Path) -> None:
    """`true` with a tokenizer that adds none gives what one that adds it gives on its own."""
    tasks, model = Tasks(["our_times", generating(folder)], str(folder)), tiny_model("llama", tmp_path)
    begins = with_bos(tiny_model("llama", tmp_path))

    def of(folder: Path, bos: Bos) -> dict[str, TaskResult]:
        return tasks.run("model", open_source(str(folder)), torch.device("cpu"), torch.float32, silent, bos)

    own, asked, without = of(begins, "auto"), of(model, True), of(begins, False)
    assert own == asked == of(begins, True) and without == of(model, "auto")
    assert [result.bos for results in (own, without) for result in results.values()] == [True, True, False, False]
    assert own["our_times"].metrics != without["our_times"].metrics


def test_unknown_tasks_offer_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match="task 'our_tims' does not exist") as caught:
        Tasks(["our_tims"], str(folder))
    assert "our_times" in str(caught.value.hint)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        Tasks(["our_times"], "nowhere")


def test_tasks_of_lm_eval_are_indexed_only_where_they_are_named(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index takes ten seconds."""
    made: list[bool] = []

    def own_only(include_path: str, include_defaults: bool = True) -> TaskManager:
        made.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_only)
    Tasks(["our_group", "our_times"], str(group))
    assert made == [False]
    (group / "mixed.yaml").write_text("group: mixed\ntask: [our_times, arc_easy]\n")
    Tasks(["mixed"], str(group))
    assert made == [False, False, True]


def test_an_empty_name_is_no_task() -> None:
    with pytest.raises(UsageError, match="task name is empty"):
        Tasks(["our_times", ""])


@pytest.fixture
def group(folder: Path, tmp_path: Path) -> Path:
    """`our_group` of `our_times` and `our_more`, which includes a file and has data elsewhere; `bare` has no score."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "common.yaml").write_text(
        (folder / "times.yaml").read_text().replace("task: our_times\n", "process_docs: !function code.keep\n")
    )
    (other / "code.py").write_text("def keep(docs):\n    return docs\n")
    for name in ("first", "second"):
        (other / f"{name}.jsonl").write_text((folder / "times.jsonl").read_text())
    files = f"[{other / 'first.jsonl'}, {other / 'second.jsonl'}]"
    (folder / "more.yaml").write_text(
        f"include: {other / 'common.yaml'}\ntask: our_more\ndataset_kwargs: {{data_files: {{test: {files}}}}}\n"
    )
    (folder / "group.yaml").write_text(
        "group: our_group\ntask: [our_times, our_more]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (folder / "bare.yaml").write_text("group: bare\ntask: [our_times, our_more]\n")
    return folder


def test_a_change_in_any_file_of_a_member_is_another_definition(group: Path, tmp_path: Path) -> None:
    def key() -> object:
        return Tasks(["our_group"], str(group)).key

    before = key()
    assert key() == before
    other = tmp_path / "other"
    for file, old, new in (
        (group / "times.jsonl", "times", "plus"),
        (group / "group.yaml", "true", "false"),
        (other / "common.yaml", 'target_delimiter: ""', 'target_delimiter: " "'),
        (other / "second.jsonl", "times", "plus"),
        (other / "code.py", "return docs", "return docs.select([0])"),
    ):
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))
        assert key() != before, file.name
        file.write_text(content)
        assert key() == before


def test_a_group_has_the_score_of_its_members(group: Path, tmp_path: Path) -> None:
    tasks = Tasks(["our_group"], str(group), limit=4, trusted=True)
    tasks.require_scores(["our_group"])
    results = measure(tasks, tiny_model("llama", tmp_path))
    assert set(results) == {"our_times", "our_more", "our_group"}
    assert (results["our_group"].samples, results["our_group"].metric) == (8, "acc")
    assert results["our_group"].score == pytest.approx((results["our_times"].score + results["our_more"].score) / 2)
    with pytest.raises(UsageError, match="bare is a group of tasks without a score of its own"):
        Tasks(["bare"], str(group)).require_scores(["bare"])


def test_an_error_in_a_template_names_the_task(folder: Path, tmp_path: Path) -> None:
    file = folder / "times.yaml"
    file.write_text(file.read_text().replace("{{question}}", "{{questoin}}"))
    tasks = Tasks(["our_times"], str(folder))
    with pytest.raises(UsageError, match="a template of task our_times does not fit its data: 'questoin' is undefined"):
        measure(tasks, tiny_model("llama", tmp_path))


def test_an_error_in_the_code_of_a_task_names_it_and_the_line(folder: Path, tmp_path: Path) -> None:
    (folder / "helpers.py").write_text("def shown(doc):\n    return doc['questoin']\n")
    file = folder / "times.yaml"
    file.write_text(file.read_text().replace('"{{question}}"', "!function helpers.shown"))
    tasks = Tasks(["our_times"], str(folder), trusted=True)
    with pytest.raises(
        UsageError, match=r"the code of task our_times fails: KeyError: 'questoin' \(.*helpers.py, line 2"
    ):
        measure(tasks, tiny_model("llama", tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"{{question}}"', "!function helpers.shown", "SyntaxError"),
        ("test_split: test", "test_split: tset", "KeyError: 'tset'"),
        ('"{{question}}"', "null", "TypeError$"),
    ],
)
def test_tasks_that_cannot_be_loaded_are_named(folder: Path, old: str, new: str, problem: str) -> None:
    (folder / "helpers.py").write_text("def shown(doc)\n")
    file = folder / "times.yaml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UsageError, match=f"task our_times cannot be loaded: {problem}"):
        Tasks(["our_times"], str(folder), trusted=True).require_data()


def test_missing_data_is_reported_before_a_model_is_loaded(folder: Path) -> None:
    Tasks(["our_times"], str(folder)).require_data()
    (folder / "times.jsonl").unlink()
    with pytest.raises(UsageError, match="the data of task our_times cannot be loaded: .*times.jsonl"):
        Tasks(["our_times"], str(folder)).require_data()


@pytest.mark.parametrize(("old", "new"), [('"label": 1', '"label": 1e30'), ('"choices": [', '"choices": ["", ')])
def test_data_that_do_not_fit_a_task_are_one_line(folder: Path, tmp_path: Path, old: str, new: str) -> None:
    file = folder / "times.jsonl"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match="task our_times cannot be (run|loaded): "):
        measure(Tasks(["our_times"], str(folder)), tiny_model("llama", tmp_path))


def test_files_that_the_readers_of_lm_eval_do_not_return_from_are_refused(folder: Path) -> None:
    deep = folder / "deep.yaml"
    deep.write_text(f"task: deep\nextra: {'[' * 5000}{']' * 5000}\n")
    with pytest.raises(UsageError, match=r"deep.yaml: nested more than 100 levels deep"):
        Tasks(["our_times"], str(folder))
    deep.write_text("task: null\n")
    with pytest.raises(UsageError, match="lm-eval cannot read its task files: "):
        Tasks(["deep"], str(folder))
    deep.unlink()
    data = folder / "times.jsonl"
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(UsageError, match=r"times.jsonl is not a regular file"):
        _ = Tasks(["our_times"], str(folder)).key
    os.mkfifo(deep)
    with pytest.raises(UsageError, match=r"deep.yaml is not a regular file"):
        Tasks(["our_times"], str(folder))


def test_ids_beyond_the_vocabulary_are_one_line(folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["t"] = 400
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="the tokenizer gives 't' the id 400, the model's vocabulary ends at 319"):
        measure(Tasks(["our_times"], str(folder)), model)


def retokenized(model: Path, **fields: object) -> Path:
    """The model with other entries in its tokenizer's config."""
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return model


def generating(folder: Path) -> str:
    """The name of a second task, whose answers are generated, in batches that are padded."""
    task = (folder / "times.yaml").read_text().replace("our_times", "our_answers")
    task = task.replace("multiple_choice", "generate_until").replace("doc_to_target: label", 'doc_to_target: "1"')
    task = task.replace('doc_to_choice: "{{choices}}"\n', 'generation_kwargs: {until: ["x"], max_gen_toks: 3}\n')
    task = task.replace("{metric: acc,", "{metric: exact_match,")
    (folder / "answers.yaml").write_text(task)
    return "our_answers"


@pytest.mark.parametrize(
    "fields",
    [{"pad_token": None}, {"pad_token": None, "eos_token": None}, {"pad_token": "<padding>"}],
    ids=["no padding", "no end", "padding beyond the vocabulary"],
)
def test_what_is_padded_does_not_matter(fields: dict[str, object], folder: Path, tmp_path: Path) -> None:
    """lm-eval would add a token for padding, which the embedding has no row for."""
    tasks = [generating(folder), "our_times"]
    model = tiny_model("llama", tmp_path, vocab_size=259, eos_token_id=None)
    expected = measure(Tasks(tasks, str(folder)), model)
    assert measure(Tasks(tasks, str(folder)), retokenized(model, **fields)) == expected


def test_a_tokenizer_without_begin_and_end_is_one_line(folder: Path, tmp_path: Path) -> None:
    model = retokenized(tiny_model("llama", tmp_path), bos_token=None, eos_token=None)
    with pytest.raises(UsageError, match="has neither a begin nor an end token, which tasks need"):
        measure(Tasks(["our_times"], str(folder)), model)


def test_without_progress_lm_eval_prints_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", tmp_path)
    monkeypatch.chdir(tmp_path)  # no repository
    tasks = Tasks(["our_times"], str(folder))
    tasks.require_data()
    capfd.readouterr()
    measure(tasks, model)
    shown = capfd.readouterr().err
    assert "it/s" not in "".join(line for line in shown.splitlines() if "Loading weights" not in line)
    assert "fatal" not in shown


def test_the_first_filter_counts_and_directions_are_kept() -> None:
    output = {
        "results": {
            "sums": {
                "alias": "sums",
                "exact_match,strict-match": 0.62,
                "exact_match_stderr,strict-match": 0.02,
                "exact_match,flexible-extract": 0.31,
                "exact_match_stderr,flexible-extract": 0.01,
            },
            "prose": {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
        },
        "n-samples": {"sums": {"effective": 5}, "prose": {"effective": 7}},
        "versions": {"sums": 1, "prose": 2},
        "higher_is_better": {"sums": {"exact_match": True}, "prose": {"word_perplexity": False}},
        "group_subtasks": {},
    }
    results = task_results(output, bos=False, chat=False)
    sums, prose = results["sums"], results["prose"]
    assert (sums.metric, sums.score, sums.stderr) == ("exact_match (strict-match)", 0.62, 0.02)
    assert sums.metrics == {"exact_match (strict-match)": 0.62, "exact_match (flexible-extract)": 0.31}
    assert (prose.metric, prose.score, prose.stderr, prose.samples) == ("word_perplexity", 20.0, None, 7)
    assert (sums.higher_is_better, prose.higher_is_better) == (True, False)
