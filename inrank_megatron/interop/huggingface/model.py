"""What the formats for ``transformers`` share: the files next to the weights, and loading."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrank_megatron.errors import UserError
from inrank_megatron.interop.core.gpt import Forward
from inrank_megatron.interop.core.tokenizer_files import copy_tokenizer
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.pointers import refuse_pointer

# Tables that older versions of transformers stored next to the weights and that the model computes.
BUFFERS = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|"
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)

MOST_SHOWN = 4  # names of tensors in one message


def write_settings(weights: Weights, config, folder: Path) -> None:
    """``config.json``, ``generation_config.json`` and, where there is one, the tokenizer."""
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    if weights.tokenizer is not None:
        copy_tokenizer(weights.tokenizer, folder)


def auto_forward(folder: Path) -> Forward:
    """Logits of what ``AutoModelForCausalLM`` makes of ``folder``, in FP32, on the CPU. Raises as
    :func:`auto_model` does.
    """
    return forward_of(auto_model(folder))


def auto_model(folder: Path):
    """What ``AutoModelForCausalLM`` makes of ``folder``, in FP32, in evaluation mode, on the CPU.

    Raises:
        UserError: transformers cannot load it, or its tensors are not those that it asks for.
    """
    from transformers import AutoModelForCausalLM

    from inrank_megatron.interop.huggingface.registration import register

    register()
    factory: Any = AutoModelForCausalLM  # its types leave out what the loading information adds
    for path in folder.iterdir():
        refuse_pointer(path)
    try:
        with quiet_transformers():
            model, loading = factory.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,  # left out, transformers would ask whoever sits at standard input
                use_safetensors=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: transformers cannot load it ({reason}); convert again") from None
    strange = {
        name: sorted(key for key in map(str, keys) if not BUFFERS.fullmatch(key))
        for name, keys in loading.items()
    }
    if faults := [_counted(name, keys) for name, keys in strange.items() if keys]:
        raise UserError(f"{folder}: transformers finds {'; '.join(faults)}; name a complete language model")
    return model.eval()


def _counted(name: str, keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_SHOWN} more" if len(keys) > MOST_SHOWN else ""
    return f"{name.replace('_', ' ')}: {', '.join(keys[:MOST_SHOWN])}{more}"


def forward_of(model) -> Forward:
    """Logits of a model of transformers in evaluation mode."""

    @torch.no_grad()
    def forward(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits.float()

    return forward


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars, and its remarks on what is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what its callers are to change
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
