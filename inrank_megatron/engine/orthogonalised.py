"""Muon, Spectron and LoRA-Muon beside AdamW, in one optimizer that DeepSpeed wraps as it wraps AdamW.

**Muon** (Jordan et al., 2024) makes the singular values of the momentum nearly equal and steps along the
result. The factor ``0.2 lr sqrt(max(O, I))`` gives a full step the root mean square of a step of AdamW (Liu
et al., 2025; ``match_rms_adamw`` in torch), so that one learning rate fits both. Momentum, Nesterov's step,
weight decay and all constants are those of ``torch.optim.Muon``. DeepSpeed's Muon does not support tensor
parallelism, and Megatron-Core's does not support ZeRO.

**Spectron** (Janson et al., 2026, arXiv 2602.12429) is for factors. The step on U and on V is divided by
``sigma_U + sigma_V + 1``, with the spectral norms of U and V before the step. So the spectral norm of the
change of U V is at most about the rate, which here is that of Muon's step on the full matrix,
``0.2 lr sqrt(max(O, I))``.

**LoRA-Muon** (Cesista et al., 2026, arXiv 2606.12921) is for factors too: Muon's steepest descent for the
product. With ``R_V = (V V^T)^(-1/2)``, the step on U is the orthogonalised ``M R_V``, times R_V again, at
half of Muon's rate on the full matrix. This rate is then about the spectral norm of ``dU V``. V has the
corresponding step. The steps do not depend on how U and V share the size of U V. Weight decay multiplies
each factor by the square root of its factor, so that it acts on U V once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.exchange import Exchange, Run, owners
from inrank_megatron.engine.fragments import Fragment, ShardMap, local_shape
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.linalg.orthogonalise import inverse_roots, orthogonalise, spectral_norms
from inrank_megatron.model.initialise import full_shape

MOMENTUM = "momentum_buffer"
FACTOR_RULES = ("spectron", "lora-muon")
"""Rules under which the step of a factor depends on the other factor."""
_RMS_OF_ADAMW = 0.2


@dataclass(frozen=True, eq=False)
class Matrix:
    """A trained matrix.

    Args:
        dim: the axis that tensor parallelism shards; at tensor-parallel size 1, the longer axis of a matrix
            that is no factor.
        features: the longer side of the matrix that sets the rate: this one, or U V under Spectron and
            LoRA-Muon.
        layer: the layer whose factor it is, if any; only the columns in use take part.
        fragment: this replica's part of the matrix.
    """

    parameter: Tensor
    dim: int
    features: int
    layer: FactorisedLinear | None
    fragment: Fragment | None

    @property
    def run(self) -> tuple[int, int]:
        return (self.fragment.start, self.fragment.count) if self.fragment else (0, 0)

    @property
    def is_left(self) -> bool:
        """Whether it is U of its layer."""
        return self.layer is not None and self.parameter is self.layer.U

    @property
    def work(self) -> float:
        """Products of its Gram matrix, in units that compare."""
        shape = local_shape(self.parameter)
        return math.prod(shape) * shape[1 - self.dim]

    def in_use(self, whole: Tensor) -> Tensor:
        """A view of the columns in use; ``whole`` has all entries of the matrix."""
        matrix = whole.view(local_shape(self.parameter))
        return matrix if self.layer is None else matrix.narrow(1 - self.dim, 0, self.layer.active_columns)


class MatrixGroup:
    """The matrices of the flat FP32 tensors that DeepSpeed steps at once, divided over the replicas.

    Args:
        runs, owner: as of :class:`Exchange`.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        runs: list[list[Run]],
        owner: list[int],
        parallel: Parallel,
        device: torch.device,
    ):
        self.matrices, self._parallel, self._device = matrices, parallel, device
        sizes = [math.prod(local_shape(matrix.parameter)) for matrix in matrices]
        self._exchange = Exchange(runs, sizes, owner, parallel.dp_group)

    @property
    def own(self) -> list[int]:
        """Indices of the matrices that this replica computes."""
        return self._exchange.own

    def orthogonalise(
        self,
        tensors: Mapping[Tensor, Tensor],
        rates: list[Tensor | float],
        roots: list[Tensor] | None = None,
    ) -> None:
        """Orthogonalise every matrix in ``tensors`` and multiply it by its rate, in place.

        Args:
            tensors: maps each flat FP32 tensor to a tensor of the same layout.
            roots: for the matrices of :attr:`own`; see ``linalg/orthogonalise.py``.
        """
        wholes = self._collect(tensors)
        views, dims = self._in_use(wholes)
        results = orthogonalise(views, dims, self._parallel.tp_group, roots)
        for i, view, result in zip(wholes, views, results, strict=True):
            view.copy_(result * rates[i])
        parts = self._exchange.spread(wholes, like=torch.empty(0, device=self._device))
        for i, part in parts.items():
            if (fragment := self.matrices[i].fragment) is not None:
                _of(fragment, tensors).copy_(part)

    def spectral_norms(self) -> Tensor:
        """The spectral norm of every matrix, FP64 [L]; the same on all ranks."""
        wholes = self._collect(None)
        norms = torch.zeros(len(self.matrices), dtype=torch.float64, device=self._device)
        if wholes:
            found = spectral_norms(*self._in_use(wholes), self._parallel.tp_group)
            for i, norm in zip(wholes, found, strict=True):
                norms[i] = norm  # a list of indices would be copied to the device, and the host would wait
        dist.all_reduce(norms, group=self._parallel.dp_group)  # each has one contributor: the sum is exact
        return norms

    def inverse_roots(self) -> dict[int, Tensor]:
        """Inverse roots of the Gram matrices of :attr:`own`, FP64 [k, k] for k columns in use; by index."""
        wholes = self._collect(None)
        roots = inverse_roots(*self._in_use(wholes), self._parallel.tp_group)
        return dict(zip(wholes, roots, strict=True))

    def _in_use(self, wholes: Mapping[int, Tensor]) -> tuple[list[Tensor], list[int]]:
        """Views of the columns in use, and the axis that is sharded, of the matrices with these entries."""
        return (
            [self.matrices[i].in_use(whole) for i, whole in wholes.items()],
            [self.matrices[i].dim for i in wholes],
        )

    def _collect(self, tensors: Mapping[Tensor, Tensor] | None) -> dict[int, Tensor]:
        """The matrices that this replica computes, in full: of ``tensors``, or of the FP32 values if None."""
        nothing = torch.empty(0, device=self._device)
        fragments = [matrix.fragment for matrix in self.matrices]
        return self._exchange.collect(
            [nothing if f is None else _of(f, tensors).to(self._device) for f in fragments]
        )


