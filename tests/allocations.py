"""Counts the bytes of tensors that are alive, now and at their most."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Sees every storage on ``device`` that an operator returns while it is active, until it is freed.

    Args:
        device: the type of the device. Tensors without data count as those with data.

    Attributes:
        alive, peak: bytes.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.alive = self.peak = 0
        self._device = device
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._references:
            return

        def free(_: object) -> None:
            del self._references[address]
            self.alive -= size

        self._references[address] = weakref.ref(storage, free)
        self.alive += size
