"""The structure of a model that has no row in the table of families, discovered from the model itself.

The model is built on the meta device, and its own forward pass runs there once: shapes and data flow, but no memory and
no arithmetic. What flows where says everything that a row says: the list of blocks; which linears read the same tensor,
in the order of their calls; which outputs stay inside of attention or MLP; and where outputs are added to the residual
stream. What the flow does not show is left out, and only costs time or accuracy: a group that seems to lead nowhere is
run again at every stage, one that joins no stream does without the correction of the residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from torch.fx.experimental import _config as fx_settings
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qcli.models.families import Family
from qcli.models.flow import BATCH, LENGTH, Flow
from qcli.models.loadable import quantizable_skeleton
from qcli.models.source import ModelSource, reported, with_type
from qcli.utils.errors import UnsupportedError


def discovered_family(source: ModelSource) -> Family:
    """The row of a model that the table does not have.

    Raises:
        UsageError: transformers cannot build the model of its config.
        UnsupportedError: as `discover`.
    """
    with reported(f"{source.path}: transformers cannot build this model"):
        model = quantizable_skeleton(source.hf_config(), trust_remote_code=source.trust_remote_code)
    return discover(model.eval(), source.config["model_type"])


def discover(model: PreTrainedModel, model_type: str) -> Family:
    """The row of a model.

    Args:
        model: on the meta device; experts as lists of linears.

    Raises:
        UnsupportedError: it has no list of decoder blocks, or its forward pass cannot be followed; the message says
            where.
    """
    lists = _block_lists(model)
    if not lists:
        raise UnsupportedError(f"model type {model_type!r} has no list of blocks")
    flow, text = _followed(model, model_type, *lists[0])
    path, blocks = max(lists, key=lambda item: sum(block in flow.passed for block in item[1]))
    if path != lists[0][0]:
        flow = _run(text, _flow(model, path, blocks))
    found = [flow.groups(index) for index in range(len(blocks))]
    folds = [flow.folds(index, groups) for index, groups in enumerate(found)]
    if not any(found):
        raise UnsupportedError(f"model type {model_type!r} has no linear layers in {path}")
    kinds = {type(linear) for linear in flow.linears()}
    if Conv1D in kinds and len(kinds) > 1:
        raise UnsupportedError(f"model type {model_type!r} mixes weights of both orientations")
    return Family(
        model_type,
        path,
        groups=(),
        folds=(),
        tuple_output=any(isinstance(output, tuple | list) for output in flow.outputs),
        conv1d=kinds == {Conv1D},
        renames=None,
        own_linear=any(kind not in (nn.Linear, Conv1D) for kind in kinds),
        dense_parts=tuple(_dense_parts(model, path, flow.passed)),
        groups_by_block=tuple(found),
        folds_by_block=tuple(each for each, _ in folds),
        unfolded={norm: reason for _, reasons in reversed(folds) for norm, reason in reasons.items()},
        embedding_path=_path_of(model, text.get_input_embeddings()),
        text_path="" if text is model else _path_of(model, text),
        discovered=True,
        passing=flow.passing(),
    )


def _block_lists(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules that may be decoder blocks, by path, the longest first: those whose modules transformers
    never splits over devices, or, where it names none, all lists in the decoder that are in no other."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):  # a head by that name
        decoder = model.base_model
    prefix = _path_of(model, decoder)
    lists = [
        (f"{prefix}.{path}".strip("."), module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    outer = [(path, blocks) for path, blocks in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    whole = set(model._no_split_modules or ())
    named = [(path, blocks) for path, blocks in outer if any(type(block).__name__ in whole for block in blocks)]
    return sorted(named or outer, key=lambda item: len(item[1]), reverse=True)


def _followed(
    model: PreTrainedModel, model_type: str, path: str, blocks: nn.ModuleList
) -> tuple[Flow, PreTrainedModel]:
    """The flow of text through a model, and what runs on text alone: the model, or the language model inside of one
    that insists on images."""
    try:
        return _run(model, _flow(model, path, blocks)), model
    except UnsupportedError:
        raise
    except Exception as error:  # of whatever type the model's code raises
        for part in _language_models(model, path):
            with suppress(Exception):
                return _run(part, _flow(model, path, blocks)), part
        reason = f"cannot be followed on text alone ({with_type(error)})"
        if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
            reason = "depends on values that are only known when it runs, such as the number of tokens of an expert"
        raise UnsupportedError(f"model type {model_type!r}: its forward pass {reason}") from error


def _language_models(model: PreTrainedModel, blocks: str) -> Iterator[PreTrainedModel]:
    """The models with a head of their own, inside of this one, that hold the blocks."""
    names = blocks.split(".")
    for end in range(1, len(names)):
        part = model.get_submodule(".".join(names[:end]))
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            yield part


def _run(model: PreTrainedModel, flow: Flow) -> Flow:
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long, device="meta")
    flow.follow(tokens)
    # Without values, distributions cannot check their parameters, and all entries count as not zero.
    with torch.no_grad(), _unchecked_distributions(), _counting_all(), flow:
        model(input_ids=tokens, use_cache=False)
    return flow


def _dense_parts(model: PreTrainedModel, blocks: str, passed: Set[nn.Module]) -> Iterator[str]:
    """Paths of modules beside the blocks that have matrices, none of which text passes."""
    names = blocks.split(".")
    for end in range(len(names)):
        owner = ".".join(names[:end])
        for name, part in model.get_submodule(owner).named_children():
            has_matrices = any(p.ndim > 1 for p in part.parameters()) and not isinstance(part, nn.Embedding)
            if name != names[end] and has_matrices and passed.isdisjoint(part.modules()):
                yield f"{owner}.{name}".strip(".")


def _flow(model: PreTrainedModel, path: str, blocks: nn.ModuleList) -> Flow:
    """A flow through these blocks. Linears that several blocks have in common stay dense: one block after the other,
    they cannot be quantized for all."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    tied = tied.union(*(owners for owners in names.values() if len(owners) > 1))
    shared = [
        {name for name, _ in block.named_parameters() if f"{path}.{index}.{name}" in tied}
        for index, block in enumerate(blocks)
    ]
    dense = {(i, name.removesuffix(".weight")) for i, names in enumerate(shared) for name in names}
    return Flow(model, blocks, dense, shared)


def _path_of(model: nn.Module, part: nn.Module) -> str:
    paths: Iterator[str] = (path for path, module in model.named_modules() if module is part)
    return next(paths)


@contextmanager
def _counting_all() -> Iterator[None]:
    settings: Any = fx_settings
    before = settings.meta_nonzero_assume_all_nonzero
    settings.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        settings.meta_nonzero_assume_all_nonzero = before


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)