def _of(fragment: Fragment, tensors: Mapping[Tensor, Tensor] | None) -> Tensor:
    return fragment.of(fragment.flat_buffer if tensors is None else tensors[fragment.flat_buffer])


class OrthogonalisedMomentum(torch.optim.AdamW):
    """Steps each parameter group by its ``rule``: AdamW (``adamw``), Muon, Spectron or LoRA-Muon.

    Call :meth:`bind` before the first step that counts. The engine makes the state: a ``momentum_buffer`` for
    each flat FP32 tensor, with the same layout.

    Args:
        momentum: of all rules except AdamW.
        adam: arguments of AdamW. Its ``lr`` and ``weight_decay`` apply to all groups.
    """

    def __init__(self, groups: list[dict], *, momentum: float, **adam: Any):
        super().__init__(groups, fused=True, **adam)
        self._momentum = momentum
        self._groups: dict[tuple[Tensor, ...], MatrixGroup] = {}
        self._measured: list[MatrixGroup] = []
        self._sums: dict[FactorisedLinear, Tensor] = {}
        self._roots: dict[tuple[FactorisedLinear, bool], Tensor] = {}

    def bind(self, model: nn.Module, shard_map: ShardMap, parallel: Parallel) -> None:
        """Find the matrices of ``model`` in DeepSpeed's flat buffers. Collective."""
        device = next(model.parameters()).device
        rules = {group["name"]: group["rule"] for group in self.param_groups}
        matrices = _matrices(model, shard_map, rules, parallel)
        for name, rule in rules.items():
            if rule == "adamw":
                continue
            buffers = shard_map.flat_buffers[name]
            every = [matrices[id(p)] for b in buffers for p in shard_map.parameters[id(b)]]
            everywhere = parallel.gather_from_all_ranks([matrix.run for matrix in every])
            runs = [everywhere[rank] for rank in dist.get_process_group_ranks(parallel.dp_group)]
            owner = _owners(every, runs, rule)
            start = 0
            for at_once in [[b] for b in buffers] if shard_map.partitioned else [buffers]:
                part = slice(start, start + sum(len(shard_map.parameters[id(b)]) for b in at_once))
                start = part.stop
                own_runs = [held[part] for held in runs]
                group = MatrixGroup(every[part], own_runs, owner[part], parallel, device)
                self._groups[tuple(at_once)] = group
                if rule in FACTOR_RULES:
                    self._measured.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        groups, loss = self.param_groups, None
        self.param_groups = [group for group in groups if group["rule"] == "adamw" and group["params"]]
        try:
            if self.param_groups:
                loss = super().step(closure)
        finally:
            self.param_groups = groups
        # Before `bind` DeepSpeed may step once, over zero gradients, to create states.
        for group in groups if self._groups else ():
            if group["rule"] != "adamw" and any(buffer.grad is not None for buffer in group["params"]):
                self._step(group)
        return loss

    def _step(self, group: dict) -> None:
        buffers, updates = group["params"], {}
        for buffer in buffers:
            momentum = self.state[buffer][MOMENTUM]
            momentum.lerp_(buffer.grad, 1 - self._momentum)
            updates[buffer] = torch.lerp(buffer.grad, momentum, self._momentum)
        rule, matrices = group["rule"], self._groups[tuple(buffers)]
        if self._measured and matrices is self._measured[0]:
            # Factors as they are before the step, also where ZeRO 3 steps part by part.
            self._measure(rule)
        matrices.orthogonalise(updates, self._rates(matrices, rule), self._partners(matrices, rule))
        kept, size = 1 - group["lr"] * group["weight_decay"], group["lr"]
        if rule == "lora-muon":
            kept = math.sqrt(kept)
            size /= kept
        for buffer, update in updates.items():
            buffer.mul_(kept).add_(update, alpha=-size)
        if self._measured and matrices is self._measured[-1]:
            self._roots = {}  # they take memory that the next backward pass needs

    def _rates(self, group: MatrixGroup, rule: str) -> list[Tensor | float]:
        """The rate of each matrix of ``group``, as a multiple of the learning rate."""
        rates: list[Tensor | float] = [_RMS_OF_ADAMW * math.sqrt(m.features) for m in group.matrices]
        if rule == "lora-muon":
            return [rate / 2 for rate in rates]
        if rule == "spectron":
            return [rate / self._sums[_layer(m)] for rate, m in zip(rates, group.matrices, strict=True)]
        return rates

    def _partners(self, group: MatrixGroup, rule: str) -> list[Tensor] | None:
        """The inverse root of the other factor's Gram matrix, for each matrix that this replica computes.
        None if the rule needs no roots.
        """
        if rule != "lora-muon":
            return None
        own = [group.matrices[i] for i in group.own]
        return [self._roots[_layer(matrix), not matrix.is_left] for matrix in own]

    def _measure(self, rule: str) -> None:
        """Compute what the rule needs: ``sigma_U + sigma_V + 1`` of every layer, as scalars on the device, or
        the inverse roots of both Gram matrices of the layers that this replica computes.
        """
        self._sums, self._roots = {}, {}
        for group in self._measured:
            if rule == "lora-muon":
                for i, root in group.inverse_roots().items():
                    self._roots[_layer(group.matrices[i]), group.matrices[i].is_left] = root
                continue
            for matrix, norm in zip(group.matrices, group.spectral_norms().float(), strict=True):
                layer = _layer(matrix)
                self._sums[layer] = self._sums.get(layer, 1.0) + norm


