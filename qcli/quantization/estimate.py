"""How long a quantization would take here: counted work, at speeds that a short probe measures on this machine.

The probe multiplies matrices of a block's shapes, rounds weights as training does, and quantizes made-up layers by the
plan's method. It is an estimate: other programs, reading and writing are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import torch

from qcli.algorithms.layer_group import CROSS, HESSIAN, OUTPUT_GAP, LinearGroup
from qcli.algorithms.method import Method
from qcli.models.sizes import ModelSizes, pass_tokens
from qcli.quantization.footprint import TRAINED_TOKENS
from qcli.quantization.plan import Plan
from qcli.quantization.solve import solve
from qcli.utils.device import has_fast_matmul, local_device, matmul_precision, resolve_dtype
from qcli.utils.distributed import world_size

_SECONDS = 2.0  # of the whole probe
_ENOUGH = 0.15  # seconds of one measurement, after which the next one could take too long
_WIDTHS = (128, 160, 192, 256, 320, 384)  # inputs of the first made-up layer: the first that the method's groups divide
_ROWS = 256  # outputs of the first made-up layer
_WIDEST, _PRODUCT = 4096, 1 << 31  # sides of a matrix that is multiplied, and multiplications
_PASSES = 1.25  # through a block for each stream: parts of it run again where a group's inputs are collected
_STEP = 6  # a training step against the matrix products of a forward pass, as measured on a CPU
_START = 3.0  # seconds of imports, tokens and the last files
_ROUNDING = 30  # passes over the weights of a training step that rounds them


def estimated_seconds(plan: Plan) -> float | None:
    """Seconds that quantizing by this plan would take on this machine, measured in at most about 2; None: nothing tells
    it beforehand, as where no data runs through the model, or bits are chosen by measurement."""
    if (
        not plan.calibrated
        or plan.choices is not None
        or not plan.methods_of(ModelSizes.of(plan.source).layers[0].block)
    ):
        return None
    probe = _Probe(plan)
    with matmul_precision(fast=False), torch.inference_mode():
        speed = probe.flops()
        rounding = probe.rounding()
    with matmul_precision(fast=False), torch.no_grad():
        solving = probe.solving(speed)
    blocks = len({layer.block for layer in plan.layers if plan.methods[layer.name] is not None})
    each = probe.forward() / speed + probe.training(speed, rounding) + solving
    return _START + blocks * each / world_size()


class _Probe:
    """Work of a block of a plan, and the speeds of this machine at it."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.sizes, self.text = plan, ModelSizes.of(plan.source), plan.recipe.calibration
        self.device, dtype = local_device(plan.recipe.device), resolve_dtype(plan.recipe.dtype)
        fast = plan.recipe.dtype == "auto" and has_fast_matmul(self.device)
        self.dtype = torch.bfloat16 if fast else dtype
        self.ends = time.perf_counter() + _SECONDS
        self.random = torch.Generator(self.device).manual_seed(0)

    def forward(self) -> float:
        """Operations of all samples in a block: its linears, attention, and the statistics of their inputs."""
        tokens = self.text.samples * self.text.seq_len
        work = tokens * (2 * self.sizes.block + 4 * self.text.seq_len * self.sizes.hidden)
        streams = (2 if self.plan.compares else 1) + (1 if self.plan.reconstructs else 0)
        statistics = 0
        for columns, rows, needs in self._groups():
            statistics += 2 * tokens * columns**2 * len(needs & {HESSIAN, CROSS})
            statistics += 2 * tokens * columns * rows if OUTPUT_GAP in needs else 0
        return _PASSES * streams * work + statistics

    def training(self, speed: float, rounding: float) -> float:
        """Seconds of the training steps of a block."""
        refinement, seconds = self.plan.recipe.refinement, 0.0
        steps = [(getattr(each, "steps", 0), TRAINED_TOKENS) for each in self.plan.recipe.all_transforms]
        if refinement is not None:
            steps.append((refinement.steps, refinement.batch_tokens))
        for count, tokens in steps:
            work = 2 * max(tokens, self.text.seq_len) * self.sizes.block * _STEP
            seconds += count * (work / speed + _ROUNDING * rounding * self.sizes.block)
        return seconds

    def flops(self) -> float:
        """Operations a second of the product of a pass's tokens and the largest linear."""
        largest = max((layer.shape for layer in self.sizes.layers), key=prod)
        rows, columns = (min(_WIDEST, side) for side in largest)
        tokens = min(pass_tokens(self.text.samples, self.text.seq_len), max(1, _PRODUCT // (rows * columns)))
        x, weight = self._made_up(tokens, columns), self._made_up(rows, columns)
        return 2 * tokens * rows * columns / self._seconds(lambda: x @ weight.T, repeated=True)

    def rounding(self) -> float:
        """Seconds of one pass over a weight, float32."""
        weights = min(self.sizes.block, 1 << 22)
        values = torch.rand(weights, device=self.device, generator=self.random)
        return self._seconds(lambda: values.mul(3.0).round_(), repeated=True) / 2 / weights

    def solving(self, speed: float) -> float:
        """Seconds of the method on the groups of a block: of each weight by measurement, and of products with the
        square matrices of statistics, which small layers hardly need time for."""
        groups = self._groups()
        methods = dict.fromkeys(self.plan.methods_of(self.sizes.layers[0].block).values())
        widest, most = max(columns for columns, _, _ in groups), max(rows for _, rows, _ in groups)
        each = sum(self._seconds_of_weight(method, most, widest) for method in methods) / len(methods)
        products = sum(2 * rows * columns**2 + columns**3 for columns, rows, _ in groups)
        return each * sum(rows * columns for columns, rows, _ in groups) + products / speed

    def _seconds_of_weight(self, method: Method, most: int, widest: int) -> float:
        """Seconds for each weight of a made-up layer, narrow and as high as time allows."""
        rows = min(_ROWS, most)
        fitting = (width for width in _WIDTHS if width < widest and method.unsupported_reason((rows, width)) is None)
        width = next(fitting, widest)
        self._solve(method, rows, width)  # whatever is imported, compiled or allocated first
        seconds = self._solve(method, rows, width)
        while 2 * rows <= most and seconds < _ENOUGH and time.perf_counter() + 2 * seconds < self.ends:
            rows *= 2
            seconds = self._solve(method, rows, width)
        return seconds / (rows * width)

    def _solve(self, method: Method, rows: int, width: int) -> float:
        x = torch.rand(2 * width, width, device=self.device, generator=self.random)
        square = x.T @ x / len(x)
        weight = torch.rand(rows, width, device=self.device, generator=self.random) - 0.5
        gap = torch.zeros(rows, width, device=self.device)

        def work() -> None:
            solve(method, self.plan.recipe.low_rank, LinearGroup({"": weight}, square.clone(), square.clone(), gap))

        return self._seconds(work)

    def _groups(self) -> list[tuple[int, int, frozenset[str]]]:
        """Inputs, outputs together, and needed statistics of every group of a block that a method quantizes."""
        chosen = self.plan.methods_of(self.sizes.layers[0].block)
        groups = []
        for group in dict.fromkeys(layer.group for layer in self.sizes.layers):
            members = [layer for layer in self.sizes.layers if layer.group == group and layer.path in chosen]
            if members:
                needs = frozenset[str]().union(*(self.plan.needs_of(chosen[layer.path]) for layer in members))
                groups.append((members[0].shape[1], sum(layer.shape[0] for layer in members), needs))
        return groups

    def _made_up(self, rows: int, columns: int) -> torch.Tensor:
        return torch.rand(rows, columns, device=self.device, generator=self.random).to(self.dtype)

    def _seconds(self, work: Callable[[], object], *, repeated: bool = False) -> float:
        """Wall-clock seconds of some work; with `repeated` the least of three."""
        found = []
        for _ in range(3 if repeated else 1):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            found.append(time.perf_counter() - started)
        return max(1e-9, min(found))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
