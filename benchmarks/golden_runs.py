"""The runs of `benchmarks.golden`, and the models and texts that they read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import common

GQA = {"intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA | {"num_hidden_layers": 3},
    "gpt2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": GQA,
    "gemma2": GQA | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "falcon": {},
}
SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES |= {"initializer_range": 0.1}

TINY = "--data ../tiny.txt --samples 8 --seq-len 32"
STORIES = "quantize ../stories --data ../wiki.txt --samples 8 --seq-len 64"
RAGGED = f"{STORIES} --group-tail ragged"  # rows of 172
Q = "--out q --json"
EVAL = "--data ../tiny.txt --window 32 --max-windows 4 --json"
BASE = """
  calibration: {data: ../tiny.txt, samples: 8, seq_len: 32}
  eval: {perplexity: [../tiny.txt], window: 32, max_windows: 4}
"""
RECIPE = """
model: ../llama
calibration: {data: ../tiny.txt, samples: 8, seq_len: 32}
method: {name: gptq-like, bits: 3, group_size: 32}
overrides:
  - {match: "*.0.*.v_proj", dense: true}
  - {match: "*.down_proj", method: {bits: 5, symmetric: true}}
  - {match: "*.1.*.q_proj", method: {name: onebit, bits: 1}}
  - {match: "*.o_proj", method: {name: dbllm, bits: 2}}
distill: {steps: 8, judgements: 2, samples: 12, train: [tables, weights]}
eval: {perplexity: [../tiny.txt], window: 32, max_windows: 4, gates: {max_kl: 10}}
pack: {format: qcli, shard_size: 1MB}
"""
GRID = f"""
base:
  model: ../llama{BASE}
grid:
  method.name: [rtn, gptq-like]
  method.bits: [2, 4]
  method.group_size: [32]
"""
OPTIONS = f"""
base:
  model: ../llama{BASE}
grid:
  - method:
      - {{name: onebit, svid: svd, residual: false}}
      - {{name: onebit, svid: nmf, error_feedback: false}}
      - {{name: gptq-like, bits: 3, group_size: 32, column_order: group-aware, gptaq_alpha: 0.25, refit_target: false}}
      - {{name: gptq-like, bits: 8, group_size: -1, column_order: none, grid: minmax, refit_tables: false}}
      - {{name: rtn, bits: 3, group_size: 32, grid: search}}
      - {{name: rtn, bits: 3, group_size: 64, grid: hessian, zero_point: float}}
      - {{name: teq, bits: 4, group_size: 32, steps: 6, loss: cross-entropy, gradient: straight-through}}
      - {{name: lcq, bits: 4, group_size: 32, rank: 3, table_bits: 16, steps: 4}}
      - {{name: dbllm, group_size: 32, error_feedback: false, refit_tables: false}}
  - method: [{{name: rtn, bits: 3, group_size: 32}}]
    activations: [{{bits: 6, granularity: block, block_size: 32, symmetric: true}}]
    low_rank: [{{rank: 4, bits: 16, of: weight}}]
    refine: [{{scope: linear, steps: 4, train: [tables]}}]
"""
MODELS = f"""
base:
  model: ../llama{BASE}
  method: {{name: gptq-like, bits: 3, group_size: 32}}
grid:
  model: [{", ".join(f"../{family}" for family in FAMILIES if family != "llama")}]
