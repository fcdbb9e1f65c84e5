"""``AutoModelForCausalLM`` learns the factorised models once it has been imported, and not before.

Importing this project must import neither torch nor transformers. Nor can the classes be registered the
moment that ``configuration_auto`` is there: transformers imports it in the middle of the modules that they
are derived from.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

AUTO = "transformers.models.auto.configuration_auto"
MODELS = "inrank_megatron.interop.huggingface.modeling_inrank"


def register_when_imported() -> None:
    """Register now if ``AUTO`` has been imported, else as soon as it has been. Repeats do nothing."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know the factorised models."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    models = import_module(MODELS)
    for config, model in (
        (models.InRankGPT2Config, models.InRankGPT2LMHeadModel),
        (models.InRankLlamaConfig, models.InRankLlamaForCausalLM),
        (models.InRankQwen2Config, models.InRankQwen2ForCausalLM),
        (models.InRankQwen3Config, models.InRankQwen3ForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model.base_class, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


class AfterImport(MetaPathFinder):
    """Finds modules as they are found without it, registers once ``AUTO`` is there and no module of
    transformers is half imported, and then leaves.
    """

    def __init__(self):
        self._under_way = 0

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers" and fullname != MODELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._counted(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _counted(self, execute: Callable) -> Callable:
        def counted(module) -> None:
            self._under_way += 1
            try:
                execute(module)
            finally:
                self._under_way -= 1
            if self._under_way == 0 and AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        return counted
