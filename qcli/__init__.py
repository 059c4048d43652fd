"""qcli quantizes language models. `import qcli` lets transformers load its checkpoints."""

from qcli.inference.autoload import when_imported

__version__ = "0.1.0"

when_imported("transformers.quantizers.auto", "qcli.inference.transformers_plugin")
