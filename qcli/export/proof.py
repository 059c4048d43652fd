"""A packed checkpoint run by the software that its layout is made for, as far as that is installed.

`readback.py` reads files with qcli's own code, which knows what they mean. Here the engine decides: transformers loads
the folder as any user would, and its logits are compared. A large model is proven on its first blocks.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from math import prod
from pathlib import Path

import torch

from qcli.export.readback import difference, probe
from qcli.export.result import Proof
from qcli.export.target import ExportTarget
from qcli.models.families import block_count, text_config
from qcli.models.folder import read_hf_config
from qcli.models.loadable import auto_class
from qcli.models.native import NativeSource
from qcli.models.pretrained import pretrained
from qcli.models.source import reported
from qcli.models.stream import ModelStream
from qcli.utils import shards
from qcli.utils.device import matmul_precision
from qcli.utils.errors import VerificationError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress
from qcli.utils.safetensors import read_header
from qcli.utils.trust import Trust

_WHOLE = 500_000_000  # weights of a model that is proven as a whole
_BLOCKS = 2  # of a larger one
_MAX_KL = 1e-2  # engines round scales or weights to half precision; what is wrong is far off


def prove(source: NativeSource, folder: Path, target: ExportTarget, trust: Trust, progress: Progress) -> Proof:
    """Load `folder` in the engine of its layout, run a forward pass, and compare the logits.

    Raises:
        VerificationError: the engine does not load it, or computes something else although no layer was requantized.
    """
    packages = target.proven_with(source)
    if why_not := packages if isinstance(packages, str) else _missing(packages):
        return Proof(None, why_not)
    progress("run", 0, 1)
    count = source.n_blocks
    weights = sum(prod(tensor.shape) for tensor in source.tensors().values())
    blocks = count if weights <= _WHOLE else min(_BLOCKS, count)
    name = ", ".join(f"{package} {version(package)}" for package in packages)
    with contextlib.ExitStack() as exits:
        part = folder if blocks == count else exits.enter_context(_first_blocks(folder, source, blocks))
        with reported(f"{name} does not run what was written", VerificationError, hint="pack it as qcli or dense"):
            actual = _run(part, trust)
    expected = _expected(source, blocks)
    maximum, kl = difference(expected, actual)
    if not target.rounded() and expected.isfinite().all() and not kl <= _MAX_KL:
        raise VerificationError(
            f"{name} computes other logits than the quantized checkpoint has (KL {kl:.3g})",
            hint="this is a bug of qcli or of that software; pack it as qcli or dense",
        )
    progress("run", 1, 1)
    return Proof(name, None, blocks, count, maximum, kl)


def _missing(packages: Iterable[str]) -> str | None:
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            return f"{package} is not installed"
    return None


@torch.no_grad()
def _expected(source: NativeSource, blocks: int) -> torch.Tensor:
    """Logits `[1, length, vocab]` of the first blocks in float32, one block in memory at a time."""
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    tokens = probe(stream.model.get_input_embeddings().num_embeddings)
    with matmul_precision(fast=False):
        *_, last = islice(stream.hidden_states(tokens), blocks)
        return stream.logits(last).float()


@torch.no_grad()
def _run(folder: Path, trust: Trust) -> torch.Tensor:
    """Logits `[1, length, vocab]` as transformers computes them in float32."""
    import qcli  # noqa: F401  registers the native layout

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        auto = auto_class(read_hf_config(folder, trust_remote_code=trust.remote_code))
        model = pretrained(auto, folder, trust_remote_code=trust.remote_code, dtype=torch.float32)
        model.eval()
        with matmul_precision(fast=False):
            logits: torch.Tensor = model(probe(model.get_input_embeddings().num_embeddings), use_cache=False).logits
    return logits.float()


@contextlib.contextmanager
def _first_blocks(folder: Path, source: NativeSource, blocks: int) -> Iterator[Path]:
    """Within: a folder like `folder`, beside it, of a model that ends after its first blocks."""
    prefix = f"{source.family.blocks}."
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=folder.parent) as name:
        part = Path(name)
        extents = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
        kept = [
            {tensor: extent}
            for header in extents
            for tensor, extent in header.items()
            if not (inside := source.names.name_in_model(tensor)).startswith(prefix)
            or int(inside.removeprefix(prefix).partition(".")[0]) < blocks
        ]
        shards.join(kept, part, shards.SHARD_SIZE)
        config = json.loads((folder / "config.json").read_text())
        count = block_count(config)
        text = dict(text_config(config))
        for key, value in text.items():
            if key in ("num_hidden_layers", "n_layer"):
                text[key] = blocks
            elif isinstance(value, list) and len(value) == count:  # one entry for each block
                text[key] = value[:blocks]
        write_json(part / "config.json", {**config, "text_config": text} if config.get("text_config") else text)
        yield part
