"""What a server that is full tells, before it reads bodies, and the connections on which it does."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.serving import INFER, Running, body_of, running, some

from stca.serve.work import Call


@contextlib.contextmanager
def full(server: Running) -> Iterator[None]:
    """All places are taken."""
    work, places = server.server.serving.work, contextlib.ExitStack()

    async def take() -> None:
        for _ in range(work.limit):
            places.enter_context(work.admitted(Call()))

    async def give_back() -> None:
        places.close()

    server.call(take())
    try:
        yield
    finally:
        server.call(give_back())


TWO = "Connection: keep-alive\r\nConnection: close\r\n"
HEAD = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n"


def head_of(answer: Any) -> bytes:
    """The head of an answer, whose body is read."""
    head = b"".join(itertools.takewhile(b"\r\n".__lt__, iter(answer.readline, b"")))
    answer.read(next((int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:")), 0))
    return head


def test_a_refusal_reads_no_body_and_leaves_the_connection(bundle_dir, monkeypatch):
    monkeypatch.setattr("stca.serve.http_app._SECONDS_REFUSED", 1000.0)  # whoever waits for a body fails here
    with running(bundle_dir, workers=1, queue=0) as server:
        body, size = json.dumps(body_of(some(server))).encode(), 1 << 24
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=20) as s, s.makefile("rb") as answer:
            with full(server):
                for _ in range(2):
                    s.sendall((HEAD % (size, "")).encode())
                    assert head_of(answer).startswith(b"HTTP/1.1 429 ")
                    s.sendall(b" " * size)
                s.sendall((HEAD % (size, "")).replace(f"Content-Length: {size}", "Transfer-Encoding: chunked").encode())
                assert head_of(answer).startswith(b"HTTP/1.1 429 ")
                s.sendall(b"4\r\nabcd\r\n0\r\n\r\n")
            s.sendall((HEAD % (len(body), "")).encode() + body)
            assert head_of(answer).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", ["Connection: keep-alive, Close\r\n", TWO, "Expect: 100-continue\r\n"])
def test_a_refusal_that_ends_its_connection_is_read_by_the_client(bundle_dir, more):
    with running(bundle_dir, workers=1, queue=0) as server, full(server):
        size = 1 << 24
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=20) as s, s.makefile("rb") as answer:
            s.sendall((HEAD % (size, more)).encode())
            if "Expect" not in more:
                s.sendall(b" " * size)
            assert head_of(answer).startswith(b"HTTP/1.1 429 "), "and not 100"
            if "Expect" not in more:
                assert answer.read() == b""


def test_a_refused_body_that_does_not_come_is_not_waited_for(bundle_dir):
    with (
        running(bundle_dir, workers=1, queue=0, body_seconds=0.1) as server,
        full(server),
        socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=20) as s,
        s.makefile("rb") as answer,
    ):
        s.sendall((HEAD % (100, "")).encode())
        assert head_of(answer).startswith(b"HTTP/1.1 429 ")
        s.sendall(b" ")
        assert answer.read() == b"", "the end of the connection, which the server makes"


def test_a_model_that_is_not_there_is_told_so_by_a_full_server(bundle_dir):
    with running(bundle_dir, workers=1, queue=0) as server, full(server):
        assert server.http("/v2/models/other/infer", b"{}")[0] == 404
        assert server.http(f"{INFER}/", b"{}", stca_deadline_ms="x")[0] == 307
        assert server.http("/v2/models/ranker/versions/1/infer", b"{}")[0] == 429


def test_the_rest_of_a_refused_body_begins_no_wait_for_the_next_request(bundle_dir):
    """A client's pool keeps the connection for as long as after any answer."""
    with running(bundle_dir, workers=1, queue=0, body_seconds=1.0) as server:
        body = json.dumps(body_of(some(server))).encode()
        with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=20) as s, s.makefile("rb") as answer:
            with full(server):
                s.sendall((HEAD % (8, "")).encode())
                assert head_of(answer).startswith(b"HTTP/1.1 429 ")
                s.sendall(b"    ")
                time.sleep(0.1)
                s.sendall(b"    ")
            time.sleep(1.5)
            s.sendall((HEAD % (len(body), "")).encode() + body)
            assert head_of(answer).startswith(b"HTTP/1.1 200 ")
