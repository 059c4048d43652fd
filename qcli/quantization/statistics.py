"""Input statistics of a block's linears, collected group by group from staged forward passes.

True sequential order: the inputs of a group come from a block whose earlier groups are already quantized. A stage runs
the block only up to the inputs of one group, and skips linears whose outputs are no longer read: groups alternate
between those whose outputs stay inside attention or MLP (q/k/v, gate/up) and those that lead out of it (o, down), so
once the inputs of the latter are known, nothing reads the outputs of the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qcli.algorithms.layer_group import CROSS, HESSIAN, OUTPUT_GAP, LinearGroup
from qcli.algorithms.solvers.tiles import panels
from qcli.models.families import Group
from qcli.models.listed_experts import ListedExperts
from qcli.models.sizes import experts_at_once
from qcli.models.stream import ModelStream
from qcli.quantization.ranks import ALONE, add_up_statistics
from qcli.utils.distributed import Processes
from qcli.utils.errors import UsageError
from qcli.utils.stored_batches import StoredBatches

_BAND = 1024  # rows of a Hessian


class _Reached(Exception):
    """The forward pass has reached the inputs of the requested group."""


class StagedBlock:
    """One block and the hidden states that enter it, run stage by stage.

    Args:
        stream: the model.
        index: number of the block.
        block: the module; its weights may change between stages, group by group.
        hidden: one `[batch, length, hidden]` a batch; replaced by the block's outputs as batches advance.
        keep: dtype in which inputs are kept between stages.
        final: whether the weights do not change, so that the last stage runs through the whole block.
    """

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        block: nn.Module,
        hidden: StoredBatches[Tensor],
        *,
        keep: torch.dtype = torch.float32,
        final: bool = False,
    ) -> None:
        self.stream, self.index, self.block, self.hidden = stream, index, block, hidden
        self.groups, self.keep, self.final = stream.family.groups_of(index), keep, final
        # By group, batches in order: inputs of groups that lead out, until there are outputs of their parents, which
        # are attention or MLP.
        self._inputs: dict[int, StoredBatches[Tensor | None]] = {}
        self._results: dict[int, StoredBatches[Any]] = {}
        self._done: set[int] = set()  # batches that have advanced

    def linear(self, path: str) -> nn.Module:
        """The linear layer at `path` of the block."""
        return self.block.get_submodule(path)

    def reach(self, group: int, batch: int) -> tuple[Tensor, Tensor | None]:
        """Run one batch up to the inputs of `group`.

        Returns:
            The inputs, `[tokens, in_features]`, and the residual stream that the group's output is added to,
            `[tokens, hidden]`, or None where it is not added directly.
        """
        seen: dict[str, Tensor] = {}
        row = self.groups[group]
        runs_on = self.final and group == len(self.groups) - 1

        def arrive(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["inputs"] = args[0] if args else next(iter(kwargs.values()))
            if not runs_on:
                raise _Reached

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault("residual", args[0] if args else next(iter(kwargs.values())))

        with ExitStack() as hooks:
            hooks.enter_context(self._reusing(group, batch))
            watched = self._watched(row.linears)
            hooks.callback(watched.register_forward_pre_hook(arrive, with_kwargs=True).remove)
            if row.residual is not None:
                hooks.callback(self.linear(row.residual).register_forward_pre_hook(note, with_kwargs=True).remove)
            with suppress(_Reached):
                self.hidden[batch] = self.stream.run_block(self.block, self.index, self.hidden[batch])
                self._done.add(batch)
        inputs = seen["inputs"].flatten(0, -2)
        if row.leads_out and not runs_on:
            self._kept(self._inputs, group).append(inputs.to(self.keep))
        residual = seen.get("residual")
        return inputs, None if residual is None else residual.flatten(0, -2)

    def reach_experts(
        self,
        group: int,
        batch: int,
        sets: Sequence[Sequence[str]],
        *,
        every_token: bool,
        routed: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """Run one batch up to the inputs of experts.

        Args:
            sets: their linears in `group`, by expert.
            every_token: whether all tokens count, and not only those that are routed to the expert.
            routed: in place of what this block's router says.

        Returns:
            The inputs of each, `[tokens, in_features]`; perhaps of no tokens. And where tokens were routed to, as
            `ListedExperts.forward` takes it, if not to all experts.
        """
        seen: dict[int, Tensor] = {}
        routes: list[tuple[Tensor, Tensor]] = []
        experts = self.block.get_submodule(sets[0][0].rpartition(".")[0].rpartition(".")[0])
        assert isinstance(experts, ListedExperts)

        def arrives(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def note(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen[number] = args[0]

            return note

        def reached(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            _, *route = *args, *kwargs.values()
            if len(route) > 1:
                routes.append((route[0], route[1]))
            raise _Reached

        with ExitStack() as hooks:
            hooks.enter_context(self._reusing(group, batch))
            for number, paths in enumerate(sets):
                hooks.callback(self._watched(paths).register_forward_pre_hook(arrives(number)).remove)
            hooks.callback(experts.register_forward_hook(reached, with_kwargs=True).remove)
            experts.every_token, experts.routed = every_token, routed
            with suppress(_Reached):
                self.stream.run_block(self.block, self.index, self.hidden[batch])
            experts.every_token, experts.routed = False, None
        widths = [ModelStream.weight_of(self.linear(paths[0])).shape[1] for paths in sets]
        nothing = self.hidden[batch]
        inputs = [seen.get(number, nothing.new_empty(0, width)) for number, width in enumerate(widths)]
        return inputs, next(iter(routes), None)

    def _watched(self, paths: Sequence[str]) -> nn.Module:
        """A linear whose hooks simulate quantized inputs, if there is one: a dense one sees other inputs."""
        return self.linear(next((path for path in paths if self.linear(path)._forward_pre_hooks), paths[0]))

    def advance(self) -> None:
        """Replace the hidden states by the block's outputs, after all groups have been reached."""
        for batch, hidden in enumerate(self.hidden):
            if batch not in self._done:
                with self._reusing(len(self.groups), batch):
                    self.hidden[batch] = self.stream.run_block(self.block, self.index, hidden)

    def release(self) -> None:
        """Free what is kept between stages; no stage may follow."""
        self._inputs.clear()
        self._results.clear()

    @contextmanager
    def _reusing(self, group: int, batch: int) -> Iterator[None]:
        """Within: modules before `group` reuse kept inputs and results, or return zeros where nothing reads them."""
        with ExitStack() as patches:
            for earlier in range(group):
                for path in self.groups[earlier].linears:
                    known = self._known(earlier, path, group, batch, patches)
                    if known is not None:
                        module, forward = known
                        module.forward = forward
                        patches.callback(delattr, module, "forward")
            patches.enter_context(_SkipsUnused())
            yield

    def _known(
        self, earlier: int, path: str, group: int, batch: int, hooks: ExitStack
    ) -> tuple[nn.Module, Callable[..., Any]] | None:
        """The module to patch for a linear of an earlier group, and its substitute; None: it runs as usual."""
        linear = self.linear(path)
        if not self.groups[earlier].leads_out:
            last = self.groups[earlier].last_reader
            return (linear, _Unused(len(ModelStream.weight_of(linear)))) if last is not None and group > last else None
        parent, results = path.rpartition(".")[0], self._kept(self._results, earlier)
        if batch < len(results):
            return self.linear(parent), _KeptResult(results[batch])
        if parent and group < len(self.groups):  # a later stage will want it again

            def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                results.append(output)
                self._inputs[earlier][batch] = None

            hooks.callback(self.linear(parent).register_forward_hook(keep).remove)
        inputs = self._inputs[earlier][batch]
        assert inputs is not None
        return linear, _OnKeptInputs(linear, inputs)

    def _kept(self, groups: dict[int, StoredBatches[Any]], group: int) -> StoredBatches[Any]:
        return groups.setdefault(group, self.hidden.memory.store())


