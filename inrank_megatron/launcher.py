"""What the launcher (`deepspeed`, `torchrun`) tells a process through its environment. Imports nothing
heavy.
"""

import os


def launcher_ranks() -> tuple[int, int]:
    """``(rank, world_size)`` of this process; 0 and 1 without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
