"""What packed checkpoints compute in other engines: python -m benchmarks.engines families mixtures stories smollm2

    [--llama-cpp PYTHON] [--auto-round PYTHON] [--formats F ...] [--bits N ...]

`families`: tiny random models of every family, in every layout that has an engine here; `mixtures`: those of experts;
`stories`: stories260k, whose vocabulary is SentencePiece's, with dense down_proj (172 inputs); `smollm2`: the real one.
The latter two get the first windows of 512 tokens of the WikiText-2 test set. Every engine gets the same token ids;
those that llama.cpp itself cuts another text into are compared besides (`same_tokens`). `PYTHON` are interpreters with
llama-cpp-python (any version of it that its own processor runs) and with auto-round, whose CPU layer decodes the `gptq`
layout; without them those rows are left out, as are those that `pack` refuses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qcli
from benchmarks import common
from qcli.export.pack import pack
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError
from tests.tiny import tiny_model, with_merge

WINDOWS, WINDOW = 4, 512
LLAMA_CPP = """
import sys
import llama_cpp, numpy
file, tokens, out, threads = sys.argv[1:5]
tokens, threads = numpy.load(tokens), int(threads)
model = llama_cpp.Llama(file, n_ctx=max(64, tokens.shape[1]), logits_all=True, verbose=False, n_threads=threads)
logits = []
for row in tokens.tolist():
    model.reset()
    model.eval(row)
    logits.append(numpy.array(model.scores[:len(row)]))
numpy.save(out, numpy.stack(logits))
print("llama-cpp-python", llama_cpp.__version__)
"""
LLAMA_CPP_TOKENS = """
import json, sys
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps(model.tokenize(sys.stdin.buffer.read(), add_bos=False, special=False)))
"""
# A layer computes its decoded weight when it is given the identity.
AUTO_ROUND = """
import json, sys
from importlib.metadata import version
import torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import load_file, save_file
folder, out = sys.argv[1:3]
said = json.load(open(folder + "/config.json"))["quantization_config"]
tensors = load_file(folder + "/model.safetensors")
decoded = {}
for name in [name for name in tensors if name.endswith(".qweight")]:
    layer, inputs = name.removesuffix(".qweight"), len(tensors[name.replace("qweight", "g_idx")])
    linear = QuantLinear(said["bits"], said["group_size"], inputs, tensors[name].shape[1], False)
    for part in ("qweight", "qzeros", "scales"):
        getattr(linear, part).copy_(tensors[f"{layer}.{part}"])
    decoded[layer + ".weight"] = linear.eval()(torch.eye(inputs).half()).T.contiguous()
