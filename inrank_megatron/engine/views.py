"""Builds the views of the layers for methods: ranks, and the spectra that a method asks for."""

from collections.abc import Mapping

from torch import Tensor

from inrank_megatron.engine import truncation
from inrank_megatron.engine.linears import FactorisedLayer, Linear
from inrank_megatron.engine.live_model import Batches, LiveModel
from inrank_megatron.engine.spectra import LayerSpectra
from inrank_megatron.engine.weighing import weighing
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.lowrank.methods.changes import LayerView, Metric, Spectrum


def layer_views(
    live: LiveModel, *, spectrum: Spectrum | None, step: int, batches: Batches | None
) -> list[LayerView]:
    """The factorisable linears with their ranks and, if asked for, spectra; the same on every rank.

    ``batches``: for a metric that is not plain.
    """
    values = _singular_values(live, spectrum, step)
    energies = _output_energies(live, spectrum, step, batches)
    views = []
    for name, linear in live.linears.items():
        spec = linear.spec if isinstance(linear, FactorisedLayer) else _dense(linear)
        view = LayerView(
            name=name,
            output_size=linear.output_size,
            input_size=linear.input_size,
            rank=spec.rank,
            active_columns=spec.active_columns,
            capacity=spec.capacity,
            attainable_rank=linear.attainable_rank,
            final=spec.final,
            grown_at=spec.grown_at,
            updated=live.loss_scaling.in_a_row == 0,
            singular_values=tuple(values[name].tolist()) if name in values else (),
            output_energies=tuple(energies[name].tolist()) if name in energies else (),
        )
        views.append(view)
    return views


def _dense(linear: Linear) -> FactorSpec:
    """A spec for a dense linear: rank and columns are min(O, I)."""
    size = min(linear.output_size, linear.input_size)
    return FactorSpec(capacity=size, active_columns=size, rank=size)


def _singular_values(live: LiveModel, spectrum: Spectrum | None, step: int) -> Mapping[str, Tensor]:
    if spectrum is None or isinstance(spectrum, Metric) or not live.layers:
        return {}
    return LayerSpectra(live.layers, live.initial, live.parallel, kind=spectrum).finish(step=step)


def _output_energies(
    live: LiveModel, spectrum: Spectrum | None, step: int, batches: Batches | None
) -> Mapping[str, Tensor]:
    if not isinstance(spectrum, Metric):
        return {}
    weighed = weighing(live, spectrum, step=step, batches=batches)
    return truncation.energies_of_outputs(live.linears, weighed, live.parallel, step=step)
