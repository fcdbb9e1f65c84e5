"""What a run says at its start of the hosts that it is on."""

from tests.cluster.trainings import run


def test_ranks_that_alternate_between_hosts_get_a_note_of_the_cost(cluster, trainings):
    """Tensor parallelism then crosses the network, and the launcher can do better."""
    more = ["--train-iters", "4", "--switch-iters", "2"]
    told = run(
        cluster, "slurm_task_per_gpu.sh", trainings / "cyclic", *more, sbatch=["--distribution=cyclic"]
    )
    assert told.count("2 hosts, connected by gloo over eth0 (GLOO_SOCKET_IFNAME)") == 1
    assert "tensor parallelism crosses hosts in 2 of 2 groups (ranks 0-1 on node-1, node-2)" in told
