"""Which device a process takes, what CUDA finds set, and what is said of GPUs that it cannot use."""

import contextlib
import inspect
import io
import os
import warnings

import pytest
import torch

from inrank_megatron.distributed.launcher import Ranks
from inrank_megatron.distributed.platform import (
    bf16_fault,
    cuda_fault,
    cuda_settings,
    device_index,
    identity_of,
    mixed_devices,
    prepare_process,
    unusable_gpus,
)
from inrank_megatron.errors import UserError
from tests.harness import run_ranks


def test_that_zero_has_an_optimizer_which_deepspeed_does_not_know_is_no_line():
    """It is Muon, the default; what else DeepSpeed says stays."""
    prepare_process()
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import logger

    said = "**** You are using ZeRO with an untested optimizer, proceed with caution *****"
    assert said in inspect.getsource(DeepSpeedEngine._do_optimizer_sanity_check)
    records = [logger.makeRecord(logger.name, 30, "engine.py", 1, text, (), None) for text in (said, "other")]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_each_local_rank_takes_its_own_device():
    ranks = [Ranks(8 + local, 16, local, 8) for local in range(8)]
    assert [device_index(rank, 8) for rank in ranks] == list(range(8))


def test_a_process_that_is_shown_one_device_takes_it():
    """As `srun --gpus-per-task=1` shows them, each to its task as number 0."""
    assert {device_index(Ranks(local, 4, local, 4), 1) for local in range(4)} == {0}


def test_more_processes_than_devices():
    with pytest.raises(UserError, match=r"local rank 3: this machine has 2 GPUs.*at most 2 processes here"):
        device_index(Ranks(3, 4, 3, 4), 2)


def test_gpus_of_several_kinds_are_told_with_their_hosts():
    same = [("a", "NVIDIA H100"), ("b", "NVIDIA H100")]
    assert mixed_devices(same) == mixed_devices([("a", "cpu"), ("b", "cpu")]) == []
    [note] = mixed_devices([*same, ("b", "NVIDIA H100"), ("c", "NVIDIA A100-SXM4-80GB")])
    assert "(NVIDIA H100 on a, b; NVIDIA A100-SXM4-80GB on c)" in note


@pytest.mark.parametrize(
    ("visible", "index", "identity"),
    [
        ("", 0, "uuid"),
        ("2,3", 1, "uuid"),
        ("GPU-1,GPU-2", 1, "uuid"),
        ("MIG-1, MIG-2", 1, "MIG-2"),
        ("0", 1, "uuid"),
    ],
)
def test_a_slice_of_a_gpu_has_its_own_identity(visible, index, identity):
    assert identity_of(visible, index, "uuid") == identity


@pytest.fixture
def devices(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "-1,0"])
def test_gpus_that_the_user_hides(devices, visible):
    assert unusable_gpus({"CUDA_VISIBLE_DEVICES": visible}, devices, lambda: "a reason") is None


def test_gpus_that_torch_cannot_use_are_not_passed_over(devices, tmp_path):
    found = unusable_gpus({}, devices, lambda: "the driver is too old")
    assert (
        "2 NVIDIA GPUs" in found and "the driver is too old" in found and 'CUDA_VISIBLE_DEVICES=""' in found
    )
    assert "CUDA_VISIBLE_DEVICES=7" in unusable_gpus({"CUDA_VISIBLE_DEVICES": "7"}, devices, lambda: "none")
    (tmp_path / "none").mkdir()
    assert unusable_gpus({}, tmp_path / "none", lambda: "a reason") is None


def test_the_reason_is_torchs_own():
    """This machine has no driver, or a torch without CUDA."""
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPUs of this machine")
    reason = cuda_fault()
    assert "\n" not in reason and ("a build without CUDA" in reason or "NVIDIA" in reason)


QUEUES, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF"


def test_one_queue_where_tensor_parallelism_needs_it():
    """Elsewhere the gathers and reductions of ZeRO's own streams would wait behind each other in it."""
    assert QUEUES not in cuda_settings({}, tensor_model_parallel_size=1)
    assert cuda_settings({}, tensor_model_parallel_size=2)[QUEUES] == "1"
    assert QUEUES not in cuda_settings({QUEUES: "4"}, tensor_model_parallel_size=2)


@pytest.mark.parametrize("name", [ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(name):
    """torch reads the variable of the old name first."""
    assert cuda_settings({}, tensor_model_parallel_size=1) == {ALLOCATOR: "expandable_segments:True"}
    assert cuda_settings({name: "max_split_size_mb:64"}, tensor_model_parallel_size=1) == {}


def test_a_gpu_without_bf16():
    assert bf16_fault(True, "NVIDIA A100", (8, 0)) is bf16_fault(False, "Tesla T4", (7, 5)) is None
    reason = bf16_fault(True, "Tesla V100", (7, 0))
    assert "bf16 = True: Tesla V100 (compute capability 7.0) has no BF16" in reason and "--fp16" in reason


def prepared(rank: int, world_size: int) -> tuple[str, str | None, str | None]:
    """What a prepared process writes of torch's remark on barriers with NCCL, and its environment."""
    remark = "barrier(): using the device under current context. "
    assert remark in inspect.getsource(torch.distributed.distributed_c10d.barrier)
    with contextlib.redirect_stderr(io.StringIO()) as written:
        warnings.warn(remark, stacklevel=1)
    return written.getvalue(), os.environ.get(QUEUES), os.environ.get(ALLOCATOR)


def test_a_prepared_process():
    """DeepSpeed calls barriers while it builds ZeRO 3; Megatron-Core asks for the one queue on a CPU too."""
    assert run_ranks(prepared, 1) == [("", "1", "expandable_segments:True")]
