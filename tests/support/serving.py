"""A server in this process, on free ports and a loop of its own, and a small HTTP client."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from stca import probe
from stca.serve.server import Server
from stca.serve.settings import Settings

# Where clients ask for scores.
INFER = "/v2/models/ranker/infer"


class Running:
    """A server that was started, and what tests do with it."""

    def __init__(self, settings: Settings) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.call(_made(settings))
        self.call(self.server.start())
        self.ports = self.server.ports
        self.name = next(iter(settings.models))

    def call(self, coroutine: Any) -> Any:
        """Run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def stop(self) -> bool:
        finished: bool = self.call(self.server.drain())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        return finished

    @property
    def served(self) -> Any:
        return self.server.serving.models.find(self.name)

    def http(self, path: str, body: Any = None, *, port: str = "http", **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and JSON of one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=30)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, data, named)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        told = json.loads(text) if answer.headers["content-type"] == "application/json" else text
        return answer.status, answer.headers, told

    def infer(self, inputs: dict[str, Any], **parameters: Any) -> tuple[int, Any, Any]:
        """Scores by JSON."""
        return self.http(f"/v2/models/{self.name}/infer", body_of(inputs, **parameters))


async def _made(settings: Settings) -> Server:
    return Server(settings)


DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "float64": "FP64"}


def body_of(inputs: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """A request as JSON."""
    return {
        "inputs": [
            {"name": n, "shape": list(x.shape), "datatype": DATATYPES[x.dtype.name], "data": x.tolist()}
            for n, x in inputs.items()
        ],
        "parameters": parameters,
    }


@contextmanager
def running(bundle: Path, **settings: Any) -> Iterator[Running]:
    """A server of one bundle, `ranker`."""
    ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
    made = Running(Settings(models={"ranker": str(bundle)}, **ports, **{"threads": 1, "workers": 2, **settings}))
    try:
        yield made
    finally:
        if made.thread.is_alive():
            made.stop()


class Held:
    """A session whose answers wait until they are let go."""

    def __init__(self, session: Any) -> None:
        self._session, self.go, self.began = session, threading.Event(), threading.Semaphore(0)
        self.calls = 0

    def answer(self, request: Any, **more: Any) -> Any:
        more["deadline"].check()  # as the session does before anything else
        self.calls += 1
        self.began.release()
        assert self.go.wait(20)
        return self._session.answer(request, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def some(server: Running) -> dict[str, Any]:
    """Inputs of a request that its model takes."""
    specs = server.served.session.manifest.graphs["request"].inputs
    return probe.single(specs, 5, 3, np.random.default_rng(0))
