"""The switch to ``U* V*``: when it comes, at which ranks, and what its truncation keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from inrank_megatron.fields import Count, Positive, Section, Share, setting
from inrank_megatron.lowrank.criteria.allocation import Demand, explaining_rank, share_budget
from inrank_megatron.lowrank.methods.changes import PLAIN, LayerView, Metric, Plan, Refactor
from inrank_megatron.lowrank.methods.settings import Run

DEFAULT_OUTPUT_THRESHOLD = 0.9


class SwitchSettings(Section):
    """When the switch comes, and what it does to the matrices."""

    switch_iters: Count | None = setting(
        "step after which every factorised matrix becomes U* V* (inrank-efficient, warm-start)", None
    )
    switch_epochs: Positive | None = setting(
        "the same in epochs; if both are left out: 1 epoch, but at most a quarter of train-iters", None
    )
    rank_multiple_of: Count = setting(
        "round the columns after the switch up to a multiple of this (the tile size of the device)", 1
    )
    final_ranks: Literal["grown", "re-estimated", "output"] | None = setting(
        "ranks after the switch: grown, the ranks so far; re-estimated, those that the criterion finds at "
        "the switch (perhaps lower); output, those that the layers' outputs need. Left out: output "
        "(warm-start), grown (inrank-efficient); with a factor-optimizer other than adamw output with a "
        "parameter-budget of 0.5",
        None,
        older_values={"refound": "re-estimated"},
    )
    output_threshold: Share | None = setting(
        "fraction of each layer's output energy that its rank must keep (final-ranks output); left out: "
        "0.9, unless a budget is given",
        None,
    )
    parameter_budget: Share | None = setting(
        "instead of output-threshold: parameters of all factors, as a fraction of these linears' dense "
        "parameters; layers that need more get more (final-ranks output)",
        None,
    )
    truncation: Literal["activation-aware", "fisher", "plain"] = setting(
        "what the switch approximates: each layer's outputs on its own inputs; fisher: the same, weighted "
        "by the gradient of the loss; plain: the layer's matrix",
        "activation-aware",
    )
    activation_batches: Count = setting(
        "number of most recent global batches whose activations and gradients weight the truncation", 4
    )


MORE = 1.5
"""A switch reports how much of the energy factors of this many times the size would keep."""


def size_in_words(layers: Sequence[LayerView], columns: Mapping[str, int]) -> str:
    """A sentence on what factors of these ``columns`` cost and keep, and what ``MORE`` times as many would.

    ``layers``: before the switch. If they have no output energies, only the cost is known.
    """
    dense = sum(layer.output_size * layer.input_size for layer in layers)
    share = sum(columns[x.name] * (x.output_size + x.input_size) for x in layers) / dense
    cost = f"{share:.2f} of these linears' dense parameters"
    if not all(layer.output_energies for layer in layers):
        return cost
    chosen = _energy_kept(layers, columns)
    text = f"{cost} keep {chosen:.1%} of their outputs' energy"
    more = share_budget(_demands(layers, relative=True), int(MORE * share * dense))
    larger = _energy_kept(layers, more)
    return f"{text}, {MORE:g} times as many would keep {larger:.1%}" if larger > chosen else text


def _energy_kept(layers: Sequence[LayerView], columns: Mapping[str, int]) -> float:
    """The share of output energy that these columns keep, as a mean over the layers."""
    shares = [sum(x.output_energies[: columns[x.name]]) / (sum(x.output_energies) or 1.0) for x in layers]
    return sum(shares) / len(shares)


def _demands(layers: Sequence[LayerView], *, relative: bool) -> dict[str, Demand]:
    """``relative``: energies are divided by the layer's sum, so that its output's scale has no effect."""
    found = {}
    for layer in layers:
        e = layer.output_energies
        unit = (sum(e) or 1.0) if relative else 1.0
        cost = layer.output_size + layer.input_size
        found[layer.name] = Demand([value / unit for value in e], cost, layer.attainable_rank)
    return found


@dataclass(frozen=True)
class Switch:
    """How a method leaves its first phase.

    Args:
        step: completed steps after which the switch comes; None: ``patience`` decides.
        patience: the switch comes after this number of checks in a row without growth.
        metric: measures the error of the truncation, and the energies from which ranks are chosen.
        threshold: share of each layer's energy that its rank must keep. budget: parameters of all factors,
            as a share of the dense parameters of these layers. Neither: the ranks so far.
        re_estimated: whether the criterion computes all ranks anew from the spectra; they may then fall.
        multiple_of: columns are multiples of this.
    """

    step: int | None = None
    patience: int | None = None
    metric: Metric = PLAIN
    threshold: float | None = None
    budget: float | None = None
    re_estimated: bool = False
    multiple_of: int = 1

    @classmethod
    def from_config(cls, config: Run, *, switch_step: int | None, default_final_ranks: str) -> "Switch":
        """The switch of a run; ``default_final_ranks``: of the method, where the setting is left out."""
        inrank = config.inrank
        final = inrank.final_ranks or default_final_ranks
        threshold = inrank.output_threshold
        if threshold is None and inrank.parameter_budget is None:
            threshold = DEFAULT_OUTPUT_THRESHOLD
        plain = inrank.truncation == "plain"
        return cls(
            step=switch_step,
            patience=inrank.switch_patience if switch_step is None else None,
            metric=Metric(inrank.truncation, 0 if plain else inrank.activation_batches),
            threshold=threshold if final == "output" else None,
            budget=inrank.parameter_budget if final == "output" else None,
            re_estimated=final == "re-estimated",
            multiple_of=inrank.rank_multiple_of,
        )

    @property
    def judges_outputs(self) -> bool:
        """Whether :meth:`refactor` needs the energies of the layers' outputs."""
        return self.threshold is not None or self.budget is not None

    def plan(self) -> Plan:
        """The switch by itself, at the ranks so far or at those that the outputs need."""
        return Plan(lambda layers: [self.refactor(layers)], self.metric if self.judges_outputs else None)

    def refactor(self, layers: Sequence[LayerView]) -> Refactor:
        """The change; ``layers`` with the energies of their outputs if :attr:`judges_outputs`."""
        if self.budget is not None:
            columns = ranks = self._shared(layers)
        else:
            ranks = {layer.name: self._rank(layer) for layer in layers}
            m = self.multiple_of
            columns = {x.name: min(-(-ranks[x.name] // m) * m, x.attainable_rank) for x in layers}
        return Refactor(ranks, columns, metric=self.metric)

    def _rank(self, layer: LayerView) -> int:
        if self.threshold is None:
            return layer.rank
        return min(explaining_rank(layer.output_energies, self.threshold), layer.attainable_rank)

    def _shared(self, layers: Sequence[LayerView]) -> Mapping[str, int]:
        # The loss gradient puts the energies of all layers into one unit.
        demands = _demands(layers, relative=self.metric.kind != "fisher")
        dense = sum(layer.output_size * layer.input_size for layer in layers)
        return share_budget(demands, int(self.budget * dense), tile=self.multiple_of)
