"""Files that DeepSpeed's engine saves: weights of each tensor-parallel rank, complete or in ZeRO's shards.

``mp_rank_XX_model_states.pt`` holds the working copies of tensor-parallel rank XX, frozen ones included.
``[bf16_]zero_pp_rank_Y_mp_rank_XX_optim_states.pt`` holds the shard of data-parallel rank Y of its FP32
master weights. Under ZeRO 1 and 2 each parameter group is one flat tensor, divided into equal shards; under
ZeRO 3 every parameter is sharded by itself, and ``zero_pp_rank_Y_mp_rank_XX_model_states.pt`` holds the
shards of frozen ones.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.torch_files import load
from inrank_megatron.interop.megatron.megatron_deepspeed import PREFIX, check_version, flat, present_name

FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
KNOWN = frozenset(
    {
        "argparse.Namespace",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "megatron.core.enums.ModelType",
        "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.transformer.enums.CudaGraphScope",
    }
)
"""What DeepSpeed, and the arguments of a Megatron program, need."""
FLAT_1, FLAT_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""FP32 master weights under ZeRO 1 and 2, and under ZeRO 3."""
STEPS = ("global_steps", "iteration")
"""How far model states say that they are."""
MIXED = "files of several saves are mixed: name a complete checkpoint"
Read = Callable[[], Tensor]


