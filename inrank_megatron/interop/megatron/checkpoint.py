"""Megatron-Core's ``dist_checkpointing`` folders: weights of a ``GPTModel``, dense or factorised, saved at
any tensor-parallel size and loaded at any other.

Written here: ``iter_NNNNNNN`` with the folder's four kinds of files, ``latest_checkpointed_iteration.txt``
next to it as Megatron-LM has it, and ``inrank_megatron.json`` (and the tokenizer), from which the run can be
made again.
"""

import json
import pickle
import warnings
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.config.loading import flatten, from_flat
from inrank_megatron.config.schema import Config
from inrank_megatron.data.cache import read_json
from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import Forward, gpt_logits, load_gpt
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.tokenizer_files import copy_tokenizer
from inrank_megatron.interop.core.torch_files import as_data, load
from inrank_megatron.interop.core.weights import Weights, account, check_layers
from inrank_megatron.interop.megatron.arguments import arguments_of, model_of
from inrank_megatron.interop.megatron.keys import (
    extra_states,
    full_shape,
    is_stacked,
    key_of,
    places,
)
from inrank_megatron.interop.megatron.torch_dist import LIST, Storage, write_storage
from inrank_megatron.lowrank.layers.spec import FactorSpec
from inrank_megatron.pointers import refuse_pointer

NAME = "megatron"
LATEST, BACKEND, COMMON = "latest_checkpointed_iteration.txt", "metadata.json", "common.pt"
RUN_RECORD, RUN_RECORD_VERSION, TOKENIZER = "inrank_megatron.json", 1, "tokenizer"
LAYOUT = {"non_homogeneous_layers": True}
"""What Megatron-Core has to be given: each layer by itself, because ranks differ from layer to layer."""
OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Enumerations, paths and settings in Megatron-LM's arguments, of which none is needed.
KNOWN = frozenset(
    {
        "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "signal.Signals", "_io.BytesIO",
        "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.transformer.enums.CudaGraphScope",
        "megatron.core.optimizer.optimizer_config.OptimizerConfig",
        "megatron.core.rerun_state_machine.RerunDiagnostic", "megatron.core.rerun_state_machine.RerunMode",
        "megatron.core.rerun_state_machine.RerunState",
    }
)  # fmt: skip


def matches(path: Path) -> bool:
    """Whether ``path`` is such a folder or one that holds some."""
    return (path / LATEST).is_file() or ((path / BACKEND).is_file() and (path / LIST).exists())


def open_weights(path: Path, options: Options) -> Weights:
    """The weights of the newest iteration in ``path``, or of ``path`` itself; rows that pad a vocabulary are
    cut.

    Raises:
        UserError: no complete checkpoint of this kind, one that does not say what its model is, or files that
            name something else than data.
    """
    folder = _iteration(path)
    common = _common(folder, options)
    storage = Storage(folder, options)
    found = places(storage.shapes)
    there = {name: full_shape(place, storage.shapes) for name, place in found.items()}
    record = _run_record(folder)
    config, vocab_size, factors = record or model_of(str(folder), arguments_of(common), there, options)
    check_layers(str(folder), config, tensors=len(there))
    for name in OF_VOCABULARY:
        if name in there and there[name][0] >= vocab_size:
            there[name] = (vocab_size, *there[name][1:])

    def read(name: str) -> Tensor:
        place = found[name]
        parts = [storage.read(key, layer=place.layer) for key in place.keys]
        full = parts[0] if len(parts) == 1 else torch.cat(parts)  # gate above up
        return full[:vocab_size] if name in OF_VOCABULARY else full

    step = common.get("iteration")
    weights = Weights(
        origin=str(folder),
        config=config,
        vocab_size=vocab_size,
        factors=factors,
        read=read,
        step=step if isinstance(step, int) else 0,
        tokenizer=next((p / TOKENIZER for p in (folder, folder.parent) if (p / TOKENIZER).is_dir()), None),
    )
    account(weights.origin, there=there, here=weights.shapes)
    return weights


