"""Ports for ranks to meet at."""

import random
import socket


def free_port() -> int:
    """A TCP port of this machine that nobody listens on, below those that outgoing connections are given."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)) != 0:
                return port
