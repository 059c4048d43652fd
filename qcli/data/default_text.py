"""The text where none is named: the public one where a hub can be reached, else the one that comes with qcli. No torch.

A text that is named never falls back to another.
"""

from __future__ import annotations

from functools import cache

from qcli.utils.errors import warn

AUTO = "auto"
ON_HUB = "wikitext2"
WITHOUT_HUB = "builtin"
DEFAULT = f"{ON_HUB}, or {WITHOUT_HUB} where no hub can be reached"

_SECONDS = 3.0


def named(data: str) -> str:
    """`data`, and for `auto` the name of the text that stands for it in this process; says so if that is `builtin`."""
    return default_text() if data == AUTO else data


@cache
def default_text(flags: str = "--data TEXT") -> str:
    """`wikitext2`, or `builtin` where no hub can be reached, which a warning says.

    Args:
        flags: of the command at hand, with which another text is named.
    """
    if reason := _unreachable():
        warn(f"{reason}: the text is {WITHOUT_HUB!r}, which comes with qcli, not {ON_HUB!r}; {flags} names another")
        return WITHOUT_HUB
    return ON_HUB


def _unreachable() -> str | None:
    """Why no hub can be reached; None: it can, or a proxy decides."""
    import socket  # late, with the others: a fifth of the start of the command line
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return None
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except (OSError, ValueError):
        return f"{address.hostname} cannot be reached"
    return None
