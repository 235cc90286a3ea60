"""What it costs `stca serve` to refuse a request for scores, before and behind its routes.

    python benchmarks/refusals.py BUNDLE --out benchmarks/results/refusals-cpu.json

A server in this process whose places are all taken, and one client of one connection. `refused` is what clients get;
`routed` is the same app without its first look, so that each request is routed and its body read, as all were before;
`live` is `GET /v2/health/live`, which does nothing. Times are the processor time of the server's event loop for a
request, the median of rounds taken in turn; gRPC has threads of its own besides, so of it the whole process' time is
told, its client's included, beside that of `ServerLive`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from outcome import tell
from starlette.applications import Starlette

from stca import probe
from stca.checks.timing import machine
from stca.load.connection import Connection
from stca.serve.http_app import clients_app
from stca.serve.http_body import HEADER_LENGTH
from stca.serve.messages import SERVICE, message
from stca.serve.server import Server, _bound
from stca.serve.settings import Settings
from stca.serve.tensors import DATATYPES
from stca.serve.work import Call

INFER = "/v2/models/m/infer"


class Full:
    """A server on a thread of its own, all of whose places are taken; `routed` is a port without the first look."""

    def __init__(self, bundle: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._call(self._start(bundle))

    async def _start(self, bundle: str) -> None:
        ports = {"http_port": 0, "grpc_port": 0, "admin_port": 0}
        server = self.server = Server(Settings(models={"m": bundle}, queue=1, workers=1, **ports))
        await server.start()
        listening, app = _bound("127.0.0.1", 0, "http-port"), clients_app(server.serving)
        server._http.append(server._run(listening, Starlette(routes=app.routes)))
        self.ports = {**server.ports, "routed": listening.getsockname()[1]}
        self._places = contextlib.ExitStack()
        for _ in range(server.serving.work.limit):
            self._places.enter_context(server.serving.work.admitted(Call()))

    def cpu(self) -> float:
        """Processor seconds of the event loop so far."""

        async def seconds() -> float:
            return time.thread_time()

        return self._call(seconds())

    def _call(self, made: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(made, self._loop).result()


def main() -> None:
    args = _arguments()
    full = Full(args.bundle)
    specs = full.server.serving.models.find("m").session.manifest.graphs["request"].inputs
    sizes = {"targets alone": (0, 200), "2000 events": (2000, 200), "10000 events": (10_000, 200)}
    found: dict[str, Any] = {}
    for name, (events, targets) in sizes.items():
        inputs = probe.single(specs, events, targets, np.random.default_rng(0))
        sent = {s.name: inputs[s.name] for s in specs if s.name in inputs and (events or s.scope != "user")}
        found[name] = _measured(full, sent, args)
        print(name, json.dumps(found[name]), flush=True)
    tell({"bundle": Path(args.bundle).name, "machine": machine(None), "cpu_ms": found}, args.out)


def _measured(full: Full, inputs: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    data = [np.ascontiguousarray(x).tobytes() for x in inputs.values()]
    told = [
        {"name": n, "datatype": DATATYPES[x.dtype.name], "shape": list(x.shape),
         "parameters": {"binary_data_size": x.nbytes}}
        for n, x in inputs.items()
    ]  # fmt: skip
    text = json.dumps({"inputs": told, "parameters": {"user": "ann", "version": 1}}).encode()
    body, headers = text + b"".join(data), {HEADER_LENGTH: str(len(text))}
    asked = message("ModelInferRequest")(model_name="m", raw_input_contents=data)
    for n, x in inputs.items():
        asked.inputs.add(name=n, datatype=DATATYPES[x.dtype.name], shape=x.shape)

    with grpc.insecure_channel(f"127.0.0.1:{full.ports['grpc']}") as channel:
        infer, live = (channel.unary_unary(f"/{SERVICE}/{name}") for name in ("ModelInfer", "ServerLive"))
        serialized = asked.SerializeToString()
        routed, front = (Connection("127.0.0.1", full.ports[port]) for port in ("routed", "http"))

        def post(connection: Connection) -> None:
            assert connection.ask("POST", INFER, body, headers)[0] == 429

        def refused() -> None:
            assert infer.future(serialized).code() == grpc.StatusCode.RESOURCE_EXHAUSTED

        calls: dict[str, tuple[Callable[[], Any], Callable[[], float]]] = {
            "refused": (lambda: post(front), full.cpu),
            "routed": (lambda: post(routed), full.cpu),
            "live": (lambda: front.ask("GET", "/v2/health/live", b"", {}), full.cpu),
            "grpc_refused": (refused, time.process_time),
            "grpc_live": (lambda: live(b""), time.process_time),
        }
        rounds = [{n: _cost(*call, args.requests) for n, call in calls.items()} for _ in range(args.rounds)]
    cost = {n: round(statistics.median(of[n] for of in rounds[1:]), 4) for n in calls}
    return {"body_bytes": len(body), **cost, "times": round(cost["routed"] / cost["refused"], 2)}


def _cost(call: Callable[[], Any], clock: Callable[[], float], requests: int) -> float:
    """Milliseconds of `clock` for a call."""
    before = clock()
    for _ in range(requests):
        call()
    return 1e3 * (clock() - before) / requests


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle")
    p.add_argument("--requests", type=int, default=200, help="of each kind in a round")
    p.add_argument("--rounds", type=int, default=8, help="the first of which is not counted")
    p.add_argument("--out")
    return p.parse_args()


if __name__ == "__main__":
    main()
