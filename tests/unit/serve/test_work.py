"""Overload, deadlines, clients that go away, the end of a server: requests are computed, or told why not."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from support.serving import DATATYPES, INFER, Held, Running, body_of, running, some

from stca.errors import DeadlineError, EngineError
from stca.runtime import Request
from stca.serve.errors import OverloadedError, UnavailableError
from stca.serve.messages import SERVICE, message
from stca.serve.server import Server, serve
from stca.serve.settings import Settings
from stca.serve.work import Call, Work


@pytest.fixture
def held(bundle_dir) -> Iterator[tuple[Running, Held]]:
    """A server of one worker and two places to wait, whose scores wait."""
    with running(bundle_dir, workers=1, queue=2, batch_tokens=0) as made:
        made.served.loaded = session = Held(made.served.loaded)
        try:
            yield made, session
        finally:
            session.go.set()


def test_a_long_queue_is_not_as_many_threads():
    for workers, queue, threads in ((1, 2, 3), (2, 1 << 20, 256), (300, 1 << 20, 300)):
        work = Work(workers, queue, gathered=True)
        assert (work.limit, work._pool._max_workers) == (workers + queue, threads)
        work.close()


def test_a_job_that_comes_after_the_end_is_told_so():
    async def late() -> None:
        work = Work(1, 1)
        work.open = True
        with work.admitted(Call()) as ticket:
            work.close()
            with pytest.raises(UnavailableError, match="the server ends"):
                await work.run(ticket, Call(), lambda: None, asyncio.sleep(0))
        assert work.admitted_now == 0

    asyncio.run(late())


def test_the_wait_to_expect_is_the_time_between_ends_for_each_request_that_is_here(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("stca.serve.work.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def some_work() -> None:
        work = Work(2, 6, gathered=True)
        work.open = True

        async def run(together: int, seconds: float) -> None:
            """Jobs of one run, which end at once."""
            go = threading.Event()
            with contextlib.ExitStack() as places:
                made = [
                    asyncio.ensure_future(work.run(places.enter_context(work.admitted(Call())), Call(), go.wait, None))
                    for _ in range(together)
                ]
                await asyncio.sleep(0)
                now[0] += seconds
                go.set()
                await asyncio.gather(*made)
            while work._jobs:
                await asyncio.sleep(0)

        await run(1, 0.5)
        now[0] += 100.0  # nothing came
        with work.admitted(Call()):
            assert work.wait == 0.0, "a worker is free"
            with work.admitted(Call()):
                assert work.wait == pytest.approx(2 * 0.25), "of two at a time, if one takes half a second"
                for _ in range(20):
                    await run(4, 2.0)
                assert work.wait == pytest.approx(2 * 2.0 / 4, rel=0.01), "not of the last one that ended"
                assert work.refusal(None) is work.refusal(2.1) is None, (
                    "a second of waiting, and one on one of two workers"
                )
                refused = work.refusal(1.9)
                assert isinstance(refused, OverloadedError)
                assert (refused.retry_after, work.refused_early) == (1, 1)
                assert "would take 2 s, and the deadline is in 1.9 s" in str(refused)
                with work.admitted(Call()) as place, pytest.raises(DeadlineError):
                    await work.run(place, Call(0.0), lambda: None, None)
                while work._jobs:
                    await asyncio.sleep(0)
                assert work.wait == pytest.approx(2 * 0.5, rel=0.01), "not of one that nobody waited for"
                assert isinstance(work.refusal(0.0), DeadlineError)
                work.open = False
                assert isinstance(work.refusal(0.0), UnavailableError)
        work.close()

    asyncio.run(some_work())


def test_jobs_that_ran_alone_say_nothing_of_a_queue(monkeypatch):
    """After light load, a burst that could be served in time is."""
    now = [0.0]
    monkeypatch.setattr("stca.serve.work.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def burst() -> None:
        work = Work(8, 64)
        work.open = True
        for _ in range(100):
            with work.admitted(Call()) as place:
                made = asyncio.ensure_future(work.run(place, Call(), lambda: None, None))
                await asyncio.sleep(0)
                now[0] += 0.005
                await made
            while work._jobs:
                await asyncio.sleep(0)
        with contextlib.ExitStack() as places:
            for _ in range(40):
                places.enter_context(work.admitted(Call()))
            assert work.refusal(0.05) is None, "40 jobs of 5 ms on 8 workers, and one more"
            assert work.refusal(0.02) is not None
        work.close()

    asyncio.run(burst())


def until(true: Any) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def message_of(inputs: dict[str, Any]) -> bytes:
    made = message("ModelInferRequest")(model_name="ranker")
    for name, x in inputs.items():
        made.inputs.add(name=name, datatype=DATATYPES[x.dtype.name], shape=x.shape)
        made.raw_input_contents.append(x.tobytes())
    return bytes(made.SerializeToString())


def test_more_than_the_queue_takes_is_refused_at_once_and_the_rest_served(held):
    server, session = held
    inputs, work = some(server), server.server.serving.work
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(server.infer, inputs) for _ in range(3)]
        until(lambda: work.admitted_now == 3)
        status, headers, told = server.infer(inputs)
        assert (status, told["code"]) == (429, "overloaded")
        assert int(headers["Retry-After"]) >= 1
        with (
            grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/{SERVICE}/ModelInfer")(message_of(inputs), timeout=20)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {"stca-code", "retry-after"} <= {k for k, _ in caught.value.trailing_metadata()}
        assert server.http("/v2/health/ready")[0] == 200  # which no queue delays
        session.go.set()
        assert [w.result()[0] for w in waiting] == [200, 200, 200]
    until(lambda: work.admitted_now == 0)
    assert server.infer(inputs)[0] == 200


def test_a_request_whose_deadline_is_sooner_than_its_turn_is_refused_at_once(held):
    server, session = held
    inputs, work = some(server), server.server.serving.work
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.infer, inputs)
        assert session.began.acquire(timeout=10)
        work._worked, work._ends = 100.0, 1.0
        for told, code, said in ((b"50", 429, "the deadline is in 0.05 s"), (b"0", 504, "deadline passed before the")):
            status, headers, text = server.http(INFER, b"no JSON", stca_deadline_ms=told.decode())
            assert (status, said in text["error"]) == (code, True)
            assert headers["Retry-After"] == ("100" if code == 429 else None)
        with (
            grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/{SERVICE}/ModelInfer")(b"no message", timeout=20)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        text = server.http("/metrics")[2].decode()
        assert "stca_refused_early_total 2.0" in text
        assert "stca_expected_wait_seconds 100.0" in text
        assert 'stca_requests_total{code="overloaded",model="ranker",protocol="http",version="1"} 1.0' in text
        session.go.set()
        assert first.result()[0] == 200
    until(lambda: work.admitted_now == 0)
    body = json.dumps(body_of(inputs)).encode()
    assert server.http(INFER, body, stca_deadline_ms="20000.5")[0] == 200, "nobody is before it"
    assert server.http(INFER, body, stca_deadline_ms="0")[0] == 504
    for wrong in ("-1", "nan", "1e3", "", "٣", "9" * 13):
        status, _, told = server.http(INFER, body, stca_deadline_ms=wrong.encode().decode("latin-1"))
        assert (status, told["code"], "stca-deadline-ms" in told["error"]) == (400, "bad_request", True)


def test_a_request_whose_deadline_passed_is_not_computed(held):
    server, session = held
    inputs = some(server)
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(server.infer, inputs)
        assert session.began.acquire(timeout=10)
        late = clients.submit(server.infer, inputs, deadline_ms=20)
        later = clients.submit(server.infer, inputs, timeout=20_000)
        until(lambda: server.server.serving.work.admitted_now == 3)
        time.sleep(0.05)
        session.go.set()
        assert first.result()[0] == 200
        for one in (late, later):
            status, _, told = one.result()
            assert (status, told["code"]) == (504, "deadline")
    assert session.calls == 1


def test_a_client_that_goes_away_takes_its_work_along(held):
    server, session = held
    inputs = some(server)
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.infer, inputs)
        assert session.began.acquire(timeout=10)
        connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"])
        connection.request("POST", "/v2/models/ranker/infer", json.dumps(body_of(inputs)))
        until(lambda: server.server.serving.work.admitted_now == 2)
        with grpc.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(message_of(inputs))
            until(lambda: server.server.serving.work.admitted_now == 3)
            connection.close()
            call.cancel()
            until(lambda: server.server.serving.work.admitted_now == 1)
        session.go.set()
        assert first.result()[0] == 200
    assert session.calls == 1
    text = server.http("/metrics")[2].decode()
    assert text.count('code="cancelled"') == 2


def test_draining_tells_that_it_is_not_ready_and_finishes_what_runs(held):
    server, session = held
    inputs = some(server)
    with ThreadPoolExecutor(2) as clients:
        running_ = clients.submit(server.infer, inputs)
        assert session.began.acquire(timeout=10)
        ended = clients.submit(server.stop)
        until(lambda: not server.server.serving.work.open)
        assert server.http("/v2/health/live")[0] == 200
        assert server.http("/v2/health/ready")[0] == 503
        assert server.http("/v2/models/ranker/ready")[0] == 503
        status, headers, told = server.infer(inputs)
        assert (status, told["code"]) == (503, "unavailable")
        assert headers["Retry-After"]
        session.go.set()
        assert running_.result()[0] == 200
        assert ended.result()
    with pytest.raises(ConnectionRefusedError):
        server.http("/v2/health/live")


def test_a_drain_that_takes_too_long_closes_the_sessions_in_which_nothing_runs(bundle_dir, tmp_path):
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
    models = {"stuck": str(bundle_dir), "idle": str(bundle_dir)}
    files = {"state_folder": str(tmp_path)}
    server = Running(
        Settings(models=models, threads=1, workers=2, batch_tokens=0, drain_seconds=0.05, **ports, **files)
    )
    stuck, idle = server.served, server.server.serving.models.find("idle")
    session = idle.session
    stuck.loaded = held = Held(stuck.loaded)
    with ThreadPoolExecutor(1) as clients:
        clients.submit(server.infer, some(server))
        assert held.began.acquire(timeout=10)
        assert session.warm("ann", some(server), version=1)
        assert not server.stop()
        with pytest.raises(EngineError, match="the session is closed"):
            idle.session.forget("ann")
        assert len(list(tmp_path.rglob("*.state"))) == 1, "it was written"
        assert not stuck.session.forget("ann"), "something runs in it"
        held.go.set()


def test_a_server_says_that_not_all_was_finished_and_leaves_the_process_alone(bundle_dir):
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
    places = contextlib.ExitStack()

    def ready(server: Server) -> None:
        places.enter_context(server.serving.work.admitted(Call()))
        signal.raise_signal(signal.SIGTERM)

    made = Settings(models={"m": str(bundle_dir)}, threads=1, drain_seconds=0.05, **ports)
    assert asyncio.run(serve(made, ready)) is False


def test_what_an_http_server_failed_of_is_told(bundle_dir):
    with running(bundle_dir) as made:
        session = made.served.session

        async def fail() -> None:
            raise ZeroDivisionError

        async def failing() -> None:
            made.server._http.append((made.server._http[0][0], asyncio.ensure_future(fail())))
            await made.server.drain()

        with pytest.raises(ZeroDivisionError):
            made.call(failing())
        with pytest.raises(EngineError, match="the session is closed"):
            session.forget("ann")
        made.loop.call_soon_threadsafe(made.loop.stop)
        made.thread.join(10)


def test_an_engine_that_fails_is_told_and_a_bug_is_hidden_from_clients(held, caplog):
    server, session = held
    session.go.set()
    inputs = some(server)

    def broken(_: Request, **more: Any) -> Any:
        raise ZeroDivisionError("ann's secret")

    session.answer = broken  # type: ignore[method-assign]
    status, _, told = server.infer(inputs)
    assert (status, told["code"]) == (500, "internal")
    assert "secret" not in json.dumps(told)
    del session.answer
    assert server.infer(inputs)[0] == 200


def test_a_swap_under_traffic_fails_no_request_and_mixes_no_scores(bundle_dir, other_weights):
    with running(bundle_dir) as server:
        inputs, stop = some(server), threading.Event()
        found: list[list[float]] = []

        def ask(user: int) -> None:
            while not stop.is_set():
                status, _, told = server.infer(inputs, user=user, version=1)
                assert status == 200
                found.append(told["outputs"][0]["data"])

        with ThreadPoolExecutor(3) as clients:
            asking = [clients.submit(ask, user) for user in range(2)]
            for bundle in (other_weights, bundle_dir, other_weights):
                swap = {"parameters": {"bundle": str(bundle)}}
                status, _, told = server.http("/v2/models/ranker/swap", swap, port="admin")
                assert (status, set(told)) == (200, {"weights"})
                count = len(found)
                until(lambda count=count: len(found) > count + 4)
            stop.set()
            [a.result() for a in asking]
        now = np.ravel(server.served.session.score(Request(inputs)))
        server.served.session.swap(bundle_dir)
        before = np.ravel(server.served.session.score(Request(inputs)))
        which = {int(np.argmin([np.abs(f - before).max(), np.abs(f - now).max()])) for f in found}
        assert which == {0, 1}
        assert all(min(np.abs(f - before).max(), np.abs(f - now).max()) < 1e-5 for f in found)
