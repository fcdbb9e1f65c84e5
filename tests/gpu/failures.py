"""What a case says that did not come to its end."""

import itertools
from pathlib import Path

LINES = 12
LAUNCHER = "torch/distributed/elastic/"
"""In every line that torchrun writes once a rank has failed, before a screenful of its own."""


class CaseFailure(Exception):
    """Why a case has no figures.

    Args:
        state: ``failed`` (an error was raised), ``crashed`` (a process died), ``hung``, or ``skipped`` (the
            machine lacks something, and the text says what).
    """

    def __init__(self, state: str, text: str):
        super().__init__(text)
        self.state, self.text = state, text


def last_lines(log: Path | str) -> str:
    """The end of what was printed, of a file or as it is, without what a launcher says of it."""
    text = log.read_text(encoding="utf-8", errors="replace") if isinstance(log, Path) else log
    lines = text.strip().splitlines()
    own = list(itertools.takewhile(lambda line: LAUNCHER not in line, lines))
    return "\n".join((own or lines)[-LINES:])
