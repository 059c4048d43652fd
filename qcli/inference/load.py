"""A whole model in memory, ready to generate, from anything that `open_source` opens; packed layers stay packed."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import torch
from torch import nn

from qcli.inference.linear import QuantLinear
from qcli.inference.served import backend_of
from qcli.inference.vocabulary import pack_embedding, share_codes
from qcli.models.quantized import QuantizedSource
from qcli.models.source import ModelSource
from qcli.models.stream import ModelStream
from qcli.utils.errors import ResourceError
from qcli.utils.memory import free_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.safetensors import MappedFiles


def load_model(source: ModelSource, device: torch.device, dtype: torch.dtype, progress: Progress = silent) -> Any:
    """The causal LM of transformers, in evaluation mode, with a `QuantLinear` for each layer that is stored packed.

    Args:
        dtype: of activations and dense weights.

    Raises:
        UsageError: config and tensors do not belong together.
        ResourceError: it does not fit in memory.
    """
    needed, free = loaded_bytes(source, dtype), free_memory(device)
    if free is not None and needed > free:
        raise ResourceError(f"the model needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
    files = MappedFiles()
    if not isinstance(source, QuantizedSource):
        return ModelStream(source, device=device, dtype=dtype).load_whole(progress=progress)

    def packed(name: str, linear: nn.Module) -> nn.Module:
        return packed_layer(source, name, device, dtype, getattr(linear, "bias", None), files)

    def pack_vocabulary(model: Any) -> None:
        for name, storage in source.vocabulary.items():
            module = model.get_submodule(name)
            if isinstance(module, nn.Embedding):
                pack_embedding(module, storage.format, _tensors(source, name, device, files), dtype)
            else:
                model.set_submodule(name, packed(name, module))
        share_codes(model)

    return ModelStream(source, device=device, dtype=dtype, prepare=pack_vocabulary).load_whole(packed, progress)


def packed_layer(
    source: QuantizedSource,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    files: MappedFiles | None = None,
) -> QuantLinear:
    """A quantized layer of a checkpoint, by its module name, with the stored tensors, for inputs of `dtype`.

    Args:
        files: of the checkpoint, where other layers are loaded too.
    """
    storage, tensors = source.packed[name], _tensors(source, name, device, files or MappedFiles())
    layer = QuantLinear(storage.format, storage.shape[1], storage.shape[0], bias, dtype, tensors)
    layer.name = name
    return layer


def _tensors(source: QuantizedSource, name: str, device: torch.device, files: MappedFiles) -> dict[str, torch.Tensor]:
    """Stored tensors of a quantized layer, by suffix."""
    return {suffix: tensor.to(device) for suffix, tensor in source.read_packed(name, files.tensors).items()}


def loaded_bytes(source: ModelSource, dtype: torch.dtype) -> int:
    """Memory of the tensors that `load_model` loads: packed ones as they are stored, others in `dtype`."""
    quantized = source.packed if isinstance(source, QuantizedSource) else {}
    return sum(
        sum(tensor.bytes for tensor in layer.format.stored(layer.shape).values())
        if (layer := quantized.get(name.removesuffix(".weight"))) is not None
        else prod(stored.shape) * dtype.itemsize
        for name, stored in source.tensors().items()
    )


def tensor_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers; tied ones count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def backend_counts(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Number of packed layers by the backend that computes them."""
    layers = (module for module in model.modules() if isinstance(module, QuantLinear))
    return dict(Counter(backend_of(layer.format, layer.shape, device.type, dtype).backend.name for layer in layers))
