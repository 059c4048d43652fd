"""`qcli recipe validate|show|schema`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._command import Command
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables

app = typer.Typer()


@app.callback(invoke_without_command=True)
def recipe(context: typer.Context) -> None:
    """Validate and show recipes, and print their JSON schema."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=Command)
def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML recipes.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Report every error of every recipe, with its place."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.recipe.load import load_recipe
        from qcli.utils.errors import UsageError

        errors, hints = [], []
        for recipe in recipes:
            try:
                load_recipe(recipe, {})
            except UsageError as error:
                errors += error.message.split("\n")
                hints += [error.hint] if error.hint else []
        if errors:
            raise UsageError(*errors, hint="; ".join(dict.fromkeys(hints)) or None)
        session.result({"valid": [str(recipe) for recipe in recipes]}, show_valid)


def show_valid(tables: Tables, result: dict[str, Any]) -> None:
    """One line per file."""
    for file in result["valid"]:
        tables.line(f"{file}: valid")


@app.command(cls=Command)
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="FILE", help="YAML recipe.")] = None,
    set_: flags.Sets = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Print a resolved recipe with the origin of each value."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.recipe.load import load_recipe

        resolved = load_recipe(recipe, {}, set_ or ())
        if json:
            session.result(resolved.to_dict())
        else:
            session.text(resolved.to_yaml(origins=True))


@app.command(cls=Command)
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    with Session() as session:
        from qcli.recipe.schema import recipe_schema

        session.result(recipe_schema())
