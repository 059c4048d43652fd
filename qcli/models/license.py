"""The licence that a model's card on the hub names, so that cards of what is made from it can name it, too."""

from __future__ import annotations

import re
from pathlib import Path

from qcli.utils.files import reading

_FRONT = 64 << 10  # bytes of a card that are searched
_FIELD = re.compile(
    r"(?P<key>license|license_name|license_link):[ \t]*(?P<quote>['\"]?)(?P<value>\S+?)(?P=quote)[ \t]*"
)
_VALUES = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]*"),
    "license_name": re.compile(r"[\w.-]+", re.ASCII),
    "license_link": re.compile(r"(https?://)?[\w./%?=&~+-]+", re.ASCII),
}


def license_of(folder: Path) -> dict[str, str] | None:
    """The fields `license`, `license_name` and `license_link` in the front matter of a folder's `README.md`.

    Fields of another form than the hub's are left out: they would end up in another card. None: it names no licence.

    Raises:
        QcliError: the file cannot be read; see `os_problem`.
    """
    file = folder / "README.md"
    if not file.is_file():
        return None
    with reading(file), file.open("rb") as stream:
        lines = stream.read(_FRONT).decode(errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (stripped := [line.strip() for line in lines[1:]]):
        return None
    fields = {}
    for line in lines[1 : 1 + stripped.index("---")]:
        match = _FIELD.fullmatch(line)
        if match is not None and _VALUES[match["key"]].fullmatch(match["value"]):
            fields[match["key"]] = match["value"]
    return fields if "license" in fields else None
