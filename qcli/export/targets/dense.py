"""Decoded weights in the model's dtype: loads wherever the original does, and is as large."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.export.target import ExportTarget, Packable, dense_config, refuse_extra_computation, write_layers
from qcli.models.native import NativeSource
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense"]


class Dense(ExportTarget):
    """An unquantized model with the decoded weights."""

    name: ClassVar[str] = "dense"
    ragged_groups: ClassVar[bool] = True
    loading: ClassVar[str] = """Loads anywhere; the weights are decoded.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```"""

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, "a dense model")

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        def read(name: str) -> Tensor:
            return source.read([name])[name].to(source.dtype)

        def decoded(name: str) -> dict[str, Tensor]:
            stack = source.names.stack_of(name)
            if stack is None:
                return {name: read(name)}
            first, *_ = source.names.members(stack)  # with it come those of all experts
            return {stack: source.names.stacked(stack, read)} if name == first else {}

        write_layers(source, folder, shard_size, progress, decoded)
        write_json(folder / "config.json", dense_config(source))
        source.copy_companions(folder)
