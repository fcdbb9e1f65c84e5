"""What the installed torch is, and whether it computes on this machine's GPUs.

.venv/bin/python -m launch.torch_probe      JSON, for :func:`installed`
"""

import json
import subprocess
import sys
from dataclasses import dataclass

_SECONDS = 300


@dataclass(frozen=True)
class Torch:
    """The installed torch; ``fault`` is why it cannot compute on the GPUs, or be imported at all."""

    version: str = ""
    cuda: str | None = None
    cards: int = 0
    fault: str = ""


def installed() -> Torch:
    """The torch of this environment, as a process of its own finds it."""
    command = [sys.executable, "-m", "launch.torch_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Torch(fault=f"torch gives no answer in {_SECONDS} s")
    if done.returncode == 0:
        return Torch(**json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Torch(fault=f"torch cannot be imported: {last}")


def probe() -> None:
    """Print what the installed torch is and whether it computes on every GPU that it sees."""
    import torch

    cards, fault = 0, ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()  # says why, where `is_available` is false
            cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
            fault = "" if cards else "it finds no GPU"
            for card in range(cards):
                square = torch.ones(64, 64, device=f"cuda:{card}")
                if float((square @ square).sum()) != 64**3:
                    fault = f"GPU {card} computes wrong products"
        except Exception as error:
            fault = str(error).splitlines()[0].rstrip(".")
    if fault:
        fault = f"torch {torch.__version__} ({' '.join(torch.cuda.get_arch_list())}): {fault}"
    print(json.dumps(vars(Torch(torch.__version__, torch.version.cuda, cards, fault))))


if __name__ == "__main__":
    probe()
