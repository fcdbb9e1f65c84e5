"""What launchers and batch systems tell a process is understood, or refused in one line."""

import pytest

from inrank_megatron.distributed.launcher import adopt_ranks, read_ranks, refuse_ranks, unused_tasks
from inrank_megatron.distributed.slurm import first_host
from inrank_megatron.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
}
DEEPSPEED = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | {
    "LOCAL_SIZE": "2"
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node-[03-06],login",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2(x3),1,1",
}
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node-[03-06],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1,1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "1192361985",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "env",
    [
        TORCHRUN,
        DEEPSPEED,
        # srun torchrun, one task per node
        TORCHRUN | SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        OPEN_MPI | ADDRESS,
        OPEN_MPI | ADDRESS | SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"},  # its daemons' step
        HYDRA | ADDRESS,
        SRUN | ADDRESS,
        SRUN | ADDRESS | {"PMI_RANK": "3", "PMI_SIZE": "8"},  # srun --mpi=pmi2
        SRUN | ADDRESS | {"PMIX_RANK": "3"},
        SRUN | ADDRESS | {"RANK": "3", "WORLD_SIZE": "8"},  # exported in a script that srun starts
    ],
)
def test_every_launcher_says_the_same(env):
    ranks = read_ranks(env)
    assert (ranks.rank, ranks.world_size) == (3, 8)
    assert (ranks.local_rank, ranks.local_world_size) == (1, 2)
    assert (ranks.master_addr, ranks.master_port) == ("node1", 1234)


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH_SCRIPT,
        BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967291"},  # the batch script's own step
        BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "8"},  # a shell by salloc
        SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
    ],
)
def test_one_process_waits_for_nobody(env):
    ranks = read_ranks(env)
    assert (ranks.rank, ranks.world_size, ranks.master_addr) == (0, 1, None)


def test_tasks_of_slurm_meet_on_the_first_host_at_a_port_of_their_own():
    places = {}
    for step in "01":
        for task in "07":
            ranks = read_ranks(SRUN | {"SLURM_PROCID": task, "SLURM_STEP_ID": step})
            assert ranks.master_addr == "node-03"
            places.setdefault(step, set()).add(ranks.master_port)
    assert len(places["0"]) == len(places["1"]) == 1 and places["0"] != places["1"]
    assert all(15000 <= port < 25000 for ports in places.values() for port in ports)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("n[3,5]", "n3"),
        ("gpu-[08-11,13]-ib.site,x", "gpu-08-ib.site"),
        ("r[1-2]c[03-04]", "r1c03"),
        ("", None),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host({"LIST": hosts}, "OTHER", "LIST") == first


def test_open_mpi_on_one_machine_needs_no_address():
    alone = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    ranks = read_ranks(alone)
    assert ranks.master_addr == "127.0.0.1" and 15000 <= ranks.master_port < 25000
    assert read_ranks(alone | {"PMIX_NAMESPACE": "5"}).master_port != ranks.master_port


def test_open_mpi_in_an_allocation_meets_on_its_first_host():
    """Slurm's own step is that of the daemons, on all hosts but the first."""
    ranks = read_ranks(OPEN_MPI | SRUN | {"SLURM_STEP_NODELIST": "node-[04-06]"})
    assert ranks.master_addr == "node-03"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": ""}, "RANK = ''"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        (SRUN | {"RANK": ""}, "RANK = ''"),
        (TORCHRUN | {"RANK": "one"}, "RANK = 'one'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK = '-1'"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        (TORCHRUN | {"RANK": "8"}, "RANK = 8: must be below WORLD_SIZE = 8"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK = 2: must be below LOCAL_WORLD_SIZE = 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = 9, and that at most WORLD_SIZE = 8"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT = 'x'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT = 70000"),
        ({"RANK": "0"}, "RANK = 0 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 without RANK"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK = 1 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_ADDR: .*set MASTER_ADDR to it .* or .*torchrun"),
        (OPEN_MPI, "without MASTER_ADDR: .*`mpirun -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=29500 "),
        (HYDRA, "without MASTER_ADDR: .*`mpiexec -genv MASTER_ADDR HOST_OF_RANK_0 -genv MASTER_PORT 29500 "),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_RANK = 3, OMPI_COMM_WORLD_SIZE = 3"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE = not set"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK = 0: .*unset PMIX_RANK"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID = 8, SLURM_STEP_NUM_TASKS = 8"),
    ],
)
def test_what_cannot_be_right_is_refused_in_one_line(env, words):
    with pytest.raises(UserError, match=words) as refused:
        read_ranks(env)
    message = str(refused.value)
    assert "\n" not in message and ("start it as `" in message or "give another" in message)


def test_the_libraries_read_torchs_names():
    env = dict(SRUN)
    adopt_ranks(env)
    assert {name: env[name] for name in TORCHRUN} == {
        **TORCHRUN,
        "MASTER_ADDR": "node-03",
        "MASTER_PORT": str(read_ranks(SRUN).master_port),
    }
    alone: dict[str, str] = {}
    adopt_ranks(alone)
    assert not alone


@pytest.mark.parametrize(
    ("env", "command"),
    [
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, "`python "),
        (TORCHRUN, "`env -u RANK -u WORLD_SIZE -u LOCAL_RANK python "),
        (SRUN, "`srun -n 1 python "),
        (OPEN_MPI | ADDRESS, "`python "),
    ],
)
def test_a_program_for_one_process_names_the_command(env, command):
    with pytest.raises(
        UserError, match=rf"report\.py works in one process, and this is rank 3 of 8.*{command}"
    ):
        refuse_ranks("report.py", env)


def test_an_allocation_whose_tasks_nobody_started_is_pointed_out():
    assert "allocation of 8 tasks" in unused_tasks(BATCH_SCRIPT) and "`srun python " in unused_tasks(
        BATCH_SCRIPT
    )
    for env in ({}, SRUN, BATCH_SCRIPT | TORCHRUN, BATCH_SCRIPT | OPEN_MPI, {"SLURM_NTASKS": "1"}):
        assert unused_tasks(env) is None
