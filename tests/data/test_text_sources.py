"""What a recipe may say of a text: columns, chats, templates, data sets on the hub, several by weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch

from qcli.data.chats import chat_render
from qcli.data.datasets import read_text, require_text
from qcli.data.identity import may_overlap, text_identity
from qcli.data.source import TextSource, WeightedText, label
from qcli.data.tokens import TokenRequest, calibration_tokens, evaluation_tokens
from qcli.models.open import ModelSource, open_source
from qcli.utils.cache import Cache
from qcli.utils.errors import UsageError
from tests.tiny import tiny_model

ASKED, ANSWERED = "2 times 3?", "It is 6."
CHAT = f"{ASKED}</s>{ANSWERED}</s>"  # by the template of `tiny_model`
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
SHARED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
Write = Callable[[str, list[dict[str, Any]]], str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(str(tiny_model("llama", tmp_path_factory.mktemp("model"))))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows to a file, return its path."""

    def of(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return of


def problem(call: Callable[..., object], *arguments: Any, **options: Any) -> tuple[str, str]:
    """The error of a call: one line, and its hint."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"prompt_id": "7", "prompt": ASKED, "messages": MESSAGES},
        {"conversations": SHARED},
        {"prompt": ASKED, "completion": ANSWERED},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"instruction": ASKED, "output": ANSWERED},
        {"instruction": ASKED, "input": "", "output": ANSWERED},
        {"instruction": ASKED, "context": None, "response": ANSWERED},
    ],
    ids=lambda row: "+".join(row),
)
def test_chats_go_through_the_chat_template(row: dict[str, Any], kind: str, write: Write, source: ModelSource) -> None:
    data = write(kind, [row, row])
    assert read_text(data, chat_render(source), calibration=True) == CHAT * 2, "nothing stands between two chats"
    tokens = calibration_tokens(TokenRequest(data, samples=2, seq_len=8, seed=0), source)
    assert tokens.ids.shape == (2, 8)


def test_an_instruction_may_have_an_input(write: Write, source: ModelSource) -> None:
    data = write("a.jsonl", [{"instruction": "Multiply.", "input": "2, 3", "output": "6"}])
    assert read_text(data, chat_render(source), calibration=True) == "Multiply.\n\n2, 3</s>6</s>"


def test_text_comes_first_and_columns_and_templates_can_be_named(write: Write, source: ModelSource) -> None:
    row = {"text": "plain", "body": "other", "messages": MESSAGES, "n": "1"}
    data = write("a.jsonl", [row, row])

    def read(**options: Any) -> str:
        return read_text(TextSource(path=data, **options), chat_render(source), calibration=True)

    assert read() == "plain\n\nplain"
    assert read(column="body") == "other\n\nother"
    assert read(column="messages") == CHAT * 2
    assert read(template="{n}: {body} {n}{}") == "1: other 1{}\n\n1: other 1{}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "'messages' is no list of messages"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": ["hi"]}, "messages[0] is no message"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no text as its content"),
        ({"messages": [{"content": "a"}]}, "messages[0] has no text as its role"),
        ({"messages": [MESSAGES[0], {"role": "user", "content": " "}]}, "messages[1] is empty"),
        ({"messages": [{"from": "parrot", "value": "a"}]}, "messages[0] is from 'parrot'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "the chat of 'messages' contains half a character"),
        ({"other": MESSAGES}, "no 'messages'"),
        ({"messages": None}, "'messages' is no list of messages"),
    ],
)
def test_wrong_chats_have_their_line(row: dict[str, Any], message: str, write: Write, source: ModelSource) -> None:
    data = write("a.jsonl", [{"messages": MESSAGES}, row])
    found, _ = problem(read_text, data, chat_render(source), calibration=True)
    assert found.startswith(f"{data}:2: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' is no text"),
        ({"prompt": "a"}, "no 'completion'"),
        ({"prompt": MESSAGES, "completion": "a"}, "'completion' is no list of messages"),
    ],
)
def test_wrong_pairs_have_their_line(row: dict[str, Any], message: str, write: Write, source: ModelSource) -> None:
    data = write("a.jsonl", [{"prompt": ASKED, "completion": ANSWERED}, row])
    assert problem(read_text, data, chat_render(source), calibration=True)[0] == f"{data}:2: {message}"


def test_an_unclear_choice_lists_the_columns(write: Write) -> None:
    data = write("a.jsonl", [{"title": "a", "body": "b"}])
    message, hint = problem(read_text, data, calibration=True)
    assert message == f"{data}: it is unclear which column is the text; its columns: title, body"
    assert f"data: {{path: {data}, column: title}}" in hint and "instruction and output" in hint
    for options, expected in (
        ({"column": "text"}, f"{data}: no column 'text'"),
        ({"template": "{title} {text}"}, f"{data}: no column 'text', which the template names"),
    ):
        message, hint = problem(read_text, TextSource(path=data, **options), calibration=True)
        assert (message, hint) == (expected, "its columns: title, body")


def test_rows_of_a_template_may_lack_some_text_but_not_all(write: Write) -> None:
    data = write("a.jsonl", [{"a": "x", "b": ""}, {"a": "", "b": " "}])
    message, _ = problem(read_text, TextSource(path=data, template="{a}{b}"), calibration=True)
    assert message == f"{data}:2: 'a', 'b' are empty"


def test_a_model_without_a_template_and_a_template_that_refuses(write: Write, tmp_path: Path) -> None:
    data, model = write("a.jsonl", [{"messages": MESSAGES}]), tiny_model("llama", tmp_path)
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    message, hint = problem(read_text, data, chat_render(open_source(str(model))), calibration=True)
    assert message == f"{data}:1: the chat template of {model} refuses it: roles must alternate"
    (model / "chat_template.jinja").unlink()
    message, hint = problem(read_text, data, chat_render(open_source(str(model))), calibration=True)
    assert message == f"{data}:1 is a chat, and {model} has no chat template" and "template" in hint


def test_another_chat_template_is_another_cache_entry(write: Write, tmp_path: Path) -> None:
    data, model = write("a.jsonl", [{"messages": MESSAGES}] * 9), tiny_model("llama", tmp_path)
    cache = Cache(tmp_path / "cache")
    before = evaluation_tokens(data, open_source(str(model)), window=16, cache=cache)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{{ m['content'] }}{% endfor %}")
    after = evaluation_tokens(data, open_source(str(model)), window=16, cache=cache)
    assert before.sha256 != after.sha256


def test_a_template_that_writes_the_date_makes_the_same_text_every_day(write: Write, tmp_path: Path) -> None:
    data, model = write("a.jsonl", [{"messages": MESSAGES}]), tiny_model("llama", tmp_path)
    dated = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}never{% endif %}\n"
    (model / "chat_template.jinja").write_text(dated + "{{ messages[0]['content'] }}")
    text = read_text(data, chat_render(open_source(str(model))), calibration=True)
    assert text == f"\n26 Jul 2024{ASKED}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parts of the data set org/name; what is not there fails as `datasets` does."""
    parts: dict[str, Any] = {"train": datasets.Dataset.from_dict({"body": ["one", "", "two"], "n": [1, 2, 3]})}

    def load_dataset(path: str, config: str | None, *, split: str) -> Any:
        assert (path, config) == ("org/name", parts.get("config"))
        if "error" in parts:
            raise parts["error"]
        if split not in parts:
            raise ValueError(f'Unknown split "{split}". Should be one of {[*parts]}.')
        return parts[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return parts


def test_data_sets_on_the_hub(hub: dict[str, Any], source: ModelSource) -> None:
    text = TextSource(path="org/name", column="body")
    require_text("org/name")
    assert read_text(text, calibration=True) == "one\n\ntwo", "public sets have empty rows"
    message, hint = problem(read_text, text, calibration=False)
    assert message.startswith("data set 'org/name' could not be loaded: Unknown split \"validation\"")
    assert "split: ..." in hint
    hub["validation"] = datasets.Dataset.from_dict({"body": ["three"]})
    assert read_text(text, calibration=False) == "three"
    hub["test"] = datasets.Dataset.from_dict({"body": ["four"]})
    assert read_text(text, calibration=False) == "four"
    hub["train[:1]"], hub["config"] = datasets.Dataset.from_dict({"text": ["five"]}), "small"
    named = TextSource(path="org/name", split="train[:1]", config="small")
    assert read_text(named, calibration=False) == "five"
    assert str(named) == text_identity(named, calibration=True) == "org/name, config small, split train[:1]"
    message, hint = problem(read_text, TextSource(path="org/name", config="small"), calibration=True)
    assert message == "org/name: it is unclear which column is the text; its columns: body, n"
    hub["error"] = ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")
    message, hint = problem(read_text, TextSource(path="org/name", config="small"), calibration=True)
    assert message.endswith("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)") and "builtin" in hint
    hub["error"] = ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
    assert "config: ..." in problem(read_text, TextSource(path="org/name", config="small"), calibration=True)[1]


@pytest.mark.parametrize(
    ("read", "measured", "overlap"),
    [
        ({}, {"split": "train"}, True),
        ({}, {"split": "train[90%:]"}, True),
        ({"column": "question"}, {"split": "train", "column": "answer"}, True),
        ({"split": "train[:100]"}, {"split": "train[50:]", "template": "{a} {b}"}, True),
        ({"split": "train + test"}, {"split": "test[:9]"}, True),
        ({"split": "test"}, {}, True),
        ({"split": "validation"}, {}, True),  # what is measured where there is no test
        ({"split": "all"}, {"split": "test"}, True),
        ({}, {}, False),
        ({}, {"split": "test"}, False),
        ({"config": "small"}, {"split": "train"}, True),
        ({"config": "small"}, {"split": "train", "config": "large"}, False),
        ({}, {"path": "org/other", "split": "train"}, False),
        ({"path": "builtin"}, {"path": "builtin"}, False),
        ({"path": "builtin"}, {"split": "train"}, False),
    ],
)
def test_which_parts_of_a_data_set_overlap(read: dict[str, str], measured: dict[str, str], overlap: bool) -> None:
    texts = [TextSource(**{"path": "org/name", **fields}) for fields in (read, measured)]
    of_calibration, of_evaluation = (
        text_identity(text, calibration=calibration) for text, calibration in zip(texts, (True, False), strict=True)
    )
    assert of_calibration is not None
    assert (of_evaluation is not None and may_overlap(of_evaluation, of_calibration)) == overlap
    mixture = f"{'0' * 64} + {of_calibration}"
    assert (of_evaluation is not None and may_overlap(of_evaluation, mixture)) == overlap


@pytest.mark.parametrize(
    "recorded", ["org/name", "org/name, column body", "org/name, config a, split train[:1], template"]
)
def test_what_earlier_versions_recorded_of_a_data_set_is_understood(recorded: str) -> None:
    assert may_overlap("org/name, split train", recorded)
    assert not may_overlap("org/name, split test+validation", recorded)


def test_what_a_source_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert problem(require_text, TextSource(path="folder"))[0] == "folder is a folder"
    assert problem(require_text, TextSource(path="c4", column="text"))[0] == "c4 has no columns to choose from"
    assert "auto is no part" in problem(require_text, (WeightedText(path="auto"),))[0]
    assert problem(require_text, (WeightedText(path="c4"), WeightedText(path="no/such.csv")))[0] == (
        "no/such.csv: no such file"
    )


def windows(ids: torch.Tensor, text: str, source: ModelSource) -> list[bool]:
    """Which windows are cut from a text."""
    whole = source.tokenizer()(text, add_special_tokens=False)["input_ids"]
    known = {tuple(whole[i : i + ids.shape[1]]) for i in range(len(whole) - ids.shape[1] + 1)}
    return [tuple(window) in known for window in ids.tolist()]


def test_several_texts_share_the_samples_by_weight(write: Write, source: ModelSource, tmp_path: Path) -> None:
    letters, digits = "abcdefghij" * 90, "0123456789" * 90
    paths = [write("a.jsonl", [{"text": letters}]), write("b.jsonl", [{"body": digits}])]
    data = (WeightedText(path=paths[0], weight=3.0), WeightedText(path=paths[1], column="body"))
    request = TokenRequest(data, samples=12, seq_len=16, seed=0, held_out=4, validation=4)
    tokens = calibration_tokens(request, source)
    of_digits = windows(tokens.ids, digits, source)
    assert tokens.ids.shape == (16, 16)
    assert [not each for each in of_digits] == windows(tokens.ids, letters, source)
    assert sum(of_digits[:12]) == 3 and sum(of_digits[8:12]) == 1 and sum(of_digits[12:]) == 1
    assert tokens.name == label(data) == f"{paths[0]} + {paths[1]}, column body"
    identity = text_identity(data, calibration=True)
    assert identity is not None and identity.split(" + ") == [text_identity(path, calibration=True) for path in paths]
    cached = calibration_tokens(request, source, cache=Cache(tmp_path / "cache"))
    assert cached.sha256 == tokens.sha256 == calibration_tokens(request, source).sha256
    light = (data[0], WeightedText(path=paths[1], column="body", weight=0.01))
    message, _ = problem(calibration_tokens, TokenRequest(light, samples=12, seq_len=16, seed=0), source)
    assert message == f"{paths[1]}, column body: its weight of 0.01 gives it none of 12 samples"
