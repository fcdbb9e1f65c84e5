"""A LoRA adapter of PEFT merged into its base: ``W + s B A`` with A [r, I], B [O, r] of a linear [O, I].

``s`` is ``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA; what PEFT can do beyond that is
refused. Reading needs the base's files and no PEFT.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inrank_megatron.config.folders import named_path
from inrank_megatron.config.schema import Config
from inrank_megatron.data.cache import read_json
from inrank_megatron.data.tokenizer import HUB_NAME
from inrank_megatron.errors import Unsupported, UserError
from inrank_megatron.interop.core.tokenizer_files import has_tokenizer
from inrank_megatron.interop.core.weights import Weights
from inrank_megatron.interop.huggingface import dense as hf_dense
from inrank_megatron.interop.huggingface.files import SafetensorsFolder
from inrank_megatron.interop.huggingface.names import hf_modules
from inrank_megatron.interop.huggingface.snapshot import ADAPTER as CONFIG
from inrank_megatron.interop.huggingface.snapshot import snapshot
from inrank_megatron.pointers import refuse_pointer

BASE, TENSORS = "base", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Settings of PEFT that say what an adapter is, or how it trains; all others must be off.
TAKEN = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
        "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip
OFF: tuple[Any, ...] = (None, False, "none", [], {})
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw the first A and B that do not change the base, as PiSSA and others do."""


class MergedTensors:
    """The tensors of a base, with an adapter merged into its linears, in FP32. As ``SafetensorsFolder``."""

    def __init__(self, base: Path, adapter: Path, settings: dict[str, Any], config: Config):
        self._base, self._adapter, self._settings = SafetensorsFolder(base), adapter, settings
        self.folder, self.shapes = base, self._base.shapes
        self._turned = {name: module.transposed for name, module in hf_modules(config).items()}
        self._adapted = self._listed()

    def read(self, name: str) -> Tensor:
        """The full tensor, on the CPU."""
        tensor = self._base.read(name)
        module = self._module(name)
        return tensor if module not in self._adapted else tensor.float() + self._product(module)

    def _product(self, module: str) -> Tensor:
        with safe_open(self._adapter / TENSORS, framework="pt") as file:
            a, b = (file.get_tensor(f"{PREFIX}{module}{leaf}").float() for leaf in (A, B))
        alpha = self._settings["lora_alpha"]
        for pattern, value in (self._settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT finds it: the first that fits
                alpha = value
                break
        rank = math.sqrt(len(a)) if self._settings.get("use_rslora") else len(a)
        product = alpha / rank * (b @ a)
        return product.T if self._turned[module] else product

    def _module(self, name: str) -> str:
        """Of a tensor in the base's files, which may leave out the prefix of GPT-2's names."""
        module = name.removesuffix(".weight")
        return module if module in self._turned else f"{hf_dense.GPT2_PREFIX}{module}"

    def _listed(self) -> set[str]:
        """The adapted modules; every tensor of the adapter belongs to one, in the right shape."""
        path = self._adapter / TENSORS
        linears = {self._module(name): shape for name, shape in self.shapes.items() if len(shape) == 2}
        try:
            with safe_open(path, framework="pt") as file:
                there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); name a complete adapter") from None
        adapted = {name.removeprefix(PREFIX).removesuffix(A) for name in there if name.endswith(A)}
        expected = {f"{PREFIX}{module}{leaf}" for module in adapted for leaf in (A, B)}
        if strange := sorted(there.keys() ^ expected) or sorted(
            adapted - linears.keys() & self._turned.keys()
        ):
            raise Unsupported(
                f"{path}: {strange[0]}: is no A or B of a linear of its base; of adapters LoRA on linears is "
                "read: merge it with PEFT's merge_and_unload, save_pretrained that and name it"
            )
        for module in adapted:
            out, inp = linears[module][::-1] if self._turned[module] else linears[module]
            (rank, width), (height, columns) = (there[f"{PREFIX}{module}{leaf}"] for leaf in (A, B))
            if (width, height, columns) != (inp, out, rank):
                raise UserError(
                    f"{path}: A [{rank}, {width}] and B [{height}, {columns}] of {module} do not fit its "
                    f"base, [{out}, {inp}]; name the adapter's own base in {CONFIG}"
                )
        return adapted


def adapter_settings(path: Path) -> dict[str, Any]:
    """``adapter_config.json`` of the folder ``path``. UserError for what is no plain LoRA."""
    refuse_pointer(path / CONFIG)
    values = read_json(path / CONFIG)
    if values is None:
        raise UserError(f"{path / CONFIG}: is not a JSON object; name a complete adapter")
    wrong = {name: value for name, value in values.items() if name not in TAKEN and value not in OFF}
    if values.get("peft_type") != "LORA":
        wrong = {"peft_type": values.get("peft_type")}
    elif values.get("init_lora_weights", True) not in KEEPS_BASE:
        wrong = {"init_lora_weights": values["init_lora_weights"]}
    elif not isinstance(values.get("lora_alpha"), int | float):
        wrong = {"lora_alpha": values.get("lora_alpha")}
    for name, value in wrong.items():
        raise Unsupported(
            f"{path / CONFIG}: {name} = {value!r}: plain LoRA is read; merge the adapter with PEFT's "
            "merge_and_unload, save_pretrained that and name it"
        )
    return values


def base_of(path: Path, *, with_weights: bool = True) -> Path:
    """The folder of the adapter's base: ``base`` next to it, or what its settings name, a folder or a model
    of the hub.
    """
    settings = adapter_settings(path)
    name = str(settings.get("base_model_name_or_path") or "")
    for folder in (path / BASE, named_path(name)):
        if folder.is_dir() and name:
            return folder
    if HUB_NAME.fullmatch(name) and name != BASE:
        return snapshot(name, revision=settings.get("revision"), with_weights=with_weights)
    raise UserError(f"{path / CONFIG}: its base {name!r} is no folder here; put it into {path / BASE}")


def model_of(path: Path) -> tuple[Config, Path | None]:
    """The settings of the base, and the folder with the adapter's tokenizer, else the base's, if any."""
    config, tokenizer = hf_dense.model_of(_dense_base(path, with_weights=False))
    return config, path if has_tokenizer(path) else tokenizer


def merged_weights(path: Path) -> Weights:
    """The dense weights of the base with the adapter merged into them."""
    refuse_pointer(path / TENSORS)
    config, tokenizer = model_of(path)  # refuses the base before its weights are downloaded
    base, settings = _dense_base(path), adapter_settings(path)
    weights = hf_dense.weights_of(base, MergedTensors(base, path, settings, config))
    note = f"the adapter {path} is merged into its base {base}"
    return replace(weights, origin=str(path), tokenizer=tokenizer, notes=(*weights.notes, note))


def _dense_base(path: Path, *, with_weights: bool = True) -> Path:
    base = base_of(path, with_weights=with_weights)
    if not hf_dense.matches(base):
        raise Unsupported(f"{base}: the base of {path} must be a model of the format {hf_dense.NAME}")
    return base
