"""Hugging Face's own models: every linear one matrix. Read and written in folders of safetensors."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.config.schema import Config
from inrank_megatron.config.shapes import is_llama, qkv_layout
from inrank_megatron.errors import Unsupported
from inrank_megatron.interop.core.gpt import Forward
from inrank_megatron.interop.core.options import Options
from inrank_megatron.interop.core.tokenizer_files import has_tokenizer
from inrank_megatron.interop.core.weights import Shapes, Weights, account, check_layers, weight_shapes
from inrank_megatron.interop.huggingface.config import hf_settings, run_config
from inrank_megatron.interop.huggingface.files import FolderTensors, SafetensorsFolder, write_tensors
from inrank_megatron.interop.huggingface.kinds import CLASSES, kind_of, model_type
from inrank_megatron.interop.huggingface.model import BUFFERS, auto_forward, write_settings
from inrank_megatron.interop.huggingface.names import feeders, hf_modules, hf_shapes, hf_tensor, run_tensor

NAME = "hf-dense"
GPT2_PREFIX, HEAD = "transformer.", "lm_head.weight"


def matches(path: Path) -> bool:
    """Whether ``path`` is a folder with a model of Hugging Face that is taken."""
    return model_type(path) in CLASSES


def open_weights(path: Path, options: Options) -> Weights:
    """The weights, as they are stored, with the settings of a dense run.

    Raises:
        UserError: the model is one that a run cannot have, its files are pickles, or tensors are missing, too
            many or of other shapes.
    """
    return weights_of(path, SafetensorsFolder(path))


def model_of(path: Path) -> tuple[Config, Path | None]:
    """The settings of a dense run with the model, and the folder with its tokenizer, if it has one; no
    weights are read. UserError as for :func:`open_weights`.
    """
    return run_config(path, _kind(path))[0], path if has_tokenizer(path) else None


def weights_of(path: Path, stored: FolderTensors) -> Weights:
    """The model whose settings are in the folder ``path``, with the tensors ``stored``."""
    config, vocab_size, notes = run_config(path, _kind(path))
    check_layers(str(path), config, tensors=len(stored.shapes))
    names = _names(stored, config)
    run_shapes = weight_shapes(config, vocab_size, {})
    account(
        str(path),
        there={name: stored.shapes[file_name] for name, file_name in names.items()},
        here=hf_shapes(config, run_shapes),
    )
    fed_by, layout = feeders(hf_modules(config)), qkv_layout(config)

    def read(name: str) -> Tensor:
        return run_tensor(
            name, run_shapes[name], lambda n: stored.read(names[n]), fed_by=fed_by, layout=layout
        )

    tokenizer = path if has_tokenizer(path) else None
    return Weights(str(path), config, vocab_size, {}, read, tokenizer=tokenizer, notes=notes)


def forward(path: Path, options: Options) -> Forward:
    """Logits of transformers' own model."""
    return auto_forward(path)


def write(weights: Weights, folder: Path, options: Options) -> None:
    """W, or W0 + U V or U V multiplied out, in FP32; no padding of the vocabulary."""
    write_tensors(folder, *dense_tensors(weights))
    write_settings(weights, dense_config(weights), folder)


def dense_tensors(weights: Weights) -> tuple[Shapes, Callable[[str], Tensor]]:
    """Shapes of the dense model's tensors, and the tensor of a name, FP32, computed when it is asked for."""
    modules, layout = hf_modules(weights.config), qkv_layout(weights.config)
    # Several modules may be rows of one linear.
    read = lru_cache(maxsize=1)(lambda name: merged(weights, name))

    def tensor(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        return hf_tensor(modules[module], leaf, read, layout=layout)

    return hf_shapes(weights.config, weight_shapes(weights.config, weights.vocab_size, {})), tensor


def dense_config(weights: Weights):
    """The configuration of the model with full matrices."""
    import transformers

    kind, model = CLASSES[kind_of(weights.config)]
    return getattr(transformers, kind)(**hf_settings(weights), architectures=[model])


def merged(weights: Weights, name: str) -> Tensor:
    """The tensor ``name`` of the run's dense model, FP32."""
    linear, _, leaf = name.rpartition(".")
    spec = weights.factors.get(linear)
    if leaf != "weight" or spec is None:
        return weights.read(name).float()
    product = weights.read(f"{linear}.U").float() @ weights.read(f"{linear}.V").float()
    return product.add_(weights.read(name)) if spec.frozen_base else product


def _kind(path: Path) -> str:
    kind = model_type(path)
    assert kind is not None, "its callers have asked matches"
    return kind


def _names(stored: FolderTensors, config: Config) -> dict[str, str]:
    """Name in the model -> name in the files, without buffers and without a head that is the embedding."""
    llama = is_llama(config)
    prefix = "" if llama or any(name.startswith(GPT2_PREFIX) for name in stored.shapes) else GPT2_PREFIX
    names = {name if name == HEAD else prefix + name: name for name in stored.shapes}
    names = {name: there for name, there in names.items() if not BUFFERS.fullmatch(name)}
    embedding = "model.embed_tokens.weight" if llama else "transformer.wte.weight"
    if not config.model.has_own_head and HEAD in names and embedding in names:
        if not torch.equal(stored.read(names[HEAD]), stored.read(names[embedding])):
            raise Unsupported(
                f"{stored.folder}: lm_head.weight differs from {embedding.partition('.')[2]}, and its "
                "config.json makes one matrix of both (tie_word_embeddings); correct that or choose another "
                "model"
            )
        del names[HEAD]
    return names
