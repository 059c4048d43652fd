"""The vLLM plug-in against a stand-in for vLLM's base classes, written from its source: the arguments of
create_weights, how models load fused layers, and what each device computes. vLLM itself is not run."""

from __future__ import annotations

import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qcli
from qcli.core.weight import Format
from qcli.inference.backend import Choice
from qcli.inference.backends.reference import Reference
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError
from qcli.utils.safetensors import read_tensors
from tests.plugins import registered
from tests.quantizing import run, write_text
from tests.tiny import tiny_model

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64, "gate_proj": 128, "up_proj": 128, "down_proj": 64}
REGISTERED: dict[str, type] = {}


class QuantizationConfig(ABC):
    """The abstract methods of vllm.model_executor.layers.quantization.base_config.QuantizationConfig."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any: ...


class LinearMethodBase(ABC):
    """Those of vllm.model_executor.layers.linear.LinearMethodBase."""

    @abstractmethod
    def create_weights(self, *args: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class UnquantizedLinearMethod:
    """Only its type is used."""


class LinearBase(nn.Module):
    """One device's linear layer, split as ColumnParallelLinear, QKVParallelLinear and RowParallelLinear split it."""

    def __init__(self, config: Any, prefix: str, rank: int, ranks: int) -> None:
        super().__init__()
        self.tp_rank, self.tp_size, leaf = rank, ranks, prefix.rpartition(".")[2]
        parts = FUSED.get(leaf, [leaf])
        inputs = 128 if leaf == "down_proj" else 64
        split_inputs = leaf in ("o_proj", "down_proj")
        local = [SIZES[part] if split_inputs else max(SIZES[part] // ranks, 16) for part in parts]  # heads of 16
        self.quant_method = config.get_quant_method(self, prefix)
        self.columns = slice(rank * inputs // ranks, (rank + 1) * inputs // ranks) if split_inputs else slice(None)
        self.split_inputs, self.local = split_inputs, local
        self.quant_method.create_weights(
            self,
            input_size_per_partition=inputs // ranks if split_inputs else inputs,
            output_partition_sizes=local,
            input_size=inputs,
            output_size=sum(SIZES[part] for part in parts),
            params_dtype=torch.float32,
            weight_loader=lambda *_: pytest.fail("the method's own loader is used"),
        )


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stands in for the modules that the plug-in imports."""

    def register_quantization_config(name: str) -> Any:
        return lambda cls: REGISTERED.setdefault(name, cls)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        "vllm.model_executor.layers.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "qcli.inference.vllm_layers", raising=False)
    REGISTERED.clear()
    from qcli.inference.vllm_plugin import register

    register()
    yield
    monkeypatch.delitem(sys.modules, "qcli.inference.vllm_layers", raising=False)


def configured(source: NativeSource) -> Any:
    config: Any = REGISTERED["qcli"]
    made = config.from_config(source.config["quantization_config"])
    made.packed_modules_mapping = FUSED
    return made


def load(layer: LinearBase, source: NativeSource, prefix: str) -> None:
    """As the `load_weights` of vLLM's models do: the part's name and its place in the fused layer."""
    parent, _, leaf = prefix.rpartition(".")
    parameters = dict(layer.named_parameters())
    for number, part in enumerate(FUSED.get(leaf, [leaf])):
        name = f"{parent}.{part}"
        for stored in source.quantized[name].stored(name):
            tensor = read_tensors([(stored, source.extents[stored])])[stored]
            parameter: Any = parameters[stored.removeprefix(f"{name}.")]
            if leaf == "qkv_proj":
                parameter.weight_loader(parameter, tensor, part[0])
            elif leaf in FUSED:
                parameter.weight_loader(parameter, tensor, number)
            else:
                parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)


def computed(source: NativeSource, prefix: str, ranks: int, x: Tensor) -> list[Tensor]:
    """The output of each part of a layer, assembled from all devices."""
    layers = [LinearBase(configured(source), prefix, rank, ranks) for rank in range(ranks)]
    for layer in layers:
        load(layer, source, prefix)
    outputs = [layer.quant_method.apply(layer, x[..., layer.columns]).split(layer.local, -1) for layer in layers]
    if layers[0].split_inputs:
        return [torch.stack([output[0] for output in outputs]).sum(0)]
    parts = []
    for number, part in enumerate(FUSED.get(prefix.rpartition(".")[2], [prefix.rpartition(".")[2]])):
        copies = ranks * layers[0].local[number] // SIZES[part]  # devices that share heads of k and v
        parts.append(torch.cat([outputs[rank][number] for rank in range(0, ranks, copies)], -1))
    return parts


METHODS: dict[str, dict[str, Any]] = {
    "affine": {"method__name": "rtn", "method__bits": 3, "method__group_size": 16},
    "symmetric rows": {"method__name": "rtn", "method__symmetric": True, "method__group_size": -1},
    "float zero points": {"method__name": "rtn", "method__zero_point": "float", "method__group_size": 16},
    "lcq": {"method__name": "lcq", "method__bits": 2, "method__group_size": 16, "method__steps": 1},
    "onebit": {"method__name": "onebit"},
    "dbllm": {"method__name": "dbllm", "method__group_size": 16},
    "low-rank": {"method__name": "rtn", "method__group_size": 16, "low_rank__rank": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_devices_together_compute_the_layer(method: str, tmp_path: Path) -> None:
    run(tiny_model("llama", tmp_path), tmp_path / "out", write_text(tmp_path), grouped=False, **METHODS[method])
    assert_devices_compute(tmp_path / "out")


def test_formats_of_plug_ins_are_loaded(tmp_path: Path) -> None:
    with registered(tmp_path / "plugins"):
        text = write_text(tmp_path)
        run(tiny_model("llama", tmp_path), tmp_path / "out", text, grouped=False, method__name="ternarize")
        assert_devices_compute(tmp_path / "out")


def assert_devices_compute(checkpoint: Path) -> None:
    """1, 2 and 4 devices compute the product with the decoded weights, in every kind of layer."""
    source = open_source(str(checkpoint))
    assert isinstance(source, NativeSource)
    generator = torch.Generator().manual_seed(0)
    for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        prefix = f"model.layers.1.{leaf}"
        parent, _, last = prefix.rpartition(".")
        x = torch.randn(2, 3, 128 if last == "down_proj" else 64, generator=generator)
        names = [f"{parent}.{part}" for part in FUSED.get(last, [last])]
        expected = [x @ source.read([f"{name}.weight"])[f"{name}.weight"].T for name in names]
        for ranks in (1, 2, 4):
            outputs = computed(source, prefix, ranks, x)
            for y, exact in zip(outputs, expected, strict=True):
                assert float((y - exact).norm() / exact.norm()) < 1e-4, (prefix, ranks)


class Noted(Reference):
    """A backend that notes what it is given."""

    name: ClassVar[str] = "noted"
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cpu"})

    def __init__(self) -> None:
        self.calls: list[tuple[Format, tuple[int, int], dict[str, Tensor]]] = []

    def linear(
        self, x: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        self.calls.append((format, shape, dict(tensors)))
        return super().linear(x, format, shape, tensors, bias)


def packed(folder: Path) -> NativeSource:
    """A tiny model in 4 bits, opened."""
    run(tiny_model("llama", folder), folder / "out", method__name="rtn", method__group_size=16, grouped=False)
    source = open_source(str(folder / "out"))
    assert isinstance(source, NativeSource)
    return source


@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_are_computed_by_the_backends_from_stored_tensors(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, backend = packed(tmp_path), Noted()
    monkeypatch.setattr("qcli.inference.linear.choose", lambda *_: Choice(backend, {}))
    for leaf, inputs in (("self_attn.qkv_proj", 64), ("mlp.down_proj", 128)):
        computed(source, f"model.layers.0.{leaf}", ranks, torch.ones(2, inputs))
    assert len(backend.calls) == 4 * ranks  # q, k, v and down
    for format, shape, tensors in backend.calls:
        stored = format.stored(shape)
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
            name: (expected.shape, expected.torch_dtype) for name, expected in stored.items()
        }
        assert all(tensor.untyped_storage().nbytes() == stored[name].bytes for name, tensor in tensors.items())
    first = f"model.layers.0.self_attn.q_proj.{next(iter(tensors))}"
    if ranks == 1:
        on_disk = read_tensors([(first, source.extents[first])])[first]
        assert torch.equal(backend.calls[0][2][first.rpartition(".")[2]], on_disk)


@pytest.mark.slow
def test_compiled_layers_call_the_operator(tmp_path: Path) -> None:
    """As vLLM compiles its models: one graph, in which a shard is one opaque operator."""
    source = packed(tmp_path)
    layer = LinearBase(configured(source), "model.layers.0.self_attn.qkv_proj", 0, 2)
    load(layer, source, "model.layers.0.self_attn.qkv_proj")
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend=backend)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), layer.quant_method.apply(layer, x))
    assert sum("qcli" in str(target) for target in targets) == 3


def test_the_guard_is_read_and_dropped(tmp_path: Path) -> None:
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    source = open_source(str(tmp_path / "out"))
    assert isinstance(source, NativeSource)
    for prefix, parts in (("model.layers.0.self_attn.qkv_proj", ("q",)), ("model.layers.0.mlp.gate_up_proj", ())):
        layer = LinearBase(configured(source), prefix, 0, 1)
        guard: Any = dict(layer.named_parameters()).get("weight")
        assert (guard is not None) == bool(parts)
        for part in parts:
            guard.weight_loader(guard, torch.empty(0, dtype=torch.uint8), part)
        load(layer, source, prefix)


def test_entry_point_registers_the_plug_in() -> None:
    project = tomllib.loads((Path(qcli.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entry_point = EntryPoint(
        "qcli", project["entry-points"]["vllm.general_plugins"]["qcli"], "vllm.general_plugins"
    ).load()
    REGISTERED.clear()
    entry_point()
    assert REGISTERED.keys() == {"qcli"}


def refused(source: NativeSource, prefix: str, ranks: int = 1) -> str:
    with pytest.raises(UnsupportedError) as raised:
        LinearBase(configured(source), prefix, 0, ranks)
    return raised.value.message


def test_layers_that_cannot_be_split_or_fused_are_refused(tmp_path: Path) -> None:
    overrides = [{"match": "*.k_proj", "dense": True}]
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn", overrides=overrides)
    source = open_source(str(tmp_path / "out"))
    assert isinstance(source, NativeSource)
    assert "some of them are dense" in refused(source, "model.layers.0.self_attn.qkv_proj")
    assert "16 inputs per device are not whole groups of 32" in refused(source, "model.layers.0.self_attn.o_proj", 4)
    assert configured(source).get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    layer = LinearBase(configured(source), "model.layers.0.mlp.down_proj", 0, 1)
    with pytest.raises(UnsupportedError, match="has no weight_packed"):
        layer.quant_method.process_weights_after_loading(layer)


def test_dense_layers_keep_vllms_method(tmp_path: Path) -> None:
    run(
        tiny_model("llama", tmp_path),
        tmp_path / "out",
        method__name="rtn",
        overrides=[{"match": "*.mlp.*", "dense": True}],
    )
    source = open_source(str(tmp_path / "out"))
    assert isinstance(source, NativeSource)
    layer = LinearBase.__new__(LinearBase)
    nn.Module.__init__(layer)
    method = configured(source).get_quant_method(layer, "model.layers.0.mlp.gate_up_proj")
    assert type(method) is UnquantizedLinearMethod


def test_formats_and_activations_that_vllm_cannot_compute_are_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    model = tiny_model("llama", tmp_path)
    run(model, tmp_path / "normed", text, grouped=False, method__name="onebit", method__paper=True)
    run(model, tmp_path / "acts", text, method__name="rtn", activations__bits=8)
    run(model, tmp_path / "head", method__name="rtn", lm_head={"bits": 8})
    normed, acts = (open_source(str(tmp_path / name)) for name in ("normed", "acts"))
    assert isinstance(normed, NativeSource) and isinstance(acts, NativeSource)
    assert "normalizes its outputs" in refused(normed, "model.layers.0.mlp.down_proj")
    head = open_source(str(tmp_path / "head"))
    assert isinstance(head, NativeSource)
    with pytest.raises(UnsupportedError, match="lm_head: qcli's layers in vLLM are those of blocks alone"):
        configured(head)
    with pytest.raises(UnsupportedError, match="activations"):
        configured(acts)
