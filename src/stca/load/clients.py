"""Who answers: a session in this process, or a server behind a URL."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

import numpy as np

from stca.arrays import Array
from stca.errors import StcaError, UsageError
from stca.load.connection import Connection, SpeaksOtherwiseError
from stca.manifest import Manifest
from stca.runtime import Deadline, Request, Session
from stca.serve.http_body import DEADLINE, HEADER_LENGTH
from stca.serve.tensors import DATATYPES


class Answered(NamedTuple):
    """What came of a request: `ok` or an error's code, and whether the user's state was there."""

    code: str
    hit: bool = False


class Client(Protocol):
    """Answers requests; safe to share between threads."""

    manifest: Manifest
    appends: bool  # whether there is a way to add events

    def score(self, user: str, version: int, inputs: Mapping[str, Array], deadline_ms: float | None) -> Answered:
        """Ask for scores."""
        ...

    def append(self, user: str, version: int, after: int, events: Mapping[str, Array]) -> str:
        """Add new events to a kept state: `appended`, `no_state` where none was there, or an error's code."""
        ...

    def store(self) -> dict[str, Any]:
        """What the state store counted, and bytes by who has them; empty where it cannot be asked."""
        ...


class InProcess:
    """A session in this process."""

    def __init__(self, session: Session) -> None:
        self._session, self.manifest, self.appends = session, session.manifest, True

    def score(self, user: str, version: int, inputs: Mapping[str, Array], deadline_ms: float | None) -> Answered:
        """See `Client.score`."""
        deadline = None if deadline_ms is None else Deadline(deadline_ms / 1e3)
        try:
            return Answered("ok", self._session.answer(Request(inputs, user, version), deadline=deadline).hits[0])
        except StcaError as e:
            return Answered(e.code)

    def append(self, user: str, version: int, after: int, events: Mapping[str, Array]) -> str:
        """See `Client.append`."""
        try:
            return "appended" if self._session.append(user, events, version, after=after) else "no_state"
        except StcaError as e:
            return e.code

    def store(self) -> dict[str, Any]:
        """See `Client.store`."""
        return {**dataclasses.asdict(self._session.stats()), "memory": dict(self._session.memory())}


