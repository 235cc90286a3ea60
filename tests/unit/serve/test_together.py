"""Requests that find no processor free are computed together, and the server tells how many were."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.serving import Running, running

from stca import probe
from stca.runtime import Request
from stca.runtime.machine import processors
from stca.runtime.model import Model


class Gate:
    """Lets scores wait until they are let go."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, score: Any) -> Any:
        def held(*given: Any) -> Any:
            self.began.set()
            assert self.go.wait(20)
            return score(*given)

        return held


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    for name in ("score", "score_one"):  # a lone request has a way of its own
        monkeypatch.setattr(Model, name, made(getattr(Model, name)))
    yield made
    made.go.set()


@pytest.fixture
def server(bundle_dir: Any, gate: Gate) -> Iterator[Running]:
    with running(bundle_dir, workers=1, threads=processors(), queue=4) as made:
        yield made


def asked(server: Running, seed: int) -> dict[str, Any]:
    specs = server.served.session.manifest.graphs["request"].inputs
    return probe.single(specs, 5, 3, np.random.default_rng(seed))


def gathered(server: Running, count: int) -> None:
    batcher = server.served.session._batcher
    for _ in range(2000):
        if sum(len(batch.items) for batch in list(batcher._small.waiting)) == count:
            return
        time.sleep(0.005)
    raise AssertionError("they were not gathered")


def test_those_who_wait_are_computed_together(server, gate):
    inputs = [asked(server, seed) for seed in range(5)]
    with ThreadPoolExecutor(6) as clients:
        first = clients.submit(server.infer, inputs[0], user="u0", version=1)
        assert gate.began.wait(20)
        rest = [clients.submit(server.infer, x, user=f"u{i}", version=1) for i, x in enumerate(inputs[1:4], 1)]
        gathered(server, 3)
        late = clients.submit(server.infer, inputs[4], deadline_ms=50)
        assert (late.result()[0], late.result()[2]["code"]) == (504, "deadline")
        gathered(server, 3)
        gate.go.set()
        answers = [call.result() for call in (first, *rest)]
    for x, (status, _, told) in zip(inputs, answers, strict=False):
        assert status == 200
        expected = server.served.session.score(Request(x))
        np.testing.assert_allclose(np.reshape(told["outputs"][0]["data"], expected.shape), expected, 1e-5, 1e-6)
    (told,) = server.http("/v2/models/ranker/stats")[2]["model_stats"]
    sizes = {of["batch_size"]: of["compute_infer"]["count"] for of in told["batch_stats"]}
    assert sizes[3] == 1, "three were one run"
    assert told["inference_count"] == 4
    assert told["execution_count"] == sum(sizes.values())
    text = server.http("/metrics")[2].decode()
    assert 'stca_batch_requests_bucket{le="4",model="ranker",version="1"}' in text
    (counted,) = [line for line in text.splitlines() if line.startswith("stca_batch_requests_sum{")]
    assert float(counted.split()[-1]) == sum(size * n for size, n in sizes.items())


def test_waiting_to_be_computed_is_no_computing(server, gate):
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.infer, asked(server, 0))
        assert gate.began.wait(20)
        second = clients.submit(server.infer, asked(server, 1))
        gathered(server, 1)
        began = time.monotonic()
        time.sleep(0.2)
        waited = time.monotonic() - began
        gate.go.set()
        assert [call.result()[0] for call in (first, second)] == [200, 200]
    (told,) = server.http("/v2/models/ranker/stats")[2]["model_stats"]
    assert told["inference_stats"]["queue"]["ns"] >= waited * 1e9


def test_places_for_those_who_wait_are_bounded(server, gate):
    work = server.server.serving.work
    with ThreadPoolExecutor(6) as clients:
        calls = [clients.submit(server.infer, asked(server, seed)) for seed in range(5)]
        gathered(server, 4)
        assert work.admitted_now == work.limit == 5
        status, headers, told = server.infer(asked(server, 9))
        assert (status, told["code"]) == (429, "overloaded")
        assert int(headers["Retry-After"]) >= 1
        gate.go.set()
        assert [call.result()[0] for call in calls] == [200] * 5


def test_batches_can_be_switched_off(bundle_dir):
    with running(bundle_dir, batch_tokens=0) as made:
        assert made.infer(asked(made, 0))[0] == 200
        (told,) = made.http("/v2/models/ranker/stats")[2]["model_stats"]
        assert json.dumps(told["batch_stats"]) == "[]"
        assert told["execution_count"] == 1
