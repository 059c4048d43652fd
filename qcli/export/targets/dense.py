"""Decoded weights in the model's own dtype: loads anywhere, as large as the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.export.target import Export, Packable, dense_config, refuse_what_runs_otherwise, write_layers
from qcli.models.native import NativeSource
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense"]


class Dense(Export):
    """An unquantized model whose weights are those that the codes stand for."""

    name: ClassVar[str] = "dense"
    loading: ClassVar[str] = """Loads anywhere; the weights are decoded.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```"""

    def check(self, source: Packable) -> None:
        refuse_what_runs_otherwise(source, "a dense model")

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        def decoded(name: str) -> dict[str, Tensor]:
            return {name: source.read([name])[name].to(source.dtype)}

        write_layers(source, folder, shard_size, progress, decoded)
        write_json(folder / "config.json", dense_config(source))
        source.copy_companions(folder)
