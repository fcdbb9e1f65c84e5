"""Time of the switch ``W0 + U V -> U* V*``: one truncation of each linear of a model.

Plain truncation minimises ``|W - U* V*|``, the activation-aware one the mean of ``|(W - U* V*) x|^2``. The
reference way is the full singular value decomposition of the dense matrix in FP64. Operations of
decompositions are by formula. Models and nodes are not run: one linear of each shape is measured and counted
as often as the model has it; eight devices share the linears evenly, each taking as long as this one. The
steps before the switch are extrapolated as by `rank-decisions`; devices divide them and the linears alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.benchmarks.blocks import RANKS, build_layer, phase_1, preset_config, single_process
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.layer import forward_backward, layer_output
from inrank_megatron.benchmarks.rank_decisions import BATCH, step_seconds
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.timing import interleaved
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.lowrank.criteria.buffer import default_buffer
from inrank_megatron.lowrank.linalg.truncation import ShardedMatrix, truncate

WAYS = ("plain", "activation-aware")
TARGET_SECONDS = 120
NODE = 8
PHASE = 225
"""Steps before the switch, an epoch, in the GPT-2 configurations."""


def measure(presets: tuple[str, ...], *, repeats: int) -> Iterator[Row]:
    """Rows for the two linears of every preset's MLP, and sums over its layers."""
    with single_process() as parallel:
        for preset in presets:
            model = preset_config(preset).model
            h, f = model.hidden_size, model.ffn_hidden_size
            linears = [Linear(f, h, RANKS[preset]), Linear(h, f, RANKS[preset])]
            totals = [0.0, 0.0]
            for linear in linears:
                seconds, rows = _rows(linear, parallel.tp_group, repeats)
                totals = [t + model.num_layers * s for t, s in zip(totals, seconds, strict=True)]
                yield from rows
            case = f"switch {preset}, {2 * model.num_layers} linears, r={RANKS[preset]}"
            for way, total in zip(WAYS, totals, strict=True):
                yield Row(case, f"seconds on one device, {way} (two linears measured, added up)", total)
                node = f"seconds on a node of {NODE} such devices, {way} (estimate)"
                yield Row(case, node, total / NODE, TARGET_SECONDS)
            training = PHASE * _step_seconds(preset, parallel, repeats)
            yield Row(case, f"seconds of {PHASE} steps of {BATCH} sequences (extrapolated)", training)
            for way, total in zip(WAYS, totals, strict=True):
                yield Row(case, f"percent of these steps, {way}", 100 * total / training, 1.0)


@dataclass(frozen=True)
class Linear:
    """Sizes of a linear [O, I] and the rank r that it is cut to."""

    output_size: int
    input_size: int
    rank: int

    def matrix(self) -> Tensor:
        """A random matrix, which is harder to cut than a trained one: its spectrum is flat."""
        generator = torch.Generator().manual_seed(0)
        return (0.02 * torch.randn(self.output_size, self.input_size, generator=generator)).to(device())

    def moment(self) -> Tensor:
        """A second moment of the narrow side, [h, h] with a decaying spectrum."""
        width = min(self.output_size, self.input_size)
        generator = torch.Generator().manual_seed(1)
        samples = torch.randn(2 * width, width, generator=generator) / (1 + torch.arange(width) / 8)
        return (samples.t() @ samples / len(samples)).to(device())


def own_way(
    linear: Linear, matrix: Tensor, moment: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The truncation that the engine uses. The one place that names the algorithm under test."""
    dim = 0 if linear.output_size > linear.input_size else 1
    sharded = ShardedMatrix("layer", lambda: matrix, dim, moment)
    (factors,) = truncate([sharded], [linear.rank], group, step=0)
    return factors.left, factors.right


def reference_way(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U* = A sqrt(S)``, ``V* = sqrt(S) B^T`` by the SVD of the dense matrix."""
    a, s, b = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return a[:, :rank] * root, root[:, None] * b[:rank]


def _step_seconds(preset: str, parallel: Parallel, repeats: int) -> float:
    config = preset_config(preset)
    columns = min(RANKS[preset] + default_buffer(config.model.hidden_size), config.model.hidden_size)
    layer = build_layer(config, phase_1(columns), parallel)
    times = interleaved({"layer": forward_backward(layer_output, layer, config)}, repeats=repeats)
    return step_seconds(preset, times.median("layer"))


def _rows(linear: Linear, group: ProcessGroup, repeats: int) -> tuple[list[float], list[Row]]:
    """Seconds of each of :data:`WAYS`, and rows."""
    case, matrix = f"r={linear.rank} {linear.output_size}x{linear.input_size}", linear.matrix()
    ways = {
        way: partial(own_way, linear, matrix, moment, group)
        for way, moment in zip(WAYS, (None, linear.moment()), strict=True)
    }
    reference = partial(reference_way, matrix, linear.rank)
    error, least = (_error(matrix, *way()) for way in (ways["plain"], reference))
    reference_flops = count_flops(reference)
    times = interleaved(ways | {"reference": reference}, repeats=repeats)
    rows = [Row(case, "truncation error over the norm, plain", error, least, None, error / least)]
    for way, run in ways.items():
        flops = count_flops(run)
        rows.append(Row(case, f"FLOP, {way}", flops, None, None, flops / reference_flops))
        ratio = times.ratio(way, "reference")
        rows.append(Row(case, f"seconds, {way}", times.median(way), None, None, ratio))
    return [times.median(way) for way in ways], rows


def _error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    return ((matrix.double() - left.double() @ right.double()).norm() / matrix.double().norm()).item()
