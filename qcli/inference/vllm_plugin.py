"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know `quant_method: qcli`. Only here is vLLM imported."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qcli.inference.vllm_layers import QcliConfig

    register_quantization_config("qcli")(QcliConfig)
