"""`qcli doctor`."""

from __future__ import annotations

import json

import torch

from tests.cli.conftest import Invoke


def test_report_as_json_and_as_tables(invoke: Invoke) -> None:
    code, out, err = invoke("doctor", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] == torch.__version__
    assert report["plugin"] == "registered"
    assert report["devices"][0]["device"] == "cpu"
    assert report["memory"]["available"] <= report["memory"]["total"]
    code, out, err = invoke("doctor")
    assert (code, err) == (0, "")
    assert "transformers plug-in  registered" in out
