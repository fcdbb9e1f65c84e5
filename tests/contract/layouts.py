"""How the ranks of a training share its work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Data-parallel over what tensor parallelism leaves of ``world_size``.

    ``separate_collectives``: factors next to W0 stay in rank space, which these small layers would not
        choose.
    """

    world_size: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = True
    separate_collectives: bool = False

    @property
    def data_parallel(self) -> int:
        return self.world_size // self.tensor_parallel


LAYOUTS = {
    "TP1 DP1": Layout(),
    "TP2 SP": Layout(2, 2),
    "TP2 without SP": Layout(2, 2, sequence_parallel=False),
    "DP2": Layout(2, 1),
    "TP2 SP DP2": Layout(4, 2),
    "TP2 SP separate": Layout(2, 2, separate_collectives=True),
    "TP4 SP": Layout(4, 4),
}
