"""qcli: make language models small. `import qcli` teaches transformers to load its checkpoints."""

from qcli.inference.autoload import when_imported

__version__ = "0.1.0"

when_imported("transformers.quantizers.auto", "qcli.inference.transformers_plugin", "register")