class TensorParallelRank:
    """The weights of one tensor-parallel rank by name, as its model has them.

    Args:
        model: model states by data-parallel rank; without ZeRO 3 the one that there is.
        optim: optimizer states by data-parallel rank, or none.
        partitioned: whether ZeRO 3 wrote them, which has no full working copies.
        file: the first of the model states.

    Attributes:
        state: what the engine saved next to the weights.
        shapes: of each weight.
        master_weights: whether FP32 master weights are read where there are some.
        updates: steps that the optimizer has made by its own count, where that is all that shows whether the
            masters are of the same save: under ZeRO 3, which has no working copies.
    """

    def __init__(self, model: Sequence[dict], optim: Sequence[dict], *, partitioned: bool, file: Path):
        self._origin, self.state, self.file = file.parent, model[0], file
        self._reads: dict[str, Read] = {}
        self._copies: dict[str, Read] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        groups = [part.get("optimizer_state_dict", {}) for part in optim]
        self.master_weights = bool(groups) and all(FLAT_1 in g or FLAT_3 in g for g in groups)
        self.updates = max(_optimizer_steps(groups), default=None) if partitioned else None
        if not partitioned:
            for name, tensor in flat(model[0]["module"]):
                self._add(name, tensor.shape, lambda tensor=tensor: tensor)  # type: ignore[misc]
        else:
            self._add_frozen(model)
        if self.master_weights and FLAT_3 in groups[0]:
            self._add_master_weights_by_parameter([g[FLAT_3] for g in groups])
        elif self.master_weights:
            self._add_master_weights_by_group(
                [g[FLAT_1] for g in groups], groups[0].get("param_alignment_paddings")
            )
        elif partitioned:
            raise UserError(
                f"{self._origin}: ZeRO 3 keeps the weights in *_optim_states.pt; put these files back"
            )

    def read(self, name: str) -> Tensor:
        """The master, or the copy where there is none. Raises UserError for a master of another step."""
        tensor = self._reads[name]()
        if name in self._copies and not torch.equal(tensor.to((copy := self._copies[name]()).dtype), copy):
            raise UserError(
                f"{self.file}: {name} is not what its FP32 master in *_optim_states.pt rounds to; {MIXED}"
            )
        return tensor

    def _add(self, name: str, shape: Sequence[int], read: Read) -> None:
        name = name.removeprefix("module.")
        if name.startswith(PREFIX):
            check_version(self._origin, self.state)
            name = present_name(name)
        if name in self._reads:
            self._copies[name] = self._reads[name]
        self._reads[name], self.shapes[name] = read, tuple(shape)

    def _add_frozen(self, model: Sequence[dict]) -> None:
        for name, shape in (model[0].get("frozen_param_shapes") or {}).items():
            shards = [part["frozen_param_fragments"][name].flatten() for part in model]
            self._add(name, shape, lambda shards=shards, shape=shape: _unpadded(torch.cat(shards), shape))  # type: ignore[misc]

    def _add_master_weights_by_group(self, shards: Sequence[Sequence[Tensor]], paddings: Any) -> None:
        for index, shapes in enumerate(self.state["param_shapes"]):
            parts = [shard[index] for shard in shards]
            begin = 0
            for position, (name, shape) in enumerate(shapes.items()):
                size = math.prod(shape)
                self._add(name, shape, lambda b=begin, n=size, s=shape, p=parts: cut(p, b, n).view(tuple(s)))  # type: ignore[misc]
                begin += size + (paddings[index][position] if paddings else 0)
            self._check(begin, sum(part.numel() for part in parts))

    def _add_master_weights_by_parameter(self, shards: Sequence[Sequence[Tensor]]) -> None:
        begin, ranks = 0, len(shards)
        for shapes in self.state["param_shapes"]:
            for name, shape in shapes.items():
                size = -(-math.prod(shape) // ranks)

                def read(begin: int = begin, size: int = size, shape: Any = shape) -> Tensor:
                    return _unpadded(torch.cat([cut(shard, begin, size) for shard in shards]), shape)

                self._add(name, shape, read)
                begin += size
        self._check(begin, sum(part.numel() for part in shards[0]))

    def _check(self, needed: int, there: int) -> None:
        if needed > there:
            raise UserError(f"{self._origin}: the shards hold {there} elements of {needed}; {MIXED}")


def open_ranks(folder: Path, options: Options) -> list[TensorParallelRank]:
    """The tensor-parallel ranks of a tag's folder, in order.

    Raises:
        UserError: files are missing, are of several saves, or name what is not data.
    """
    found: dict[tuple[int, str], dict[int, Path]] = {}
    partitioned = False
    for path in sorted(folder.iterdir()):
        if match := FILE.fullmatch(path.name):
            found.setdefault((int(match[2]), match[3]), {})[int(match[1] or 0)] = path
            partitioned = partitioned or (match[3] == "model" and match[1] is not None)
    ranks = sorted({rank for rank, kind in found if kind == "model"})
    if not ranks:
        raise UserError(f"{folder}: has no *mp_rank_*_model_states.pt; name a folder that DeepSpeed saved")
    opened: list[TensorParallelRank] = []
    seen: dict[str, tuple[Path, Any]] = {}
    for rank in ranks:
        files = {kind: found.get((rank, kind), {}) for kind in ("model", "optim")}
        model, optim = (_in_order(folder, files[kind], options) for kind in files)
        _check_numbers(folder, model[0], ranks=ranks, model=model, optim=optim)
        for index, state in enumerate(model):
            _check_steps(files["model"][index], {name: state.get(name) for name in STEPS}, seen)
        for index, state in enumerate(optim):
            steps = sorted(set(_optimizer_steps(state.get("optimizer_state_dict"))))
            _check_steps(files["optim"][index], {"the optimizer's step": steps}, seen)
        opened.append(TensorParallelRank(model, optim, partitioned=partitioned, file=files["model"][0]))
    with_optim = sorted({rank for rank, kind in found if kind == "optim"})
    if with_optim not in ([], ranks):
        raise UserError(
            f"{folder}: *_optim_states.pt of tensor-parallel ranks {with_optim} and *_model_states.pt of "
            f"{ranks}; put the others back"
        )
    return opened


def cut(parts: Sequence[Tensor], begin: int, length: int) -> Tensor:
    """``length`` elements from ``begin`` on, of flat tensors one after the other."""
    pieces, end = [], begin + length
    for part in parts:
        if begin < part.numel() and end > 0:
            pieces.append(part[max(0, begin) : end])
        begin, end = begin - part.numel(), end - part.numel()
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _unpadded(flat: Tensor, shape: Sequence[int]) -> Tensor:
    return flat[: math.prod(shape)].view(tuple(shape))


def _in_order(folder: Path, files: dict[int, Path], options: Options) -> list[dict]:
    if sorted(files) != list(range(len(files))):
        raise UserError(
            f"{folder}: has only files of data-parallel ranks {sorted(files)}; put the others back"
        )
    states = [load(files[index], options, known=KNOWN) for index in range(len(files))]
    if not all(isinstance(state, dict) for state in states):
        raise UserError(
            f"{folder}: {files[0].name} is not a state file of DeepSpeed; name a folder that it saved"
        )
    return states


def _check_numbers(folder: Path, state: dict, *, ranks: list[int], model: list, optim: list) -> None:
    sizes = (state.get("mp_world_size", len(ranks)), state.get("dp_world_size"))
    if ranks != list(range(sizes[0])) or (optim and sizes[1] not in (None, len(optim))):
        raise UserError(
            f"{folder}: saved by {sizes[0]} tensor-parallel ranks x {sizes[1]} replicas, and there are files "
            f"of {len(ranks)} x {len(optim) or len(model)}; some are missing, or files of several saves are "
            "mixed: name a complete checkpoint"
        )


def _check_steps(path: Path, steps: Mapping[str, Any], seen: dict[str, tuple[Path, Any]]) -> None:
    """UserError unless ``path`` says what the first of its kind said, which ``seen`` keeps."""
    for name, value in steps.items():
        first, expected = seen.setdefault(name, (path, value))
        if value != expected:
            raise UserError(f"{path}: {name} = {value}, in {first.name} {expected}; {MIXED}")


def _optimizer_steps(state: Any) -> Iterator[float]:
    """Every ``step`` in an optimizer's state, which is all that it says of when it was saved."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            if name == "step" and isinstance(value, (int, float, Tensor)):
                yield float(value)
            else:
                yield from _optimizer_steps(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _optimizer_steps(value)
