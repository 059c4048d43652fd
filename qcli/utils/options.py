"""The base of all option records: frozen, and validated from plain data without conversions."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of records whose fields a user sets.

    Unknown keys are errors, values are not converted (text is no number, 1 is not true) and numbers are finite. So
    `model_dump(mode="json")` is plain data that validates to an equal record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
