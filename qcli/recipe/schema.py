"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from qcli.recipe.allocation import AUTO, OWN, Allocation
from qcli.recipe.plugins import DEFAULT_METHOD, EXPORTS, METHODS, TRANSFORMS
from qcli.recipe.recipe import Recipe
from qcli.utils import registry


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe with the options of every method, for editors."""
    schema = Recipe.model_json_schema()
    names = registry.names(METHODS)
    methods = {name: registry.load(METHODS, name).model_json_schema() for name in names}
    for name, method in methods.items():
        method["properties"] = {"name": {"const": name, "description": "the method"}} | method["properties"]
        method["required"] = [] if name == DEFAULT_METHOD else ["name"]
        schema["$defs"][name] = method
    schema["properties"]["method"] = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    options = {key: value for method in methods.values() for key, value in method["properties"].items()}
    for method in methods.values():
        _offer_auto(method["properties"])
    schema["properties"]["transforms"]["items"] = {
        "anyOf": [_transform_schema(name) for name in registry.names(TRANSFORMS)]
    }
    partial = {
        "type": "object",
        "additionalProperties": False,
        "properties": options | {"name": {"enum": names}},
    }
    schema["$defs"]["Override"]["properties"]["method"] = partial
    _name_exports(schema["$defs"]["Pack"]["properties"])
    for section in ("Calibration", "Distillation"):
        _offer_names(schema["$defs"][section]["properties"]["data"])
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qcli recipe"}


def _offer_auto(options: dict[str, Any]) -> None:
    """`bits: auto`, and what goes with it."""
    if "minimum" in options.get("bits", {}):
        for name in ("bits", "group_size"):
            options[name] = {"anyOf": [options[name], {"const": AUTO}], "description": options[name]["description"]}
        own = Allocation.model_json_schema()["properties"]
        options |= {name: own[name] for name in OWN}


def _offer_names(data: dict[str, Any]) -> None:
    """Texts of a mixture may be names, too."""
    mixture = next(part for part in data["anyOf"] if part.get("type") == "array")
    mixture["items"] = {"anyOf": [{"type": "string"}, mixture["items"]]}


def _name_exports(options: dict[str, Any]) -> None:
    """The export targets, and the types that they can requantize to."""
    names = registry.names(EXPORTS)
    types = (type for name in names for type in registry.load(EXPORTS, name).requantize_types)
    options["format"]["enum"] = names
    options["requantize"]["anyOf"][0]["enum"] = list(dict.fromkeys(types))


def _transform_schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = registry.load(TRANSFORMS, name).model_json_schema()
    schema["properties"] = {"name": {"const": name, "description": "the transform"}} | schema["properties"]
    return {"anyOf": [{"const": name}, schema | {"required": ["name"]}]}
