"""Task files of the user's own run no code unless --trust-tasks says so; those of lm-eval keep theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import lm_eval.tasks
import pytest
import yaml  # type: ignore[import-untyped]
from lm_eval import utils
from lm_eval.api import task
from lm_eval.tasks import _yaml_loader

from qcli.evaluation import task_sandbox
from qcli.evaluation.task_sandbox import sandboxed
from qcli.evaluation.tasks import Tasks
from qcli.utils.errors import UnsupportedError, UsageError
from tests.evaluation.test_tasks import measure
from tests.tiny import tiny_model

pytestmark = pytest.mark.xdist_group("lm-eval")  # one worker alone imports it

TASK: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question | upper}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A file that exists once code has run."""
    return tmp_path / "it ran"


def write(folder: Path, **fields: Any) -> str:
    """A folder with the task, changed in some fields."""
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text(json.dumps({"question": "a", "choices": ["x", "y"], "label": 0}) + "\n")
    data = {"data_files": {"test": str(folder / "data.jsonl")}}
    text = yaml.safe_dump({**TASK, "dataset_kwargs": data, **fields})
    (folder / "mine.yaml").write_text(text.replace("'!function ", "!function '"))
    return str(folder)


def run(folder: str, model: Path, *, trusted: bool = False) -> None:
    tasks = Tasks(["mine"], folder, trusted=trusted)
    tasks.require_data()
    measure(tasks, model)


def test_plain_templates_and_data_are_all_a_task_needs(tmp_path: Path) -> None:
    run(write(tmp_path / "tasks"), tiny_model("llama", tmp_path))


def test_templates_reach_nothing_of_the_interpreter(tmp_path: Path, proof: Path) -> None:
    shell = f"touch '{proof}'"
    attack = f'{{{{ cycler.__init__.__globals__.os.popen("{shell}").read() }}}}'
    folder, model = write(tmp_path / "tasks", doc_to_text=attack), tiny_model("llama", tmp_path)
    with pytest.raises(UsageError, match="a template of task mine does what only trusted ones may") as refused:
        run(folder, model)
    assert refused.value.hint is not None and "--trust-tasks" in refused.value.hint
    assert not proof.exists()
    run(folder, model, trusted=True)
    assert proof.exists()


@pytest.mark.parametrize("field", ["process_docs", "doc_to_text", "custom_dataset", "class"])
def test_functions_of_task_files_are_not_imported(field: str, tmp_path: Path, proof: Path) -> None:
    folder = write(tmp_path / "tasks", **{field: "!function code.f"})
    (tmp_path / "tasks" / "code.py").write_text(f"open({str(proof)!r}, 'w')\ndef f(docs):\n    return docs\n")
    with pytest.raises(UsageError, match=r"runs code: !function code\.f"):
        Tasks(["mine"], folder).require_data()
    assert not proof.exists()


def test_functions_of_included_files_are_not_imported_either(tmp_path: Path, proof: Path) -> None:
    (tmp_path / "other.yaml").write_text("process_docs: !function code.f\n")
    (tmp_path / "code.py").write_text(f"open({str(proof)!r}, 'w')\ndef f(docs):\n    return docs\n")
    folder = write(tmp_path / "tasks", include=str(tmp_path / "other.yaml"))
    with pytest.raises(UsageError, match="runs code: !function"):
        Tasks(["mine"], folder).require_data()
    assert not proof.exists()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metric_list": [{"metric": "/evil/metric.py"}]}, "no metric '/evil/metric.py' of its own"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "no metric 'acc' of its own"),
        ({"use_prompt": "promptsource:x"}, "templates of promptsource:x are not restricted"),
        ({"dataset_path": "pandas"}, "data of kind 'pandas' may run code"),
        ({"dataset_kwargs": {"storage_options": {"fo": {}}}}, "storage_options may run code"),
        ({"dataset_kwargs": {"data_files": ["reference://x"]}}, "data at 'reference://x' may run code"),
        ({"dataset_kwargs": {"data_files": {"test": "zip://x::a.zip"}}}, "data at 'zip://x::a.zip' may run code"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_other_ways_to_code_are_closed(fields: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        Tasks(["mine"], write(tmp_path / "tasks", **fields)).require_data()


def test_tasks_of_lm_eval_keep_their_functions() -> None:
    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    with sandboxed():
        assert callable(_yaml_loader._import_func_in_yml("utils.process_docs", folder))
        with pytest.raises(UsageError, match="runs code that the model or the data holds"):
            _yaml_loader._import_func_in_yml("utils.pass_at_1", folder.parent / "mbpp")


def test_everything_is_as_before_afterwards() -> None:
    def state() -> list[Any]:
        return [utils.env, _yaml_loader._import_func_in_yml, task.get_metric, task.get_prompt, datasets.load_dataset]

    before = state()
    with pytest.raises(ZeroDivisionError), sandboxed():
        assert not any(one is other for one, other in zip(before, state(), strict=True))
        raise ZeroDivisionError
    assert all(one is other for one, other in zip(before, state(), strict=True))


def test_a_version_that_cannot_be_restricted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = utils.env
    monkeypatch.delattr(_yaml_loader, "_import_func_in_yml")
    with pytest.raises(UnsupportedError, match="cannot restrict task files in this version of lm-eval"), sandboxed():
        pass
    assert utils.env is own
    assert task_sandbox.TRUST