"""
TASK = """
task: our_times
dataset_path: json
dataset_kwargs: {data_files: {test: times.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
target_delimiter: ""
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
QUESTIONS = "".join(
    json.dumps({"question": f"{n} times 3 is", "choices": [f" {3 * n}", f" {3 * n + 7}"], "label": 0}) + "\n"
    for n in range(12)
)


class Run(NamedTuple):
    """Commands, one after the other in a new folder; what each prints is kept there as `stdout-N`.

    Attributes:
        files: written first.
        killed: the last command writes `q`; it is done twice, once killed whenever a part of it is finished.
    """

    name: str
    commands: tuple[str, ...]
    files: dict[str, str] = {}  # noqa: RUF012
    killed: bool = False


def _run(name: str, *commands: str, killed: bool = False, **files: str) -> Run:
    return Run(name, commands, {file.replace("_", "."): text for file, text in files.items()}, killed)


def _auto(options: str) -> str:
    return f"quantize ../llama {TINY} --bits auto {options} {Q}"


STUDENT = f"quantize ../llama {TINY} --method dbllm --group-size 32 --out s --json"
DISTILL = f"distill s --teacher ../llama {TINY} --samples 12 --steps 8 --set distill.judgements=2 {Q}"
PLAIN = f"quantize ../llama {TINY} --bits 3 --group-size 32"
RUNS = (
    _run("killed-gptq-like", f"{PLAIN} {Q}", killed=True),
    _run(
        "killed-refined", f"{PLAIN} --set refine.steps=6 --set 'transforms=[{{name: teq, steps: 6}}]' {Q}", killed=True
    ),
    _run("killed-distill", STUDENT, f"{DISTILL} --scope block", killed=True),
    _run("study-grid", "study grid.yaml --out d --json", "study report d --json", grid_yaml=GRID),
    _run("study-options", "study options.yaml --out d --json", options_yaml=OPTIONS),
    _run("study-models", "study models.yaml --out d --workers 2 --json", models_yaml=MODELS),
    _run("auto-rtn", _auto("--method rtn --target-bpw 3.8 --group-size 32")),
    _run(
        "auto-fused",
        _auto("--target-bpw 3.8 --group-size auto --fused"),
        "pack q --format compressed-tensors --out p --json",
    ),
    _run("auto-stories", f"{RAGGED} --bits auto --target-bpw 3.4 {Q}"),
    _run(
        "rtn-symmetric",
        f"quantize ../llama --method rtn --bits 4 --group-size 32 --symmetric {Q}",
        *(f"pack q --format {layout} --out {layout} --json" for layout in ("gptq", "compressed-tensors", "gguf")),
        f"quantize gguf/model.gguf {TINY} --bits 5 --group-size 32 --out again --json",
        "verify gptq --json",
    ),
    _run(
        "gptq-like-stories",
        f"{RAGGED} --bits 3 {Q}",
        "eval q --baseline ../stories --data ../wiki.txt --window 64 --max-windows 6 --layers --json",
        "pack q --out native --shard-size 1MB --evaluation stdout-2.json --json",
        "pack q --out dense --format dense --shard-size 1MB --json",
        "inspect native --json",
        "verify native --json",
    ),
    _run("gptq-like-float", f"quantize ../llama {TINY} --bits 2 --group-size -1 --set method.zero_point=float {Q}"),
    _run(
        "gptq-like-symmetric",
        f"{STORIES} --bits 8 --group-size 4 --symmetric --dtype bfloat16 {Q}",
        "pack q --format compressed-tensors --out p --json",
    ),
    _run("teq", f"quantize ../llama {TINY} --method teq --group-size 32 --set method.steps=10 {Q}"),
    _run(
        "teq-kl",
        f"{RAGGED} --bits 3 --set 'transforms=[{{name: teq, loss: kl, steps: 6}}]' {Q}",
        "pack q --format gguf --requantize F16 --out p --json",
    ),
    _run(
        "lcq",
        f"quantize ../llama {TINY} --method lcq --bits 2 --group-size 32 "
        f"--set method.rank=2 --set method.basis_rows=32 --set method.steps=8 {Q}",
        "pack q --out p --json",
    ),
    _run("lcq-stories", f"{RAGGED} --method lcq --bits 3 --set method.steps=4 {Q}"),
    _run("onebit", f"quantize ../llama {TINY} --method onebit {Q}", "pack q --format dense --out p --json"),
    _run("onebit-paper", f"{STORIES} --method onebit --set method.paper=true {Q}", "pack q --out p --json"),
    _run("dbllm", f"{RAGGED} --method dbllm --set method.levels=symmetric {Q}"),
    _run("activations", f"{RAGGED} --set activations.bits=8 {Q}"),
    _run("refined-block", f"{RAGGED} --bits 2 --set refine.steps=8 {Q}"),
    _run("refined-linear", f"{PLAIN} --set 'refine={{scope: linear, steps: 6}}' {Q}"),
    _run("low-rank", f"{PLAIN} --set 'low_rank={{rank: 4, rounds: 2}}' {Q}", "pack q --out p --json"),
    _run("low-rank-rtn", f"quantize ../llama --method rtn --set 'low_rank={{rank: 4, weighted: false}}' {Q}"),
    _run("calibrated", f"calibrate ../llama {TINY} --hessians --out c --json", f"{PLAIN} --data c --samples 6 {Q}"),
    _run("self", f"{PLAIN} --data self --seed 3 {Q}"),
    _run("distill-tables", STUDENT, f"{DISTILL} --set distill.hidden_mse=0.1"),
    _run("distill-weights", STUDENT, f"{DISTILL} --train tables,weights --loss dad --set distill.accumulate=2"),
    _run("distill-onebit", STUDENT.replace("dbllm --group-size 32", "onebit"), f"{DISTILL} --loss onebit --data self"),
    _run("distill-top", STUDENT, f"{DISTILL} --set distill.teacher_top_k=4"),
    _run("run", "run recipe.yaml --out d --json", "inspect d/packed --json", recipe_yaml=RECIPE),
    _run(
        "eval",
        "quantize ../llama --method rtn --bits 2 --group-size 32 --out q --json",
        f"eval ../llama q --baseline ../llama {EVAL} --data ../wiki.txt --max-kl 0.0001 --max-ppl-ratio 9",
        "eval q --baseline ../llama --tasks our_times --include-path . --limit 10 --json",
        times_yaml=TASK,
        times_jsonl=QUESTIONS,
    ),
    _run(
        "recipe",
        "recipe schema",
        "recipe show recipe.yaml --json --set method.bits=2",
        "recipe show recipe.yaml",
        "quantize --recipe recipe.yaml --out q --dry-run --json",
        "study grid.yaml --dry-run --json",
        recipe_yaml=RECIPE,
        grid_yaml=GRID,
    ),
)


def write_inputs(work: Path) -> None:
    """Models and texts that the runs read."""
    (work / "tiny.txt").write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(900)))
    shutil.copyfile(common.assets() / "text" / "wikitext2.valid.detok.txt", work / "wiki.txt")
    (work / "stories").mkdir()
    for file in (common.assets() / "models" / "stories260k").iterdir():
        shutil.copyfile(file, work / "stories" / file.name)
    special = ("<s>", "</s>", "<pad>")
    vocabulary = {token: n for n, token in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ti"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "i")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        described = AutoConfig.for_model(family, **{**SIZES, **config})
        auto.from_config(described, dtype=torch.float32).save_pretrained(work / family)
        fast(tokenizer_object=tokenizer, **names).save_pretrained(work / family)
