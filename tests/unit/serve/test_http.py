"""The Open Inference Protocol over HTTP: what Triton's client sends, and what nobody should."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import logging
import resource
import socket
import zlib
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import uvicorn
from support.serving import DATATYPES, INFER, Running, body_of, running
from uvicorn.server import ServerState

from stca.runtime import Request
from stca.serve import server as server_module
from stca.serve.connections import Connection, most_connections
from stca.serve.http_body import HEADER_LENGTH
from stca.serve.log import Seldom
from stca.serve.server import _bound


def targets_alone(server: Running, inputs: dict[str, Any]) -> dict[str, Any]:
    specs = server.served.session.manifest.graphs["request"].inputs
    return {s.name: inputs[s.name] for s in specs if s.scope != "user" and s.name in inputs}


def test_scores_are_the_sessions(server, asked):
    inputs = asked()
    status, _, told = server.infer(inputs)
    assert status == 200
    (scores,) = told["outputs"]
    assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [3, 2])
    np.testing.assert_allclose(np.reshape(scores["data"], (3, 2)), server.served.session.score(Request(inputs)), 1e-6)


def test_a_hit_needs_no_history_and_a_miss_says_so(server, asked):
    inputs = asked()
    rest = targets_alone(server, inputs)
    status, _, told = server.infer(rest, user="never seen", version=1)
    assert (status, told["code"]) == (409, "history_needed")
    first = server.infer(inputs, user="ann", version=1)[2]
    again = server.infer(rest, user="ann", version=1)[2]
    assert (first["parameters"]["hit"], again["parameters"]["hit"]) == (False, True)
    assert first["outputs"] == again["outputs"]
    assert server.infer(rest, user="ann", version=2)[0] == 409


def test_states_are_changed_on_the_admin_port_alone(server, asked):
    inputs, specs = asked(), server.served.session.manifest.graphs["request"].inputs
    server.infer(inputs, user="bob", version=1)
    per_token = {s.name for s in specs if s.shape[0] == "N_h"}
    events = {n: x[:2] for n, x in inputs.items() if n in per_token}
    appended = body_of(events, user="bob", version=2, after=1)
    status, _, told = server.http("/v2/models/ranker/append", appended)
    assert (status, told["code"]) == (404, "not_found")
    assert f"send it to the admin port, http://127.0.0.1:{server.ports['admin']}" in told["error"]
    assert server.http("/v2/models/ranker/append", appended, port="admin")[2] == {"kept": True}
    longer = {n: np.concatenate([x, events[n]]) if n in events else x for n, x in inputs.items()}
    hit = server.infer(targets_alone(server, inputs), user="bob", version=2)[2]
    assert hit["parameters"]["hit"]
    np.testing.assert_allclose(
        np.reshape(hit["outputs"][0]["data"], (3, 2)), server.served.session.score(Request(longer)), 2e-5
    )
    amended = body_of(events, user="bob", version=3, after=2, at=-2)
    assert server.http("/v2/models/ranker/amend", amended, port="admin")[2] == {"kept": True}
    status, _, told = server.http("/v2/models/ranker/amend", body_of(events, user="bob", version=4), port="admin")
    assert (status, told["error"][:28]) == (400, "parameters: misses 'at', the")
    gone = {"parameters": {"user": "bob"}}
    where = server.http("/v2/models/ranker/residence", {"parameters": {"user": "bob", "version": 3}}, port="admin")[2]
    assert where == dataclasses.asdict(server.served.session.residence("bob", 3))
    assert (where["tier"], where["version"]) == ("memory", 3)
    where = server.http("/v2/models/ranker/residence", {"parameters": {"user": "bob", "version": 2}}, port="admin")[2]
    assert where == {"tier": None, "bytes": 0, "version": None}
    assert server.http("/v2/models/ranker/forget", gone, port="admin")[2] == {"forgotten": True}
    assert server.http("/v2/models/ranker/forget", gone, port="admin")[2] == {"forgotten": False}
    once = {n: x for n, x in inputs.items() if n not in targets_alone(server, inputs)}
    warmed = server.http("/v2/models/ranker/warm", body_of(once, user="dora", version=4), port="admin")
    assert warmed[2] == {"kept": True}
    assert server.infer(targets_alone(server, inputs), user="dora", version=4)[2]["parameters"]["hit"]
    assert server.http("/v2/models/ranker/swap", {}, port="admin")[2]["code"] == "bad_request"
    nowhere = server.http("/v2/models/ranker/swap", {"parameters": {"bundle": "/nowhere"}}, port="admin")
    assert (nowhere[0], nowhere[2]["code"]) == (422, "bad_bundle")


def test_tritons_client_over_http(server, asked):
    client_of = pytest.importorskip("tritonclient.http")
    client = client_of.InferenceServerClient(f"127.0.0.1:{server.ports['http']}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ranker")
    assert client.get_server_metadata()["name"] == "stca"
    names = [i["name"] for i in client.get_model_metadata("ranker")["inputs"]]
    inputs = asked()
    assert set(names) == set(inputs)
    assert client.get_model_config("ranker")["max_batch_size"] == 0
    assert client.get_model_repository_index()[0]["state"] == "READY"
    wanted = server.served.session.score(Request(inputs))
    before = client.get_inference_statistics("ranker")["model_stats"][0]["inference_count"]
    for binary_in in (True, False):
        for outputs in (
            None,
            [client_of.InferRequestedOutput("scores", binary_data=True)],
            [client_of.InferRequestedOutput("scores", binary_data=False)],
        ):
            for packed in (None, "gzip", "deflate"):
                sent = []
                for name, x in inputs.items():
                    sent.append(client_of.InferInput(name, list(x.shape), DATATYPES[x.dtype.name]))
                    sent[-1].set_data_from_numpy(x, binary_data=binary_in)
                got = client.infer(
                    "ranker",
                    sent,
                    request_id="7",
                    outputs=outputs,
                    request_compression_algorithm=packed,
                    parameters={"user": "triton"},
                )
                assert got.get_response()["id"] == "7"
                np.testing.assert_allclose(got.as_numpy("scores"), wanted, 1e-6)
    after = client.get_inference_statistics()["model_stats"][0]["inference_count"]
    assert after == before + 18
    client.close()


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats"])
def test_models_and_versions_that_are_not_there(server, path):
    assert server.http(f"/v2/models/ranker/versions/1{path}")[0] == 200
    for missing in (f"/v2/models/other{path}", f"/v2/models/ranker/versions/7{path}"):
        status, _, told = server.http(missing)
        assert (status, told["code"]) == (404, "not_found")
        assert "ranker" in told["error"] or "1" in told["error"]


def test_metrics_are_named_and_count(server, asked):
    server.infer(asked(), user="carl", version=1)
    for port in ("http", "admin"):
        text = server.http("/metrics", port=port)[2].decode()
        names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        assert names
        assert all(n.startswith("stca_") for n in names)
        assert {"stca_requests_total", "stca_request_seconds_sum", "stca_state_misses_total", "stca_ready"} <= names
    assert 'stca_state_misses_for_total{kind="new_user",model="ranker",version="1"}' in text
    assert 'stca_requests_total{code="ok",model="ranker",protocol="http",version="1"}' in text


def body(*inputs: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **more}


def one(**changes: Any) -> dict[str, Any]:
    return {"name": "target_item", "shape": [2], "datatype": "INT64", "data": [1, 2], **changes}


HOSTILE: dict[str, Any] = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "many small inputs": b'{"inputs":[' + b"{}," * 500_000 + b"{}]}",
    "deep": b"[" * 100_000,
    "deep data": b'{"inputs":[{"name":"a","shape":[1],"datatype":"INT64","data":' + b"[" * 900 + b"]" * 900 + b"}]}",
    "deep parameters": b'{"parameters":{"user":' + b"[" * 900 + b"]" * 900 + b"}}",
    "a name twice": b'{"id": "a", "id": "b"}',
    "not a number": b'{"parameters": {"deadline_ms": NaN}}',
    "a number of 5,000 digits": b'{"parameters": {"deadline_ms": ' + b"9" * 5000 + b"}}",
    "an integer beyond any float": body(one(), parameters={"deadline_ms": 10**400}),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a flag of text": body(one(), parameters={"binary_data_output": "yes"}),
    "an output's flag of text": body(one(), outputs=[{"name": "scores", "parameters": {"binary_data": 1}}]),
    "an input twice": body(one(), one()),
    "an unknown input": body(one(name="nobody's\n\x00")),
    "an unknown field": body(one(extra=1)),
    "an unknown parameter": body(one(), parameters={"usr": "ann"}),
    "an unknown output": body(one(), outputs=[{"name": "other"}]),
    "shared memory": body(one(data=None, parameters={"shared_memory_region": "r"})),
    "a class asked": body(one(), outputs=[{"name": "scores", "parameters": {"classification": 3}}]),
    "a datatype of text": body(one(datatype="BYTES", data=["a", "b"])),
    "no such datatype": body(one(datatype="INT65")),
    "a huge dimension": body(one(shape=[1 << 40])),
    "a product that overflows": body(one(shape=[1 << 32, 1 << 32, 1 << 32])),
    "a negative dimension": body(one(shape=[-1])),
    "many dimensions": body(one(shape=[1] * 1000)),
    "a shape of text": body(one(shape=["2"])),
    "more data than shape": body(one(shape=[1])),
    "ragged data": body(one(data=[[1], [1, 2]])),
    "text as data": body(one(data="ab")),
    "a mapping as data": body(one(data={"a": 1})),
    "floats for integers": body(one(data=[0.5, 1])),
    "a hole in the data": body(one(data=[1, None])),
    "integers beyond their type": body(one(datatype="INT8", data=[300, 1])),
    "integers beyond 64 bits": body(one(data=[1 << 70, 1])),
    "bytes that are not there": body(one(data=None, parameters={"binary_data_size": 16})),
    "a size of bytes that is none": body(one(data=None, parameters={"binary_data_size": -1})),
    "data and bytes": body(one(parameters={"binary_data_size": 0})),
    "many inputs": body(*(one(name=f"x{i}") for i in range(2000))),
    "a user that is no label": body(one(), parameters={"user": [1]}),
    "an id that is no text": body(one(), id=7),
    "nothing": body(),
}


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bodies_are_refused_in_one_line(server, sent):
    status, _, told = server.http(INFER, sent)
    assert (status, told["code"]) == (400, "bad_request")
    assert "\n" not in told["error"]
    assert "unexpected" not in told["error"].lower()
    assert "sys." not in told["error"]
    for change in ("append", "amend", "warm", "swap"):
        assert 400 <= server.http(f"/v2/models/ranker/{change}", sent, port="admin")[0] < 500


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "1e3", "٣", "1"])
def test_hostile_lengths_of_the_json(server, length):
    data = json.dumps(body(one())).encode()
    request = b"POST %s HTTP/1.1\r\nHost: a\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s" % (
        INFER.encode(), HEADER_LENGTH.encode(), length.encode("latin-1", "replace"), len(data), data,
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.ports["http"])) as s:
        s.sendall(request)
        assert s.recv(100).startswith(b"HTTP/1.1 400")


def test_bodies_over_the_limit_are_told_so_before_and_after_decompression(bundle_dir, asked):
    with running(bundle_dir, body_mib=1) as small:
        large = b" " * (1 << 20) + b"{}"
        assert small.http(INFER, large)[0] == 413
        status, _, told = small.http(INFER, zlib.compress(large), Content_Encoding="deflate")
        assert (status, told["code"]) == (413, "too_large")
        assert small.http(INFER, b" " * (1 << 19))[0] == 413  # all of it JSON
        assert small.http(INFER, b"\x1f\x8bxx", Content_Encoding="gzip")[0] == 400
        assert small.http(INFER, zlib.compress(b"{}")[:-2], Content_Encoding="deflate")[0] == 400
        assert small.http(INFER, b"{}", Content_Encoding="br")[0] == 415
        chunked = b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
        with socket.create_connection(("127.0.0.1", small.ports["http"])) as s:
            s.sendall(chunked + (b"80000\r\n" + b" " * 0x80000 + b"\r\n") * 3 + b"0\r\n\r\n")
            assert s.recv(100).startswith(b"HTTP/1.1 413")
        assert small.infer(asked())[0] == 200


def test_a_request_that_does_not_begin_is_not_waited_for(bundle_dir, asked):
    with running(bundle_dir, body_seconds=0.1) as hurried:
        for begun in (b"", b"GET /v2 HTT"):
            with socket.create_connection(("127.0.0.1", hurried.ports["http"]), timeout=30) as s:
                s.sendall(begun)
                while s.recv(1000):  # to the end of the connection, which the server makes
                    pass
        assert hurried.infer(asked())[0] == 200


def test_silent_connections_make_room_for_others(bundle_dir, asked, monkeypatch):
    monkeypatch.setattr(server_module, "most_connections", lambda: 4)
    with running(bundle_dir) as small, contextlib.ExitStack() as stack:
        regular = http.client.HTTPConnection("127.0.0.1", small.ports["http"], timeout=30)
        stack.callback(regular.close)
        assert live_by(regular) == 200
        held = regular.sock
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", small.ports["http"]), timeout=30))
            for _ in range(8)
        ]
        assert small.infer(asked())[0] == 200
        assert silent[0].recv(1) == b""
        assert live_by(regular) == 200
        assert regular.sock is held, "one that asks now and then made room for silent ones"


def live_by(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/v2/health/live")
    with connection.getresponse() as answer:
        answer.read()
        return answer.status


def test_a_burst_leaves_no_more_connections_than_there_may_be():
    """All come in one turn of the loop, before any that made room is gone."""

    async def burst() -> list[bool]:
        config = uvicorn.Config(lambda *_: None, log_config=None)
        config.load()
        state, transports = ServerState(), [MagicMock() for _ in range(100)]
        for transport in transports:
            connection = Connection(config=config, server_state=state, app_state={}, seconds=30, most=4)
            connection.connection_made(transport)
        return [transport.abort.called for transport in transports]

    assert asyncio.run(burst()) == [True] * 96 + [False] * 4


def test_a_limit_that_cannot_be_raised_is_taken_as_it_is(monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert 16 <= most_connections() <= (1024 - 64) // 3


def test_a_lack_of_descriptors_is_told_once_a_second():
    seldom, line = Seldom(), "socket.accept() out of system resource"
    told = [logging.LogRecord("asyncio", logging.ERROR, "", 0, line, None, None) for _ in range(4)]
    for record, when in zip(told, (10.0, 10.1, 10.9, 11.2), strict=True):
        record.created = when
    assert [seldom.filter(record) for record in told] == [True, False, False, True]
    assert seldom.filter(logging.LogRecord("asyncio", logging.ERROR, "", 0, "another", None, None))


def test_a_body_that_does_not_come_is_not_waited_for(bundle_dir, asked):
    with running(bundle_dir, body_seconds=0.1) as hurried:
        with socket.create_connection(("127.0.0.1", hurried.ports["http"])) as s:
            s.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{" % INFER.encode())
            assert s.recv(100).startswith(b"HTTP/1.1 408")
        assert hurried.server.serving.work.admitted_now == 0
        assert hurried.infer(asked())[0] == 200


@pytest.mark.parametrize(
    "path", ["/", "/v2/../..", "/v2/models//infer", "/v2/models/a%00b/infer", "/%ff", "/v2?" + "a" * 9000]
)
def test_hostile_paths(server, path):
    assert server.http(path)[0] in (400, 404, 405, 200)
    assert server.http(path, b"{}")[0] in (400, 404, 405)
    assert server.http("/v2/health/live")[0] == 200


def test_no_part_of_an_answer_waits_for_the_clients_word_on_the_part_before():
    with _bound("127.0.0.1", 0, "http-port") as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
