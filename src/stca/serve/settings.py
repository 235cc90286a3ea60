"""How a server is set up: flags before the environment, the environment before a file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_type_hints
from urllib.parse import quote

from stca import folders, typed_json
from stca.errors import UsageError

# Each setting's variable is this and its name: STCA_SERVE_HTTP_PORT. Bundles are NAME=BUNDLE, with spaces between them.
PREFIX: Final = "STCA_SERVE_"
# Of a file of settings: a device may have no end.
_MOST_BYTES: Final = 1 << 20


def _said(help_: str, default: Any) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that can be set; the field's help says what it is.

    Raises:
        UsageError: naming the setting that is out of its range.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    host: str = _said("address to listen on", "127.0.0.1")
    http_port: int = _said("port of HTTP; 0 takes a free one", 8000)
    grpc_port: int = _said("port of gRPC; 0 takes a free one", 8001)
    admin_host: str = _said("address of append, amend, forget, warm, swap and the metrics", "127.0.0.1")
    admin_port: int = _said("port of these; 0 takes a free one", 8002)
    workers: int | None = _said("runs of a bundle at a time (default: one for each processor)", None)
    queue: int = _said("requests that may wait besides; more are refused with 429", 64)
    batch_tokens: int = _said("most history tokens and targets of requests computed together; 0 for none", 1024)
    batch_seconds: float = _said("how long a request waits for others although a processor is free", 0.0)
    body_mib: int = _said("most MiB of a request's body, after decompression; its JSON may have a quarter of it", 64)
    body_seconds: float = _said("how long a request's head may take to arrive, and its body", 30.0)
    drain_seconds: float = _said("how long to finish what runs when the server is told to end", 30.0)
    log_level: str = _said("debug, which tells of each request, info, warning or error", "info")
    threads: int | None = _said("threads of one request (default: processors / workers)", None)
    engine: str | None = _said("what runs the bundles (default: the fastest that runs here)", None)
    precision: str | None = _said("of that engine", None)
    trusted: str | None = _said("public key in PEM: refuse a bundle its holder did not sign", None)
    native_code: bool = _said("open engines that carry native code: you trust its maker", False)
    truncate: bool = _said("keep the most recent events of a history that is too long", False)
    cache_mib: int = _said("most MiB of user states of each bundle", 1024)
    max_users: int | None = _said("most users whose states are kept (default: as many as fit)", None)
    max_targets: int = _said("most targets of a request", 1 << 16)
    state_folder: str | None = _said("where states go that memory has no room for, a folder for each bundle", None)
    state_folder_mib: int = _said("most MiB of each", 8192)
    gpu: int = _said("which GPU, where the engine runs on one", 0)
    ttl_seconds: float | None = _said("how long a state is kept (default: for ever)", None)
    record: str | None = _said("where requests are recorded as a trace, a folder for each bundle", None)
    record_share: float = _said("which share of those that bring a history, above 0 and at most 1", 0.01)
    record_mib: int = _said("most MiB of each trace", 256)

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port", "admin_port"):
            if not 0 <= getattr(self, name) < 1 << 16:
                raise UsageError(f"{name}: is {getattr(self, name)}, expected a port from 0 to 65535")
        for name in ("workers", "threads", "body_mib", "body_seconds"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1 << 16:
                raise UsageError(f"{name}: is {value}, expected a number above 0, and at most 65536")
        known = (
            "queue",
            "drain_seconds",
            "cache_mib",
            "state_folder_mib",
            "batch_tokens",
            "batch_seconds",
            "record_mib",
        )
        for name in known:
            if not 0 <= getattr(self, name) <= 1 << 30:
                raise UsageError(f"{name}: is {getattr(self, name)}, expected a number from 0")
        if self.log_level not in (levels := ("debug", "info", "warning", "error")):
            raise UsageError(f"log_level: is {self.log_level!r:.60}, expected one of {', '.join(levels)}")

    @property
    def jobs(self) -> int:
        """Requests computed at a time."""
        return self.workers or _processors()

    def of_session(self, label: str) -> dict[str, Any]:
        """What `Session.load` is told of the bundle with this name and version."""
        same = (
            "engine",
            "precision",
            "trusted",
            "native_code",
            "truncate",
            "max_users",
            "max_targets",
            "ttl_seconds",
            "gpu",
        )
        threads = self.threads or max(1, _processors() // self.jobs)
        made = {n: getattr(self, n) for n in same} | {"threads": threads, "cache_bytes": self.cache_mib << 20}
        if self.batch_tokens:
            made |= {"batch_tokens": self.batch_tokens, "batch_seconds": self.batch_seconds}
        if self.state_folder is not None:
            made["state_folder"] = str(_folder(self.state_folder, label))
            made["state_folder_bytes"] = self.state_folder_mib << 20
        if self.record is not None:
            from stca.runtime.recording import Recording

            made["record"] = Recording(_folder(self.record, label), self.record_share, self.record_mib << 20)
        return made


def _folder(root: str, label: str) -> Path:
    """A bundle's own below `root`, NAME/VERSION: no name leads out of there."""
    parts = (quote(part, safe="") for part in label.split("/", 1))
    return Path(root, *(part if part.strip(".") else part.replace(".", "%2E") for part in parts))


