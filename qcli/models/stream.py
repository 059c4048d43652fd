"""A causal LM of which one block at a time is in memory.

The model is built on the meta device; only the modules outside its blocks (embeddings, final norm, head, rotary
tables) are loaded. Every block is replaced by a stand-in, so the model's own forward pass computes the masks, positions
and rotary tables that each block receives, and everything before and after the blocks: no family needs code of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.cache_utils import KVSharingDict
from transformers.pytorch_utils import Conv1D

from qcli.models.families import TOKEN_CHANNELS, Family
from qcli.models.loadable import quantizable_skeleton, require_tensors, tied_tensors
from qcli.models.sizes import BATCH_TOKENS
from qcli.models.source import ModelSource, reported
from qcli.models.stream_proof import prove
from qcli.models.stream_samples import Call, GivenSamples, SampleRecorder
from qcli.utils.determinism import any_order, order_where_known
from qcli.utils.errors import UnsupportedError
from qcli.utils.progress import Progress, silent
from qcli.utils.stored_batches import BatchMemory, StoredBatches

_DTYPES = "scalar type", "dtype"  # what torch says of tensors that do not go together
_SMALL = 2.0**-24  # times a digit: exact in every dtype
BlockForward = Callable[[Tensor], Tensor]  # hidden states `[batch, length, hidden]` -> the same shape


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Split `[windows, length, ...]` into views of `BATCH_TOKENS` tokens, or of one window if that is longer."""
    return windows.split(max(1, BATCH_TOKENS // windows.shape[1])) if len(windows) else ()


@dataclass(frozen=True)
class _Passed:
    """What enters a block, as the model has it: tokens int64 `[batch, length]`, where arguments depend on them, and
    keys and values of earlier blocks, `[batch, heads, length, channels]`, by kind of attention."""

    hidden: Tensor
    tokens: Tensor | None
    shared: dict[str, tuple[Tensor, ...]]


class ModelStream:
    """Runs a model block by block.

    Args:
        source: the model.
        device: of weights and activations.
        dtype: of weights and activations.
        prepare: changes the skeleton before any weight is read, as by packing embedding and head.

    Raises:
        UsageError: transformers cannot build the model of this config; tensors are missing, unexpected, or of another
            shape than the config implies.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.family = source.family
        self.config = source.hf_config()
        self._problem = f"{source.path}: transformers cannot build this model"
        with reported(self._problem):
            self.model = quantizable_skeleton(self.config, dtype=dtype, trust_remote_code=source.trust_remote_code)
        self.model.eval().requires_grad_(False)
        require_tensors(source, self.model)
        self._stored = frozenset(source.tensors())
        if prepare is not None:
            prepare(self.model)
        self._tied = tied_tensors(self.model, source.tensors())
        self._text = self.model.get_submodule(self.family.text_path)
        self._beside = {path: self.model.get_submodule(path) for path in self.family.dense_parts}
        for path in self._beside:  # text does not pass them: they come back when the whole model is loaded
            self.model.set_submodule(path, nn.Identity())
        container = self.model.get_submodule(self.family.blocks)
        self._blocks = list(container)
        self._stand_ins = [_StandIn(block, self.family) for block in self._blocks]
        for index, stand_in in enumerate(self._stand_ins):
            container[index] = stand_in
        with reported(self._problem):
            self._load(self.model)
        self._tie()
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._samples: GivenSamples | None = None
        self._passing = self.family.passing
        self._trusted = not self.family.discovered

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def shared_channels(self) -> slice:
        """Channels of keys and values that blocks leave for later ones, among those that pass from block to block."""
        end = self.width - TOKEN_CHANNELS * self._passing.tokens
        return slice(end - self._passing.n_shared, end)

    @property
    def width(self) -> int:
        """Channels of the hidden states that pass from block to block."""
        return self._passing.width(self.config.get_text_config().hidden_size)

    def kind_of(self, index: int) -> str:
        """Equal for blocks of the same modules and shapes."""
        return str(self._blocks[index]) + str({name: [*p.shape] for name, p in self._blocks[index].named_parameters()})

    def load_block(self, index: int) -> nn.Module:
        """Block `index` with its weights, in the stream's dtype on its device; a new module at every call.

        If the source quantizes activations or normalizes outputs of layers, so does the block.
        """
        return self._fill(copy.deepcopy(self._blocks[index]), index)

    def load_whole(
        self, packed: Callable[[str, nn.Module], nn.Module] | None = None, progress: Progress = silent
    ) -> Any:
        """The model with all its parts, or the language model inside of one that insists on images; the stream serves
        nothing else afterwards.

        Args:
            packed: makes the module of a quantized layer from its name and the linear layer whose place it takes, with
                all tensors but a bias; None: linear layers stay, with decoded weights.
        """
        container = self.model.get_submodule(self.family.blocks)
        for index, block in enumerate(self._blocks):
            progress("loading the model", index, self.n_blocks)
            container[index] = self._fill(block, index, packed)
        self._load_beside()
        progress("loading the model", self.n_blocks, self.n_blocks)
        return self._text

    def _load_beside(self) -> None:
        """Load what text does not pass."""
        for path, part in self._beside.items():
            self._load(part, prefix=f"{path}.")
            self.model.set_submodule(path, part)
        self._beside = {}
        self._tie()

    @contextmanager
    def _with_beside(self) -> Iterator[None]:
        """Within: what text does not pass is loaded."""
        parts = self._beside
        self._load_beside()
        try:
            yield
        finally:
            for path, part in parts.items():
                part.to("meta")
                self.model.set_submodule(path, nn.Identity())
            self._beside = parts

    def _tie(self) -> None:
        """Let names of one tensor share it, those of parts that are not loaded aside."""
        absent = tuple(f"{path}." for path in self._beside)
        for name, origin in self._tied.items():
            in_block = name.startswith(f"{self.family.blocks}.")  # read again with its block
            if not in_block and not name.startswith(absent) and not origin.startswith(absent):
                owner, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, self.model.get_parameter(origin))

    def _fill(
        self, block: nn.Module, index: int, packed: Callable[[str, nn.Module], nn.Module] | None = None
    ) -> nn.Module:
        prefix = f"{self.family.blocks}.{index}."
        layers = {layer: format for layer, format in self.source.formats().items() if layer.startswith(prefix)}
        if packed is not None:
            for layer in layers:
                path = layer.removeprefix(prefix)
                block.set_submodule(path, packed(layer, block.get_submodule(path)))
        container: Any = self.model.get_submodule(self.family.blocks)
        before, container[index] = container[index], block  # where the model looks for it when it computes tables
        try:
            self._load(block, prefix=prefix)
        finally:
            container[index] = before
        for layer, format in layers.items():
            linear = block.get_submodule(layer.removeprefix(prefix))
            if packed is None:
                format.attach(linear)
            if self.source.activations is not None:
                self.source.activations.simulate(linear)
        return block

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states that enter the first block: int64 `[batch, length]` -> `[batch, length, hidden]`.

        Where blocks are given more than that for each token, hidden states have channels of their own for it.

        Raises:
            UnsupportedError: blocks of this model cannot run one by one; the message says why.
        """
        if not self._trusted:
            self._trusted = True
            prove(self)
        tokens = tokens.to(self.device)
        with reported(self._problem), any_order(), self._without_masks():
            self._text.base_model(input_ids=tokens, use_cache=False)
        return self._packed(self._entered(), tokens)

    @torch.no_grad()
    def embed_samples(
        self, samples: Iterable[tuple[int, Mapping[str, Tensor]]], memory: BatchMemory
    ) -> Iterator[Tensor]:
        """Hidden states that enter the first block for samples of text and images, `[1, length, channels]` each.

        The model's own forward pass, with all its parts, makes them and whatever else blocks are given for a sample,
        which is kept: from now on the stream runs these samples, in any order, and no others.

        Args:
            samples: a number for each, from 0, and what the model's processor makes of it: a batch of one.
            memory: where it waits what blocks are given.

        Raises:
            UnsupportedError: blocks of this model cannot run one by one, or not on images; the message says why.
        """
        if not self._trusted:
            self._trusted = True
            prove(self)
        self._passing = replace(self._passing, tokens=True)  # numbers of samples, in place of tokens
        if self._samples is None:
            self._samples = GivenSamples(memory)
        with self._with_beside(), SampleRecorder(self.model, self._text, self._stand_ins, self.family) as recorder:
            for number, inputs in samples:
                placed = {
                    name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
                    for name, value in inputs.items()
                }
                with order_where_known():
                    given = recorder.record(placed, self.dtype)
                self._samples.keep(number, given)
                numbers = torch.full(given.hidden.shape[:2], number, device=self.device)  # as hidden states may be
                yield self._packed(given.hidden, numbers)

    @torch.no_grad()
    def calls(self, batch: int, length: int) -> list[Call]:
        """The arguments of each block besides hidden states, for all token batches of this shape; cached."""
        key = batch, length
        if key not in self._calls:
            width = self.model.get_input_embeddings().embedding_dim
            embedded = torch.zeros(batch, length, width, device=self.device, dtype=self.dtype)
            self._calls[key] = self._calls_of(inputs_embeds=embedded)
        return self._calls[key]

    def run_block(
        self,
        block: nn.Module,
        index: int,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run `block` as block `index`: `[batch, length, hidden]` -> the same shape, on the stream's device.

        Args:
            weights: `[out, in]` by path of a linear in the block: replace the block's own, differentiably.
            biases: `[out]` by path, with `weights`: likewise.
        """
        if self._samples is not None and len(hidden) > 1:
            return torch.cat([self.run_block(block, index, each, weights, biases) for each in hidden.split(1)])
        passed = self._unpacked(hidden.to(self.device))
        if self._samples is not None and passed.tokens is not None:
            call, added = self._samples.of_block(int(passed.tokens[0, 0]), index)
            passed = passed if added is None else replace(passed, hidden=passed.hidden + added)
        elif passed.tokens is None:
            call = self.calls(*hidden.shape[:2])[index]
        else:
            call = self._calls_of(input_ids=passed.tokens)[index]
        args, kwargs = call.args, {**call.kwargs}
        shared = KVSharingDict(passed.shared)
        kwargs |= {name: shared for name, value in kwargs.items() if isinstance(value, KVSharingDict)}
        if weights is None:
            with self._typed(index):
                output = block(passed.hidden, *args, **kwargs)
        else:
            kind = self.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
            own = {
                f"{path}.weight": (weight.T if self.family.conv1d else weight).to(dtype)
                for path, weight in weights.items()
            }
            own |= {f"{path}.bias": bias.to(self.dtype) for path, bias in (biases or {}).items()}
            with self._typed(index):
                output = functional_call(block, own, (passed.hidden, *args), kwargs)
        return self._packed(output[0] if self.family.tuple_output else output, passed.tokens, shared)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: last block's output `[batch, length, hidden]` -> `[batch, length, vocab]`."""
        last = self._unpacked(hidden.to(self.device))
        tokens = last.tokens
        inputs: dict[str, Tensor] = {"input_ids": tokens} if tokens is not None else {}
        if tokens is None:
            width = self.model.get_input_embeddings().embedding_dim
            inputs["inputs_embeds"] = torch.zeros(*hidden.shape[:2], width, device=self.device, dtype=self.dtype)
        self._stand_ins[0].output = lambda _: last.hidden
        try:
            with any_order(), self._without_masks():
                logits: Tensor = self._text(**inputs, use_cache=False).logits
        finally:
            self._stand_ins[0].output = None
        self._entered()
        return logits

    def in_place(self, block: nn.Module, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The output of block `index` in the model's own forward pass, where stand-ins take the place of all others:
        int64 `[batch, length]` and the hidden states that enter it, `[batch, length, hidden]` -> the same shape."""
        container: Any = self.model.get_submodule(self.family.blocks)
        found: list[Tensor] = []
        passed = self._unpacked(hidden)

        def fill(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for given in kwargs.values():
                if isinstance(given, KVSharingDict):
                    given.update(passed.shared)

        def note(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shared = next((given for given in kwargs.values() if isinstance(given, KVSharingDict)), passed.shared)
            found.append(self._packed(output[0] if self.family.tuple_output else output, tokens, shared))

        with ExitStack() as hooks:
            hooks.callback(block.register_forward_pre_hook(fill, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
            container[index] = block
            hooks.callback(setattr, container, str(index), self._stand_ins[index])
            hooks.enter_context(any_order())
            self._text(input_ids=tokens, use_cache=False)
        return found[0]

    def _calls_of(self, **inputs: Tensor) -> list[Call]:
        with torch.no_grad(), reported(self._problem), any_order():
            self._text.base_model(**inputs, use_cache=False)
        self._entered()
        return [stand_in.call for stand_in in self._stand_ins]

    def _packed(
        self, hidden: Tensor, tokens: Tensor | None, shared: Mapping[str, tuple[Tensor, ...]] = MappingProxyType({})
    ) -> Tensor:
        """All that passes from block to block as `[batch, length, channels]`: hidden states; keys and values for later
        blocks, zeros if there are none yet; and tokens, where arguments that depend on them are computed again for each
        block. All but hidden states are so small that no sum of squares sees them."""
        passing, before = self._passing, len(self._passing.before)
        if before or passing.after:
            hidden = hidden.movedim([*range(before)], [*range(2, 2 + before)]).flatten(2)
        parts = [hidden]
        for kind, sizes in passing.shared.items():
            if kind in shared:
                parts += [state.transpose(1, 2).flatten(2).to(hidden.dtype) * _SMALL for state in shared[kind]]
            else:
                parts.append(hidden.new_zeros(*hidden.shape[:2], sum(heads * size for heads, size in sizes)))
        if passing.tokens and tokens is not None:
            digits = torch.stack([tokens >> 8 * place & 255 for place in range(TOKEN_CHANNELS)], -1)
            parts.append(digits.to(hidden.dtype) * _SMALL)
        return torch.cat(parts, -1) if len(parts) > 1 else hidden

    def _unpacked(self, packed: Tensor) -> _Passed:
        """What `_packed` was made of."""
        passing, before = self._passing, len(self._passing.before)
        sizes = [(kind, *size) for kind, states in passing.shared.items() for size in states]
        rest = [*(heads * size for _, heads, size in sizes), *([TOKEN_CHANNELS] if passing.tokens else [])]
        hidden, *parts = packed.split([packed.shape[-1] - sum(rest), *rest], -1)
        tokens: Tensor | None = None
        if passing.tokens:
            digits = (parts.pop().detach().float() / _SMALL).round().long()
            tokens = (digits << 8 * torch.arange(TOKEN_CHANNELS, device=digits.device)).sum(-1)
        if before or passing.after:
            hidden = hidden.unflatten(-1, (*passing.before, *passing.after, -1))
            hidden = hidden.movedim([*range(2, 2 + before)], [*range(before)])
        shared: dict[str, tuple[Tensor, ...]] = {}
        for (kind, heads, _), part in zip(sizes, parts, strict=True):
            shared[kind] = (*shared.get(kind, ()), (part / _SMALL).unflatten(-1, (heads, -1)).transpose(1, 2))
        return _Passed(hidden, tokens, shared)

    @torch.no_grad()
    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What the head reads: the last block's output `[batch, length, hidden]` behind the final norm. The head itself
        may have been freed."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise _HeadReached

        handle = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            with suppress(_HeadReached):
                self.logits(hidden)
        finally:
            handle.remove()
        self._entered()
        return seen[0]

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int, hidden: StoredBatches[Tensor]) -> None:
        """Replace the inputs of block `index` by its outputs, batch by batch: the two never exist at once in full.

        Args:
            block: the module to run.
            hidden: `[batch, length, hidden]` each.
        """
        for number, batch in enumerate(hidden):
            hidden[number] = self.run_block(block, index, batch)

    def hidden_states(self, tokens: Tensor, blocks: Iterable[BlockForward] | None = None) -> Iterator[Tensor]:
        """The output `[batch, length, hidden]` of each block in turn for int64 tokens `[batch, length]`.

        Args:
            blocks: what to run; by default the source's blocks, of which one at a time is in memory.
        """
        hidden = self.embed(tokens)
        for block in self._block_forwards() if blocks is None else blocks:
            hidden = block(hidden)
            del block  # frees it before the next is loaded
            yield hidden

    def logits_of(self, tokens: Tensor, blocks: Iterable[BlockForward] | None = None) -> Tensor:
        """Logits `[batch, length, vocab]` for int64 tokens `[batch, length]`; `blocks` as for `hidden_states`."""
        for hidden in self.hidden_states(tokens, blocks):
            last = hidden
        return self.logits(last)

    @staticmethod
    def round_linears(module: nn.Module, dtype: torch.dtype) -> None:
        """Keep the frozen weights of linear layers in the dtype that they are multiplied in, so that they are not
        converted in every pass: half the memory, and the same outputs. A tensor that others share becomes a copy."""
        for linear in module.modules():
            if isinstance(linear, nn.Linear | Conv1D) and linear.weight is not None:
                linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)

    def share(self, other: ModelStream) -> None:
        """Use the tensors outside of the other stream's blocks, such as its embedding, in place of one's own where both
        are the same: at 8B embedding and head take 3 GB."""
        shared = dict(other.model.named_parameters(remove_duplicate=False))
        for name, own in [*self.model.named_parameters(remove_duplicate=False)]:
            tensor = shared.get(name)
            if tensor is not None and own.dtype == tensor.dtype and torch.equal(own, tensor):
                owner, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, tensor)

    def drop_embedding(self) -> None:
        """Free the embedding, often larger than a block, unless the head is the same tensor; `embed` cannot be called
        afterwards."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if (head is None or head.weight is not embedding.weight) and not self._reads_embedding():
            embedding.to("meta")

    def drop_vocabulary(self) -> None:
        """Free embedding and head; `embed` and `logits` cannot be called afterwards."""
        if not self._reads_embedding():
            self.model.get_input_embeddings().to("meta")
            if (head := self.model.get_output_embeddings()) is not None:  # some models do not say which it is
                head.to("meta")

    def _reads_embedding(self) -> bool:
        """Whether the arguments of blocks need the embedding: they depend on the tokens, or the model looks up a token
        of its own, such as that of an image."""
        if self._passing.tokens or not self.family.discovered:
            return self._passing.tokens
        embedding = self.model.get_input_embeddings()
        own: nn.Parameter = embedding.weight
        embedding.weight = nn.Parameter(own.to("meta"), requires_grad=False)
        try:
            inputs = torch.zeros(1, 2, embedding.embedding_dim, device=self.device, dtype=self.dtype)
            self._calls_of(inputs_embeds=inputs)
        except Exception:  # of whatever type the model's code raises
            return True
        else:
            return False
        finally:
            embedding.weight = own

    @staticmethod
    def weight_of(module: nn.Module) -> Tensor:
        """The weight of a linear layer as `[out, in]`, whatever its storage order; a view."""
        weight = module.get_parameter("weight")
        return weight.T if isinstance(module, Conv1D) else weight

    @staticmethod
    @torch.no_grad()
    def set_weight(module: nn.Module, weight: Tensor) -> None:
        """Overwrite the weight of a linear layer with `[out, in]` values, in its own dtype and device."""
        ModelStream.weight_of(module).copy_(weight)

    @staticmethod
    def new_weight(module: nn.Module, weight: Tensor) -> None:
        """Let a linear layer have this tensor, `[out, in]`, as its weight, in whatever dtype."""
        module.get_parameter("weight").data = weight.T.contiguous() if isinstance(module, Conv1D) else weight

    @contextmanager
    def _typed(self, index: int) -> Iterator[None]:
        """Within: code of a model that cannot multiply in bf16 is refused."""
        try:
            yield
        except RuntimeError as error:
            if not (torch.is_autocast_enabled(self.device.type) and any(part in str(error) for part in _DTYPES)):
                raise
            raise UnsupportedError(
                f"model type {self.family.model_type!r}: block {index} does not run in bf16 ({error})",
                hint="use --dtype float32",
            ) from error

    @contextmanager
    def _without_masks(self) -> Iterator[None]:
        """Where only stand-ins run, no attention masks are made: to make them, transformers waits for the device, which
        looks for packed sequences. It makes none for an implementation that it does not know. A model without a row may
        need them."""
        if self.family.discovered:
            yield
            return
        config = self._text.base_model.config
        previous = config._attn_implementation
        config._attn_implementation = {"": "none"}  # of this config, not of those in it
        try:
            yield
        finally:
            config._attn_implementation = {"": previous}

    def _block_forwards(self) -> Iterator[BlockForward]:
        for index in range(self.n_blocks):
            yield partial(self.run_block, self.load_block(index), index)

    def _entered(self) -> Tensor:
        """The hidden states that entered the first block in the last forward pass; the stand-ins release theirs."""
        hidden = self._stand_ins[0].hidden
        for stand_in in self._stand_ins:
            stand_in.hidden = None
        assert hidden is not None
        return hidden

    def _load(self, module: nn.Module, prefix: str = "") -> None:
        """Load `module`, which is on the meta device: weights stored under `prefix`, and computed buffers."""
        self._compute_tables(module, self.model)
        names = {name: prefix + name for name in module.state_dict()}
        origins = {name: self._tied.get(own, own) if prefix else own for name, own in names.items()}
        origins = {name: origin for name, origin in origins.items() if origin in self._stored}
        weights = self.source.read(origins.values())
        real = {name: weights[origin].to(self.device, self.dtype) for name, origin in origins.items()}
        module.load_state_dict(real, strict=False, assign=True)
        module.requires_grad_(False)

    def _compute_tables(self, module: nn.Module, owner: Any) -> None:
        """Recompute the buffers that no checkpoint stores (rotary frequencies, embedding scales).

        Args:
            owner: the transformers model that `module` is part of; its `_init_weights` computes them.
        """
        owner = module if isinstance(module, PreTrainedModel) else owner
        names = sorted(module._non_persistent_buffers_set & module._buffers.keys())
        makers = [module, self._text.base_model]  # some models compute what their blocks have
        if not any(self._compute(module, names, owner, makers[:count]) for count in (1, 2)):
            raise UnsupportedError(f"transformers cannot recompute {', '.join(names)} of {type(module).__name__}")
        for child in module.children():
            self._compute_tables(child, owner)

    def _compute(self, module: nn.Module, names: Sequence[str], owner: Any, makers: Sequence[nn.Module]) -> bool:
        """Have transformers initialize `makers`, and thereby buffers of `module`; whether nothing of them is left that
        was there before, and nothing else has changed."""
        results = []
        for number, integer in ((torch.nan, -1), (torch.inf, 0)) if names else ():
            for name in names:
                like = module.get_buffer(name)
                value = number if like.is_floating_point() else integer
                module._buffers[name] = torch.full_like(like, value, device=self.device)
            for maker in makers:
                versions = [tensor._version for tensor in self.model.parameters()] if maker is not module else []
                owner._init_weights(maker)
                if versions and versions != [tensor._version for tensor in self.model.parameters()]:
                    return False
            results.append([module.get_buffer(name) for name in names])
        return all(torch.equal(*pair) for pair in zip(*results, strict=True))


class _HeadReached(Exception):
    """The forward pass has reached the head."""


class _StandIn(nn.Module):
    """Takes a block's place: records its arguments and passes the hidden states on, or what `output` makes of them."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that it is not registered as a submodule
        self._others = (None,) * (family.passing.n_outputs - 1) if family.tuple_output else None
        self.call = Call((), {})
        self.hidden: Tensor | None = None
        self.output: Callable[[Tensor], Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.hidden, self.call = hidden, Call(args, kwargs)
        hidden = hidden if self.output is None else self.output(hidden)
        return hidden if self._others is None else (hidden, *self._others)
