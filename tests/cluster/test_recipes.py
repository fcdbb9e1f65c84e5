"""Recipes of ``launch/cluster`` with their real launchers, on two hosts and one on four."""

import pytest

from inrank_megatron.training.run_place import NAMES
from tests.cluster.trainings import RECIPES, STEPS, result, run

# The others are interrupted and compared in test_slurm.py and test_elastic.py.
SCRIPTS = [
    "deepspeed_no_ssh.sh",
    "deepspeed_openssh.sh",
    "deepspeed_pdsh.sh",
    "open_mpi.sh",
    "torchrun_static.sh",
]


_DEEPSPEED = "deepspeed --hostfile HOSTFILE "
_TORCHRUN = "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node-1:29500 --nproc-per-node 2 "
# How the command begins that the run prints to go on.
GO_ON = {
    **{name: _DEEPSPEED for name in SCRIPTS if name.startswith("deepspeed")},
    "open_mpi.sh": "mpirun -n 4 --hostfile HOSTFILE --map-by slot --bind-to none -x MASTER_ADDR=node-1 -x ",
    "torchrun_static.sh": _TORCHRUN,
}


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_recipe_trains_as_one_host_does(cluster, trainings, one_host, recipe):
    """Bit for bit, and everything is written once, by one rank."""
    folder = trainings / recipe
    told = run(cluster, recipe, folder)
    assert result(folder) == one_host
    assert told.count("4 x cpu = 2 tensor-parallel x 2 data-parallel") == 1
    assert told.count("report      ") == 1
    assert told.count(f"  go on        {GO_ON[recipe]}") == 1
    assert {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} <= NAMES
    assert [entry.name for entry in sorted((folder / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (STEPS // 2, STEPS)
    ]


def test_every_recipe_has_its_test():
    tested = {*SCRIPTS, "slurm_task_per_gpu.sh", "slurm_task_per_node.sh", "torchrun_elastic.sh"}
    assert tested == {path.name for path in RECIPES.glob("*.sh")}


def test_four_hosts_train_as_one_host_does(cluster, trainings, one_host):
    """Twice the replicas sum the gradients in another order, so the losses agree up to rounding."""
    told = run(cluster, "deepspeed_pdsh.sh", trainings / "four", hosts=4)
    assert told.count("8 x cpu = 2 tensor-parallel x 4 data-parallel") == 1
    losses = [[record[1] for record in run["train"]] for run in (result(trainings / "four"), one_host)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
