"""Text to windows: the protocol to the token, and every kind of bad data in one line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import save_file

from qcli.data.calibration_folder import write_record
from qcli.data.datasets import read_text, require_text
from qcli.data.identity import text_identity
from qcli.data.tokens import TokenRequest, calibration_tokens, evaluation_tokens
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.windows import evaluation_windows
from qcli.models.open import ModelSource, open_source
from qcli.utils.cache import Cache
from qcli.utils.errors import UsageError
from qcli.utils.progress import silent
from tests.tiny import VOCAB, tiny_model

TEXT = " ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(60))


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tiny Llama: a token a byte, a context of 256."""
    return open_source(str(tiny_model("llama", tmp_path)))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a file, return its path."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


def ids_of(source: ModelSource, text: str) -> torch.Tensor:
    return torch.tensor(source.tokenizer()(text, add_special_tokens=False)["input_ids"])


def problem(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The error of a call: one line, with a hint."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_calibration_windows_lie_where_the_seed_says(source: ModelSource, file: Callable[[str, str], str]) -> None:
    data = file("a.txt", TEXT)
    tokens = calibration_tokens(TokenRequest(data, samples=5, seq_len=32, seed=3), source)
    ids, generator = ids_of(source, TEXT), random.Random(3)
    offsets = [generator.randrange(0, len(ids) - 32) for _ in range(5)]
    assert tokens.ids.tolist() == [ids[offset : offset + 32].tolist() for offset in offsets]
    assert tokens.ids.dtype == torch.int64
    assert tokens.data == data
    assert tokens.sha256 == calibration_tokens(TokenRequest(data, samples=5, seq_len=32, seed=3), source).sha256
    assert tokens.sha256 != calibration_tokens(TokenRequest(data, samples=5, seq_len=32, seed=4), source).sha256


@pytest.mark.parametrize("seed", range(4))
def test_held_out_and_validation_windows_share_no_token_with_others(
    source: ModelSource, file: Callable[[str, str], str], seed: int
) -> None:
    text = "".join(random.Random(5).choices("abcdefghijklmnop", k=4000))  # no window of it occurs twice
    ids, data = ids_of(source, text), file("a.txt", text)

    def offsets(**options: Any) -> list[int]:
        tokens = calibration_tokens(TokenRequest(data, samples=30, seq_len=32, seed=seed, **options), source).ids
        return [int(torch.nonzero((ids.unfold(0, 32, 1) == window).all(1)).item()) for window in tokens]

    drawn, held, validated = offsets(), offsets(held_out=6), offsets(held_out=6, validation=12)
    assert held[-6:] == drawn[-6:] and validated[:30] == held
    assert all(abs(one - other) >= 32 for one in held[:-6] for other in held[-6:])
    assert all(abs(one - other) >= 32 for one in validated[:30] for other in validated[30:])
    assert all(abs(one - other) >= 32 for i, one in enumerate(validated[30:]) for other in validated[31 + i :])
    kept = [all(abs(offset - other) >= 32 for other in drawn[-6:]) for offset in drawn[:-6]]
    assert 0 < sum(kept) < 24
    assert [offset for offset, keep in zip(held, kept, strict=False) if keep] == [
        offset for offset, keep in zip(drawn, kept, strict=False) if keep
    ]


def test_a_text_that_held_out_samples_fill_is_too_short(source: ModelSource, file: Callable[[str, str], str]) -> None:
    text = TEXT[:60]
    data, length = file("a.txt", text), len(ids_of(source, text)) - 2
    assert calibration_tokens(TokenRequest(data, samples=4, seq_len=length, seed=0), source).ids.shape == (4, length)
    request = TokenRequest(data, samples=4, seq_len=length, seed=0)
    for each in (replace(request, held_out=1), replace(request, validation=1)):
        message = problem(calibration_tokens, each, source)
        assert "too short for samples that do not overlap" in message and str(length + 2) in message


def test_evaluation_windows_follow_each_other_without_bos(source: ModelSource, file: Callable[[str, str], str]) -> None:
    data, ids = file("a.txt", TEXT), ids_of(source, TEXT)
    tokens = evaluation_tokens(data, source, window=100)
    assert tokens.ids.flatten().tolist() == ids[: len(ids) // 100 * 100].tolist()
    assert torch.equal(evaluation_tokens(data, source, window=100, max_windows=2).ids, tokens.ids[:2])


def test_global_generators_are_left_alone(source: ModelSource, file: Callable[[str, str], str]) -> None:
    data = file("a.txt", TEXT)
    states = torch.random.get_rng_state(), random.getstate()
    calibration_tokens(TokenRequest(data, samples=5, seq_len=32, seed=3), source)
    evaluation_tokens(data, source, window=32)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_documents_are_joined_by_an_empty_line(tmp_path: Path, file: Callable[[str, str], str]) -> None:
    documents = ["one\u2028still one", "two", "three"]
    lines = "\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in documents)
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for data in (file("a.jsonl", f"{lines}\n\n"), str(tmp_path / "a.parquet")):
        assert read_text(data, calibration=True) == "one\u2028still one\n\ntwo\n\nthree"


def test_self_for_calibration_and_evaluation_are_different_texts(source: ModelSource) -> None:
    calibration = calibration_tokens(TokenRequest("self", samples=2, seq_len=16, seed=0), source)
    evaluation = evaluation_tokens("self", source, window=16, max_windows=2)
    assert calibration.ids.shape == evaluation.ids.shape == (2, 16)
    assert not torch.equal(calibration.ids, evaluation.ids)
    assert calibration.data == evaluation.data == "self"


def test_a_calibration_folder_gives_its_tokens_verbatim(source: ModelSource, tmp_path: Path) -> None:
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    (tmp_path / "calibration").mkdir()
    save_file({"ids": ids}, tmp_path / "calibration" / "tokens.safetensors")
    tokens = calibration_tokens(TokenRequest(str(tmp_path / "calibration"), samples=9, seq_len=99, seed=5), source)
    assert torch.equal(tokens.ids, ids)
    cut = evaluation_tokens(str(tmp_path / "calibration"), source, window=20, max_windows=3)
    assert torch.equal(cut.ids, ids[:3])
    with pytest.raises(UsageError, match="has windows of 20 tokens, 21 are asked for"):
        evaluation_tokens(str(tmp_path / "calibration"), source, window=21)
    for window, length in ((None, 20), (12, 12)):
        options = EvalOptions([str(tmp_path / "calibration")], window)
        (tokens,) = evaluation_windows(options, [source], Cache(None), silent)
        assert torch.equal(tokens.ids, ids[:, :length])
    assert torch.equal(evaluation_tokens(str(tmp_path / "calibration"), source, window=8).ids, ids[:, :8])


@pytest.mark.parametrize(
    ("name", "calibration", "split", "joined"),
    [
        ("wikitext2", True, "train", "a\n\nb"),
        ("wikitext2", False, "test", "a\n\nb"),
        ("c4", True, "train[:10000]", "a b"),
        ("c4", False, "validation[:1100]", "a b"),
        ("ptb", False, "test", "a b"),
    ],
)
def test_named_sets_come_through_datasets(
    name: str, calibration: bool, split: str, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **options: Any) -> dict[str, list[str]]:
        assert options["split"] == split
        return {"text": ["a", "b"], "sentence": ["a", "b"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(name, calibration=calibration) == joined


def test_a_named_set_without_network(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (ConnectionError)\nsee the docs")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError) as caught:
        calibration_tokens(TokenRequest("wikitext2", samples=1, seq_len=8, seed=0), source)
    assert caught.value.message == (
        "data set 'wikitext2' could not be loaded: Couldn't reach 'Salesforce/wikitext' on the Hub (ConnectionError)"
    )
    assert "`self`" in str(caught.value.hint)


def test_too_short_says_how_short(source: ModelSource, file: Callable[[str, str], str]) -> None:
    data = file("a.txt", "x" * 32)
    exact = calibration_tokens(TokenRequest(data, samples=1, seq_len=31, seed=0), source)
    assert exact.ids.shape == (1, 31)
    assert problem(calibration_tokens, TokenRequest(data, samples=1, seq_len=32, seed=0), source) == (
        f"{data}: too short for calibration: 32 tokens, but a window of 32 needs 33"
    )
    assert problem(evaluation_tokens, data, source, window=33) == (
        f"{data}: too short for evaluation: 32 tokens, but one window needs 33"
    )


def test_windows_beyond_the_context_are_refused(source: ModelSource, file: Callable[[str, str], str]) -> None:
    assert source.context_length == 256
    for data in (file("a.txt", TEXT), "self"):
        message = problem(calibration_tokens, TokenRequest(data, samples=1, seq_len=257, seed=0), source)
        assert message == "windows of 257 tokens do not fit the model's context of 256"
        assert problem(evaluation_tokens, data, source, window=257) == message
    assert "no token to predict" in problem(evaluation_tokens, "self", source, window=1)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_files(name: str, content: str, file: Callable[[str, str], str]) -> None:
    data = file(name, content)
    assert problem(read_text, data, calibration=True) == f"{data}: contains no text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "no 'text'"),
        ('{"text": 3}', "'text' is no text"),
        ('{"text": " "}', "'text' is empty"),
        ('["text"]', "a row is a JSON object, not a list"),
        ('{"text": "\\ud800"}', "'text' contains half a character (a lone surrogate)"),
        ('{"text": "x"', "not JSON: Expecting ',' delimiter"),
        ("[" * 100_000, "not JSON: nested too deeply, or a huge number"),
        ("1" * 5_000, "not JSON: nested too deeply, or a huge number"),
    ],
)
def test_bad_lines_have_their_number(line: str, message: str, file: Callable[[str, str], str]) -> None:
    data = file("a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    assert problem(read_text, data, calibration=True) == f"{data}:3: {message}"


def test_bad_files(tmp_path: Path, file: Callable[[str, str], str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "body.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "none.parquet")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    expected = {
        str(tmp_path / "body.parquet"): "it is unclear which column is the text; its columns: body, n",
        str(tmp_path / "none.parquet"): "row 1: 'text' is no text",
        file("text.parquet", "no parquet"): "not a readable parquet file",
        str(tmp_path / "latin.txt"): "not UTF-8 text (byte 3)",
        str(tmp_path / "missing.txt"): "no such file",
        file("a.tsv", "x"): "unknown kind of file '.tsv'",
    }
    for data, message in expected.items():
        assert problem(read_text, data, calibration=True).startswith(f"{data}: {message}")
    unread = [data for data, message in expected.items() if message.startswith(("no such", "unknown"))]
    assert len(unread) == 2
    for data, message in expected.items():
        if data in unread:
            assert problem(require_text, data) == f"{data}: {message}"
        else:
            require_text(data)


@pytest.mark.parametrize("start", range(4, 900, 64))
def test_a_parquet_file_that_lost_bytes_is_refused(start: int, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"hello world {n} " * 20 for n in range(60)]}), file)
    content = file.read_bytes()
    file.write_bytes(content[:start] + content[start + 200 :])
    assert "a.parquet: " in problem(read_text, str(file), calibration=True)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    column = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert "not a readable parquet file" in problem(read_text, str(tmp_path / "a.parquet"), calibration=True)


def test_tokens_beyond_the_vocabulary_are_named(source: ModelSource, file: Callable[[str, str], str]) -> None:
    tokenizer = source.tokenizer()
    tokenizer.add_tokens([f"<new {n}>" for n in range(VOCAB - len(tokenizer) + 1)])
    new = tokenizer.convert_ids_to_tokens(VOCAB)
    tokenizer.save_pretrained(source.path)
    data = file("a.txt", f"{new} hello " * 20)
    for call in (
        lambda: evaluation_tokens(data, source, window=16),
        lambda: calibration_tokens(TokenRequest(data, samples=1, seq_len=8, seed=0), source),
    ):
        message = problem(call)
        assert f"gives '{new}' the id {VOCAB}" in message and f"vocabulary ends at {VOCAB - 1}" in message


def test_cached_tokens_of_a_larger_model_are_refused(tmp_path: Path, file: Callable[[str, str], str]) -> None:
    """The same tokenizer gives the same cache entry."""
    models = [open_source(str(tiny_model("llama", tmp_path, vocab_size=rows))) for rows in (VOCAB + 8, VOCAB)]
    for model in models:
        tokenizer = model.tokenizer()
        tokenizer.add_tokens([f"<new {n}>" for n in range(VOCAB - len(tokenizer) + 1)])
        new = tokenizer.convert_ids_to_tokens(VOCAB)
        tokenizer.save_pretrained(model.path)
    data, cache = file("a.txt", f"{new} hello " * 20), Cache(tmp_path / "cache")
    larger, smaller = models
    assert int(evaluation_tokens(data, larger, window=16, cache=cache).ids.max()) == VOCAB
    assert f"the id {VOCAB}" in problem(evaluation_tokens, data, smaller, window=16, cache=cache)


def test_an_unknown_set_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown data set 'wikitext'") as caught:
        read_text("wikitext", calibration=True)
    assert caught.value.hint == "did you mean 'wikitext2'? known: builtin, c4, ptb, wikitext2, self; or a file"


def test_folders_that_are_no_calibration(source: ModelSource, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    request = TokenRequest(str(folder), samples=1, seq_len=8, seed=0)
    assert "no tokens.safetensors" in problem(calibration_tokens, request, source)
    (folder / "tokens.safetensors").write_bytes(b"torn")
    assert "truncated or broken" in problem(calibration_tokens, request, source)
    save_file({"ids": torch.full((1, 8), 320)}, folder / "tokens.safetensors")
    assert "vocabulary of 320" in problem(calibration_tokens, request, source)
    assert "vocabulary of 320" in problem(evaluation_tokens, str(folder), source, window=8)


def test_calibration_folders_are_checked_when_they_are_read(source: ModelSource, tmp_path: Path) -> None:
    ids = torch.arange(16).view(2, 8)
    save_file({"ids": ids}, tmp_path / "tokens.safetensors")
    record = {"tokens_sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(), "text_identity": "00"}
    write_record(tmp_path, record)
    request = TokenRequest(str(tmp_path), samples=1, seq_len=8, seed=0)
    assert torch.equal(calibration_tokens(request, source).ids, ids)
    assert text_identity(str(tmp_path), calibration=True) == "00"
    save_file({"ids": ids ^ 1}, tmp_path / "tokens.safetensors")
    assert "its hash is not the one in calibration.json" in problem(calibration_tokens, request, source)
    file = tmp_path / "calibration.json"
    for damaged in (file.read_text().replace('"00"', '"01"'), "[]", "no json"):
        file.write_text(damaged)
        assert "calibration.json: damaged" in problem(calibration_tokens, request, source)
        with pytest.raises(UsageError, match=r"calibration\.json: damaged"):
            text_identity(str(tmp_path), calibration=True)
    file.write_text(json.dumps(record))  # as earlier versions wrote it
    assert text_identity(str(tmp_path), calibration=True) == "00"
