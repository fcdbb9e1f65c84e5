"""A process with a GPU in deterministic mode: what the mode asks for is set before anything runs there."""

import os

import torch

from inrank_megatron.distributed.platform import prepare_process
from tests.emulated.device import run_emulated


def prepared(deterministic: bool) -> dict:
    """What libraries read, after the process was prepared."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    for name in names:
        os.environ.pop(name, None)
    prepare_process(deterministic=deterministic)
    return {name: os.environ.get(name) for name in names} | {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "fused attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "tf32": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
    }


def test_deterministic_mode_sets_every_switch():
    assert run_emulated(prepared, True) == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "algorithms": True,
        "only warns": False,
        "fills": False,
        "cudnn": (True, False),
        "cudnn attention": False,
        "fused attention": (True, True),
        "tf32": ("highest", False),
    }


def test_without_deterministic_mode_no_switch_is_set():
    seen = run_emulated(prepared, False)
    assert (seen["CUBLAS_WORKSPACE_CONFIG"], seen["NCCL_ALGO"], seen["algorithms"]) == (None, None, False)
    assert seen["cudnn attention"]
