"""Imports point down, and what must start fast imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcli

ROOT = Path(qcli.__file__).parent
LAYERS = (
    ("errors", "registry", "bits", "progress", "memory", "allocator", "launch", "processes", "markdown", "_autoload"),
    ("format", "quantized", "formats"),
    (
        "method",
        "methods",
        "solvers",
        "training",
        "trained",
        "refine",
        "losses",
        "distillation",
        "transform",
        "transforms",
        "low_rank",
        "activations",
        "gates",
    ),
    (
        "models",
        "layouts",
        "compute",
        "shards",
        "checkpoint",
        "run_folder",
        "cache",
        "self_text",
        *("data", "texts"),
        "hf",
        "vllm_quantization",
        "vllm_plugin",
    ),
    (
        *("yaml_places", "plugins", "recipe_errors", "recipe_draft", "recipe_text"),
        *("recipe", "recipe_sections", "recipe_loading", "recipe_schema", "allocation", "plan", "study_grid"),
    ),
    (
        "block_transforms",
        "block_loop",
        "calibrate",
        "quantize",
        *("allocate", "sensitivity"),
        *("distill", "distill_model", "distill_blocks", "distill_plan", "teaching", "plots"),
        "pack",
        *("evaluate", "evaluation", "recipe_evaluation", "scoring"),
        *("tasks", "layer_errors"),
        "verify",
        "inspection",
        *("export", "packable"),
        "exports",
        "model_card",
    ),
    (
        "study",
        "study_content",
        "study_rows",
        "study_run",
        "study_processes",
        "study_ray",
        "study_findings",
        "study_plots",
        "study_report",
    ),
    ("doctor", "ui", "cli", "__main__"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
VERBS = ("calibrate", "quantize", "distill", "pack", "evaluate", "verify", "inspection")
TORCH_FREE_AT_THE_TOP = (
    *(
        "errors",
        "registry",
        "progress",
        "processes",
        "allocator",
        "format",
        "method",
        "yaml_places",
        "recipe",
        "recipe_sections",
        "recipe_errors",
    ),
    *("plugins", "recipe_draft", "recipe_text", "recipe_loading", "recipe_schema", "allocation"),
    *("refine", "distillation", "gates", "texts", "plan", "ui", "doctor", "cli", "formats", "methods"),
    *("models.arch", "models.base", "models.source"),
)
HEAVY = {"torch", "transformers", "datasets", "tokenizers", "accelerate", "gguf", "pyarrow", "lm_eval"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(file: Path) -> str:
    """`models.arch` for `qcli/models/arch.py`; the empty text for `qcli/__init__.py`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, but not what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def own_imports(file: Path, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and first component below `qcli` of everything that `file` imports from the package."""
    for line, name in imports(ast.parse(file.read_text()), top_only=top_only):
        package, _, rest = name.partition(".")
        component = rest.partition(".")[0]
        if package == "qcli" and component in LAYER:
            yield line, component


def test_every_module_has_a_layer() -> None:
    components = {dotted(file).partition(".")[0] for file in modules()} - {""}
    assert components <= LAYER.keys()


@pytest.mark.parametrize("file", modules(), ids=dotted)
def test_imports_point_down(file: Path) -> None:
    here = dotted(file).partition(".")[0]
    if not here:
        return
    upward = [
        f"{file.name}:{line} imports {name} (layer {LAYER[name]})"
        for line, name in own_imports(file)
        if LAYER[name] > LAYER[here]
    ]
    assert not upward, f"{here} is in layer {LAYER[here]}"


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_do_not_import_each_other(verb: str) -> None:
    assert {name for _, name in own_imports(ROOT / f"{verb}.py")} & set(VERBS) <= {verb}


@pytest.mark.parametrize("file", modules(), ids=dotted)
def test_no_heavy_import_at_the_top_of_light_modules(file: Path) -> None:
    name = dotted(file)
    light = name in TORCH_FREE_AT_THE_TOP or name.partition(".")[0] in TORCH_FREE_AT_THE_TOP
    if light:
        tops = {module.partition(".")[0] for _, module in imports(ast.parse(file.read_text()), top_only=True)}
        assert not tops & HEAVY


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}


def test_importing_qcli_is_light() -> None:
    assert not modules_after("import qcli") & (HEAVY | {"pydantic", "rich", "typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_neither_torch_nor_pydantic_nor_rich(arguments: list[str]) -> None:
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "typer" in after
    assert not after & (HEAVY | {"pydantic", "rich", "ruamel", "numpy"})


@pytest.mark.parametrize("arguments", [[], ["nope"], ["quantize", "--help"], ["quantize", "--nope"], ["recipe"]])
def test_wrong_usage_and_help_of_commands_are_light_too(arguments: list[str]) -> None:
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert not after & (HEAVY | {"rich", "ruamel", "numpy"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "m", "--method", "rtm", "--out", "x"],
        ["quantize", "m", "--bits", "99", "--dry-run"],
        ["recipe", "schema"],
        ["recipe", "show", "--set", "model=m"],
        ["run", "no-such-recipe.yaml"],
    ],
)
def test_recipe_errors_and_explanations_do_not_import_torch(arguments: list[str]) -> None:
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "pydantic" in after
    assert not after & HEAVY