def _processors() -> int:
    from stca.runtime.machine import processors  # and with it the engine's library, which no `--help` waits for

    return processors()


def settings(file: str | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Settings:
    """The settings of a TOML file, overridden by the environment, overridden by flags.

    Args:
        file: its path; None for none. Its table `[models]` has directories by name.
        environment: variables; those that begin with `PREFIX` count.
        flags: what the command line says, by the setting's name.

    Raises:
        UsageError: when the file cannot be read, or naming the setting that is unknown or of the wrong kind.
    """
    hints = get_type_hints(Settings)
    found = _of_file(file) if file is not None else {}
    for name, text in environment.items():
        if name.startswith(PREFIX) and (setting := name.removeprefix(PREFIX).lower()) not in hints:
            raise UsageError(f"{name}: there is no such setting; they are {', '.join(hints)}")
        if name.startswith(PREFIX):
            found[setting] = named(text.split()) if setting == "models" else from_text(hints[setting], name, text)
    found |= flags
    try:
        made = {name: typed_json.as_type(hints[name], value, name) for name, value in found.items() if name in hints}
    except (TypeError, ValueError) as e:
        raise UsageError(f"settings: {e}") from e
    if unknown := found.keys() - hints.keys():
        raise UsageError(f"{file}: there is no setting {min(unknown)!r:.60}; they are {', '.join(hints)}")
    return Settings(**made)


def _of_file(file: str) -> dict[str, Any]:
    try:
        if len(read := folders.read(Path(file), _MOST_BYTES)) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        return {n.replace("-", "_"): v for n, v in tomllib.loads(read.decode("utf-8")).items()}
    except (OSError, ValueError, RecursionError) as e:  # an integer of 5,000 digits is a plain ValueError
        raise UsageError(f"{file}: cannot be read ({getattr(e, 'strerror', None) or e}); name a TOML file") from e


def from_text(kind: Any, name: str, text: str) -> Any:
    """A setting of a type, from text.

    Raises:
        UsageError: when it is not of that type.
    """
    if kind is bool:
        if text.lower() not in (known := {"1": True, "true": True, "0": False, "false": False}):
            raise UsageError(f"{name}: is {text!r:.60}, expected true or false")
        return known[text.lower()]
    for number in (int, float):
        if kind in (number, number | None):
            try:
                return number(text)
            except ValueError:
                raise UsageError(f"{name}: is {text!r:.60}, expected a number") from None
    return text


def named(labels: list[str], name: str | None = None) -> dict[str, str]:
    """Bundles by name, of `NAME=BUNDLE`, `NAME/VERSION=BUNDLE` or `BUNDLE`, which is called as its folder, or `name`.

    Raises:
        UsageError: when two have one name.
    """
    found: dict[str, str] = {}
    for label in labels:
        given, equals, bundle = label.partition("=")
        if not equals or Path(label).is_dir():
            given, bundle = name or Path(label).resolve().name, label
        if given in found or not given or not bundle:
            raise UsageError(f"{label!r:.60}: give each bundle a name of its own, as NAME=BUNDLE")
        found[given] = bundle
    return found


def documented() -> list[tuple[str, Any, str, Any]]:
    """Name, type, help and default of each setting that is a flag."""
    hints = get_type_hints(Settings)
    return [(f.name, hints[f.name], f.metadata["help"], f.default) for f in dataclasses.fields(Settings) if f.metadata]
