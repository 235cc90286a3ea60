"""Several servers behind one door with Ray Serve: each user's requests go to the replica that keeps their state.

    serve run stca.examples.ray_serve.app:build bundle=/path/of/bundle name=ranker replicas=2

Each replica is what `stca serve` is over HTTP, under Ray's port 8000. A client names the user in the header
`x-session-id`, and Ray's consistent hash takes them to the same replica for as long as there is one: on scaling and
after a failure some users move, and their next request is told `history_needed`, as any new user's.
"""

from __future__ import annotations

from typing import Any, Final, get_type_hints

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.applications import Starlette

from stca.errors import UsageError
from stca.serve.http_app import admin_app, clients_app
from stca.serve.server import Server
from stca.serve.settings import Settings, from_text

# Changes of one user's state, which go to the replica that keeps it.
_CHANGES: Final = ("append", "amend", "forget", "residence", "warm")


class Replica:
    """One server without ports of its own."""

    async def __init__(self, bundle: str, name: str, settings: dict[str, Any]) -> None:  # type: ignore[misc]
        self._server = Server(Settings(models={name: bundle}, **settings))
        await self._server.load()

    def __serve_build_asgi_app__(self) -> Starlette:
        """What clients ask, and the changes of one user's state; a swap would be one replica's alone."""
        clients, admin = clients_app(self._server.serving), admin_app(self._server.serving)
        changes = [r for r in admin.routes if getattr(r, "path", "").rpartition("/")[2] in _CHANGES]
        return Starlette(routes=[*clients.routes, *changes], exception_handlers=clients.exception_handlers)

    async def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        if not self._server.serving.work.open:
            raise RuntimeError("the bundle is not loaded")


def build(args: dict[str, str]) -> Any:
    """The application, for Ray to run.

    Args:
        args: `bundle`, its directory on every machine; `name` of the model; number of `replicas`; any other is a
            setting of `stca serve`, such as `cache_mib`.

    Raises:
        UsageError: naming the setting that replicas cannot have.
    """
    given, hints = dict(args), get_type_hints(Settings)
    bundle, name, replicas = given.pop("bundle"), given.pop("name", "ranker"), int(given.pop("replicas", 2))
    for key in ("state_folder", "record"):
        if key in given:  # replicas come and go under new names, so none would find its own again
            raise UsageError(f"{key}: is one process' own, and replicas would share it; leave it out")
    settings = {key: from_text(hints[key], key, text) for key, text in given.items()}
    deployment = serve.deployment(
        num_replicas=replicas,
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        max_ongoing_requests=1024,  # the replica itself refuses what its queue has no room for, with 429
    )
    return deployment(serve.ingress()(Replica)).bind(bundle, name, settings)
