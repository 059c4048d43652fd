"""`qcli generate`."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qcli.utils.registry import names
from tests.cli.conftest import Invoke
from tests.quantizing import run
from tests.tiny import tiny_model, with_merge


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_text_goes_to_stdout_and_figures_to_stderr(invoke: Invoke, model: Path) -> None:
    flags = ("--prompt", "one and", "--max-new-tokens", 8)
    code, out, err = invoke("generate", model, *flags, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["tokens"]) == 8 and result["stopped"] == "length"
    assert result["prompt_tokens"] == len("one and")
    assert result["tokens_per_second"] > 0 and result["first_token_seconds"] > 0
    assert result["memory"]["peak"] and result["memory"]["tensors"] > 0
    assert result["backends"] == {}
    code, out, err = invoke("generate", model, *flags)
    assert (code, out) == (0, result["text"] + "\n")
    (last,) = err.splitlines()[-1:]
    assert last.startswith("8 tokens, ") and "tokens/s" in last and "--max-new-tokens reached" in last
    assert invoke("generate", model, *flags, "--quiet") == (0, out, "")


def test_the_same_seed_gives_the_same_text(invoke: Invoke, model: Path) -> None:
    flags = ("--prompt", "one", "--max-new-tokens", 12, "--temperature", 1, "--top-p", 0.9, "--quiet")
    texts = [invoke("generate", model, *flags, "--seed", seed).out for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_stdin_is_a_prompt(invoke: Invoke, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--max-new-tokens", 4, "--quiet")
    expected = invoke("generate", model, "--prompt", "one\ntwö", *flags)
    type_in(monkeypatch, "one\ntwö\n".encode())
    assert invoke("generate", model, *flags) == expected
    type_in(monkeypatch, b"one")
    chat = invoke("generate", model, "--chat", *flags)
    assert chat == invoke("generate", model, "--chat", "--prompt", "one", *flags)
    assert chat != invoke("generate", model, "--prompt", "one", *flags)
    assert invoke("generate", model, "--chat", "--system", "x", "--prompt", "one", *flags).out != chat.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", " \n"), "the prompt is empty"),
        (("--prompt", "a" * 256), "the prompt has 256 tokens, the model's context 256"),
        (("--prompt", "a", "--system", "b"), "--system needs --chat"),
        (("--prompt", "a", "--chat-template", "b"), "--chat-template needs --chat"),
        (("--prompt", "a", "--chat", "--chat-template", "b"), "has no chat template 'b'"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--temperature", "nan"), "temperature"),
        (("--prompt", "a", "--temperature", "inf"), "temperature"),
        (("--prompt", "a", "--temperature", "1", "--top-p", "0"), "top-p"),
        (("--prompt", "a", "--temperature", "1", "--top-p", "1.5"), "top-p"),
        (("--prompt", "a", "--top-p", "0.5"), "--top-p needs a temperature"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max-new-tokens"),
        (("--prompt", "a", "--seed", "-1"), "seed"),
        (("--prompt", "a", "--device", "toaster"), "toaster"),
        (("--prompt", "a", "--dtype", "int3"), "int3"),
        (("--prompt", "\udcff"), "the prompt is not valid UTF-8"),
    ],
)
def test_bad_input_is_one_line(invoke: Invoke, model: Path, flags: tuple[str, ...], message: str) -> None:
    code, out, err = invoke("generate", model, *flags)
    assert (code, out) == (2, ""), err
    (line,) = [line for line in err.splitlines() if not line.startswith("hint: ")]
    assert line.startswith("error: ") and message in line


def test_bad_stdin_models_and_tokenizers(
    invoke: Invoke, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_in(monkeypatch, b"a\xff")
    assert invoke("generate", model)[:2] == (2, "")
    type_in(monkeypatch, b"")
    assert "the prompt is empty" in invoke("generate", model).err
    code, _, err = invoke("generate", tmp_path / "none", "--prompt", "a")
    assert code == 2 and "does not exist" in err
    (model / "chat_template.jinja").unlink()
    code, _, err = invoke("generate", model, "--prompt", "a", "--chat")
    assert code == 2 and "has no chat template" in err
    small = tiny_model("llama", tmp_path, vocab_size=40)
    code, _, err = invoke("generate", small, "--prompt", "one")
    assert code == 2 and "the model's vocabulary ends at 39" in err
    for file in small.glob("tokenizer*"):
        file.unlink()
    code, _, err = invoke("generate", small, "--prompt", "one")
    assert code == 2 and "no usable tokenizer" in err


@pytest.mark.slow
@pytest.mark.parametrize("format", names("qcli.export.targets"))
def test_every_packed_checkpoint_says_what_its_dense_export_says(invoke: Invoke, tmp_path: Path, format: str) -> None:
    """In float32, on a model whose files are float32 too."""
    flags = ("--prompt", "one two three", "--max-new-tokens", 12, "--dtype", "float32", "--json")
    quantized, dense, packed = tmp_path / "q", tmp_path / "dense", tmp_path / "packed"
    model = with_merge(tiny_model("llama", tmp_path))
    run(model, quantized, method__name="rtn", method__bits=4, method__symmetric=True)
    assert invoke("pack", quantized, "--out", dense, "--format", "dense").code == 0
    assert invoke("pack", quantized, "--out", packed, "--format", format).code == 0
    code, out, err = invoke("generate", packed, *flags)
    assert code == 0, err
    result, expected = json.loads(out), json.loads(invoke("generate", dense, *flags).out)
    assert (result["tokens"], result["text"]) == (expected["tokens"], expected["text"])
    assert sum(result["backends"].values()) == (0 if format in ("dense", "gguf") else 14)
    assert (result["memory"]["tensors"] < expected["memory"]["tensors"]) == (format not in ("dense", "gguf"))


class Terminal:
    """A command on a pseudo terminal for stdin, with its output in pipes."""

    def __init__(self, *arguments: object) -> None:
        self._typing, terminal = pty.openpty()
        command = [sys.executable, "-m", "qcli", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, stdin=terminal, text=True, env=environment, **pipes)
        os.close(terminal)

    def type(self, text: str) -> None:
        os.write(self._typing, text.encode())

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        os.close(self._typing)
        return self.process.returncode, out, err


@pytest.mark.slow
def test_a_conversation_on_a_terminal(invoke: Invoke, model: Path) -> None:
    """It keeps what was said, forgets it on request, survives a turn that is too long, and ends with its input."""
    flags = ("--max-new-tokens", 4, "--quiet")
    terminal = Terminal("generate", model, "--chat", *flags)
    terminal.type("one\n\n" + "a" * 256 + "\none\n/reset\none\n\x04")
    code, out, err = terminal.end()
    assert code == 0, err
    expected = invoke("generate", model, "--chat", "--prompt", "one", *flags).out
    assert out.startswith(expected) and out.endswith(expected)
    assert out != 3 * expected and len(out) > 2 * len(expected)
    assert "tokens, the model's context 256" in err
    assert "/reset begins a new conversation" in err


@pytest.mark.slow
def test_a_terminal_gets_no_prompt_from_nobody(model: Path, invoke: Invoke) -> None:
    code, out, err = Terminal("generate", model).end()
    assert (code, out) == (2, "")
    assert err.startswith("error: no prompt\nhint: --prompt TEXT")
    code, _, err = Terminal("generate", model, "--chat", "--json").end()
    assert code == 2 and "--json needs a prompt" in err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_printed(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, max_position_embeddings=1 << 20, eos_token_id=None)
    command = [sys.executable, "-m", "qcli", "generate", str(model), "--prompt", "one"]
    command += ["--max-new-tokens", "1000000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell starts with &
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    (first + rest).decode()
    assert err.decode().splitlines()[-1] == "interrupted"
