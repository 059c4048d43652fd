"""TEQ as a method: the trained equivalent transformation, then rounding to nearest."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.transform import Transform
from qcli.algorithms.transforms.teq import TEQ

__all__ = ["TEQThenRTN"]

_DEFAULT = TEQ()


class TEQThenRTN(RTN):
    """Shorthand for `transforms: [teq]` before `method: {name: rtn}`."""

    name: ClassVar[str] = "teq"

    loss: Literal["block", "kl", "cross-entropy"] = Field(default=_DEFAULT.loss, description="as of the transform")
    gradient: Literal["range", "straight-through"] = Field(default=_DEFAULT.gradient, description="as of the transform")
    steps: int = Field(default=_DEFAULT.steps, ge=0, description="steps of the transform's optimizer")
    lr: float = Field(default=_DEFAULT.lr, gt=0, description="learning rate of the transform")

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return (TEQ(loss=self.loss, gradient=self.gradient, steps=self.steps, lr=self.lr),)
