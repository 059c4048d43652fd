"""Names of texts that are no paths. No torch, nothing that takes long to import: help texts list them."""

from __future__ import annotations

from qcli.data.rows import kinds
from qcli.utils import registry

SETS = "qcli.data.sets"
SELF = "self"  # sampled from the model
FILES = f"{', '.join(kinds()[:-1])} or {kinds()[-1]}"
HINT = f"give a local {FILES} file, `builtin`, or `self` for text sampled from the model"

NO_HUB = (
    "--data builtin needs no hub; nor does a recipe with --set calibration.data=builtin --set "
    f"'eval.perplexity=[builtin]'; other texts: a local {FILES} file, or `self`, sampled from the model"
)


def set_names() -> list[str]:
    """Names of the data sets in `sets/`; imports none of them."""
    return registry.names(SETS)


def is_named(data: object) -> bool:
    """Whether `data` is the name of a data set in `sets/`."""
    return data in set_names()
