"""This machine and installation, as `qcli doctor` reports them."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import qcli
from qcli.utils.memory import system_memory

REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "pydantic",
    "ruamel.yaml",
    "typer",
    "rich",
    "lm-eval",
)
OPTIONAL = {  # what each is for
    "gguf": "models from .gguf files, `pack --format gguf`",
    "pyarrow": ".parquet text",
    "matplotlib": "pictures: reports of studies, curves of `distill`, --plot",
    "ray": "`study --executor ray`",
    "triton": "packed layers and training on a CUDA GPU",
    "accelerate": "device_map in transformers",
    "compressed-tensors": "transformers loads `pack --format compressed-tensors`",
    "auto-round-lib": "transformers runs `pack --format gptq` on a CPU",
    "gptqmodel": "transformers loads `pack --format awq`",
    "vllm": "serving checkpoints and packs on a GPU",
    "llama-cpp-python": "`pack --format gguf --type`, and running the files",
}


def examine() -> dict[str, Any]:
    """Versions, devices, memory, disk and the transformers plug-in, as plain data."""
    memory = system_memory()
    return {
        "qcli": qcli.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "plugin": plugin(),
        "threads": _threads(),
        "memory": None if memory is None else memory._asdict(),
        "disk": {"path": str(Path.cwd()), "free": shutil.disk_usage(Path.cwd()).free},
        "devices": devices(),
        "packages": packages(),
    }


def packages() -> list[dict[str, str | None]]:
    """Every package that qcli uses: name, installed version (None: missing), what needs it, how to install it."""
    needed = dict.fromkeys(REQUIRED, "always") | OPTIONAL
    return [
        {"name": name, "version": _version(name), "needed": why, "install": f"pip install {name}"}
        for name, why in needed.items()
    ]


def versions_of(*names: str) -> dict[str, str | None]:
    """Installed versions of packages; None: missing."""
    return {name: _version(name) for name in names}


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def devices() -> list[dict[str, Any]]:
    """The CPU and every CUDA device: name, memory, and whether bfloat16 matrix products are fast."""
    try:
        import torch
    except ImportError:
        return []
    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "memory": None,
        "bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory": properties.total_memory,
                "bf16": properties.major >= 8,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return [cpu, *gpus]


def plugin() -> str:
    """Whether transformers can load qcli's checkpoints: `registered`, or the reason why not."""
    try:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    except ImportError as error:
        return f"transformers cannot be imported: {error}"
    return "registered" if "qcli" in AUTO_QUANTIZER_MAPPING else "not registered"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
