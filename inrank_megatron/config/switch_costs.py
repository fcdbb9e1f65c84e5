"""Memory of a device at the switch, where ``W0 + U V`` or a dense W becomes ``U* V*``.

Letters as in `costs.py`, and c columns of U* and V*. Of four moments the largest counts (`engine/changes.py`
and `engine/truncation.py` do what is counted here):

- weighing: the first phase's states, and the forward passes that measure second moments of activations, FP32
  [h, h] for each factorised linear, none of them sharded until a replica keeps those of its own linears: so
  only some of the linears at a time (`weighed_at_a_time`). With Fisher weights a backward pass besides;
- truncating: the first phase's states, those second moments, FP32 masters of the replica's linears where they
  are copies, matrices in FP64, and U* and V* in FP32, of all linears in the end;
- reading: the first phase's states, U* and V*, and masters and moments of one other parameter, whole, on
  their way to the host, where they wait: on a CPU all of them count;
- building: the second phase's states next to U* and V*. Nothing of the first phase is there.
"""

from dataclasses import dataclass, replace

from inrank_megatron.config.activation_costs import activation_bytes
from inrank_megatron.config.costs import (
    Memory,
    keeps_whole_gradients,
    memory_per_device,
    moments_of_a_parameter,
    parameters_of_a_rank,
    precision,
    zero_stage_in_use,
)
from inrank_megatron.config.orthogonalisation_costs import orthogonalised_entries
from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import Ranks, alike, factorises_attention, number_of_linears, qkv_layout
from inrank_megatron.config.topology import Topology

FP64 = 8
SQUARES = {"plain": 3, "activation-aware": 8, "fisher": 8}
"""Matrices [h, h] that the truncation of a linear has at a time."""

WEIGHED_BYTES = 2 * 2**30
"""Of second moments that are measured together, where other replicas' parts leave before the next ones."""


def weighed_at_a_time(config: Config, replicas: int) -> int:
    """Linears whose second moments are measured together, at least one; all where nothing would leave."""
    if replicas == 1:
        return number_of_linears(config)
    return max(1, min(number_of_linears(config), WEIGHED_BYTES // (4 * config.model.hidden_size**2)))


def switch_memory(
    config: Config,
    topology: Topology,
    *,
    ranks: Ranks,
    frozen_base: bool,
    columns: Ranks,
    device: str = "cpu",
) -> Memory:
    """Bytes on one device at the most expensive moment of the switch; what only the switch takes is
    ``refactoring``.

    Args:
        ranks, frozen_base: of the first phase, as in `memory_per_device`.
        columns: c, one number or by linear.
        device: its type or its name.
    """
    first = _Structure(config, topology, ranks, frozen_base, device)
    second = _Structure(config, topology, columns, False, device)
    linears, dp = number_of_linears(config), topology.data_parallel_size
    weighed = config.inrank.truncation != "plain"
    moment = weighed * 4 * config.model.hidden_size**2
    own_moments = moment * -(-linears // dp)
    factors = 4 * second.factorised()
    waiting = first.waiting() if device == "cpu" else 0
    reading = max(waiting, first.largest_state())
    truncating = own_moments + first.copied_masters() + max(_workspace(second) + factors // dp, factors)
    held, then = first.at_rest(gathered=weighed), second.at_rest(gathered=False)
    whole = second.number_bytes * parameters_of_a_rank(config, topology, ranks=columns)[0]
    found = [
        replace(held, refactoring=max(truncating, factors + reading)),
        replace(then, refactoring=factors + waiting, building=max(0, whole - then.total)),
    ]
    if weighed:
        together = weighed_at_a_time(config, dp)
        measured = moment * together + (own_moments if together < linears else 0)
        found.append(replace(held, activations=first.passing(backward=False), refactoring=measured))
    if config.inrank.truncation == "fisher":
        found.append(replace(held, activations=first.passing(backward=True), refactoring=own_moments))
    return max(found, key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Structure:
    """The model of a phase, and where it is."""

    config: Config
    topology: Topology
    ranks: Ranks
    frozen_base: bool
    device: str

    @property
    def stage(self) -> int:
        return zero_stage_in_use(self.config, self.topology.data_parallel_size)

    @property
    def number_bytes(self) -> int:
        return 4 if precision(self.config) == "fp32" else 2

    def at_rest(self, *, gathered: bool) -> Memory:
        """What is there between two steps; ``gathered``: with what a pass leaves gathered under ZeRO 3. Small
        parameters, which stay gathered, do not count without it.
        """
        config, device = self.config, self.device
        memory = memory_per_device(
            config, self.topology, ranks=self.ranks, frozen_base=self.frozen_base, device=device
        )
        divided = self.stage == 3
        whole = keeps_whole_gradients(config, device, self.stage)
        return replace(
            memory,
            gradients=memory.gradients if divided or whole else 0,
            bucket=memory.bucket if divided else 0,
            gathered_parameters=memory.gathered_parameters if gathered else 0,
            **dict.fromkeys(("activations", "gathered_factors", "head_gradient", "building"), 0),
            **dict.fromkeys(("copies", "not_at_once"), 0),
        )

    def passing(self, *, backward: bool) -> int:
        """Bytes of the activations of a pass."""
        return activation_bytes(
            self.config,
            self.topology,
            self.ranks,
            frozen_base=self.frozen_base,
            size=self.number_bytes,
            backward=backward,
        )

    def factorised(self) -> int:
        """Entries of the linears' factors, or of their dense matrices, on a tensor-parallel rank."""
        n = self.topology.tensor_model_parallel_size
        return sum(each.number * (each.entries // n) for each in alike(self.config, self.ranks))

    def copied_masters(self) -> int:
        """FP32 masters of the linears that a replica truncates, and under ZeRO 3 their W0, where they are not
        the parameters or the masters themselves.
        """
        dp, half = self.topology.data_parallel_size, precision(self.config) != "fp32"
        if not (self.stage == 3 or (half and self.stage > 0)):
            return 0
        found = 4 * self.factorised()
        if self.stage == 3 and self.frozen_base:
            dense = replace(self, ranks=None)
            found += self.number_bytes * dense.factorised()
        return found // dp

    def largest_state(self) -> int:
        """Master and moments of the largest parameter that the switch does not replace, while they are read:
        under ZeRO the last of them is copied from what the replicas sent.
        """
        config, layout = self.config, qkv_layout(self.config)
        attention = 0 if factorises_attention(config) else layout.total
        rows = max(self.topology.padded_vocab_size, attention) // self.topology.tensor_model_parallel_size
        copies = 1 + moments_of_a_parameter(config) + (self.stage > 0)
        return 4 * copies * rows * config.model.hidden_size

    def waiting(self) -> int:
        """Masters and moments of the parameters that the switch does not replace."""
        config, n = self.config, self.topology.tensor_model_parallel_size
        _, trained = parameters_of_a_rank(
            config, self.topology, ranks=self.ranks, frozen_base=self.frozen_base
        )
        kept = trained - self.factorised()
        spared = orthogonalised_entries(config, 0) // n
        return 4 * ((1 + moments_of_a_parameter(config)) * kept - spared)


def _workspace(second: _Structure) -> int:
    """Two matrices of the largest linear, as that of the turn before is still there; its squares; and twice
    what its factors are.
    """
    h = second.config.model.hidden_size
    largest = max(alike(second.config, second.ranks), key=lambda each: (sum(each.shape), each.entries))
    squares = SQUARES[second.config.inrank.truncation] * h * h
    factors = largest.entries // second.topology.tensor_model_parallel_size
    return FP64 * (2 * h * (sum(largest.shape) - h) + squares + 2 * factors)
