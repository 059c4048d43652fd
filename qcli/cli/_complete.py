"""Values that a shell completes after a flag. Where none begins as what was typed, it offers files."""

from collections.abc import Callable, Iterable


def one_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes a flag that takes one of these values."""
    known = list(values)

    def complete(incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return complete


def several_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """What completes a flag that takes some of these values, separated by commas."""
    known = list(values)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{value}" for value in known if value.startswith(last) and value not in given]

    return complete
