"""The load generator's own HTTP client, against a server that says what it is told to, in pieces."""

from __future__ import annotations

import socket
import threading

import pytest
from support.errors import one_line

from stca.errors import UsageError
from stca.load.connection import Connection, SpeaksOtherwiseError

PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 429 Too Many\r\nTransfer-Encoding:  chunked\r\nRetry-After: 1\r\n\r\n"
    b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nTrailer: z\r\n\r\n"
)


@pytest.fixture
def serve():
    """A server that answers the n-th request of each connection with the n-th of what it is given, and then closes."""
    heard: list[bytes] = []
    all_listening = []

    def run(answers, pieces=1 << 16):
        listening = socket.create_server(("127.0.0.1", 0))
        all_listening.append(listening)

        def answer():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    for text in answers:
                        heard.append(connection.recv(1 << 16))
                        for i in range(0, len(text), pieces):
                            connection.sendall(text[i : i + pieces])

        threading.Thread(target=answer, daemon=True).start()
        return Connection(*listening.getsockname()), heard

    yield run
    for listening in all_listening:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


@pytest.mark.parametrize("pieces", [1, 7, 1 << 16])
def test_answers_one_after_the_other(serve, pieces):
    connection, heard = serve([PLAIN, CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN], pieces)
    assert connection.ask("GET", "/a", b"", {}) == (200, PLAIN[:-5], b"hello")
    status, head, body = connection.ask("POST", "/b", b"xyz", {"A": "1"})
    assert (status, body) == (429, b"hello")
    assert b"Retry-After: 1" in head
    assert connection.ask("GET", "/c", b"", {})[::2] == (200, b"hello")
    port = connection._at[1]
    assert heard[1] == f"POST /b HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 3\r\nA: 1\r\n\r\nxyz".encode()


def test_a_closed_connection_is_opened_anew(serve):
    connection, _ = serve([PLAIN.replace(b"content-type: x", b"Connection: close")])
    for _ in range(3):
        assert connection.ask("GET", "/", b"", {})[2] == b"hello"
    connection, _ = serve([PLAIN])
    connection.ask("GET", "/", b"", {})
    with pytest.raises(OSError):  # it went without a word
        connection.ask("GET", "/", b"", {})
    assert connection.ask("GET", "/", b"", {})[0] == 200


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n\r\n",
        b"x" * 100000,
    ],
)
def test_what_is_no_answer(serve, text):
    connection, _ = serve([text])
    with pytest.raises(SpeaksOtherwiseError):
        connection.ask("GET", "/", b"", {})


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2 \t\r\n\r\nok", b"ok"),
    ],
)
def test_what_http_allows(serve, text, body):
    connection, _ = serve([text])
    for _ in range(2 if b"close" in text else 1):
        assert connection.ask("GET", "/", b"", {})[2] == body


def test_a_header_of_other_characters_is_the_callers_fault(serve):
    connection, _ = serve([PLAIN])
    with one_line(UsageError, "is no character of an HTTP header"):
        connection.ask("GET", "/", b"", {"A": "\u20ac"})
