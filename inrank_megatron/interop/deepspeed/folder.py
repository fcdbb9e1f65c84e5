"""Checkpoint folders of DeepSpeed's engine around a Megatron-Core GPT model, dense or factorised: ZeRO 0 to
3, any tensor-parallel size. Read only, and without software of its own here: DeepSpeed loads such a folder
on the processes that saved it alone.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.checkpoint.accounting import differences
from inrank_megatron.config.shapes import is_llama
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.weights import Weights, account
from inrank_megatron.interop.deepspeed.zero_files import FILE, MIXED, TensorParallelRank, open_ranks
from inrank_megatron.interop.megatron.arguments import arguments_of, model_of
from inrank_megatron.pointers import refuse_pointer

NAME = "deepspeed"
LATEST = "latest"
OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
COLUMN, ROW = (".linear_qkv", ".linear_fc1"), (".linear_proj", ".linear_fc2")
PART_OF_QKV = re.compile(r"\.linear_qkv\.[qkv]$")
NO_WEIGHT = "_extra_state"


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder that ``save_checkpoint`` was given, or a tag's folder in it."""
    if not path.is_dir():
        return False
    return (path / LATEST).is_file() or any(FILE.fullmatch(file.name) for file in path.iterdir())


def open_weights(path: Path, options: Options) -> Weights:
    """FP32 master weights where the folder has them, else the working copies (of W0 always); padding rows are
    cut.

    Raises:
        UserError: no complete checkpoint, one that does not say what its model is, tensors of another model,
            files that name something else than data or, also on reading a tensor, that are of several saves.
    """
    folder = _tag(path)
    ranks = open_ranks(folder, options)
    there = {name: _full_shape(name, shape, len(ranks)) for name, shape in _shapes(ranks).items()}
    state = ranks[0].state
    config, vocab_size, factors = model_of(str(folder), arguments_of(state), there, options)
    for name in OF_VOCABULARY:
        if name in there:
            there[name] = (vocab_size, *there[name][1:])
    llama = is_llama(config)

    def read(name: str) -> Tensor:
        if (axis := _axis(name)) is None:
            return _replicated(name, ranks)
        gate_and_up = 2 if llama and ".linear_fc1." in name and axis == 0 else 1
        full = _joined([rank.read(name) for rank in ranks], axis, gate_and_up)
        return full[:vocab_size] if name in OF_VOCABULARY else full

    weights = Weights(
        origin=str(folder),
        config=config,
        vocab_size=vocab_size,
        factors=factors,
        read=read,
        step=state.get("iteration") or state.get("global_steps") or 0,  # an engine counts its own
        notes=tuple(_notes(folder, ranks)),
    )
    account(weights.origin, there=there, here=weights.shapes)
    return weights


def _tag(path: Path) -> Path:
    if not (path / LATEST).is_file():
        return path
    refuse_pointer(path / LATEST)
    tag = (path / LATEST).read_text(errors="replace").strip()[:200]
    folder = path / tag
    if Path(tag).name != tag or tag == ".." or folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{path / LATEST}: says {tag!r}, which is not a folder next to it; name one that is")
    return folder


def _notes(folder: Path, ranks: Sequence[TensorParallelRank]) -> Iterator[str]:
    if not all(rank.master_weights for rank in ranks):
        yield f"{folder}: has no FP32 master weights by name; working copies are read"
    made, updates = ranks[0].state.get("global_steps"), ranks[0].updates
    if made is not None and updates is not None:
        made -= ranks[0].state.get("skipped_steps") or 0
        if updates != made:
            yield (
                f"{folder}: the optimizer counts {updates:g} updates, the engine {made}; either it was "
                "started again, or *_optim_states.pt, which hold the weights, are of another save"
            )


def _shapes(ranks: Sequence[TensorParallelRank]) -> dict[str, tuple[int, ...]]:
    """Of each weight's shard, which Megatron makes of one size on all ranks."""
    first, *others = (
        {name: shape for name, shape in rank.shapes.items() if NO_WEIGHT not in name} for rank in ranks
    )
    for rank, shapes in zip(ranks[1:], others, strict=True):
        if differing := differences(shapes, first, expected=f"in {ranks[0].file.name}"):
            raise UserError(f"{rank.file}: tensors that differ between ranks: {differing}; {MIXED}")
    return first


def _replicated(name: str, ranks: Sequence[TensorParallelRank]) -> Tensor:
    first = ranks[0].read(name)
    for rank in ranks[1:]:
        if not torch.equal(first, other := rank.read(name)):
            largest = (first.float() - other.float()).abs().max().item()
            raise UserError(
                f"{rank.file}: {name} differs by up to {largest:.1e} from that in {ranks[0].file.name}, and "
                f"all ranks have the same; {MIXED}"
            )
    return first


def _axis(name: str) -> int | None:
    """The axis on which ranks have their shards; None: each has all."""
    module, _, leaf = name.rpartition(".")
    module = PART_OF_QKV.sub(".linear_qkv", module)
    if name in OF_VOCABULARY or leaf == "U":
        return 0
    if leaf == "V":
        return 1
    if module.endswith(COLUMN):
        return 0
    return 1 if module.endswith(ROW) and leaf == "weight" else None


def _full_shape(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    axis = _axis(name)
    return tuple(size * ranks if index == axis else size for index, size in enumerate(shape))


def _joined(shards: Sequence[Tensor], axis: int, stride: int) -> Tensor:
    """Of ``stride`` matrices one above the other every rank has its shard of each."""
    if len(shards) == 1:
        return shards[0]
    pieces = [shard.chunk(stride, axis) for shard in shards]
    return torch.cat([piece[index] for index in range(stride) for piece in pieces], axis)