class _OnKeptInputs:
    """A linear's forward on inputs kept from an earlier stage."""

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self.forward, self.inputs = module.forward, inputs

    def __call__(self, like: Tensor) -> Tensor:
        output: Tensor = self.forward(self.inputs.to(like.dtype).view(*like.shape[:-1], -1))
        return output


class _KeptResult:
    """A module's forward that returns a kept result."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.result


class _Unused:
    """A linear's forward whose output nothing reads: zeros, the same memory for all tokens."""

    def __init__(self, out_features: int) -> None:
        self.out_features = out_features

    def __call__(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.out_features).expand(*like.shape[:-1], -1)


class _SkipsUnused(TorchFunctionMode):
    """Within: attention over the values of `_Unused` is not computed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) > 2 and not any(args[2].stride()[::2]):
            query, _, value = args[:3]
            return query.new_zeros(()).expand(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def collect(
    group: int,
    quantized: StagedBlock,
    original: StagedBlock | None,
    needs: frozenset[str],
    processes: Processes = ALONE,
) -> LinearGroup:
    """Run both streams up to `group`, batch by batch, and average the input statistics that `needs` names.

    Args:
        group: its index in the family's table; earlier groups have been collected before.
        quantized: the block, earlier groups quantized.
        original: the same block in full precision; None where no statistic needs it.
        processes: that the samples are divided among; all get the averages over all samples.

    Returns:
        The statistics, float32, and the original weights by path in the block.

    Raises:
        UsageError: inputs overflow the dtype that the model runs in.
    """
    paths = quantized.groups[group].linears
    weights = {path: ModelStream.weight_of(quantized.linear(path)).float() for path in paths}
    if OUTPUT_GAP in needs and quantized.groups[group].residual is None:
        needs = needs - {OUTPUT_GAP} | {CROSS}
    needs = needs | {HESSIAN} if CROSS in needs else needs
    sums: dict[str, Tensor] = {}  # of H its upper triangle; in place of the cross moment what it has more than H
    tokens = 0
    for batch in range(len(quantized.hidden)):
        inputs, residual = quantized.reach(group, batch)
        inputs, tokens = inputs.float(), tokens + len(inputs)
        if HESSIAN in needs:
            _add_square(sums, HESSIAN, inputs)
        if original is None:
            continue
        true_inputs, true_residual = original.reach(group, batch)
        if CROSS in needs:
            _add_product(sums, CROSS, true_inputs - inputs, inputs)
        if OUTPUT_GAP in needs:  # far cheaper than the cross moment where outputs are fewer than inputs
            assert residual is not None and true_residual is not None
            gap = F.linear(true_inputs - inputs, weights[paths[0]]).float()
            _add_product(sums, OUTPUT_GAP, gap.add_(true_residual).sub_(residual), inputs)
    if processes.world_size > 1:
        if not tokens:  # there are more processes than held-out samples
            like = weights[paths[0]]
            for name in needs if original is not None else needs & {HESSIAN}:
                sums[name] = like.new_zeros(like.shape[name != OUTPUT_GAP], like.shape[1])
        tokens = add_up_statistics(sums, tokens, processes)
    ranges = [value for total in sums.values() for value in total.div_(tokens).aminmax()]
    if ranges and not bool(torch.stack(ranges).isfinite().all()):
        raise _overflowing(quantized.index, paths[0])
    if HESSIAN in sums:
        _mirror(sums[HESSIAN])
    if CROSS in sums:
        sums[CROSS].add_(sums[HESSIAN])
    return LinearGroup(weights, **sums)


def mean_square(inputs: Iterable[Tensor], processes: Processes = ALONE) -> Tensor:
    """`E[x^T x]`, float32 `[in, in]`, of inputs `[batch, length, in]` of the head.

    Args:
        inputs: of this process's samples, on one device.
        processes: that the samples are divided among; all get the average over all samples.

    Raises:
        UsageError: it is not finite.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch in inputs:
        rows = batch.flatten(0, -2).float()
        _add_square(sums, HESSIAN, rows)
        tokens += len(rows)
    if processes.world_size > 1:
        tokens = add_up_statistics(sums, tokens, processes)
    square = sums[HESSIAN].div_(tokens)
    if not bool(square.isfinite().all()):
        raise UsageError(
            "the inputs of the head are not finite",
            hint="activations overflow in this dtype: use --dtype float32",
        )
    _mirror(square)
    return square


