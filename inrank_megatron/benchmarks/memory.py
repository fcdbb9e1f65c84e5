"""Bytes of one MLP: parameters, gradients, optimizer states, and what the forward pass keeps for backward.

Measured, not derived: the optimizer takes a step, and every storage that is made in the forward pass is
watched and counted if it is alive at its end, however it is held. The output is not counted, as its consumer
keeps it. Master weights and moments are those of AdamW in FP32 on one rank, before ZeRO divides them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inrank_megatron.benchmarks.blocks import (
    DENSE,
    Variant,
    build_layer,
    mlp_output,
    preset_config,
    single_process,
)
from inrank_megatron.benchmarks.layer import SEQUENCES, layer_variants
from inrank_megatron.benchmarks.rows import Row
from inrank_megatron.distributed.platform import device


def measure(preset: str, rank: int) -> Iterator[Row]:
    """Rows for every variant, dense first."""
    with single_process() as parallel:
        dense: dict[str, float] = {}
        for variant in layer_variants(preset, rank):
            mlp: Any = build_layer(preset_config(preset), variant, parallel).mlp
            measured = _bytes_of(mlp, preset)
            measured["total bytes"] = sum(measured.values())
            limits = _least_bytes(preset, variant, mlp)
            dense = dense or measured
            for quantity, value in measured.items():
                ratio = value / dense[quantity] if dense[quantity] else None
                yield Row(f"MLP {preset} {variant.name}", quantity, value, limits.get(quantity), ratio)


class LiveStorages(TorchDispatchMode):
    """Watches every storage that operators return while it is active, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._seen[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self, *, but: tuple[Tensor, ...] = ()) -> int:
        """Bytes of the storages seen that still exist, without those of ``but``."""
        excluded = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in but}
        return sum(
            size
            for address, (reference, size) in self._seen.items()
            if address not in excluded and not reference.expired()
        )


def kept_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes that ``module`` (as Megatron's: returns output and bias) holds after a forward pass of ``x``.

    The input counts if it is held.
    """
    with LiveStorages() as storages:
        y, _ = module(x.clone())
    return storages.alive(but=(y, *module.parameters()))


def _bytes_of(mlp: nn.Module, preset: str) -> dict[str, float]:
    config = preset_config(preset)
    like = next(mlp.parameters())
    shape = (config.model.seq_length, SEQUENCES[device().type], config.model.hidden_size)
    x = torch.randn(shape, device=like.device, dtype=like.dtype, requires_grad=True)
    activations = kept_for_backward(mlp, x)
    y = mlp_output(mlp, x)
    y.backward(torch.ones_like(y))
    trained = [p for p in mlp.parameters() if p.requires_grad]
    return {
        "parameter bytes": _total(mlp.parameters()),
        "gradient bytes": _total(p.grad for p in trained),
        "master and moment bytes": _optimizer_bytes(trained),
        "activation bytes": activations,
    }


def _optimizer_bytes(trained: list[nn.Parameter]) -> int:
    master_weights = [p.detach().float().clone().requires_grad_() for p in trained]
    for master, parameter in zip(master_weights, trained, strict=True):
        master.grad = parameter.grad.float()
    optimizer = torch.optim.AdamW(master_weights)
    optimizer.step()
    moments = (t for state in optimizer.state.values() for t in state.values() if t.dim())
    return _total(master_weights) + _total(moments)


def _total(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _least_bytes(preset: str, variant: Variant, mlp: nn.Module) -> dict[str, float]:
    """What the equations of backward ask for: x [T, h], the GELU's input and output [T, f], z [T, k] twice.

    A frozen matrix needs no input, factors do.
    """
    model, size = preset_config(preset).model, next(mlp.parameters()).element_size()
    tokens = model.seq_length * SEQUENCES[device().type]
    columns = 0 if variant == DENSE else variant.columns
    width = model.hidden_size + 2 * model.ffn_hidden_size + 2 * columns
    trained = sum(p.numel() for p in mlp.parameters() if p.requires_grad)
    return {
        "parameter bytes": _total(mlp.parameters()),
        "gradient bytes": trained * size,
        "master and moment bytes": trained * 12,
        "activation bytes": tokens * width * size,
    }
