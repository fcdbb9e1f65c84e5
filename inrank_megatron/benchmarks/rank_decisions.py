"""Time of a rank decision from the factors, against the reference way, and of all checks against training.

The reference way forms the product (for the update: ``U V - U0 V0``) and takes ``svdvals`` of the dense
matrix in FP32. Both spectra go through the same method; the decisions must agree. ``limit`` of a time is a
target: the reference's time over 75 with the columns that a run starts with, over 12 with those of the
paper's rank. Operations of decompositions are by formula.

Checks of complete models are not run: one layer is measured at its widths and counted as often as the model
has it. The step they are compared with is extrapolated from one transformer layer in phase 1 on this machine,
without embeddings and head, to the paper's batch of 512 sequences.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from inrank_megatron.benchmarks.blocks import RANKS, build_layer, phase_1, preset_config, single_process
from inrank_megatron.benchmarks.flops import count_flops
from inrank_megatron.benchmarks.layer import SEQUENCES, forward_backward, layer_output
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.benchmarks.timing import interleaved
from inrank_megatron.config.loading import from_flat
from inrank_megatron.distributed.platform import device
from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.lowrank.criteria.buffer import default_buffer
from inrank_megatron.lowrank.linalg.spectra import Product, Update, singular_values
from inrank_megatron.lowrank.methods.changes import LayerView
from inrank_megatron.lowrank.methods.inrank import InRank
from inrank_megatron.lowrank.methods.registry import make_method

SPECTRA = {"product": "eq7", "Delta": "update"}
"""What is decomposed -> the rank criterion that asks for it."""
BATCH = 512
"""Sequences of one step in the InRank paper."""


@dataclass(frozen=True)
class Factors:
    """Factors of one linear and their initial values: U, U0 [O, k], V, V0 [k, I], FP32."""

    U: Tensor
    V: Tensor
    U0: Tensor
    V0: Tensor

    def spectrum(self, kind: str, group: ProcessGroup) -> Tensor:
        """As the engine takes it, descending. The one place that names the algorithm under test."""
        if kind == "product":
            product: Product | Update = Product("layer", self.U, self.V)
        else:
            product = Update("layer", self.U, self.V, self.U0, self.V0)
        return singular_values([product], group, step=0)[0]

    def reference_spectrum(self, kind: str) -> Tensor:
        """By the dense matrix."""
        product = self.U @ self.V
        return torch.linalg.svdvals(product if kind == "product" else product - self.U0 @ self.V0)


def measure(preset: str, rank: int, *, repeats: int) -> Iterator[Row]:
    """Rows of single decisions at the preset's widths, then of all checks of a model."""
    with single_process() as parallel:
        model = preset_config(preset).model
        width, height = model.hidden_size, model.ffn_hidden_size
        buffer = default_buffer(width)
        for columns, speed_up in ((2 + buffer, 75), (min(rank + buffer, width), 12)):
            factors = make_factors(width, height, columns)
            for kind in SPECTRA:
                yield from _decision_rows(factors, kind, speed_up, parallel, repeats)
        presets = ("small", "medium", "large") if preset != "tiny" else ("tiny",)
        for name in presets:
            yield from _check_rows(name, parallel, repeats)


def make_factors(output_size: int, input_size: int, columns: int) -> Factors:
    """Factors; their spectrum and that of their update fall inside the buffer, so there is a rank to find."""
    generator = torch.Generator().manual_seed(0)

    def orthonormal(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, columns, generator=generator)).Q

    buffer = default_buffer(min(output_size, input_size))
    fall = torch.sigmoid((columns - 0.6 * buffer - torch.arange(columns)) / (0.08 * buffer))
    U0, V0 = orthonormal(output_size) * fall, orthonormal(input_size).t()
    U = U0 + 0.1 * orthonormal(output_size) * fall
    V = V0 + 0.001 * orthonormal(input_size).t()
    return Factors(*(t.to(device()).contiguous() for t in (U, V, U0, V0)))


def decide(spectrum: Tensor, kind: str, columns: int, min_dim: int) -> int:
    """The rank that InRank decides, with its defaults, for a layer that trains ``columns`` columns."""
    flat = {"model_preset": "small", "train_iters": 1, "method": InRank.name, "rank_criterion": SPECTRA[kind]}
    method: Any = make_method(from_flat(flat), switch_step=None)
    rule = method.growth
    view = LayerView(
        name="layer",
        output_size=min_dim,
        input_size=min_dim,
        rank=columns - rule.buffer_of(min_dim),
        active_columns=columns,
        capacity=min(min_dim, columns + rule.buffer_of(min_dim)),
        attainable_rank=min_dim,
        singular_values=tuple(spectrum.tolist()),
    )
    return method.plan_step(rule.interval, [view]).decide([view])[0].rank


def _decision_rows(
    factors: Factors, kind: str, speed_up: float, parallel: Parallel, repeats: int
) -> Iterator[Row]:
    output_size, columns = factors.U.shape
    min_dim = min(output_size, factors.V.shape[1])
    case = f"k={columns} {output_size}x{factors.V.shape[1]}"

    def run(spectrum: Callable[[], Tensor]) -> int:
        return decide(spectrum(), kind, columns, min_dim)

    own = partial(run, partial(factors.spectrum, kind, parallel.tp_group))
    reference = partial(run, partial(factors.reference_spectrum, kind))
    ranks = own(), reference()
    if ranks[0] != ranks[1]:
        raise AssertionError(f"{case}, {kind}: rank {ranks[0]} from the factors, {ranks[1]} by the reference")
    flops = count_flops(own), count_flops(reference)
    times = interleaved({"own": own, "reference": reference}, repeats=repeats)
    yield Row(case, f"rank decided, {kind}", ranks[0], ranks[1], None, ranks[0] / ranks[1])
    yield Row(case, f"FLOP a decision, {kind}", flops[0], None, None, flops[0] / flops[1])
    yield Row(
        case,
        f"seconds a decision, {kind}",
        times.median("own"),
        times.median("reference") / speed_up,
        None,
        times.ratio("own", "reference"),
    )


def _check_rows(preset: str, parallel: Parallel, repeats: int) -> Iterator[Row]:
    config = preset_config(preset)
    model, interval = config.model, config.inrank.rank_check_interval
    columns = min(RANKS[preset] + default_buffer(model.hidden_size), model.hidden_size)
    factors = make_factors(model.ffn_hidden_size, model.hidden_size, columns)
    layer = build_layer(config, phase_1(columns), parallel)
    runs: dict[str, Callable[[], Any]] = {
        kind: partial(factors.spectrum, kind, parallel.tp_group) for kind in SPECTRA
    }
    runs["layer"] = forward_backward(layer_output, layer, config)
    times = interleaved(runs, repeats=repeats)
    linears = 2 * model.num_layers
    case = f"all checks {preset}, {linears} linears, k={columns}"
    step = step_seconds(preset, times.median("layer"))
    yield Row(case, f"seconds of {interval} steps of {BATCH} sequences (extrapolated)", interval * step)
    for kind in SPECTRA:
        seconds = linears * times.median(kind)
        yield Row(case, f"seconds of one check, {kind} (one linear measured, added up)", seconds)
        share = 100 * seconds / step
        yield Row(case, f"percent of an interval of {interval} steps, {kind}", share / interval, 1.0)
        yield Row(case, f"percent of a step, for a check at every step, {kind}", share, 1.0)


def step_seconds(preset: str, layer: float) -> float:
    """Of a step of :data:`BATCH` sequences on one device, from a layer's seconds forward and backward."""
    return preset_config(preset).model.num_layers * layer * BATCH / SEQUENCES[device().type]
