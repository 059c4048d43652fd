"""The house has few rooms, imports run one way between them, and what must start fast imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qcli
from qcli.cli.main import main
from tests.quantizing import write_text
from tests.tiny import tiny_model

ROOT = Path(qcli.__file__).parent
FLOORS = (  # a folder imports only from folders before it
    *("utils", "core", "algorithms", "models", "data", "recipe", "inference", "evaluation"),
    *("quantization", "distillation", "export", "pipeline", "study", "cli"),
)
TORCH_FREE_AT_THE_TOP = (  # what `--help`, recipes and `--dry-run` import; folders and files
    *("recipe", "cli", "core/formats", "core/weight.py", "core/activations.py"),
    *("algorithms/methods", "algorithms/method.py", "algorithms/layer_group.py", "algorithms/refine.py"),
    *("algorithms/transform.py", "algorithms/low_rank.py", "data/datasets.py", "quantization/plan.py"),
    *("quantization/search_space.py", "models/families.py", "models/source.py", "models/open.py"),
    *("utils/errors.py", "utils/registry.py", "utils/progress.py", "utils/dtypes.py", "utils/environment.py"),
    *("utils/distributed.py", "utils/files.py", "utils/memory.py", "utils/options.py"),
)
UNUSED = {  # what quantizing never needs: seconds of every start
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.onnx"),
    *("torch.distributed.checkpoint", "triton", "scipy", "sklearn", "pandas", "matplotlib", "pyarrow", "ray"),
    *("datasets", "lm_eval", "gguf", "transformers.trainer", "compressed_tensors", "qcli.evaluation.evaluate"),
}
HEAVY = {"torch", "transformers", "datasets", "tokenizers", "accelerate", "gguf", "pyarrow", "lm_eval"}


def modules() -> dict[str, Path]:
    """Every file of the package by dotted name; a folder's `__init__.py` has the folder's."""
    files = sorted(ROOT.rglob("*.py"))
    return {".".join(("qcli", *f.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): f for f in files}


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported; with `top_only` not what functions and type checkers import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif top_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def house() -> dict[str, dict[str, int]]:
    """By file, the files of the package that it imports anywhere, type checking included, and on which line."""
    known = modules()
    arrows: dict[str, dict[str, int]] = {}
    for name, file in known.items():
        arrows[name] = {}
        for line, imported in imports(ast.parse(file.read_text())):
            target = imported if imported in known else imported.rpartition(".")[0]
            if target in known and target not in (name, "qcli"):
                arrows[name].setdefault(target, line)
    return arrows


def folder(name: str) -> str:
    """`models` for `qcli.models.open`."""
    return name.split(".")[1]


def test_the_front_door_is_small() -> None:
    entries = {entry.name for entry in ROOT.iterdir() if entry.name != "__pycache__"}
    assert entries - {"__init__.py", "__main__.py"} == {
        name if (ROOT / name).is_dir() else f"{name}.py" for name in FLOORS
    }
    assert len(entries) <= 16


def test_imports_between_folders_run_one_way() -> None:
    upward = [
        f"{name}:{line} imports {target}"
        for name, targets in house().items()
        for target, line in targets.items()
        if name.count(".") and name != "qcli.__main__" and folder(name) != folder(target)
        if FLOORS.index(folder(target)) > FLOORS.index(folder(name))
    ]
    assert not upward


def test_no_files_import_each_other() -> None:
    """By way of others neither."""
    try:
        list(TopologicalSorter({name: targets.keys() for name, targets in house().items()}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("place", TORCH_FREE_AT_THE_TOP)
def test_no_heavy_import_at_the_top_of_light_modules(place: str) -> None:
    files = [file for file in modules().values() if file.is_relative_to(ROOT / place)]
    assert files
    for file in files:
        tops = {module.partition(".")[0] for _, module in imports(ast.parse(file.read_text()), top_only=True)}
        assert not tops & HEAVY, file


def names_after(code: str) -> set[str]:
    """Modules that a fresh interpreter has imported after `code`."""
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(run.stdout.splitlines()[-1].split())


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after `code`."""
    return {name.partition(".")[0] for name in names_after(code)}


def test_importing_qcli_is_light() -> None:
    assert not modules_after("import qcli") & (HEAVY | {"pydantic", "rich", "typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_neither_torch_nor_pydantic_nor_rich(arguments: list[str]) -> None:
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "typer" in after
    assert not after & (HEAVY | {"pydantic", "rich", "ruamel", "numpy", "socket", "ssl", "urllib.request"})


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
        ["recipe", "validate", "recipes/w3-quality.yaml"],
        ["recipe", "show", "--set", "model=m"],
        ["run", "no-such-recipe.yaml"],
    ],
)
def test_recipe_errors_and_explanations_do_not_import_torch(arguments: list[str]) -> None:
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "pydantic" in after
    assert not after & HEAVY


def test_validating_recipes_does_not_import_rich() -> None:
    assert "rich" not in modules_after(
        "from qcli.cli.main import main; main(['recipe', 'validate', 'recipes/rtn.yaml'])"
    )


@pytest.mark.parametrize("command", ["quantize", "dry run", "run", "bits: auto"])
def test_what_does_not_fit_the_layers_is_refused_without_torch(command: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"model: {model}\nmethod: {{group_size: 48}}\n")
    arguments = {
        "quantize": ["quantize", str(model), "--group-size", "48"],
        "dry run": ["quantize", str(model), "--set", "overrides=[{match: nothing, dense: true}]", "--dry-run"],
        "run": ["run", str(tmp_path / "recipe.yaml")],
        "bits: auto": ["quantize", str(model), "--bits", "auto", "--target-bpw", "1"],
    }[command]
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "pydantic" in after
    assert not after & HEAVY


def test_a_finished_study_ends_without_torch(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    study = tmp_path / "study.yaml"
    study.write_text(
        f"base: {{model: {model}, method: {{name: rtn, group_size: 32}}, "
        f"eval: {{perplexity: [{text}], window: 64, max_windows: 1}}}}\ngrid: {{method.bits: [3]}}\n"
    )
    arguments = ["study", str(study), "--out", str(tmp_path / "out"), "-q"]
    with pytest.raises(SystemExit):
        main(arguments)
    after = modules_after(f"from qcli.cli.main import main; main({arguments!r})")
    assert "pydantic" in after
    assert not after & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("more", [["gptq-like"], ["rtn"], ["rtn", "--dry-run"]], ids=" ".join)
def test_quantizing_imports_nothing_that_it_does_not_use(more: list[str], tmp_path: Path) -> None:
    arguments = ["quantize", tiny_model("llama", tmp_path), "--group-size", 32, "--method", *more]
    arguments += ["--out", tmp_path / "out", "--device", "cpu", "--quiet"]
    if "rtn" not in more:
        arguments += ["--data", write_text(tmp_path), "--samples", 2, "--seq-len", 16]
    after = names_after(f"from qcli.cli.main import main; main({[*map(str, arguments)]!r})")
    assert (tmp_path / "out" / "config.json").exists() != ("--dry-run" in more)
    assert "transformers.modeling_utils" in after
    assert sorted(after & UNUSED) == []