save_file(decoded, out)
print("auto-round", version("auto-round"))
"""
Engine = Callable[[Path, Tensor], tuple[str, Tensor]]
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_scaling": LLAMA_3}),
    *((family, {}) for family in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")),
]
MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("olmoe", {}),
    ("glm4_moe", {}),
    ("dots1", {}),
]
TEXT = "It's 1984, or 2024; they're naïve: 北京, Ünïcode\t\ttabs,  two...\n\n  def f(x):\n    return x**2  # ok\n"
SCHEMES = ((4, True), (4, False), (3, False), (8, True))


@torch.no_grad()
def ours(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """Logits of qcli's own evaluation in float32, `[windows, tokens, vocabulary]`."""
    stream = ModelStream(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    return f"qcli {qcli.__version__}", stream.logits_of(tokens)


@torch.no_grad()
def in_transformers(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
    """The same in transformers, with what the checkpoint's config asks for."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    name = f"transformers {version('transformers')}"
    if "compressed-tensors" in (folder / "config.json").read_text():
        name += f", compressed-tensors {version('compressed-tensors')}"
    return name, torch.cat([model(row[None]).logits for row in tokens])


def in_llama_cpp(python: str) -> Engine:
    """The same in llama.cpp, in a process of its own."""

    def run(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
        given, found = folder / "tokens.npy", folder / "logits.npy"
        np.save(given, tokens.numpy())
        threads = str(torch.get_num_threads())
        name = elsewhere(python, LLAMA_CPP, str(folder / "model.gguf"), str(given), str(found), threads)
        return name, torch.from_numpy(np.load(found))

    return run


def in_auto_round(python: str) -> Engine:
    """The same with the quantized layers decoded by AutoRound, in a process of its own."""

    def run(folder: Path, tokens: Tensor) -> tuple[str, Tensor]:
        found = folder / "decoded"
        name = elsewhere(python, AUTO_ROUND, str(folder), str(found))
        stored = load_file(folder / "model.safetensors") | load_file(found)
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=torch.float32).eval()
        missing, _ = model.load_state_dict(stored, strict=False)  # what is not expected are the packed tensors
        if set(missing) - {"lm_head.weight"} or (missing and not config.tie_word_embeddings):
            raise SystemExit(f"{folder} has no {missing[0]}")
        return name, torch.cat([model(row[None]).logits for row in tokens])

    return torch.no_grad()(run)


def elsewhere(python: str, script: str, *arguments: str, given: str = "") -> str:
    """The last line that a script prints in another interpreter."""
    command = [python, "-c", script, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def same_tokens(python: str, folder: Path) -> bool:
    """Whether llama.cpp cuts a text into the tokens that the model's own tokenizer cuts it into."""
    expected: list[int] = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    found: list[int] = json.loads(elsewhere(python, LLAMA_CPP_TOKENS, str(folder / "model.gguf"), given=TEXT))
    return found == expected


def rows(
    name: str,
    fields: dict[str, Any],
    tokens: Tensor,
    engines: dict[str, Engine],
    given: argparse.Namespace,
    work: Path,
) -> Iterator[dict[str, Any]]:
    """A row for each scheme and layout that holds it.

    Args:
        fields: of the recipe: the model, and what else it needs.
    """
    for bits, symmetric in SCHEMES:
        if bits not in given.bits:
            continue
        native = work / f"{name}-{bits}-{symmetric}"
        scheme = {"method.name": "rtn", "method.bits": bits, "method.group_size": 32, "method.symmetric": symmetric}
        quantize(load_recipe(None, {**fields, **scheme}), native)
        _, expected = ours(native, tokens)
        for layout, engine in engines.items():
            folder = work / f"{native.name}-{layout}"
            try:
                packed = pack(native, folder, format=layout, shard_size=10**10, allow_refused=True)
            except UnsupportedError as refusal:
                print(f"{name}, {layout}: {refusal.message}", flush=True)
                continue
            engine_name, found = engine(folder, tokens)
            yield {
                "model": name,
                "format": layout,
                "bits": bits,
                "symmetric": symmetric,
                "stored": packed.notes.get("exact"),
                "bits_per_weight": round(packed.bits_per_weight, 3),
                "engine": engine_name,
                **({"same_tokens": same_tokens(given.llama_cpp, folder)} if layout == "gguf" else {}),
                **compared(expected, found, tokens),
            }


def compared(expected: Tensor, found: Tensor, tokens: Tensor) -> dict[str, float]:
    """Largest difference of a logit, mean KL in nats, and both perplexities."""
    log_p, log_q = expected.log_softmax(-1), found.float().log_softmax(-1)
    target = tokens[:, 1:, None]
    return {
        "max_logit_difference": float((expected - found).abs().max()),
        "logits_deviation": float(expected.std()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "perplexity": float((-log_q[:, :-1].gather(2, target)).mean().exp()),
        "our_perplexity": float((-log_p[:, :-1].gather(2, target)).mean().exp()),
    }


def wikitext(model: str) -> Tensor:
    """The first windows of the test set, without bos."""
    text = (common.assets() / "text" / "wikitext2.test.detok.txt").read_text()
    ids = open_source(model).tokenizer()(text[:20_000], add_special_tokens=False).input_ids
    return torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="+", choices=["families", "mixtures", "stories", "smollm2"])
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--auto-round", metavar="PYTHON")
    parser.add_argument("--formats", nargs="+", metavar="F", help="only these layouts")
    parser.add_argument("--bits", nargs="+", type=int, metavar="N", default=[bits for bits, _ in SCHEMES])
    given = parser.parse_args()
    engines: dict[str, Engine] = {"compressed-tensors": in_transformers, "dense": in_transformers}
    if given.llama_cpp:
        engines["gguf"] = in_llama_cpp(given.llama_cpp)
    if given.auto_round:
        engines["gptq"] = in_auto_round(given.auto_round)
    if given.formats is not None:
        if unknown := set(given.formats) - engines.keys():
            parser.error(f"no engine for {', '.join(sorted(unknown))}")
        engines = {layout: engine for layout, engine in engines.items() if layout in given.formats}
    random_tokens = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models: list[tuple[str, dict[str, Any], Tensor]] = []
        if "families" in given.suites:
            for family, config in FAMILIES:
                # No longer than the tiny Mistral's window, which llama.cpp does not know.
                tokens = random_tokens.view(-1, 8) if family == "mistral" else random_tokens
                label = f"tiny {family}" + (", Llama 3's rotary scaling" if config else "")
                models.append((label, {"model": str(with_merge(tiny_model(family, work, **config)))}, tokens))
        if "mixtures" in given.suites:
            for family, config in MIXTURES:
                model = str(with_merge(tiny_model(family, work, **config)))
                models.append((f"tiny {family}", {"model": model}, random_tokens))
        if "stories" in given.suites:
            stories = str(common.assets() / "models" / "stories260k")
            dense = {"overrides": [{"match": "*.down_proj", "dense": True}]}  # 172 inputs are no whole groups
            models.append(("stories260k", {"model": stories, **dense}, wikitext(stories)))
        if "smollm2" in given.suites:
            models.append(("SmolLM2-135M-Instruct", {"model": common.smollm2()}, wikitext(common.smollm2())))
        for label, fields, tokens in models:
            for row in rows(label, fields, tokens, engines, given, work):
                print(row, flush=True)
                common.save_row("engines", ("model", "format", "bits", "symmetric"), row, __doc__)


if __name__ == "__main__":
    main()
