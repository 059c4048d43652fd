"""`qcli recipe validate|show|schema`."""

from pathlib import Path
from typing import Annotated

import typer

from qcli.cli import _flags as flags
from qcli.cli._command import Command, Group
from qcli.cli.ui.session import Session
from qcli.utils.text import printable

app = typer.Typer(cls=Group)


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
        if json:
            session.result({"valid": [str(recipe) for recipe in recipes]})
        else:  # without rich, a fifth of the start
            session.text("".join(f"{printable(str(recipe))}: valid\n" for recipe in recipes))


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
