"""TEQ as a method: rounding to nearest with the transform's options."""

from __future__ import annotations

from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.methods.teq import TEQThenRTN
from qcli.algorithms.transforms.teq import TEQ


def test_options_are_those_of_the_transform() -> None:
    assert TEQThenRTN().transforms == (TEQ(),)
    method = TEQThenRTN(loss="kl", gradient="straight-through", steps=7, lr=0.002)
    assert method.transforms == (TEQ(loss="kl", gradient="straight-through", steps=7, lr=0.002),)


def test_weights_are_quantized_as_by_rtn() -> None:
    assert TEQThenRTN(bits=3, group_size=32).format == RTN(bits=3, group_size=32).format
    assert TEQThenRTN().needs == frozenset()
