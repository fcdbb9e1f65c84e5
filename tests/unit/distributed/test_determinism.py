"""The deterministic mode's variables, and that a CPU run knows nothing of it."""

import pytest

from inrank_megatron.distributed.determinism import is_deterministic, make_deterministic
from inrank_megatron.distributed.platform import prepare_process
from inrank_megatron.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NCCL_ALGO", "Tree")],
    ids=["cuBLAS", "NCCL", "trees"],
)
def test_a_variable_that_contradicts_it_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} = '{value}': deterministic_mode needs .*; unset it"):
        make_deterministic({name: value})
    assert not is_deterministic()


def test_a_cpu_run_knows_nothing_of_it(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_process(deterministic=True)
    assert not is_deterministic()
