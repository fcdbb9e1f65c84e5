"""The optimizers of a run, and how each keeps its state."""

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inrank_megatron.config.schema import Config, OptimizerConfig
from inrank_megatron.engine.orthogonalised import MOMENTUM, OrthogonalisedMomentum
from inrank_megatron.errors import UserError

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Args:
        build: from parameter groups and the section of the settings.
        moments: the tensors of its state that are shaped like the parameter, the second moment last.
        step_in: where it counts steps: ``tensor`` and ``int`` in each state, ``group`` in the parameter
            group, ``nowhere``.
    """

    build: Callable[[list[dict], OptimizerConfig], torch.optim.Optimizer]
    moments: tuple[str, ...]
    step_in: str

    def fresh_state(self, owner: Tensor) -> dict:
        """Zero moments at step 0, as at the first step."""
        state: dict = {key: torch.zeros_like(owner, dtype=torch.float32) for key in self.moments}
        if self.step_in == "tensor":
            state["step"] = torch.zeros((), device=owner.device)
        elif self.step_in == "int":
            state["step"] = 0
        return state

    def step(self, group: dict, state: dict) -> int:
        """Steps counted so far; bias correction depends on it."""
        if self.step_in == "nowhere":
            return 0
        return int(group.get("step", 0) if self.step_in == "group" else state["step"])

    def set_step(self, group: dict, state: dict, step: int) -> None:
        if self.step_in == "tensor":
            state["step"].fill_(step)
        elif self.step_in != "nowhere":
            (group if self.step_in == "group" else state)["step"] = step


def rule_of(config: Config, group: str) -> str:
    """How the parameter group of that name is stepped: by ``muon``, ``spectron`` or ``lora-muon``, or
    (``adamw``) as the run's optimizer does.
    """
    settings = config.optimizer
    return {"factors": settings.factor_optimizer, "matrices": settings.matrix_optimizer}.get(group, "adamw")


def kind_of(config: Config, group: str) -> Kind:
    """The optimizer of the parameter group of that name; plain SGD has no moments."""
    if rule_of(config, group) != "adamw":
        return _ORTHOGONALISED
    if config.optimizer.optimizer == "sgd":
        moments = ("momentum_buffer",) if config.optimizer.sgd_momentum else ()
        return Kind(_sgd, moments, "nowhere")
    return _ADAMS[config.optimizer.optimizer]


def check_installed(config: Config) -> None:
    """Refuses NVIDIA apex's optimizer where apex is missing or another package of that name."""
    if config.optimizer.optimizer != "apex-fused-adam":
        return
    # Not imported to look: a package of the same name may do anything.
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations or []) if spec else []
    if any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return
    place = spec.origin or ", ".join(folders) if spec else None
    found = f"the `apex` at {place} is another package of that name" if place else "it is not installed"
    raise UserError(
        f"optimizer = 'apex-fused-adam': needs NVIDIA apex, and {found}; build apex from "
        "github.com/NVIDIA/apex (the package index has only the other one), or give --optimizer adamw"
    )


def build_optimizer(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    """The run's optimizer at learning rate 0: each step sets its own, and some of DeepSpeed's optimizers take
    a step with zero gradients when they are built, which would decay the weights.

    Raises:
        UserError: where its operator cannot be compiled or loaded.
    """
    # Imported here: it takes seconds, and the patches come before.
    from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException

    faults = (RuntimeError, ImportError, OSError, subprocess.SubprocessError)
    try:
        plain = all(rule_of(config, group) == "adamw" for group in ("factors", "matrices"))
        kind = kind_of(config, "decay") if plain else _ORTHOGONALISED
        return kind.build(groups, config.optimizer)
    except (*faults, CUDAMismatchException, MissingCUDAException) as error:
        # DeepSpeed's Adam for the CPU says no more than that it failed, from the error that has the reason.
        cause = error.__cause__ if "failed to build/load" in str(error) else error
        raise UserError(unbuilt(config.optimizer.optimizer, cause or error)) from error


def unbuilt(optimizer: str, error: BaseException) -> str:
    """The line on an operator that does not build, by what the compiler, torch or DeepSpeed raised.

    A failed compilation carries all that the compiler printed: its first line with an error counts.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"\berror:|not found|No such file", line))
    reason = next(telling, " ".join(lines)).rstrip(".")[:300]
    if optimizer == "apex-fused-adam":
        remedy = f"rebuild apex for torch {torch.__version__}"
    elif re.search("nvcc|CUDA", reason):
        version = f"CUDA toolkit {torch.version.cuda}, which this torch is built with"
        remedy = f"install the {version}, and set CUDA_HOME to its folder"
    elif re.search("[Nn]inja (is required|not being installed)", reason):
        remedy = "activate the environment (source .venv/bin/activate), or install ninja into it"
    else:
        remedy = "install a C++ compiler (Debian, Ubuntu: apt install g++)"
    return (
        f"optimizer = {optimizer!r}: its operator does not build on this machine ({reason}); {remedy}, or "
        "give --optimizer adamw"
    )


def _adam(settings: OptimizerConfig) -> dict:
    return {
        "lr": 0.0,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }


def _adamw(groups, settings):
    return torch.optim.AdamW(groups, fused=True, **_adam(settings))


def _orthogonalised(groups, settings):
    return OrthogonalisedMomentum(groups, momentum=settings.muon_momentum, **_adam(settings))


def _fused_adam(groups, settings):
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **_adam(settings))


def _cpu_adam(groups, settings):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **_adam(settings))


def _apex_fused_adam(groups, settings):
    return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True, **_adam(settings))


def _sgd(groups, settings):
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay)


_ORTHOGONALISED = Kind(_orthogonalised, (MOMENTUM,), "nowhere")
_ADAMS = {
    "adamw": Kind(_adamw, ADAM_MOMENTS, "tensor"),
    "fused-adam": Kind(_fused_adam, ADAM_MOMENTS, "int"),
    "cpu-adam": Kind(_cpu_adam, ADAM_MOMENTS, "int"),
    "apex-fused-adam": Kind(_apex_fused_adam, ADAM_MOMENTS, "group"),
}
