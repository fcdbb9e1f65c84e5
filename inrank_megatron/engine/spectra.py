"""Spectra of all factorised layers from their FP32 masters, each layer computed once in the whole job."""

from collections.abc import Mapping

from torch import Tensor

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.layer_distribution import own_layers, shared_spectra
from inrank_megatron.engine.zero_state import read_master
from inrank_megatron.lowrank.layers.factorised import FactorisedLinear
from inrank_megatron.lowrank.linalg.spectra import Product, SpectraUnderWay, Update

Layers = Mapping[str, FactorisedLinear]


class LayerSpectra:
    """Singular values of ``U V`` (``product``) or ``U V - U0 V0`` (``update``) as the layers are now.

    Making it and :meth:`finish` are collective.

    Args:
        overlap: the layers may change before :meth:`finish`, and the host computes meanwhile.
    """

    def __init__(
        self,
        layers: Layers,
        initial: Mapping[str, tuple[Tensor, Tensor]],
        parallel: Parallel,
        *,
        kind: str,
        overlap: bool = False,
    ):
        self._names, self._parallel = list(layers), parallel
        self._length = max(min(2 * x.active, x.output_size, x.input_size) for x in layers.values())
        self._device = next(iter(layers.values())).U.device
        products: list[Product | Update] = []
        for name, pair in _own_masters(layers, parallel).items():
            k = layers[name].active
            u, v = pair[0][:, :k], pair[1][:k]
            if overlap:
                u, v = u.clone(), v.clone()
            if kind == "update":
                u0, v0 = initial[name]  # columns in use keep their initial values
                products.append(Update(name, u, v, u0[:, :k], v0[:k]))
            else:
                products.append(Product(name, u, v))
        self._own = [product.name for product in products]
        self._under_way = SpectraUnderWay(products, parallel.tp_group, overlap=overlap)

    def finish(self, *, step: int) -> dict[str, Tensor]:
        """By layer, FP64, the same on every rank. ``step``: after which they are, for messages."""
        results = self._parallel.in_unison(lambda: self._under_way.finish(step=step))
        values = dict(zip(self._own, results, strict=True))
        return shared_spectra(
            self._names, values.__getitem__, self._parallel, length=self._length, device=self._device
        )


def _own_masters(layers: Layers, parallel: Parallel) -> dict[str, tuple[Tensor, Tensor]]:
    """FP32 masters of U and V, this rank's shards, of the layers that its replica computes."""
    own = set(own_layers(list(layers), parallel))
    masters = {}
    for name, layer in layers.items():  # collective over the data-parallel group: every rank goes through all
        pair = read_master(layer.U), read_master(layer.V)
        if name in own:
            masters[name] = pair
    return masters
