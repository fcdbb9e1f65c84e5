"""A connection that sends and receives messages, one per line, and waits for neither."""

import json
import socket

MOST_BYTES = 2**16  # of a line: a stranger may send anything
MOST_IDLE = 2**15 - 1  # seconds between probes, the kernel's limit


class Lines:
    """A connected socket. The system finds out that the other host is gone.

    Args:
        silence: within how many seconds it does.
        rank: whose it is; None until that is known.
    """

    def __init__(self, connection: socket.socket, *, silence: float, rank: int | None = None):
        self.rank = rank
        self._connection = connection
        self._came, self._goes = b"", b""
        self._fault: OSError | None = None
        interval = min(MOST_IDLE, max(1, int(silence / 6)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, interval),
            (socket.TCP_KEEPINTVL, interval),
            (socket.TCP_KEEPCNT, 5),
            (socket.TCP_USER_TIMEOUT, round(1000 * silence)),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict, *, urgent: bool = False) -> None:
        """Hand over to the system. As long as that does not take an earlier message, one that is not
        ``urgent`` is dropped. A fault shows in :meth:`receive`.
        """
        if urgent or not self._goes:
            self._goes += json.dumps(message).encode() + b"\n"
        try:
            sent = self._connection.send(self._goes, socket.MSG_DONTWAIT)
            self._goes = self._goes[sent:]
        except BlockingIOError:
            return
        except OSError as error:
            self._fault = error

    def receive(self) -> list[dict] | None:
        """The messages that have come, when there is something to read; None at the end of the connection.

        Raises:
            OSError: the connection is lost.
        """
        received = self._connection.recv(4096)
        if not received:
            if isinstance(self._fault, TimeoutError):
                raise self._fault
            return None
        *whole, self._came = (self._came + received).split(b"\n")
        if len(self._came) > MOST_BYTES:
            return None
        return [message for message in map(_message, whole) if message is not None]


def _message(line: bytes) -> dict | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
