"""Connections that send lines, at every silence that the settings allow."""

import socket

import pytest

from inrank_megatron.distributed.lines import Lines


@pytest.fixture
def pair():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        yield one, other


@pytest.mark.parametrize("silence", [2.5, 30.0, 5e5])
def test_what_one_sends_the_other_receives_whole(pair, silence):
    one, other = (Lines(connection, silence=silence) for connection in pair)
    one.send({"lost": "rank 1"})
    one.send({"rank": 2})
    assert other.receive() == [{"lost": "rank 1"}, {"rank": 2}]


def test_the_end_and_what_is_no_message(pair):
    lines = Lines(pair[1], silence=30.0)
    pair[0].sendall(b'GET / HTTP/1.1\n[1]\n{"rank": 1}\n{"ra')
    assert lines.receive() == [{"rank": 1}]
    pair[0].sendall(b'nk": 2}\n')
    assert lines.receive() == [{"rank": 2}]
    pair[0].close()
    assert lines.receive() is None
