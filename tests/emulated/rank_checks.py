"""A rank check's algebra on the emulated device; top-level functions that ``run_emulated`` calls."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from inrank_megatron.distributed.device_copies import to_device
from inrank_megatron.engine.layer_distribution import gathered_spectra, local_layers
from inrank_megatron.lowrank.linalg.spectra import Product, Update, singular_values
from tests.emulated.device import device, rank_of
from tests.emulated.rules import Wait

WORLD, OUTPUTS, INPUTS = 2, 64, 48


def waits(layers: int) -> list[Wait]:
    """Those of one check of so many layers, each of another rank, half of them on either replica."""
    return _waits(layers, lambda values: values)


def waits_of_values_on_the_device(layers: int) -> list[Wait]:
    """A planted fault: each layer's values come from the device on their own."""
    return _waits(layers, lambda values: to_device(values, device()))


def _waits(layers: int, place: Callable[[Tensor], Tensor]) -> list[Wait]:
    with rank_of(0, WORLD, 1) as (parallel, log):
        names = [f"layer {i}" for i in range(layers)]
        products = {name: _product(name, 8 + i) for i, name in enumerate(names)}
        log.phase = "check"
        own = local_layers(names, parallel)
        values = singular_values([products[name] for name in own], parallel.tp_group, step=1)
        values = dict(zip(own, values, strict=True))
        found = gathered_spectra(
            names, lambda name: place(values[name]), parallel, length=OUTPUTS, device=device()
        )
        assert found.keys() == set(names) and dist.get_world_size() == WORLD
        return log.waits["check"]


def _product(name: str, k: int) -> Product | Update:
    u, v = torch.ones(OUTPUTS, k, device=device()), torch.ones(k, INPUTS, device=device())
    return Product(name, u, v) if k % 4 else Update(name, u, v, u, v)
