"""The text that comes with qcli, and when it stands for a text that nobody named."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcli.data import default_text
from qcli.data.datasets import is_folder, read_text, require_text
from qcli.data.named_set import PackagedText
from qcli.data.tokens import TokenRequest, calibration_tokens, evaluation_tokens
from qcli.models.open import open_source
from qcli.utils.errors import QcliWarning, UsageError
from tests.tiny import tiny_model

SHA256 = {  # figures in the documentation are of this text
    True: "08b465e2c8370e1f982c9cde43a0982576127b670b34b05a9a8457efc474603c",
    False: "bfc2e88dd6a579859f8af0fd48458cc73d97ec3bc7ae2286afd92107b9d53e9e",
}


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """The default is chosen once a process."""
    default_text.default_text.cache_clear()
    yield
    default_text.default_text.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("calibration", [True, False])
def test_the_text_is_the_one_of_the_published_figures(calibration: bool) -> None:
    text = read_text("builtin", calibration=calibration)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256[calibration]
    assert "Gutenberg" not in text


def test_no_passage_is_in_both_parts() -> None:
    parts = [
        {text for text in read_text("builtin", calibration=calibration).split("\n\n") if len(text) > 150}
        for calibration in (True, False)
    ]
    assert min(map(len, parts)) > 300
    assert not parts[0] & parts[1]


def test_a_damaged_installation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "torn.xz").write_bytes(b"\xfd7zXZ\x00torn")
    for file in (tmp_path / "torn.xz", tmp_path / "missing.xz"):
        with pytest.raises(UsageError, match=f"could not be read: {file}"):
            PackagedText(file, file).read(calibration=True)


def test_the_default_without_a_hub_is_said_once(offline: None, tmp_path: Path) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    with pytest.warns(QcliWarning, match="HF_HUB_OFFLINE is set: the text is 'builtin'") as caught:
        calibration = calibration_tokens(TokenRequest("auto", samples=2, seq_len=32, seed=0), source)
        evaluation = evaluation_tokens("auto", source, window=32, max_windows=2)
    assert len(caught) == 1
    assert calibration.data == evaluation.data == "builtin"
    named = calibration_tokens(TokenRequest("builtin", samples=2, seq_len=32, seed=0), source)
    assert calibration.sha256 == named.sha256
    assert evaluation.sha256 == evaluation_tokens("builtin", source, window=32, max_windows=2).sha256


def test_a_named_text_never_falls_back(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # type: ignore[import-untyped]

    def load_dataset(path: str, **options: Any) -> None:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match="data set 'wikitext2' could not be loaded") as caught:
        read_text("wikitext2", calibration=True)
    assert caught.value.hint is not None and "--data builtin" in caught.value.hint
    assert default_text.named("wikitext2") == "wikitext2"


def test_the_hub_is_asked_for_by_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        if len(asked) > 1:
            raise ConnectionRefusedError
        return socket.socket()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.test")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert default_text.default_text() == default_text.default_text() == "wikitext2"
    default_text.default_text.cache_clear()
    with pytest.warns(QcliWarning, match=r"hub\.test cannot be reached: the text is 'builtin'"):
        assert default_text.default_text() == "builtin"
    assert asked == [("hub.test", 443)] * 2
    default_text.default_text.cache_clear()
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "proxy.test"})
    assert default_text.default_text() == "wikitext2"
    assert len(asked) == 2


def test_auto_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auto").mkdir()
    monkeypatch.chdir(tmp_path)
    require_text("auto")
    assert not is_folder("auto")
