"""The variables by which launchers of MPI tell a process its place. Imports nothing heavy."""

from dataclasses import dataclass

DEFAULT_PORT = 29500  # torch's and DeepSpeed's


@dataclass(frozen=True)
class Scheme:
    """The variables of one launcher; ``address``: how it is given the one of rank 0."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    address: str


MPI = (
    Scheme(
        "mpirun of Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        f"mpirun -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT={DEFAULT_PORT}",
    ),
    Scheme(
        "mpirun of MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        f"mpirun -genv MASTER_ADDR HOST_OF_RANK_0 -genv MASTER_PORT {DEFAULT_PORT}",
    ),
    Scheme(
        "mpiexec",  # of MPICH and Intel MPI
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        f"mpiexec -genv MASTER_ADDR HOST_OF_RANK_0 -genv MASTER_PORT {DEFAULT_PORT}",
    ),
)