class Behind:
    """A server that speaks the Open Inference Protocol over HTTP, with `manifest` besides, as `stca serve` does.

    Args:
        url: `http://HOST:PORT`, or with `/v2/models/NAME` behind it.
        admin: `http://HOST:PORT` of the admin port, for events; None sends whole histories instead.

    Raises:
        UsageError: when no such server answers, or it serves several models and none is named, or `admin` is no admin
            port.
    """

    def __init__(self, url: str, admin: str | None = None) -> None:
        self._local = threading.local()
        self._at, path = _address(url)
        self._named = bool(path)
        self._admin = None if admin is None else _address(admin)[0]
        self.appends = self._admin is not None
        if not path:
            names = {m["name"] for m in self._asked("/v2/repository/index")}
            if len(names) != 1:
                raise UsageError(f"{url}: serves {', '.join(sorted(names))}; add /v2/models/NAME to the URL")
            path = f"/v2/models/{names.pop()}"
        self._path = path
        self.manifest = Manifest.from_json(json.dumps(self._asked(f"{path}/manifest")))
        if self._admin is not None:
            self._check_admin(self._admin)

    def score(self, user: str, version: int, inputs: Mapping[str, Array], deadline_ms: float | None) -> Answered:
        """See `Client.score`."""
        parameters = {"user": user, "version": version, "binary_data_output": True}
        headers = {}
        if deadline_ms is not None:
            parameters["deadline_ms"], headers[DEADLINE] = deadline_ms, f"{deadline_ms:.3f}"
        status, told = self._post(self._at, f"{self._path}/infer", inputs, parameters, headers)
        return Answered("ok", bool(told["parameters"]["hit"])) if status == 200 else Answered(_code(told))

    def append(self, user: str, version: int, after: int, events: Mapping[str, Array]) -> str:
        """See `Client.append`."""
        status, told = self._changed("append", {"user": user, "version": version, "after": after}, events)
        return _code(told) if status != 200 else "appended" if told.get("kept") else "no_state"

    def store(self) -> dict[str, Any]:
        """See `Client.store`."""
        return {}

    def change(
        self, what: str, parameters: Mapping[str, Any], inputs: Mapping[str, Array] | None = None
    ) -> dict[str, Any]:
        """Ask the admin port for a change, `append`, `forget`, `warm` or `swap`.

        Args:
            what: the change.
            parameters, inputs: of it, as `docs/serving.md` has them.

        Returns:
            What came of it; nothing when it was refused, or there is no admin port.
        """
        status, told = self._changed(what, parameters, inputs or {})
        return dict(told) if status == 200 else {}

    def _changed(
        self, what: str, parameters: Mapping[str, Any], inputs: Mapping[str, Array]
    ) -> tuple[int, Mapping[str, Any]]:
        if self._admin is None:
            return 0, {"code": "no_admin"}
        return self._post(self._admin, f"{self._path}/{what}", inputs, parameters)

    def _check_admin(self, at: tuple[str, int]) -> None:
        """Raises UsageError unless changes of this model are asked there: a user that nobody has is forgotten."""
        status, told = self._post(at, f"{self._path}/forget", {}, {"user": "nobody of stca load"})
        if status != 200:
            raise UsageError(
                f"--admin http://{at[0]}:{at[1]}: {_why(told)}; name the server's admin port, 8002 unless --admin-port "
                "says otherwise, or leave --admin out to send whole histories"
            )

    def _asked(self, path: str) -> Any:
        status, told = self._sent(self._at, "GET", path, None, {})
        if status == 200:
            return told
        fix = "name a model that is served" if _code(told) == "not_found" and self._named else _NO_SERVER
        raise UsageError(f"http://{self._at[0]}:{self._at[1]}{path}: {_why(told)}; {fix}")

    def _post(
        self,
        at: tuple[str, int],
        path: str,
        inputs: Mapping[str, Array],
        parameters: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        head, data = [], []
        for name, x in inputs.items():
            data.append(np.ascontiguousarray(x).tobytes())
            head.append(
                {
                    "name": name,
                    "datatype": DATATYPES[x.dtype.name],
                    "shape": list(x.shape),
                    "parameters": {"binary_data_size": len(data[-1])},
                }
            )
        text = json.dumps({"inputs": head, "parameters": parameters}).encode()
        return self._sent(at, "POST", path, b"".join([text, *data]), {HEADER_LENGTH: str(len(text)), **(headers or {})})

    def _sent(
        self, at: tuple[str, int], method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, Any]:
        """Status and JSON; 0 and the code `connection` where none is to be had."""
        kept = self._local.__dict__.setdefault("connections", {})  # of this thread
        if at not in kept:
            kept[at] = Connection(*at)
        try:
            status, head, text = kept[at].ask(method, path, body or b"", headers)
            if (length := _JSON_LENGTH.search(head)) is not None:
                text = text[: int(length[1])]
            told = json.loads(text)
            return status, told if isinstance(told, dict | list) else {}
        except (SpeaksOtherwiseError, ValueError):
            return 0, {"code": "connection", "error": "what answers there speaks another protocol"}
        except OSError as e:
            return 0, {"code": "connection", "error": e.strerror or str(e) or type(e).__name__}


_JSON_LENGTH = re.compile(rf"\r\n{HEADER_LENGTH}:\s*(\d{{1,15}})\r\n".encode(), re.IGNORECASE)
_NO_SERVER = "start `stca serve BUNDLE` and name its HTTP port, 8000 unless --http-port says otherwise"


def _code(told: Any) -> str:
    """An error's code, of whatever a server says."""
    return str(told.get("code", "no_code")) if isinstance(told, Mapping) else "no_code"


def _why(told: Any) -> str:
    return str(told.get("error", _code(told))) if isinstance(told, Mapping) else _code(told)


def _address(url: str) -> tuple[tuple[str, int], str]:
    try:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError
        return (parts.hostname, parts.port or 80), quote(parts.path.rstrip("/"), safe="/%")
    except ValueError:
        tls = "; TLS is for a proxy in front of the server" if url.startswith("https:") else ""
        raise UsageError(f"{url!r:.80}: is no URL of a server; write http://HOST:PORT{tls}") from None
