"""Spectra of all factorised layers from their FP32 master weights, each layer computed once in the whole
job.
"""

from collections.abc import Mapping

from torch import Tensor

from inrank_megatron.distributed.process_groups import Parallel
from inrank_megatron.engine.layer_distribution import gathered_spectra, local_layers
from inrank_megatron.engine.zero_state import read_master_weight
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
        self._length = max(min(2 * x.active_columns, x.output_size, x.input_size) for x in layers.values())
        self._device = next(iter(layers.values())).U.device
        products: list[Product | Update] = []
        for name, pair in _local_master_weights(layers, parallel).items():
            k = layers[name].active_columns
            u, v = pair[0][:, :k], pair[1][:k]
            if overlap:
                u, v = u.clone(), v.clone()
            if kind == "update":
                u0, v0 = initial[name]  # columns in use keep their initial values
                products.append(Update(name, u, v, u0[:, :k], v0[:k]))
            else:
                products.append(Product(name, u, v))
        self._local = [product.name for product in products]
        self._under_way = SpectraUnderWay(products, parallel.tp_group, overlap=overlap)

    def owned(self) -> dict[str, Tensor] | None:
        """FP64 values by layer, of those that this rank has decomposed; None where one is left to
        :meth:`finish`. Not collective; any thread may ask.
        """
        values = self._under_way.owned()
        if values is None:
            return None
        return {self._local[i]: row[: self._length] for i, row in values.items()}

    def finish(self, *, step: int) -> dict[str, Tensor]:
        """By layer, FP64, the same on every rank. ``step``: after which they are, for messages."""
        results = self._parallel.call_or_raise_on_all_ranks(lambda: self._under_way.finish(step=step))
        values = dict(zip(self._local, results, strict=True))
        return gathered_spectra(
            self._names, values.__getitem__, self._parallel, length=self._length, device=self._device
        )


def _local_master_weights(layers: Layers, parallel: Parallel) -> dict[str, tuple[Tensor, Tensor]]:
    """FP32 master weights of U and V, this rank's shards, of the layers that its replica computes."""
    local = set(local_layers(list(layers), parallel))
    master_weights = {}
    for name, layer in layers.items():  # collective over the data-parallel group: every rank goes through all
        pair = read_master_weight(layer.U), read_master_weight(layer.V)
        if name in local:
            master_weights[name] = pair
    return master_weights
