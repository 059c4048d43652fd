"""The JSON schema of recipes."""

from __future__ import annotations

from qcli.recipe.plugins import METHODS, build_method
from qcli.recipe.schema import recipe_schema
from qcli.utils import registry


def test_schema_names_every_option_of_every_method() -> None:
    schema = recipe_schema()
    names = registry.names(METHODS)
    assert schema["properties"]["method"]["oneOf"] == [{"$ref": f"#/$defs/{name}"} for name in names]
    for name in names:
        properties = schema["$defs"][name]["properties"]
        auto = {"target_bpw", "fused"} if name not in ("onebit", "dbllm", "full-precision", "fp8", "nvfp4") else set()
        assert set(properties) == {"name", *type(build_method({"name": name})).model_fields} | auto
        assert all("description" in field for field in properties.values())
