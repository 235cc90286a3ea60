"""The protocol over HTTP: what clients ask, and on a port of its own what changes states and bundles."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from stca.errors import CancelledError, RequestError, StcaError
from stca.serve.errors import (
    INTERNAL,
    INTERNAL_MESSAGE,
    NotFoundError,
    ServeError,
    SlowBodyError,
    TooLargeError,
    status_of,
)
from stca.serve.http_body import DEADLINE, HEADER_LENGTH, decoded, encoded, plain, seconds_left
from stca.serve.log import LOG, write
from stca.serve.metrics import CONTENT_TYPE, Metrics
from stca.serve.models import CHANGES, Models, Served
from stca.serve.work import Call, Work
from stca.versions import installed

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]
SERVER: Final[Mapping[str, Any]] = {
    "name": "stca",
    "version": installed()["stca"],
    "extensions": ["binary_tensor_data", "statistics", "model_configuration", "model_repository", "parameters"],
}
_INFER: Final = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
# How long a refused client may go on sending: it reads no answer before its body is out.
_SECONDS_REFUSED: Final = 5.0


@dataclass(frozen=True)
class Serving:
    """What all doors of one server share.

    Attributes:
        models: the bundles.
        work: where requests are computed.
        changes: where changes are made; a swap takes seconds, and would stand in the way of scores.
        metrics: what is counted.
        body_limit: most bytes of a body, after decompression.
        body_seconds: how long a body may take to arrive.
    """

    models: Models
    work: Work
    changes: Work
    metrics: Metrics
    body_limit: int
    body_seconds: float

    def answered(self, served: Served | None, protocol: str, code: str, call: Call) -> None:
        """Count a request for scores, as `Metrics.answered` does, and log it."""
        seconds = time.monotonic() - call.arrived
        self.metrics.answered(served, protocol, code, seconds)
        write("request", logging.DEBUG, protocol=protocol, code=code, ms=round(1e3 * seconds, 3))


class Refusing:
    """Refuses a request for scores that will not be computed, before it is routed and before its body is read: most
    requests to an overloaded server are such. What cannot be told at once is left to the app.

    uvicorn drops a body that comes after its answer, so the connection serves the next request. One that would end
    with this answer has to be read first, or the client may lose it; one whose client waits to be told to go on would
    take the next request for this body.

    Args:
        app: what answers.
        serving: what is served.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        answer = self._refused(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (self._app(scope, receive, send) if answer is None else answer(scope, receive, send))

    def _refused(self, scope: Scope) -> Response | None:
        headers, work, call = Headers(scope=scope), self._serving.work, Call()
        if (asked := _INFER.fullmatch(scope["path"])) is None or scope["http_version"] != "1.1":
            return None
        if "expect" in headers or "close" in ",".join(headers.getlist("connection")).lower():
            return None
        try:
            served = self._serving.models.find(asked[1], asked[2] or "")
            error = work.refusal(seconds_left(headers.get(DEADLINE)))
        except (NotFoundError, RequestError):
            return None
        if error is None:
            return None
        self._serving.answered(served, "http", error.code, call)
        return _told(error)


class _Body:
    """A request's body, part by part; and then, whether its client is still there."""

    def __init__(self, request: Request, limit: int, seconds: float) -> None:
        self._request, self._limit, self._seconds = request, limit, seconds
        self._whole = self._late = False

    async def parts(self) -> AsyncIterator[bytes]:
        while not self._whole:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                self._whole = True
                raise CancelledError("the client went away")
            self._whole = not message.get("more_body", False)
            yield message.get("body", b"")

    async def read(self) -> bytes:
        """All of it.

        Raises:
            TooLargeError, SlowBodyError, CancelledError: when it is not to be had.
        """
        length = self._request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limit:
            raise TooLargeError(f"the body has {length:.20} bytes, the limit is {self._limit}; send less at once")
        found = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                async for part in self.parts():
                    found += part
                    if len(found) > self._limit:
                        raise TooLargeError(f"the body has more than {self._limit} bytes; send less at once")
        except TimeoutError:
            self._late = True
            raise SlowBodyError(f"the body did not arrive within {self._seconds:g} s") from None
        return bytes(found)

    async def discard(self) -> None:
        """Read what a refused client still sends, so that it comes to read why."""
        if self._late or self._request.headers.get("expect"):
            return  # it sends too slowly, or has not begun to
        seen = 0
        with contextlib.suppress(TimeoutError, CancelledError):
            async with asyncio.timeout(_SECONDS_REFUSED):
                async for part in self.parts():
                    if (seen := seen + len(part)) > self._limit:
                        return

    async def gone(self) -> None:
        """Ends when the client has gone away."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


def clients_app(serving: Serving, admin: str | None = None) -> Starlette:
    """What clients ask: health, metadata, scores, metrics.

    Args:
        serving: what is served.
        admin: host and port of `admin_app`, for who asks a change here; None where there is none.
    """
    app = _Endpoints(serving)
    model = "/v2/models/{model}"
    routes = [
        *_routes("/v2", app.server),
        *_routes("/v2/health/live", app.live),
        *_routes("/v2/health/ready", app.ready),
        *_routes("/v2/models/stats", app.statistics),
        *_routes("/v2/repository/index", app.index, methods=("GET", "POST")),
        *_routes("/metrics", app.metrics),
    ]
    for at in (model, f"{model}/versions/{{version}}"):
        routes += [
            *_routes(at, app.metadata),
            *_routes(f"{at}/ready", app.model_ready),
            *_routes(f"{at}/config", app.config),
            *_routes(f"{at}/manifest", app.manifest),
            *_routes(f"{at}/stats", app.statistics),
            *_routes(f"{at}/infer", app.infer, methods=("POST",)),
        ]
        for change in CHANGES if admin else ():
            routes += _elsewhere(f"{at}/{change}", f"the admin port, http://{admin}")
    refusing = [Middleware(Refusing, serving=serving)]
    return Starlette(routes=routes, middleware=refusing, exception_handlers={HTTPException: _no_route})


def admin_app(serving: Serving, clients: str | None = None) -> Starlette:
    """What changes states and bundles, for whoever reaches this port; and the metrics.

    Args:
        serving: what is served.
        clients: host and port of `clients_app`, for who asks it here; None where there is none.
    """
    app, routes = _Endpoints(serving), []
    for at in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        for change in CHANGES:
            routes += _routes(f"{at}/{change}", functools.partial(app.change, change), methods=("POST",))
        if clients:
            routes += _elsewhere(f"{at}/infer", f"the clients' port, http://{clients}")
    for path, endpoint in (("/v2/health/live", app.live), ("/v2/health/ready", app.ready), ("/metrics", app.metrics)):
        routes += _routes(path, endpoint)
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


class _Endpoints:
    """The endpoints; each raises what goes wrong."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def server(self, _: Request) -> Response:
        return _json(SERVER)

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self._serving.work.open
        return _json({"ready": ready}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        ready = self._model(request).loaded is not None and self._serving.work.open
        return _json({"ready": ready}, 200 if ready else 503)

    async def metadata(self, request: Request) -> Response:
        return _json(self._model(request).metadata())

    async def config(self, request: Request) -> Response:
        return _json(self._model(request).config())

    async def manifest(self, request: Request) -> Response:
        return Response(self._model(request).session.manifest.to_json(), media_type="application/json")

    async def statistics(self, request: Request) -> Response:
        found = self._serving.models.some(*_named(request))
        return _json({"model_stats": [served.told_statistics() for served in found]})

    async def index(self, request: Request) -> Response:
        await _Body(request, self._serving.body_limit, self._serving.body_seconds).discard()
        return _json(self._serving.models.index())

    async def metrics(self, _: Request) -> Response:
        return Response(self._serving.metrics.text(), media_type=CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        served: Served | None = None
        body, call, code = self._body(request), Call(), "internal"
        try:
            served = self._model(request)
            call.expire_in(seconds_left(request.headers.get(DEADLINE)))
            response = await self._scored(request, served, body, call)
            code = "ok"
        except StcaError as e:
            code = e.code
            await body.discard()
            raise
        finally:
            self._serving.answered(served, "http", code, call)
        return response

    async def _scored(self, request: Request, served: Served, body: _Body, call: Call) -> Response:
        with self._serving.work.admitted(call) as ticket:
            data = await body.read()
            read = self._reader(request, data)

            def job() -> tuple[bytes, int | None]:
                asked = read()
                call.deadline.check()
                return encoded(served.infer(asked, call), asked.binary)

            made, length = await self._serving.work.run(ticket, call, job, body.gone())
        if length is None:
            return Response(made, media_type="application/json")
        return Response(made, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")

    async def change(self, change: str, request: Request) -> Response:
        served: Served | None = None
        body, code, call = self._body(request), "internal", Call()
        try:
            served = of = self._model(request)
            with self._serving.changes.admitted(call) as ticket:
                read = self._reader(request, await body.read())

                def job() -> dict[str, Any]:
                    return of.change(change, read(), call)

                found = await self._serving.changes.run(ticket, call, job, body.gone())
            code = "ok"
        except StcaError as e:
            code = e.code
            await body.discard()
            raise
        finally:
            self._serving.metrics.changed(served, change, code)
        return _json(found)

    def _body(self, request: Request) -> _Body:
        return _Body(request, self._serving.body_limit, self._serving.body_seconds)

    def _reader(self, request: Request, data: bytes) -> Callable[[], Any]:
        """What makes a request of a body, on another thread."""
        encoding, length = request.headers.get("content-encoding", ""), request.headers.get(HEADER_LENGTH)
        limit = self._serving.body_limit
        return lambda: decoded(plain(data, encoding, limit), length, limit)

    def _model(self, request: Request) -> Served:
        return self._serving.models.find(*_named(request))


def _named(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _routes(path: str, endpoint: Endpoint, methods: tuple[str, ...] = ("GET",)) -> list[Route]:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except StcaError as e:
            return _told(e)
        except Exception:
            LOG.exception("failed")
            return _error(INTERNAL_MESSAGE, "internal", INTERNAL.http)

    return [Route(path, answer, methods=list(methods))]


def _elsewhere(path: str, port: str) -> list[Route]:
    """A path of the other port, whatever the method."""

    async def refused(request: Request) -> Response:
        raise NotFoundError(f"{path.rpartition('/')[2]}: is not asked here; send it to {port}")

    return _routes(path, refused, methods=("GET", "POST", "PUT", "DELETE"))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    said = f"{error.detail}: {request.method} of this path" + (f"; it takes {allowed}" if allowed else "")
    codes = {404: "not_found", 405: "bad_method"}
    return _error(said, codes.get(error.status_code, "bad_request"), error.status_code)


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _told(e: StcaError) -> Response:
    return _error(str(e), e.code, status_of(e).http, e.retry_after if isinstance(e, ServeError) else None)


def _error(message: str, code: str, status: int, retry_after: int | None = None) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Response(json.dumps({"error": message, "code": code}), status, headers, "application/json")
