"""A small process next to a rank, which ends it when it gives no sign of life: ``guard.py PID SECONDS WHOSE``

A stopped process can neither end itself nor be told to. The rank writes to this one's standard input now and
then, and its end closes it. Seconds are those in which this process itself runs, so that a job which is
suspended as a whole, this process with it, goes on.
"""

import os
import select
import signal
import sys

TICK_SECONDS = 1.0
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(rank: int, seconds: float, whose: str) -> None:
    """Until the rank ends, or is ended from here."""
    for number in IGNORED:  # which are the rank's to answer
        signal.signal(number, signal.SIG_IGN)
    silent, tick = 0.0, min(TICK_SECONDS, seconds / 4)
    while os.getppid() == rank:
        if select.select([0], [], [], tick)[0]:
            if not os.read(0, 4096):
                return
            silent = 0.0
            continue
        silent += tick
        if silent >= seconds:
            print(
                f"{whose}: error: it was stopped, or held up, for {seconds:g} s, and is ended; continue with "
                "--resume auto",
                file=sys.stderr,
            )
            os.kill(rank, signal.SIGKILL)
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
