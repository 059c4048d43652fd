"""Which of the decoders that transformers has can be quantized: python -m benchmarks.coverage [--images] [TYPE...].

For every registered type of causal LM, a tiny random model (`benchmarks.shrunk`) is built and saved. Its logits block
by block are compared with those of the whole model; it is quantized at 4 bits with rtn and gptq-like; what was written
is loaded in transformers, and its logits are compared with those of the stored weights, block by block.

With --images, types of models that see images too are tried likewise, with text alone.

Types run in a process beside this one, which is replaced if it dies. Every result is kept at once; without TYPE, those
that have none are made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

BITS, GROUP, SAMPLES, LENGTH = 4, 32, 6, 32
TOLERANCE = 1e-4  # of the largest logit
SECONDS = 600  # for one type
PASS, FAIL, NO_DECODER, NOT_BUILT = "pass", "fail", "not a decoder", "cannot be built"
NAME = "coverage"
PART = "quantized part of blocks"  # of the numbers in their matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--images", action="store_true", help="types of image-text-to-text in place of causal LMs")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/models.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        for model_type in given.types:
            print(json.dumps(_row(model_type, given.images)), flush=True)
        return
    from benchmarks.common import kept, save

    results = f"{NAME}-images" if given.images else NAME
    rows: dict[str, dict[str, Any]] = {row["type"]: row for row in kept(results).get("rows", [])}

    def keep(row: dict[str, Any]) -> None:
        rows[row["type"]] = row
        print(f"{row['type']}: {row['result']}{_why(row)}", flush=True)
        settings = {"bits": BITS, "group_size": GROUP, "samples": SAMPLES, "seq_len": LENGTH, "tolerance": TOLERANCE}
        save(results, {"settings": settings, "rows": [rows[name] for name in sorted(rows)]})

    types = _registered(given.images)
    if given.table:
        _write_table(results, [rows[name] for name in sorted(rows)], len(types))
        return
    _run(given.types or [name for name in types if name not in rows], keep, ["--images"] if given.images else [])
    print(_sum(list(rows.values()), len(types)))


def _sum(rows: list[dict[str, Any]], registered: int) -> str:
    counts = Counter(row["result"] for row in rows)
    return (
        f"{counts[PASS]} of {counts[PASS] + counts[FAIL]} decoders pass; {counts[NO_DECODER]} types are no decoders, "
        f"and {counts[NOT_BUILT]} cannot be built here: {len(rows)} of {registered} types."
    )


def _write_table(results: str, rows: list[dict[str, Any]], registered: int) -> None:
    """Replace what docs/models.md has between the two marks of these results."""
    start, end = f"<!-- {results} -->", f"<!-- end of {results} -->"
    file = Path(__file__).parents[1] / "docs" / "models.md"
    before, _, rest = file.read_text().partition(start)
    after = rest.partition(end)[2]
    file.write_text(f"{before}{start}\n{_table(rows, registered)}\n{end}{after}")


def _table(rows: list[dict[str, Any]], registered: int) -> str:
    def names(chosen: Callable[[dict[str, Any]], bool]) -> str:
        return ", ".join(f"`{row['type']}`" for row in rows if chosen(row))

    lines = [
        _sum(rows, registered),
        "",
        "| Result | Types |",
        "|---|---|",
        f"| pass, by a row of the table | {names(lambda row: row['result'] == PASS and bool(row.get('row')))} |",
        f"| pass, discovered | {names(lambda row: row['result'] == PASS and not row.get('row'))} |",
        f"| no decoder | {names(lambda row: row['result'] == NO_DECODER)} |",
    ]
    partly = ", ".join(f"`{row['type']}` {row[PART]:.0%}" for row in rows if row.get(PART, 1) < 0.9)
    if partly:
        what = "what several blocks share, and what is not linear, stays"
        lines += ["", f"Of these types less than 90% of the blocks is quantized; {what}: {partly}."]
    for title, result in (("What fails", FAIL), ("What cannot be built here", NOT_BUILT)):
        lines += ["", f"| {title} | At | Reason |", "|---|---|---|"]
        for row in rows:
            if row["result"] == result:
                reason = row["reason"].replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
                lines.append(f"| `{row['type']}` | {row['stage']} | {reason} |")
    return "\n".join(lines)


def _registered(images: bool) -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    return sorted(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if images else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _why(row: dict[str, Any]) -> str:
    return f" ({row['stage']}): {row['reason']}" if row["reason"] else ""


def _run(types: list[str], keep: Callable[[dict[str, Any]], None], options: list[str]) -> None:
    """Have workers do all types, one worker after the other; the type at which one dies has failed."""
    left = list(types)
    while left:
        command = [sys.executable, "-m", "benchmarks.coverage", "--worker", *options, *left]
        with tempfile.TemporaryFile() as errors:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("{"):
                    keep(json.loads(line))
                    left.pop(0)
            if worker.wait() and left:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                reason = f"the process ended with {worker.returncode}: {last}"
                keep({"type": left.pop(0), "result": FAIL, "stage": "process", "reason": reason, "seconds": None})


def _row(model_type: str, images: bool) -> dict[str, Any]:
    """Everything for one type."""
    import signal

    started = time.monotonic()
    signal.alarm(SECONDS)  # ends the process
    folder = Path(tempfile.mkdtemp(prefix="qcli-coverage-"))
    try:
        found = _Trial(model_type, folder, images).result()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.alarm(0)
    return {"type": model_type, **found, "seconds": round(time.monotonic() - started, 1)}


class _Trial:
    def __init__(self, model_type: str, folder: Path, images: bool) -> None:
        import torch

        self.model_type, self.folder, self.images = model_type, folder, images
        self.stage = "build"
        self.facts: dict[str, Any] = {}
        self.tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))

    def result(self) -> dict[str, Any]:
        from qcli.utils.errors import QcliError

        try:
            result, reason = self._try()
        except QcliError as error:
            result, reason = FAIL, str(error)
        except Exception as error:  # the reason why it fails, whatever it is
            result = NOT_BUILT if self.stage == "build" else FAIL
            reason = f"{type(error).__name__}: {error}"
        reason = " ".join(reason.replace(str(self.folder), "").split())[:300]
        return {"result": result, "stage": self.stage, "reason": reason, **self.facts}

    def _try(self) -> tuple[str, str]:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, logging

        from benchmarks.shrunk import shrunk
        from qcli.models.open import open_source
        from tests.tiny import tiny_tokenizer

        logging.set_verbosity_error()
        auto: Any = AutoModelForImageTextToText if self.images else AutoModelForCausalLM
        config = shrunk(self.model_type)
        if getattr(config, "is_encoder_decoder", False):
            return NO_DECODER, "an encoder and a decoder"
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.02 * torch.randn_like(parameter)
            if self.images and not _runs(model, self.tokens):
                return self._refused(model)
            full = _logits(model, self.tokens)
            changed = self.tokens.clone()
            changed[:, -1] += 1
            others = _logits(model, changed)
        if _differ(others[:, :-1], full[:, :-1]) > TOLERANCE:
            return NO_DECODER, "predictions depend on later tokens"
        self.stage = "save"
        original = self.folder / "model"
        model.save_pretrained(original)
        tiny_tokenizer().save_pretrained(original)
        self.stage = "read"
        source = open_source(str(original))
        self.facts["row"] = not source.family.discovered
        blocks = f"{source.family.blocks}."
        matrices = {n: prod(t.shape) for n, t in source.tensors().items() if n.startswith(blocks) and len(t.shape) > 1}
        quantized = sum(prod(linear.shape) for linear in source.linears())
        self.facts[PART] = round(quantized / sum(matrices.values()), 3)
        self.stage = "forward pass by blocks"
        self._require(self._by_blocks(original), full)
        for method in ("rtn", "gptq-like"):
            self.stage = method
            out = self.folder / method
            self._quantize(original, out, method)
            self.stage = f"load what {method} wrote"
            loaded = auto.from_pretrained(out, dtype=torch.float32).eval()
            with torch.no_grad():
                logits = _logits(loaded, self.tokens)
            packed = self._by_blocks(out)
            self._require(logits, packed)
            target = full.log_softmax(-1)
            divergence = (target.exp() * (target - packed.log_softmax(-1))).sum(-1).mean()
            self.facts[f"kl {method}"] = float(f"{float(divergence):.3g}")
        self.stage = "all"
        return PASS, ""

    def _refused(self, model: Any) -> tuple[str, str]:
        """Of a model that does not run on text alone: what a user is told."""
        from qcli.utils.errors import UnsupportedError
        from tests.tiny import tiny_tokenizer

        self.stage = "read"
        model.save_pretrained(self.folder)
        tiny_tokenizer().save_pretrained(self.folder)
        try:
            self._by_blocks(self.folder)
        except UnsupportedError as error:
            return FAIL, str(error)
        return FAIL, "qcli runs it on text alone, and it does not run itself"

    def _quantize(self, model: Path, out: Path, method: str) -> None:
        from qcli.quantization.quantize import quantize
        from qcli.recipe.load import load_recipe

        given: dict[str, Any] = {"model": str(model), "method.name": method, "method.group_size": GROUP}
        if method != "rtn":
            text = self.folder / "text.txt"
            text.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
            given |= {"calibration.data": str(text), "calibration.samples": SAMPLES, "calibration.seq_len": LENGTH}
        quantize(load_recipe(None, given | {"method.bits": BITS}), out)

    def _by_blocks(self, folder: Path) -> Any:
        import torch

        from qcli.models.open import open_source
        from qcli.models.stream import ModelStream

        stream = ModelStream(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            return stream.logits_of(self.tokens)

    def _require(self, found: Any, expected: Any) -> None:
        difference = _differ(found, expected)
        if not difference <= TOLERANCE:
            raise AssertionError(f"logits differ by {difference:.2g} of the largest")


def _runs(model: Any, tokens: Any) -> bool:
    try:
        _logits(model, tokens)
    except Exception:  # of whatever type the model's code raises
        return False
    return True


def _logits(model: Any, tokens: Any) -> Any:
    """Of a model; of its language model, where it insists on images."""
    try:
        return model(input_ids=tokens).logits
    except (TypeError, ValueError):
        inner = getattr(model, "language_model", None) or getattr(model, "text_model", None)
        if inner is None or inner.get_output_embeddings() is None:
            raise
        return inner(input_ids=tokens).logits


def _differ(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
