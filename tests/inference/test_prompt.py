"""Text in pieces, chat templates, and the tokens that end a text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qcli.inference.prompt import Prompts, TextStream
from qcli.models.open import open_source
from qcli.utils.errors import UsageError
from tests.tiny import tiny_model, tiny_tokenizer

TEXT = "naïve 日本語のテキスト 😀👩‍👩‍👧 and ∑ again"


def byte_fallback() -> Any:
    """A SentencePiece-like vocabulary: words with their space before, and bytes."""
    words = ["▁the", "▁of", "▁"]
    vocabulary = {token: index for index, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer)


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    for split in range(0, len(ids), 7):
        stream = TextStream(tokenizer, ids[:split])
        pieces = [stream.add(token) for token in ids[split:]]
        before = tokenizer.decode(ids[:split])
        if "\ufffd" not in before:
            assert all("\ufffd" not in piece for piece in pieces)
            assert before + "".join(pieces) + stream.end() == TEXT


def test_bytes_of_a_word_vocabulary_and_the_space_before_words() -> None:
    tokenizer = byte_fallback()
    prompt = [256, *"日本".encode()]
    stream = TextStream(tokenizer, prompt)
    new = [*"語".encode(), 257, *"😀é".encode(), 256]
    pieces = [stream.add(token) for token in new]
    assert [piece for piece in pieces if piece] == ["語", " of", "😀", "é", " the"]
    assert stream.end() == ""
    assert TextStream(tokenizer, [256]).add(257) == " of"


def test_bytes_that_are_no_text_are_replaced_at_last() -> None:
    tokenizer, generator = tiny_tokenizer(), random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(3, 259) for _ in range(40)]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.add, ids), stream.end()]) == tokenizer.decode(ids)


def test_templates(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    hello = [{"role": "user", "content": "ab"}]
    prompts = Prompts(open_source(str(folder)))
    a, b = (prompts.text(letter)[0] for letter in "ab")
    assert prompts.chat(hello) == [a, b, 1]
    for text in ("", " \n"):
        with pytest.raises(UsageError, match="the prompt is empty"):
            prompts.text(text)
        with pytest.raises(UsageError, match="the prompt is empty"):
            prompts.chat([{"role": "user", "content": text}])
    with pytest.raises(UsageError, match="not valid UTF-8"):
        prompts.text("a\udcff")
    with pytest.raises(UsageError, match="has no chat template 'rag'") as caught:
        Prompts(open_source(str(folder)), "rag").require_template()
    assert caught.value.hint == "--chat-template default"

    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UsageError, match="the chat template fails: no"):
        Prompts(open_source(str(folder))).chat(hello)
    (folder / "chat_template.jinja").write_text("{{ messages.nope.nope }}")
    with pytest.raises(UsageError, match="the chat template fails"):
        Prompts(open_source(str(folder))).chat(hello)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template$"):
        Prompts(open_source(str(folder))).require_template()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("b")
    with pytest.raises(UsageError, match="has no chat template 'default'") as caught:
        Prompts(open_source(str(folder))).require_template()
    assert caught.value.hint == "--chat-template rag"
    assert Prompts(open_source(str(folder)), "rag").chat(hello) == [b]


def test_end_tokens(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "generation_config.json").unlink()
    assert Prompts(open_source(str(folder))).ends(chat=False) == {1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Prompts(open_source(str(folder))).ends(chat=False) == {1, 7, 9}
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<pad>\n{% endfor %}")
    prompts = Prompts(open_source(str(folder)))
    assert prompts.ends(chat=True) == {1, 2, 7, 9}
    assert prompts.ends(chat=False) == {1, 7, 9}
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert Prompts(open_source(str(folder))).ends(chat=True) == {1, 7, 9}
