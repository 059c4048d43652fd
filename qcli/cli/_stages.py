"""What `qcli run` has done already: the record beside its results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcli.utils.errors import StateError
from qcli.utils.files import read_json, write_json
from qcli.utils.run_folder import differences

RECORD = "stages.json"


class Stages:
    """The stages of a run folder, and what each result was made from.

    A stage is recorded before it starts. Results appear complete or not at all, so a result that is there, with
    a record of the same inputs, is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record: dict[str, Any] = read_json(folder / RECORD)
        except FileNotFoundError:
            self.record = {}
        except ValueError:
            raise StateError(f"{folder / RECORD} is damaged", hint="choose another --out") from None

    def done(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether result `name` exists; if not, its inputs are recorded.

        Raises:
            StateError: it exists and was made from other inputs (the differences are named).
        """
        result = self.folder / name
        if not result.exists():
            self.record[name] = inputs
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RECORD, self.record)
            return False
        described = differences(self.record.get(name), inputs)
        if described:
            raise StateError(
                f"{result} was made with other settings: {described}",
                hint=f"choose another --out, or remove {', '.join(self._made_of(name))}",
            )
        return True

    def _made_of(self, name: str) -> list[str]:
        """This result and those of later stages, as far as they exist."""
        names = [name, *(other for other in self._after(name) if (self.folder / other).exists())]
        return [str(self.folder / other) for other in names]

    def _after(self, name: str) -> list[str]:
        names = [*self.record]  # in the order in which stages began
        return names[names.index(name) + 1 :] if name in names else []
