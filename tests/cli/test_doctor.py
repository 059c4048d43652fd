"""`qcli doctor`."""

from __future__ import annotations

import json

import pytest
import torch

from qcli.inference import backend
from qcli.inference.backends import cpu
from tests.cli.conftest import Invoke


def test_report_as_json_and_as_tables(invoke: Invoke) -> None:
    cpu.kernels()  # built now if they are not yet, which is worth a line
    code, out, err = invoke("doctor", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] == torch.__version__
    assert report["plugin"] == "registered"
    assert report["devices"][0]["device"] == "cpu"
    assert report["memory"]["available"] <= report["memory"]["total"]
    assert {"name": "reference", "devices": "all", "reason": None} in report["backends"]
    code, out, err = invoke("doctor")
    assert (code, err) == (0, "")
    assert "transformers plug-in  registered" in out


def test_every_optional_part_has_a_purpose_and_a_way_to_install_it(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcli.utils.environment._version", lambda package: None if package == "ray" else "1.2")
    monkeypatch.setattr("qcli.inference.cpu.build._COMPILERS", ())
    monkeypatch.delenv("CXX", raising=False)
    code, out, _ = invoke("doctor", "--json")
    packages = {package["name"]: package for package in json.loads(out)["packages"]}
    parts = ("matplotlib", "ray", "compressed-tensors", "auto-round-lib", "vllm", "llama-cpp-python", "triton")
    assert code == 0 and {*parts, "gguf", "pyarrow", "accelerate", "C++ compiler"} <= packages.keys()
    assert [name for name, package in packages.items() if package["version"] is None] == ["ray", "C++ compiler"]
    assert all(package["needed"] and package["install"] for package in packages.values())
    code, out, _ = invoke("doctor")
    rows = {line.split("  ")[0].strip(): " ".join(line.split()) for line in out.splitlines()}
    assert rows["ray"] == "ray missing `study --executor ray` pip install ray"
    assert rows["C++ compiler"] == "C++ compiler missing packed layers on a CPU apt install g++"
    assert rows["vllm"].endswith("on a GPU")


def test_why_a_backend_is_missing(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "kernels", lambda: "there is no C++ compiler")
    code, out, _ = invoke("doctor")
    assert code == 0
    assert "no: there is no C++ compiler" in out
    (found,) = (entry for entry in backend.examine() if entry["name"] == "cpu")
    assert found == {"name": "cpu", "devices": "cpu", "reason": "there is no C++ compiler"}