@dataclass(frozen=True)
class Statistics:
    """Of the input of linears, and what is amiss with them."""

    group: LinearGroup
    fallbacks: tuple[str, ...] = ()


def at_once(group: Group, block: nn.Module) -> Iterator[tuple[tuple[str, ...], ...]]:
    """The sets of a group whose statistics are collected in one pass: all, or as many experts as memory should hold."""
    width = ModelStream.weight_of(block.get_submodule(group.linears[0])).shape[1]
    count = experts_at_once(width)
    for start in range(0, len(group.sets), count):
        yield group.sets[start : start + count]


def collect_experts(
    group: int,
    sets: Sequence[Sequence[str]],
    quantized: StagedBlock,
    original: StagedBlock | None,
    needs: frozenset[str],
    processes: Processes = ALONE,
    *,
    every_token: bool = False,
    floor: int | None = None,
) -> list[Statistics]:
    """The statistics of experts, each from the tokens that are routed to it in the model as quantized so far.

    An expert that saw too few tokens, whose own Hessian would be singular or noisy, makes up for the missing ones by
    the mean of all experts of the pass. The full-precision block is compared on the same tokens: where its router would
    send them elsewhere, it sends them where the quantized model's does.

    Args:
        group: its index in the block.
        sets: the linears of each expert.
        quantized, original, processes: as `collect` takes them.
        every_token: whether all tokens count for all experts.
        floor: tokens that are enough; None: as many as the linears have inputs.
    """
    weights = [{path: ModelStream.weight_of(quantized.linear(path)).float() for path in paths} for paths in sets]
    if not needs:
        return [Statistics(LinearGroup(own)) for own in weights]
    widths = [next(iter(own.values())).shape[1] for own in weights]
    like = next(iter(weights[0].values()))
    compared = original is not None and bool(needs & {CROSS, OUTPUT_GAP})
    # Of H its upper triangle; in place of the cross moment what it has more than H.
    names = (HESSIAN, CROSS) if compared else (HESSIAN,)
    sums = [{name: like.new_zeros(width, width) for name in names} for width in widths]
    counts = [0] * len(sets)
    for batch in range(len(quantized.hidden)):
        inputs, routed = quantized.reach_experts(group, batch, sets, every_token=every_token)
        true_inputs: Sequence[Tensor | None] = [None] * len(sets)
        if compared and original is not None:
            true_inputs, _ = original.reach_experts(group, batch, sets, every_token=every_token, routed=routed)
        for number, (own, true) in enumerate(zip(inputs, true_inputs, strict=True)):
            if not len(own):
                continue
            counts[number] += len(own)
            _add_square(sums[number], HESSIAN, own.float())
            if true is not None:
                _add_product(sums[number], CROSS, true.float() - own.float(), own.float())
    if processes.world_size > 1:
        counts = [add_up_statistics(own, count, processes) for own, count in zip(sums, counts, strict=True)]
    pooled = {name: like.new_zeros(widths[0], widths[0]) for name in names}
    for name, total in pooled.items():
        for totals in sums:  # not stacked: that would be all of them once more
            total.add_(totals[name])
        total.div_(max(1, sum(counts)))
    found = []
    for totals, count, width, linears in zip(sums, counts, widths, weights, strict=True):
        fallbacks = tuple[str, ...]()
        missing = max(0, (floor or width) - count)
        if missing:
            fallbacks = (f"an expert that saw {count} tokens: statistics of all experts make up for {missing}",)
        for name, total in totals.items():
            total.add_(pooled[name], alpha=missing).div_(count + missing)
        _mirror(totals[HESSIAN])
        if compared:
            totals[CROSS].add_(totals[HESSIAN])
        found.append(Statistics(LinearGroup(linears, **totals), fallbacks))
    finite = torch.stack([each for totals in sums for total in totals.values() for each in total.aminmax()])
    if not bool(finite.isfinite().all()):
        raise _overflowing(quantized.index, sets[0][0])
    return found


def _overflowing(block: int, path: str) -> UsageError:
    return UsageError(
        f"block {block}: the inputs of {path} are not finite",
        hint="activations overflow in this dtype: use --dtype float32",
    )


def _mirror(square: Tensor) -> None:
    """Replace what is below the diagonal by what is above it, a band at a time: the whole may be a GPU's tenth."""
    for start in range(0, len(square), _BAND):
        band = slice(start, start + _BAND)
        square[band, band] = square[band, band].triu() + square[band, band].triu(1).T
        square[band.stop :, band] = square[band, band.stop :].T


def _add_square(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add `x^T x` in float32; below the diagonal only in part."""
    if name not in sums:
        sums[name] = x.new_zeros(x.shape[1], x.shape[1])
    total = sums[name]
    for part in panels(total):
        total[part, part.start :].addmm_(x[:, part].T, x[:, part.start :])


def _add_product(sums: dict[str, Tensor], name: str, difference: Tensor, x: Tensor) -> None:
    """Add `difference^T x` in float32: what is solved with it magnifies its errors."""
    if name not in sums:
        sums[name] = x.new_zeros(difference.shape[1], x.shape[1])
    sums[name].addmm_(difference.T, x)