def forward(path: Path, options: Options) -> Forward:
    """Logits of the model that Megatron-Core's own loader fills."""
    weights = open_weights(path, options)  # refuses what must not reach a loader that trusts its files
    folder = Path(weights.origin)
    model = load_gpt(changed(weights, read=lambda name: torch.zeros(weights.shapes[name])))
    # Imported here: it takes seconds, and the process has been made ready for it by now.
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    keys = Storage(folder, options).shapes
    layout = {
        "non_homogeneous_layers": not is_stacked(keys),
        "singleton_local_shards": any(key.endswith("linear_fc1.weight_w") for key in keys),
    }
    warnings.filterwarnings("ignore", message=r"`load_state_dict` is deprecated", category=FutureWarning)
    wanted = model.sharded_state_dict(metadata=layout)
    wanted = {name: entry for name, entry in wanted.items() if not name.endswith("_extra_state")}
    try:
        with as_data(folder / COMMON, options, known=KNOWN):
            state = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointingException, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: Megatron-Core cannot load it ({reason}); name a complete checkpoint"
        ) from None
    model.load_state_dict({name: value for name, value in state.items() if isinstance(value, Tensor)})
    return gpt_logits(model, vocab_size=weights.vocab_size)


def write(weights: Weights, folder: Path, options: Options) -> None:
    """A folder for ``dist_checkpointing.load`` at any tensor-parallel size, with what makes a run of it."""
    iteration = folder / f"iter_{weights.step:07d}"
    iteration.mkdir()
    names = {key_of(name): name for name in weights.shapes}
    write_storage(
        iteration,
        {key: weights.shapes[name] for key, name in names.items()},
        lambda key: weights.read(names[key]),
        empty=extra_states(weights.shapes, weights.factors),
    )
    common = {"iteration": weights.step, "checkpoint_version": 3.0, "content_metadata": LAYOUT}
    torch.save(common, iteration / COMMON)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / BACKEND).write_text(
        json.dumps(backend | {"common_backend": "torch", "common_backend_version": 1})
    )
    factors = {
        name: changed(spec, capacity=spec.active_columns, tracked=False).to_record()
        for name, spec in weights.factors.items()
    }
    record = {"format_version": RUN_RECORD_VERSION, "vocab_size": weights.vocab_size, "factors": factors}
    record["config"] = flatten(weights.config) | {"save": None, "pretrained_checkpoint": None}
    (folder / RUN_RECORD).write_text(json.dumps(record, indent=1))
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, folder / TOKENIZER)
    (folder / LATEST).write_text(str(weights.step))


def _iteration(path: Path) -> Path:
    if not (path / LATEST).is_file():
        return path
    refuse_pointer(path / LATEST)
    latest = (path / LATEST).read_text(errors="replace").strip()[:20]
    folder = path / (f"iter_{int(latest):07d}" if latest.isdecimal() else "release")
    if not (folder / BACKEND).is_file():
        raise UserError(
            f"{path}: {LATEST} says {latest}, and {folder.name} has no {BACKEND}; name a folder that "
            "Megatron-Core's dist_checkpointing wrote (Megatron-LM: --ckpt-format torch_dist)"
        )
    return folder


def _common(folder: Path, options: Options) -> dict[str, Any]:
    refuse_pointer(folder / BACKEND)
    backend = (read_json(folder / BACKEND) or {}).get("sharded_backend")
    if backend != "torch_dist":
        raise UserError(
            f"{folder / BACKEND}: storage {backend}, and only torch_dist is read here; save with "
            "--ckpt-format torch_dist"
        )
    common = load(folder / COMMON, options, known=KNOWN)
    return common if isinstance(common, dict) else {}


def _run_record(folder: Path) -> tuple[Config, int, dict[str, FactorSpec]] | None:
    path = next((p / RUN_RECORD for p in (folder, folder.parent) if (p / RUN_RECORD).is_file()), None)
    if path is None:
        return None
    refuse_pointer(path)
    try:
        record = read_json(path) or {}
        version = record["format_version"]
        factors = {name: FactorSpec.from_record(spec) for name, spec in record["factors"].items()}
        found = (from_flat(record["config"]), int(record["vocab_size"]), factors)
        if not all(1 <= spec.rank <= spec.active_columns <= spec.capacity for spec in factors.values()):
            raise ValueError("a rank must lie between 1 and its columns")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); convert again") from None
    if version != RUN_RECORD_VERSION:
        raise UserError(
            f"{path}: version {version}, this program reads {RUN_RECORD_VERSION}; use the one that wrote it"
        )
    return found
