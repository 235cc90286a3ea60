"""A server's life: it listens, loads its bundles, serves, and finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

from stca.errors import UsageError
from stca.runtime import Session
from stca.serve.connections import Connection, most_connections
from stca.serve.grpc_service import grpc_server
from stca.serve.http_app import Serving, admin_app, clients_app
from stca.serve.log import write
from stca.serve.metrics import Metrics
from stca.serve.models import Models
from stca.serve.settings import Settings
from stca.serve.work import Work

# Changes of states and bundles made at a time. Most of them wait: a swap for the disk, a warm for its turn.
_CHANGES: Final = 4
# Options of glibc's allocator by number: from how many bytes on a block is the system's own and given back when it is
# freed; and in how many places threads allocate smaller ones, each of which keeps what it once needed.
_MALLOC: Final = {-3: 128 << 10, -8: 2}


class _Uvicorn(uvicorn.Server):
    """An HTTP server that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One process' server. `ports` has where it listens, by `http`, `grpc` and `admin`.

    Args:
        settings: of it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        models = Models(settings.models)
        work = Work(settings.jobs, settings.queue, gathered=settings.batch_tokens > 0)
        changes, body_limit = Work(_CHANGES, settings.queue), settings.body_mib << 20
        self.serving = Serving(models, work, changes, Metrics(models, work), body_limit, settings.body_seconds)
        self.ports: dict[str, int] = {}
        self._http: list[tuple[_Uvicorn, asyncio.Task[None]]] = []
        self._grpc: Any = None
        self._most = most_connections()
        self._connection = partial(Connection, seconds=settings.body_seconds, most=self._most)

    async def start(self) -> None:
        """Listen, so that health can be asked; then load the bundles and be ready.

        Raises:
            UsageError: when a port cannot be taken.
            BundleError, BuildError: when a bundle cannot be loaded.
        """
        s = self.settings
        self._grpc = grpc_server(self.serving, self._most)  # before what can fail: the end stops it
        http, admin = _bound(s.host, s.http_port, "http-port"), _bound(s.admin_host, s.admin_port, "admin-port")
        clients = f"{_bracketed(s.host)}:{http.getsockname()[1]}"
        sockets = {
            "http": (http, clients_app(self.serving, f"{_bracketed(s.admin_host)}:{admin.getsockname()[1]}")),
            "admin": (admin, admin_app(self.serving, clients)),
        }
        _bound(s.host, s.grpc_port, "grpc-port").close()  # gRPC would say in a log line of its own that it is taken
        try:
            self.ports["grpc"] = self._grpc.add_insecure_port(f"{_bracketed(s.host)}:{s.grpc_port}")
        except RuntimeError as e:
            raise UsageError(f"port {s.grpc_port} of {s.host} cannot be taken; choose another with --grpc-port") from e
        for name, (bound, app) in sockets.items():
            self.ports[name] = bound.getsockname()[1]
            self._http.append(self._run(bound, app))
        await self._grpc.start()
        write("listening", host=s.host, **self.ports)
        await self.load()

    async def load(self) -> None:
        """Load the bundles and be ready; where something else listens, this is enough.

        Raises:
            BundleError, BuildError: when a bundle cannot be loaded.
        """
        for served in self.serving.models:
            label = f"{served.name}/{served.version}"
            served.loaded = await asyncio.to_thread(Session.load, served.bundle, **self.settings.of_session(label))
        self.serving.work.open = self.serving.changes.open = True
        write("ready", models=[f"{m.name}/{m.version}" for m in self.serving.models], workers=self.settings.jobs)

    def _run(self, bound: socket.socket, app: Starlette) -> tuple[_Uvicorn, asyncio.Task[None]]:
        config = uvicorn.Config(
            app,
            http=self._connection,  # type: ignore[arg-type]  # what makes one
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, int(self.settings.drain_seconds)),
        )
        server = _Uvicorn(config)
        return server, asyncio.ensure_future(server.serve([bound]))

    async def drain(self, hurry: asyncio.Event | None = None) -> bool:
        """Refuse what comes and tell that it is not ready, finish what runs, then listen no more. Sessions in which
        nothing runs any more are closed, which takes a few seconds at most where states wait to be written.

        Args:
            hurry: when it is set, no request is waited for any more; None for nothing to set.

        Returns:
            Whether all that ran was finished in time. Otherwise a thread may still compute.

        Raises:
            Exception: what an HTTP server failed of.
        """
        running, hurry = (self.serving.work, self.serving.changes), hurry or asyncio.Event()
        for work in running:
            work.open = False
        write("draining", running=sum(work.admitted_now for work in running), at_most=self.settings.drain_seconds)
        idle = asyncio.gather(*(work.idle(self.settings.drain_seconds) for work in running))
        finished = await _first(idle, hurry) and all(idle.result())
        for work in running:
            work.close()
        for server, _ in self._http:
            server.should_exit = True
        closed = asyncio.gather(*(task for _, task in self._http), self._grpc.stop(0.0 if hurry.is_set() else 1.0))
        all_closed = await _first(closed, hurry)
        for served in self.serving.models:
            served.close()
        if hurry.is_set():
            left = sum(work.admitted_now for work in running)
            finished = not left
            write("ended", finished=finished, unanswered=left, why="a second signal came before the drain was over")
        else:
            write("ended", finished=finished)
        if all_closed:
            closed.result()
        return finished


async def serve(settings: Settings, ready: Callable[[Server], None]) -> bool:
    """Serve until SIGTERM or SIGINT, and finish what runs; a second one ends that at once.

    Args:
        settings: of the server.
        ready: told when all bundles are loaded.

    Returns:
        Whether all that ran was finished. Otherwise a thread may still compute, and keep the process from its end.

    Raises:
        UsageError, BundleError, BuildError: as `Server.start`.
    """
    _give_back_what_is_freed()
    server, stop, hurry = Server(settings), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    starting = asyncio.ensure_future(server.start())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            ready(server)
            await stopping
    finally:
        stop.set()  # also where the start failed: a signal then is a second one
        starting.cancel()
        finished = await server.drain(hurry)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return finished


async def _first(work: asyncio.Future[Any], hurry: asyncio.Event) -> bool:
    """Wait until `work` is done, and no longer than until `hurry` is set; whether it is done."""
    waiting = asyncio.ensure_future(hurry.wait())
    await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not work.done():
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # which is nobody's to log
        work.cancel()
    return work.done() and not work.cancelled()


def _give_back_what_is_freed() -> None:
    """Else glibc keeps freed blocks of up to 32 MiB, with holes between states that came and went, for each of many
    threads: a server's memory grew by several times what its states did.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # not every C library has it
        for option, value in _MALLOC.items():
            mallopt(option, value)


def _bound(host: str, port: int, option: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit it: else the second part of an answer waits some 40 ms for the client's word on the first.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return bound
    except OSError as e:
        why = str(e.strerror).partition(" (")[0]  # Python adds the address, which is told anyway
        if isinstance(e, socket.gaierror) or e.errno == errno.EADDRNOTAVAIL:
            option = "admin-host" if option == "admin-port" else "host"
        raise UsageError(f"port {port} of {host} cannot be taken ({why}); choose another with --{option}") from e


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
