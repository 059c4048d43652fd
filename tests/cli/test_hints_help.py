"""Doing as the hint says helps: each case is a command that fails, its hint, and the command that the hint asks for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from qcli.cli.main import main
from tests.cli.conftest import Invoke
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """`hint` is as in docs/errors.md, `…` standing for anything; commands are in words, folders in braces."""

    hint: str
    fails: str
    helps: str


RTN = "--method rtn --group-size 32"
TEXT = "--data {text} --window 16 --max-windows 2"
GPTQ = "--group-size 32 --data {text} --samples 4 --seq-len 16"
CASES = [
    Case("--baseline MODEL", f"eval {{q}} {TEXT} --max-kl 9", f"eval {{q}} {TEXT} --max-kl 9 --baseline {{m}}"),
    Case("--baseline MODEL --data TEXT", f"eval {{q}} {TEXT} --layers", f"eval {{q}} {TEXT} --layers --baseline {{m}}"),
    Case(
        "use more text, or a smaller --window",
        "eval {m} --data {short} --window 99",
        "eval {m} --data {short} --window 4",
    ),
    Case(
        "use more text, or a smaller --seq-len",
        "quantize {m} --group-size 32 --data {short} --samples 2 --seq-len 99 --out {out}",
        "quantize {m} --group-size 32 --data {short} --samples 2 --seq-len 4 --out {out}",
    ),
    Case(
        "use --seq-len … (for evaluation: --window …) or less",
        "quantize {m} --group-size 32 --data {text} --samples 2 --seq-len 999 --out {out}",
        "quantize {m} --group-size 32 --data {text} --samples 2 --seq-len 256 --out {out}",
    ),
    Case(
        "--temperature 1",
        "generate {m} --prompt a --top-p .5",
        "generate {m} --prompt a --top-p .5 --temperature 1 --max-new-tokens 2",
    ),
    Case("shorten the prompt", f"generate {{m}} --prompt {'x' * 999}", "generate {m} --prompt x --max-new-tokens 2"),
    Case(
        "leave out --resume required",
        f"quantize {{m}} {RTN} --out {{out}} --resume required",
        f"quantize {{m}} {RTN} --out {{out}}",
    ),
    Case(
        "choose another --out, or replace it: --force",
        f"quantize {{m}} {RTN} --out {{q}}",
        f"quantize {{m}} {RTN} --out {{out}}",
    ),
    Case("name the folder of the rows, or check first with --dry-run", "study {study}", "study {study} --dry-run"),
    Case("run the study: qcli study STUDY.yaml --out …", "study report {empty}", "study {study} --out {out}"),
    Case("create one: qcli study STUDY.yaml --out DIR", "study report {m}", "study {study} --out {out}"),
    Case(
        "start from the unquantized model", f"quantize {{q}} {RTN} --out {{out}}", f"quantize {{m}} {RTN} --out {{out}}"
    ),
    Case(
        "quantize the model first",
        "distill {m} --teacher {m} --data {text} --samples 40 --seq-len 16 --dry-run",
        "distill {q} --teacher {m} --data {text} --samples 40 --seq-len 16 --dry-run",
    ),
    Case(
        "pack the folder of `qcli quantize` that it was made from",
        "pack {packed} --format dense --out {out}",
        "pack {q} --format dense --out {out}",
    ),
    Case("qcli eval … --json > …", "pack {q} --evaluation {evaluation} --dry-run", f"eval {{q}} {TEXT} --json"),
    Case(
        "leave the revision out", f"quantize {{m}} --revision main {RTN} --dry-run", f"quantize {{m}} {RTN} --dry-run"
    ),
    Case("give the model's folder", f"quantize {{m}}/config.json {RTN} --dry-run", f"quantize {{m}} {RTN} --dry-run"),
    Case("auto, cpu, cuda or cuda:N", f"eval {{m}} {TEXT} --device tpu", f"eval {{m}} {TEXT} --device cpu"),
    Case("auto, …", f"eval {{m}} {TEXT} --dtype int8", f"eval {{m}} {TEXT} --dtype bfloat16"),
    Case("convert it to UTF-8", "eval {m} --data {latin} --window 16", f"eval {{m}} {TEXT}"),
    Case("lm-eval's own tasks are trusted anyway", f"eval {{m}} {TEXT} --trust-tasks", f"eval {{m}} {TEXT}"),
    Case("`qcli quantize`, `distill` and `pack` write them", "verify {m}", "verify {q}"),
    Case("model: ...", "recipe validate {list}", "recipe validate {recipe}"),
    Case("see `… --help`", "quantize --bitz 3", "quantize --help"),
    Case("pack it as qcli or dense", "pack {three} --format gptq --dry-run", "pack {three} --dry-run"),
    Case(
        "pack it as qcli or dense, or quantize in groups that divide",
        "pack {ragged} --format compressed-tensors --dry-run",
        "pack {ragged} --format dense --dry-run",
    ),
    Case(
        "pack it as qcli or dense, or quantize with `zero_point: integer`",
        "pack {float} --format compressed-tensors --dry-run",
        "pack {q} --format compressed-tensors --dry-run",
    ),
    Case(
        "pack it as qcli, gguf or dense, or quantize without `lm_head` and `embeddings`",
        "pack {vocabulary} --format compressed-tensors --dry-run",
        "pack {q} --format compressed-tensors --dry-run",
    ),
    Case(
        "pack it as qcli, or quantize without activations; compressed-tensors stores method fp8 with activations of "
        "type float",
        "pack {activations} --format dense --dry-run",
        "pack {activations} --dry-run",
    ),
    Case(
        "quantize with …; or pack it as qcli or dense; --allow-refused (in a recipe `pack.allow_refused: true`) "
        "writes it for another engine",
        "pack {three} --format compressed-tensors --dry-run",
        "pack {three} --format compressed-tensors --allow-refused --dry-run",
    ),
    Case(
        "the checkpoint was made from …",
        "distill {q} --teacher {other} --data {text} --samples 40 --seq-len 16 --dry-run",
        "distill {q} --teacher {m} --data {text} --samples 40 --seq-len 16 --dry-run",
    ),
    Case(
        "use the model that was quantized as --baseline, or leave --layers out",
        f"eval {{q}} --baseline {{other}} {TEXT} --layers",
        f"eval {{q}} --baseline {{m}} {TEXT} --layers",
    ),
    Case(
        "without --chat it continues a text",
        "generate {bare} --chat --prompt a",
        "generate {bare} --prompt a --max-new-tokens 2",
    ),
]
QUANTIZED = {
    "q": f"{RTN} --symmetric",
    "three": f"{RTN} --bits 3",
    "float": f"{RTN} --set method.zero_point=float",
    "ragged": "--method rtn --group-size 48 --group-tail ragged",
    "vocabulary": f"{RTN} --set lm_head.bits=8 --set lm_head.group_size=32",
    "activations": f"{RTN} --set activations.bits=8",
}


def ended(*arguments: object) -> object:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its quantized and packed versions, texts, recipes and studies."""
    folder = tmp_path_factory.mktemp("hints")
    named = {name: folder / name for name in (*QUANTIZED, "packed", "empty")}
    text = " ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400))
    contents = {
        "text.txt": text,
        "short.txt": text[:60],
        "broken.jsonl": "{",
        "jsonl.jsonl": '{"text": "some text of a few words"}\n',
        "list.yaml": "[1]\n",
        "recipe.yaml": "model: m\n",
    }
    model = named["m"] = tiny_model("llama", folder)
    named["other"] = tiny_model("opt", folder)
    named["bare"] = shutil.copytree(model, folder / "bare")
    for file in named["bare"].glob("chat_template*"):
        file.unlink()
    contents["study.yaml"] = (
        f"base: {{model: {model}, method: {{name: rtn, group_size: 32}}, "
        f"eval: {{perplexity: [{folder / 'text.txt'}], window: 16, max_windows: 2}}}}\ngrid: {{method.bits: [4]}}\n"
    )
    contents["empty.yaml"] = contents["study.yaml"].replace("group_size: 32", "group_size: 7")
    for name, content in contents.items():
        named[name.partition(".")[0]] = folder / name
        (folder / name).write_text(content)
    named["empty"] = folder / "failed"
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    named["latin"] = folder / "latin.txt"
    evaluation = ("eval", model, "--data", named["text"], "--window", 16, "--max-windows", 2, "--json")
    named["evaluation"] = folder / "evaluation.json"
    with pytest.MonkeyPatch.context() as patch, named["evaluation"].open("w") as output:
        patch.setenv("QCLI_CACHE", str(folder / "cache"))
        for name, flags in QUANTIZED.items():
            assert ended("quantize", model, *flags.split(), "--out", named[name], "-q") == 0
        assert ended("pack", named["q"], "--format", "dense", "--out", named["packed"], "-q") == 0
        assert ended("study", folder / "empty.yaml", "--out", named["empty"], "-q") == 2
        patch.setattr("sys.stdout", output)
        assert ended(*evaluation) == 0
    return named


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"[^\w-]+", " ", case.hint).strip())
def test_doing_as_the_hint_says_helps(case: Case, invoke: Invoke, places: dict[str, Path], tmp_path: Path) -> None:
    named = {**places, "out": tmp_path / "out"}
    code, _, err = invoke(*(word.format_map(named) for word in case.fails.split()))
    assert code in (2, 3, 4, 5, 6)
    hint = err.splitlines()[-1].removeprefix("hint: ")
    assert re.fullmatch(".*".join(map(re.escape, case.hint.split("…"))), hint), err
    helped = invoke(*(word.format_map(named) for word in case.helps.split()))
    assert helped.code == 0, helped.err
