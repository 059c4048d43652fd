"""The base class of everything a model can be read from: config, tensor headers, weights, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from qcli.core.weight import Format
from qcli.models import families
from qcli.models.companions import tokenizer_files, without_code, write_companions
from qcli.utils.dtypes import WEIGHT_DTYPES, StoredTensor
from qcli.utils.errors import QcliError, UnsupportedError, UsageError
from qcli.utils.files import sha256

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.core.activations import Activations

T = TypeVar("T")

# Fields of config.json that choose a tokenizer's class.
_TOKENIZER_FIELDS = ("model_type", "tokenizer_class", "auto_map")
_CODES = (".qweight", ".weight_packed")  # how the names of other software's packed weights end


class HubModel(NamedTuple):
    """A repository of the hub, and the commit that files are from."""

    repository: str
    commit: str


class ModelSource:
    """A model on disk. Tensors have the names that they have in the causal LM's `state_dict`.

    Attributes:
        path: the folder or file.
        config: `config.json` as a dict.
        trust_remote_code: whether Python files of the model may run; only the command line sets it.
        dense_dtype: dtype that unquantized tensors are written in; None: their stored dtype.
        hub: where it was downloaded from; None: it is local.
        activations: how the inputs of quantized layers are quantized when the model runs; None: not at all.
    """

    dense_dtype: str | None = None
    activations: Activations | None = None
    hub: HubModel | None = None

    def __init__(self, path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        self.path, self.config, self.trust_remote_code = path, config, trust_remote_code

    @cached_property
    def family(self) -> families.Family:
        """The row of the model table, with the groups and folds that the config implies."""
        return families.family(self.config)

    @property
    def n_blocks(self) -> int:
        """Number of blocks.

        Raises:
            UsageError: the config does not have it.
        """
        return self.family.n_blocks or families.block_count(self.config)

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model was made for, in tokens; None if its config sets no limit."""
        text = families.text_config(self.config)
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(limit := text.get(key), int):
                return limit
        return None

    def tensors(self) -> dict[str, StoredTensor]:
        """Dtype and shape of each tensor, from headers; masks and rotary tables of old checkpoints are left out."""
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors in the dtypes that `tensors` announces, into memory of their own.

        Raises:
            UsageError: a tensor is missing, or holds NaN or infinity.
        """
        tensors = self._read(list(names))
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
                raise UsageError(f"{name} holds NaN or infinity", hint="the model itself is broken")
        return tensors

    def linears(self) -> list[families.Linear]:
        """The quantizable layers, in order of computation.

        Raises:
            UsageError: a weight is missing or not a matrix.
            UnsupportedError: a block has matrices that the family's row does not list, or a weight has a dtype such as
                float8, which is quantized already.
        """
        self._refuse_leftovers()
        stored = self.tensors()
        return [
            families.Linear(name, block, group, self._shape(name, stored))
            for name, block, group in self._linear_names()
        ]

    @property
    def left_out(self) -> list[str]:
        """Stored tensors that transformers does not load, such as heads that predict several tokens."""
        return []

    @property
    def quantized_as(self) -> str | None:
        """What other software stored the weights as, which are decoded; None: they are not quantized, or by qcli."""
        return None

    def on_disk(self, name: str) -> str:
        """The name that checkpoints have for a tensor, as `save_pretrained` writes it and engines expect it.

        Args:
            name: in the causal LM, or that of a tensor of a quantized layer.
        """
        raise NotImplementedError

    def name_in_model(self, stored: str) -> str:
        """The opposite of `on_disk`."""
        raise NotImplementedError

    def as_on_disk(self, name: str, whole: T, rows: Callable[[int, int], T]) -> dict[str, T]:
        """A tensor, or what stands for it, by name on disk: one, or several where this model stores it so.

        Args:
            name: as `on_disk` takes it.
            whole: the tensor.
            rows: a part of it, from one row up to another.
        """
        parts, start, found = self._joined(name), 0, dict[str, T]()
        for stored, count in parts:
            found[stored] = rows(start, start + count)
            start += count
        return found if parts else {self.on_disk(name): whole}

    def _joined(self, name: str) -> list[tuple[str, int]]:
        """Names on disk, and rows, of the stored tensors that a tensor is, one after the other; none: it is one."""
        return []

    def formats(self) -> Mapping[str, Format]:
        """The formats of the quantized layers, by name."""
        return {}

    def leftovers(self) -> list[str]:
        """Matrices and stacks of matrices in the blocks that the family's row does not list; none without a row: what
        discovery leaves out is known to stay dense."""
        if self.family.discovered:
            return []
        prefix = f"{self.family.blocks}."
        known = {f"{name}.weight" for name, _, _ in self._linear_names()}
        return [
            name
            for name, stored in self.tensors().items()
            if name.startswith(prefix) and len(stored.shape) > 1 and name not in known
        ]

    def hf_config(self) -> PreTrainedConfig:
        """The config as transformers reads it."""
        raise NotImplementedError

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        raise NotImplementedError

    def processor(self) -> Any:
        """The model's processor of text and images, a `ProcessorMixin` of transformers.

        Raises:
            UnsupportedError: it has none, or one that cannot be loaded.
        """
        raise UnsupportedError(f"{self.path} has no processor of images", hint="calibrate with text")

    def companions(self) -> Mapping[str, Path | bytes]:
        """Tokenizer, chat templates, generation config, licence and the like, by name: files to copy, or contents.

        Raises:
            UsageError: one of them is not safe to copy, or damaged.
        """
        raise NotImplementedError

    def copy_companions(self, out: Path) -> None:
        """Write the companions into a checkpoint's folder.

        Raises:
            UsageError: as `companions`.
        """
        write_companions(self.companions(), out)

    def config_to_write(self) -> dict[str, Any]:
        """`config.json` for a checkpoint made of this model; it names code of the model only if that is copied."""
        return without_code(self.config, trusted=self.trust_remote_code)

    def code_files(self) -> Mapping[str, Path]:
        """The model's own Python files that may run, by name; none unless they are trusted."""
        return {}

    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in order."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(self._file_sizes())

    def stored_as(self, name: str) -> str:
        """The type that the file stores a tensor in; `tensors` has the dtype that it is read as."""
        return self.tensors()[name].dtype

    def bits_of(self, layers: Iterable[str]) -> float:
        """Stored bits per weight of these linear layers."""
        return self._bits(f"{layer}.weight" for layer in layers)

    def bits_per_weight(self) -> float:
        """Stored bits per weight of the blocks' linear layers; of a qcli checkpoint, only of the quantized ones."""
        return self.linear_bits_per_weight()

    def linear_bits_per_weight(self) -> float:
        """Stored bits per weight of all linear layers of the blocks, quantized or not."""
        return self._bits(f"{linear.name}.weight" for linear in self.linears())

    def model_bits_per_weight(self) -> float:
        """Stored bits per weight of the whole model."""
        return self._bits(self.tensors())

    def fingerprint(self) -> str:
        """SHA-256 of config, tensor names, dtypes, shapes and file sizes: cheap, but blind to changed values."""
        headers = [(name, *stored) for name, stored in sorted(self.tensors().items())]
        described = json.dumps([self.config, headers, self._file_sizes()], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """Plain data that changes when model or tokenizer does; of the weights only headers and the time are read."""
        state = {
            "headers": self.fingerprint(),
            "modified": max(file.stat().st_mtime for file in self.weight_files()),
            "tokenizer": self.tokenizer_content() if self.tokenizer_path.is_dir() else None,
        }
        return state | ({"code": self._code_hashes()} if self.code_files() else {})

    def content(self) -> str:
        """SHA-256 of config, weight files, and code that may run."""
        hashes = [*(sha256(file) for file in self.weight_files()), *self._code_hashes().values()]
        return hashlib.sha256(json.dumps([self.config, hashes], sort_keys=True).encode()).hexdigest()

    def tokenizer_content(self) -> str:
        """SHA-256 of all that makes the tokenizer: its files, what chooses its class, and code that may run."""
        if self.tokenizer_path.is_file():
            return self.content()
        files = tokenizer_files(self.tokenizer_path)
        hashes = {name: sha256(file) for name, file in files.items()} | self._code_hashes()
        fields = {field: self.config.get(field) for field in _TOKENIZER_FIELDS}
        return hashlib.sha256(json.dumps([hashes, fields]).encode()).hexdigest()

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is: the folder, or a file that holds it too."""
        return self.path

    def _code_hashes(self) -> dict[str, str]:
        return {name: sha256(file) for name, file in self.code_files().items()}

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in the files; of a quantized layer's weight, those of codes and tables."""
        raise NotImplementedError

    def _file_sizes(self) -> list[int]:
        return [file.stat().st_size for file in self.weight_files()]

    def _linear_names(self) -> Iterator[tuple[str, int, int]]:
        """Name, block and group of every linear layer, from the config and the family's row."""
        for block in range(self.n_blocks):
            for index, group in enumerate(self.family.groups_of(block)):
                for path in group.linears:
                    yield f"{self.family.blocks}.{block}.{path}", block, index

    def _bits(self, names: Iterable[str]) -> float:
        names, stored = list(names), self.tensors()
        weights = sum(prod(stored[name].shape) for name in names)
        return 8 * sum(self.stored_bytes(name) for name in names) / weights if weights else 0.0

    def _shape(self, linear: str, stored: dict[str, StoredTensor]) -> tuple[int, int]:
        weight = stored.get(f"{linear}.weight")
        if weight is None:
            renamed = next((name for name in stored if name.endswith(f".{linear}.weight")), None)
            if renamed is not None:
                prefix = renamed.removesuffix(f"{linear}.weight")
                raise UsageError(
                    f"{self.path} names its tensors {renamed}, not {linear}.weight",
                    hint=f"save the model again without {prefix!r}, which torch.compile or a wrapper adds",
                )
            raise UsageError(f"{self.path} has no tensor {linear}.weight", hint="download the model again")
        if weight.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(f"{linear}.weight is stored as {weight.dtype}: start from unquantized weights")
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise UsageError(f"{linear}.weight has shape {list(weight.shape)}, which is not a matrix")
        rows, columns = weight.shape
        return (columns, rows) if self.family.conv1d else (rows, columns)

    def _refuse_leftovers(self) -> None:
        leftovers = self.leftovers()
        packed = next((name for name in leftovers if name.endswith(_CODES)), None)
        if packed is not None:
            raise UnsupportedError(
                f"{self.path} is already quantized ({packed}), and its config.json does not say how",
                hint="use the unquantized model, or a version whose config.json has a quantization_config",
            )
        if leftovers:
            more = f" and {len(leftovers) - 3} more" if len(leftovers) > 3 else ""
            raise UnsupportedError(
                f"this {self.family.model_type} has weights that qcli does not know: {', '.join(leftovers[:3])}{more}",
                hint="it may be a variant of the architecture that qcli does not support",
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; unlike `isfinite`, needs no mask of the tensor's size."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def first_line(error: Exception) -> str:
    """The first line of another library's error, or its type if it has no message; that of a failed look-up has both,
    since its message is no more than the key."""
    line, _, rest = str(error).strip().partition("\n")
    if line.rstrip().endswith(":"):  # it only introduces the next
        following = rest.strip().partition("\n")[0]
        line = f"{line.rstrip()} {following}"
    return with_type(error) if not line or isinstance(error, LookupError) else line


def with_type(error: Exception) -> str:
    """The type of another library's error and the first line of its message, if it has one."""
    kind, line = type(error).__name__, str(error).strip().partition("\n")[0]
    return f"{kind}: {line}" if line else kind


@contextmanager
def reported(place: str, kind: type[QcliError] = UsageError, *, hint: str | None = None) -> Iterator[None]:
    """Within: whatever another library raises over a model's files becomes one line, `place` and the reason.

    Our own errors pass unchanged, and so do those of the machine: a lack of memory, a disk that cannot be read.
    """
    try:
        yield
    except (QcliError, MemoryError):
        raise
    except Exception as error:  # of whatever type a bad value leads to
        of_the_machine = isinstance(error, OSError) and error.errno is not None
        if of_the_machine or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        raise kind(f"{place}: {first_line(error)}", hint=hint) from error
