"""The phases of a run in their order, each with its steps and the columns that it is assumed to have."""

from dataclasses import dataclass

from inrank_megatron.config.costs import break_even_rank
from inrank_megatron.config.loading import flatten, from_flat, method_preset
from inrank_megatron.config.plan import columns_of, largest_phase
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import smallest_dim
from inrank_megatron.config.topology import Topology
from inrank_megatron.errors import UserError
from inrank_megatron.lowrank.methods.base import DENSE
from inrank_megatron.lowrank.methods.registry import METHODS

FIRST = "phase 1"
"""The phase in which ranks grow."""
EPOCH_TOKENS = {("Salesforce/wikitext:wikitext-103-raw-v1", "gpt2"): 225 * 512 * 1024}
"""Tokens of a training text, by dataset and tokenizer, where they are known without reading it. WikiText-103:
225 steps of the paper."""


@dataclass(frozen=True)
class Assumed:
    """What a plan assumes, because only the run will tell.

    Args:
        vocab_size: of the tokenizer, without padding.
        final_rank: of every factorised linear after the switch, and what growing ranks reach.
        epoch_steps: optimizer steps of an epoch; None: those of `known_epoch_steps`.
    """

    vocab_size: int
    final_rank: int
    epoch_steps: int | None = None


@dataclass(frozen=True)
class Phase:
    """A part of the run with one structure.

    Args:
        name: as the page shows it.
        columns: in use in each factorised linear, which cost operations; None: dense.
        capacity: columns allocated, which cost memory; None: dense.
        frozen_base: whether W0 is there too.
        steps: optimizer steps.
    """

    name: str
    columns: int | None
    capacity: int | None
    frozen_base: bool
    steps: int

    @property
    def checks_ranks(self) -> bool:
        """Whether ranks may grow in it."""
        return self.name == FIRST


def timeline(config: Config, topology: Topology, assumed: Assumed) -> list[Phase]:
    """The run's phases.

    Raises:
        UserError: the switch comes after epochs whose length is not known.
    """
    method, steps = METHODS[config.training.method], config.training.train_iters
    shape = largest_phase(config)
    buffer, most = columns_of(config)
    used = min(assumed.final_rank + buffer, most) if buffer else shape.columns
    if not method.switches:
        name = FIRST if buffer else DENSE.name if shape == DENSE else "one phase"
        return [Phase(name, used, shape.capacity, shape.frozen_base, steps)]
    epoch_steps = assumed.epoch_steps or known_epoch_steps(config, topology)
    if epoch_steps is None and config.inrank.switch_epochs is not None:
        raise UserError(
            f"switch_epochs = {config.inrank.switch_epochs:g}: the length of an epoch of this text is not "
            "known without reading it; give --steps-per-epoch N, or --switch-iters"
        )
    # A switch that the ranks bring about is assumed half-way.
    switch = method.switch_step(config, epoch_steps or steps) or steps // 2
    first = FIRST if shape.columns is not None else DENSE.name
    rank = columns_after_the_switch(config, assumed.final_rank)
    return [
        Phase(first, used, shape.capacity, shape.frozen_base, switch),
        Phase("phase 2", rank, rank, False, steps - switch),
    ]


def columns_after_the_switch(config: Config, final_rank: int) -> int:
    """``final_rank``, rounded up as the run rounds it."""
    multiple = config.inrank.rank_multiple_of
    return min(-(-final_rank // multiple) * multiple, smallest_dim(config))


def known_epoch_steps(config: Config, topology: Topology) -> int | None:
    """Optimizer steps of an epoch; None if the text is not in `EPOCH_TOKENS`."""
    tokenizer = (config.data.tokenizer or "").rpartition("/")[2]
    tokens = EPOCH_TOKENS.get((config.data.dataset or "", tokenizer))
    return tokens and -(-tokens // (topology.global_batch_size * config.model.seq_length))


def assumed_rank(config: Config) -> int:
    """The final rank where none is given: the largest that ranks can reach, or that of the budget."""
    columns, break_even = columns_of(config), break_even_rank(config)
    if config.inrank.parameter_budget is not None:
        return max(1, int(config.inrank.parameter_budget * break_even))
    return columns.capacity - columns.buffer if columns.buffer else config.inrank.rank or break_even // 2


def with_method(config: Config, name: str, rank: int) -> Config:
    """The same run by another method, with ``rank`` if the run gives none. A preset of the run's method goes,
    with what it implies, unless the other method has it too.

    Raises:
        UserError: the settings do not go together.
    """
    flat = flatten(config)
    setting, implied = method_preset(flat)
    if METHODS[name].presets[0] != setting:
        flat = {key: value for key, value in flat.items() if key != setting and key not in implied}
    return from_flat(flat | {"method": name, "rank": config.inrank.rank or rank})
