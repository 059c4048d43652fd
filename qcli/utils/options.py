"""The base of all option records: frozen, and validated from plain data without conversions."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from qcli.utils.paths import expanded

Place = Annotated[str, AfterValidator(expanded)]
"""A path, or what may be one instead of a hub id or the name of a data set; `~` at its start is expanded."""


class Options(BaseModel):
    """Base of records whose fields a user sets.

    Unknown keys are errors, values are not converted (text is no number, 1 is not true) and numbers are finite. So
    `model_dump(mode="json")` is plain data that validates to an equal record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
