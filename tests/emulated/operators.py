"""What the optimizers that DeepSpeed compiles ask of their arguments, and what stands in their place here: a
tensor without values has no memory that compiled code could work on.

- ``fused-adam`` takes tensors of the device, its lists of one length, their tensors of one size and type.
- ``cpu-adam`` takes tensors of the host into which no copy is under way.
- Both take contiguous ones.
"""

from collections.abc import Callable

from deepspeed.ops.adam import cpu_adam, fused_adam
from torch import Tensor

from tests.emulated.races import UnderWay
from tests.emulated.rules import NAME, refuse


class Operators:
    """Of both optimizers. ``under_way``: what the device still works on, asked at each update."""

    def __init__(self, under_way: Callable[[], UnderWay]):
        self._under_way = under_way
        self.updates: list[str] = []

    def load(self) -> "Operators":
        """As DeepSpeed's builders do."""
        return self

    def multi_tensor_adam(self, chunk: int, skip: Tensor, lists: list[list[Tensor]], *numbers) -> None:
        self._check("multi_tensor_adam", [skip, *(tensor for each in lists for tensor in each)], NAME)
        for row in zip(*lists, strict=True):
            if len({(tensor.shape, tensor.dtype) for tensor in row}) > 1:
                refuse(f"multi_tensor_adam of {[(tuple(t.shape), t.dtype) for t in row]}")
        under_way, given = self._under_way(), [(tensor, True) for each in lists for tensor in each]
        if fault := under_way.on_stream(under_way.streams.current, given, "multi_tensor_adam"):
            refuse(f"multi_tensor_adam touches {fault}")

    def adam_update(self, number: int, step: int, *arguments) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self._check("adam_update", tensors, "cpu")
        if fault := self._under_way().on_host((tensor, True) for tensor in tensors):
            refuse(f"adam_update touches {fault}")

    def create_adam(self, *arguments) -> None:
        pass

    destroy_adam = create_adam

    def _check(self, name: str, tensors: list[Tensor], kind: str) -> None:
        for tensor in tensors:
            if tensor.device.type != kind:
                refuse(f"{name} of a tensor on the {tensor.device.type}")
            if not tensor.is_contiguous():
                refuse(f"{name} of strides {tensor.stride()}: not contiguous")
        self.updates.append(name)


def install(operators: Operators) -> None:
    """Have DeepSpeed's optimizers load these."""
    fused_adam.FusedAdamBuilder = cpu_adam.CPUAdamBuilder = lambda: operators
