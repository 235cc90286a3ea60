"""The protocol over gRPC: `inference.GRPCInferenceService`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc

from stca.errors import StcaError
from stca.serve.errors import INTERNAL, INTERNAL_MESSAGE, ServeError, status_of
from stca.serve.grpc_body import decoded, encoded, parsed
from stca.serve.http_app import SERVER, Serving
from stca.serve.log import LOG
from stca.serve.messages import SERVICE, message
from stca.serve.models import Served
from stca.serve.work import Call

# A call's bytes and its context → the answer's bytes.
Method: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]
# Trailing metadata: the error's code, and the seconds after which to try again.
CODE: Final = "stca-code"
RETRY_AFTER: Final = "retry-after"
# After so long without a call a connection is closed; clients open it again by themselves.
_IDLE_MS: Final = 600_000


# Calls at a time of one connection; a client opens another one for more, and connections are bounded.
_STREAMS: Final = 1024


def grpc_server(serving: Serving, most: int) -> Any:
    """A `grpc.aio.Server` without a port yet.

    Args:
        serving: what is served.
        most: connections at a time; what comes beyond is closed at once, and clients try again by themselves.
    """
    options = [
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.max_concurrent_streams", _STREAMS),
        ("grpc.max_receive_message_length", serving.body_limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # or a second server would take half of the requests
        ("grpc.server_handshake_timeout_ms", int(1e3 * serving.body_seconds)),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
    ]
    server = grpc.aio.server(options=options)
    methods = {
        name: grpc.unary_unary_rpc_method_handler(_answering(method)) for name, method in _methods(serving).items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    return server


def _methods(serving: Serving) -> dict[str, Method]:
    models, work = serving.models, serving.work

    def ready(served: Served) -> dict[str, Any]:
        return {"ready": served.loaded is not None and work.open}

    plain: dict[str, Callable[[Any], dict[str, Any]]] = {
        "ServerLive": lambda _: {"live": True},
        "ServerReady": lambda _: {"ready": work.open},
        "ServerMetadata": lambda _: dict(SERVER),
        "ModelReady": lambda asked: ready(models.find(asked.name, asked.version)),
        "ModelMetadata": lambda asked: models.find(asked.name, asked.version).metadata(),
        "ModelConfig": lambda asked: {"config": models.find(asked.name, asked.version).config()},
        "ModelStatistics": lambda asked: {
            "model_stats": [s.told_statistics() for s in models.some(asked.name, asked.version)]
        },
        "RepositoryIndex": lambda _: {"models": models.index()},
    }
    return {name: _quick(name, answer) for name, answer in plain.items()} | {"ModelInfer": _Infer(serving)}


def _quick(name: str, answer: Callable[[Any], dict[str, Any]]) -> Method:
    """A method that is answered at once, on the event loop."""

    async def method(data: bytes, _: Any) -> bytes:
        made: bytes = message(f"{name}Response")(**answer(parsed(f"{name}Request", data))).SerializeToString()
        return made

    return method


class _Infer:
    """`ModelInfer`."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, data: bytes, context: Any) -> bytes:
        call, code = Call(context.time_remaining()), "cancelled"
        found: list[Served] = []

        def job() -> bytes:
            name, version, request = decoded(data, self._serving.body_limit)
            found.append(self._serving.models.find(name, version))
            call.deadline.check()
            return encoded(found[0].infer(request, call))

        try:
            with self._serving.work.admitted(call) as ticket:
                made = await self._serving.work.run(ticket, call, job, None)
            code = "ok"
        except StcaError as e:
            code = e.code
            raise
        except Exception:
            code = "internal"
            raise
        finally:  # a call that the client cancels ends here, too
            self._serving.answered(found[0] if found else None, "grpc", code, call)
        return made


def _answering(method: Method) -> Method:
    async def answer(data: bytes, context: Any) -> bytes:
        try:
            return await method(data, context)
        except StcaError as e:
            after = e.retry_after if isinstance(e, ServeError) else None
            code, status, said = e.code, status_of(e).grpc, str(e)
        except Exception:
            LOG.exception("failed")
            after, code, status, said = None, "internal", INTERNAL.grpc, INTERNAL_MESSAGE
        trailing = ((CODE, code), *(((RETRY_AFTER, str(after)),) if after is not None else ()))
        await context.abort(getattr(grpc.StatusCode, status), said, trailing)
        raise AssertionError("abort raises")

    return answer