def _owners(matrices: list[Matrix], runs: list[list[Run]], rule: str) -> list[int]:
    """The replica that computes each matrix, chosen by what the replicas hold of it. Under LoRA-Muon, one
    replica computes both factors of a layer, because the step of each needs the inverse root of the other.
    """
    units: dict[FactorisedLinear | int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        units.setdefault(_layer(matrix) if rule == "lora-muon" else i, []).append(i)
    held = [[sum(counts[i][1] for i in unit) for unit in units.values()] for counts in runs]
    chosen = owners(held, [sum(matrices[i].work for i in unit) for unit in units.values()])
    by_place = {i: rank for unit, rank in zip(units.values(), chosen, strict=True) for i in unit}
    return [by_place[i] for i in range(len(matrices))]


def _layer(matrix: Matrix) -> FactorisedLinear:
    assert matrix.layer is not None, "the rule is for factors"
    return matrix.layer


def _matrices(
    model: nn.Module, shard_map: ShardMap, rules: Mapping[str, str], parallel: Parallel
) -> dict[int, Matrix]:
    """The matrices with another rule than AdamW, by ``id`` of the parameter."""
    found, layers = shard_map.groups(), dict(_factors(model))
    matrices = {}
    parameter: Any  # with Megatron's attributes
    for parameter in model.parameters():
        if (rule := rules.get(found.get(id(parameter), ""), "adamw")) == "adamw":
            continue
        layer, shape = layers.get(id(parameter)), full_shape(parameter, parallel)
        whole = (layer.output_size, layer.input_size) if layer and rule in FACTOR_RULES else shape
        dim = parameter.partition_dim
        if layer is None and parallel.tp_size == 1:
            dim = 0 if shape[0] >= shape[1] else 1
        fragment = shard_map.fragments[id(parameter)]
        matrices[id(parameter)] = Matrix(parameter, dim, max(whole), layer, fragment)
    return matrices


def _factors(model: nn.Module) -> Iterator[tuple[int, FactorisedLinear]]:
    for module in model.modules():
        if isinstance(module, FactorisedLinear):
            yield from ((id(factor), module) for factor in (module.U, module.V))
