"""The deployment artifact: a directory whose `manifest.json` names every file with its SHA-256.

`docs/bundle_format.md` is the specification. Loading executes and unpickles nothing, and trusts nothing: a file that is
missing, changed, extra, linked or outside the directory is refused before any engine library sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from stca import typed_json
from stca.errors import BundleError

FORMAT = "stca-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

Scope = Literal["user", "request", "target"]
SCOPES: tuple[Scope, ...] = ("user", "request", "target")
# Stands where the manifest's own digest goes while it is computed: the digest is of the text with this in its place.
_NO_DIGEST = "0" * 64
# What a bundle's files end in; a directory with anything else is not replaced by a bundle.
_SUFFIXES = (".json", ".onnx", ".safetensors", ".plan", ".weights")
HALVES = ("user_encoder", "target_scorer")
GRAPHS = ("request", *HALVES)
_ASIDE = ".old"

# Symbolic sizes with a fixed meaning: packed history tokens, packed targets, requests, and offsets. Rows that these
# count can be joined with other requests' rows in a ragged batch.
TOKENS, TARGETS, USERS, OFFSETS = "N_h", "N_t", "B", "B_plus_1"

# Bytes of one element, by the dtype names that manifests use (numpy's, and ml_dtypes' for the rest).
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: its name in the graph.
        dtype: numpy's name of the element type.
        shape: sizes; a string is symbolic. `TOKENS`, `TARGETS`, `USERS` and `OFFSETS` have a fixed meaning.
        scope: where an input's values come from; None for an output.
        limit: ids must be in `[0, limit)`; None when any value will do.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    scope: Scope | None = None
    limit: int | None = None


def packable(inputs: Sequence[TensorSpec]) -> bool:
    """Whether several requests with these inputs can be joined into one ragged batch: every row says whose it is."""
    counted = {TOKENS if s.scope == "user" else TARGETS for s in inputs if s.shape == (OFFSETS,)}
    return bool(counted) and all(s.shape[:1] and s.shape[0] in {*counted, USERS, OFFSETS} for s in inputs)


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a user state: under this name it leaves the user encoder and enters the target scorer.

    Attributes:
        name, dtype, shape: as in the two graphs.
        bytes_per_token: what one history token adds; 0 when the first axis is not the history's.
        input: the user input it is a copy of, or None when it was computed.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes_per_token: int
    input: str | None = None


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX file of the bundle and what goes in and out of it."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileEntry(TypedDict):
    """A file of the bundle: its digest in hex, and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All a bundle says of itself; `docs/bundle_format.md` has each field's meaning.

    Attributes:
        model: `{"kind": "stca", "config": {…}}`, `{"kind": "callable", "name": …}` or `{"kind": "onnx"}`.
        weights: the weights' version, the SHA-256 of the weights file.
        precision: dtype of the floating-point graph.
        attention: `projected` or `absorbed` where the operator is used, else None.
        graphs: `request`, `user_encoder` and `target_scorer`.
        state: the tensors of a user state.
        appendable: whether encoding new events alone and joining them to a state was shown exact at export.
        max_history: longest history served, in tokens; None for no limit.
        split: the cut's report. parity: the report of the export's own checks. producer: versions that made it.
        engines: what `build` added.
        files: name → `{"sha256", "bytes"}` for every file but the manifest.
    """

    model: Mapping[str, Any]
    weights: str
    precision: str
    attention: str | None
    graphs: Mapping[str, GraphSpec]
    state: tuple[StateSpec, ...]
    appendable: bool
    max_history: int | None
    split: Mapping[str, Any]
    parity: Mapping[str, Any]
    producer: Mapping[str, str]
    engines: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as JSON: `format`, `version`, `digest`, then the fields."""
        head = {"format": FORMAT, "version": FORMAT_VERSION, "digest": _NO_DIGEST}
        text = json.dumps({**head, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"
        return text.replace(_NO_DIGEST, _digest_of(text), 1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: when it is not ours, newer than this library, or lacks a field or has one of the wrong kind.
        """
        try:
            raw = typed_json.parse(text)
        except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a plain ValueError
            raise BundleError(f"{MANIFEST} is not JSON ({e}); export the bundle again") from e
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} does not say format {FORMAT!r}; this is not a bundle")
        version = raw.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{MANIFEST} has version {version!r}; expected an integer from 1")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"bundle has manifest version {version}, this stca reads up to {FORMAT_VERSION}; upgrade stca"
            )
        try:
            manifest: Manifest = typed_json.as_type(
                cls, {k: v for k, v in raw.items() if k not in ("format", "version", "digest")}, MANIFEST
            )
            _check_names(manifest)
        except (TypeError, ValueError, KeyError) as e:
            raise BundleError(f"{MANIFEST} is malformed ({e}); export the bundle again") from e
        return manifest


def _check_names(manifest: Manifest) -> None:
    """What the runtime looks up must be there: the three graphs, their inputs, and dtypes that are known.

    Raises:
        ValueError: naming what is missing.
    """
    if missing := [g for g in GRAPHS if g not in manifest.graphs]:
        raise ValueError(f"graphs: misses {missing[0]!r}")
    for name, graph in manifest.graphs.items():
        if not graph.outputs:
            raise ValueError(f"graphs.{name}: has no outputs")
    tensors = [t for g in manifest.graphs.values() for t in (*g.inputs, *g.outputs)]
    for tensor in [*tensors, *(TensorSpec(s.name, s.dtype, s.shape) for s in manifest.state)]:
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"{tensor.name}: has the unknown dtype {tensor.dtype!r}")
    state, given = {s.name for s in manifest.state}, {t.name for t in manifest.graphs["request"].inputs}
    for name, known in (("user_encoder", given), ("target_scorer", given | state)):
        if unknown := [t.name for t in manifest.graphs[name].inputs if t.name not in known]:
            raise ValueError(f"graphs.{name}: input {unknown[0]!r} is no input of the request graph and no state")
    for spec in manifest.state:
        if spec.input is not None and spec.input not in given:
            raise ValueError(f"state {spec.name!r}: copies {spec.input!r}, which is no input of the request graph")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are all what its manifest says."""

    path: Path
    manifest: Manifest

    def file(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[graph].file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read the manifest and hold every file against it.

        Raises:
            BundleError: naming the first file or field that is not as it should be, and what to do.
        """
        root = Path(path)
        if not os.path.isdir(root):  # unlike Path's, also False for names that cannot exist
            raise BundleError(f"{root}: no such bundle directory; make one with `stca export`")
        if os.path.lexists(root / MANIFEST) and not _is_plain(root / MANIFEST):
            raise BundleError(f"{root}: {MANIFEST} is not a plain file inside the bundle; copy the bundle again")
        try:
            text = (root / MANIFEST).read_bytes().decode("utf-8")  # bytes, so that no line end changes unseen
        except FileNotFoundError as e:
            raise BundleError(f"{root}: has no {MANIFEST}; this is not a bundle, or its export did not finish") from e
        except (OSError, UnicodeDecodeError) as e:
            raise BundleError(f"{root / MANIFEST}: cannot be read ({e})") from e
        try:
            manifest = Manifest.from_json(text)
        except BundleError as e:
            raise BundleError(f"{root}: {e}") from e
        _check_files(root, manifest)
        _check_digest(root, text)
        return cls(root, manifest)


def _check_files(root: Path, manifest: Manifest) -> None:
    present = {p.name for p in root.iterdir()}
    named = {MANIFEST, *manifest.files}
    if missing := sorted(named - present):
        raise BundleError(f"{root}: {missing[0]!r} is missing; copy the bundle again or export it anew")
    if extra := sorted(present - named):
        raise BundleError(
            f"{root}: {extra[0]!r} is not in the manifest; remove it, or copy the bundle again if that is another one's"
        )
    for graph in manifest.graphs.values():
        if graph.file not in manifest.files:
            raise BundleError(f"{root}: graph file {graph.file!r} is not among the manifest's files; export it anew")
    for engine in manifest.engines:
        if engine.get("file") not in manifest.files:
            raise BundleError(
                f"{root}: engine file {engine.get('file')!r} is not among the manifest's files; build the engine again"
            )
    for name, entry in manifest.files.items():
        file = root / name
        if file.parent != root or not _is_plain(file):
            raise BundleError(f"{root}: {name!r} is not a plain file inside the bundle; copy the bundle again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{root}: {name} has {size} bytes, the manifest says {entry['bytes']}; copy it again")
        if (digest := sha256_of(file)) != entry["sha256"]:
            raise BundleError(
                f"{root}: {name} was changed (SHA-256 {digest[:12]}…, expected {entry['sha256'][:12]}…); copy it again"
            )
    if WEIGHTS in manifest.files and manifest.files[WEIGHTS]["sha256"] != manifest.weights:
        raise BundleError(f"{root}: the weights' version is not the digest of {WEIGHTS}; export the bundle anew")


def _is_plain(file: Path) -> bool:
    """Neither a link, whose target may change, nor a pipe, whose end may never come."""
    return file.is_file() and not file.is_symlink()


def seal(root: Path, manifest: Manifest) -> Bundle:
    """Write `manifest` into the directory `root` with the digests of the files that lie there."""
    files = {
        p.name: FileEntry(sha256=sha256_of(p), bytes=p.stat().st_size)
        for p in sorted(root.iterdir())
        if p.name != MANIFEST
    }
    sealed = dataclasses.replace(manifest, files=files)
    (root / MANIFEST).write_text(sealed.to_json(), encoding="utf-8")
    return Bundle(root, sealed)


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_digest(root: Path, text: str) -> None:
    """Hold the manifest's text against the digest it carries, so that no changed byte of it goes unseen."""
    found = re.search(r'"digest": "([0-9a-f]{64})"', text)
    if found is None or found[1] != _digest_of(text[: found.start(1)] + _NO_DIGEST + text[found.end(1) :]):
        raise BundleError(f"{root}: {MANIFEST} was changed; copy the bundle again or export it anew")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class BundleChangedError(BundleError):
    """The bundle that was to be replaced is not what it was when it was read."""


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], *, replaces: Manifest | None = None
) -> Iterator[tuple[Path, Callable[[Manifest], Bundle]]]:
    """Write a bundle beside its place, then put it there in one step; on any failure what was there stays untouched.

    Args:
        path: its place.
        replaces: what must be there when it is put there, so that nothing another process put there is lost.

    Yields:
        A fresh directory to write files into, and `commit(manifest)`, which records the files, writes the manifest
        and swaps the directory in. Without a commit nothing happens to `path`.

    Raises:
        BundleError: when `path` exists and is not a bundle, or its parent cannot be written to.
        BundleChangedError: when another bundle is there than `replaces`.
    """
    target = place_for(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work, lock = _workplace(target)
    except OSError as e:
        raise BundleError(f"{target}: cannot be written ({e.strerror}); choose another --out") from e
    _remove_stale(target)

    def commit(manifest: Manifest) -> Bundle:
        done = seal(work, manifest).manifest
        mask = umask()
        for p in work.iterdir():
            p.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
            _sync(p)
        os.chmod(work, 0o777 & ~mask)
        _sync(work)
        with _still(target, replaces):
            _put(work, target)
        _sync(target.parent)
        return Bundle(target, done)

    try:
        yield work, commit
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise BundleError(f"{target}: cannot be written ({e.strerror}); free space or choose another --out") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after a swap this is the old bundle
        os.close(lock)


def place_for(path: str | os.PathLike[str]) -> Path:
    """Where a bundle for `path` would be written: of a link (`current`), what it points to is replaced.

    Raises:
        BundleError: when something is there that is not a bundle. Ask before long work, not only after it.
    """
    target = Path(os.path.realpath(path))
    if _is_ours(target.parent):
        raise BundleError(f"{target}: lies inside the bundle {target.parent}; choose an --out outside of it")
    if target.exists() and not _may_replace(target):
        raise BundleError(f"{target}: exists and is not a bundle, or not only that; choose another --out or remove it")
    return target


def _workplace(target: Path) -> tuple[Path, int]:
    """A fresh directory beside `target`, and the lock on it that says that someone is writing there."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        lock = os.open(work, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where directories cannot be locked, nobody takes them for left behind
            _lock(lock)
        if work.exists():  # and nobody took it for left behind before it was locked
            return work, lock
        os.close(lock)


def _remove_stale(target: Path) -> None:
    """Remove the work directories beside `target` whose writers were killed: those whose lock can be had."""
    ours = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.tmp")
    for left in [p for p in target.parent.iterdir() if ours.fullmatch(p.name)]:
        if left.with_name(left.name + _ASIDE).exists():
            continue  # killed between two renames: nothing has the bundle's name, and both are there to choose from
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(lock)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(directory: int, *, wait: bool = False) -> None:
    """Lock an open directory for as long as it is open; the system lets go when the process ends, however it ends.

    Raises:
        OSError: when another process has the lock, or there are no such locks here.
    """
    try:
        import fcntl
    except ImportError as e:
        raise OSError("no locks") from e
    fcntl.flock(directory, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def _still(target: Path, expected: Manifest | None) -> Iterator[None]:
    """Keep others who write with an expectation from replacing `target` meanwhile; where locks are to be had, that is.

    Raises:
        BundleChangedError: when the bundle there is not the expected one.
    """
    if expected is None:
        yield
        return
    changed = BundleChangedError(f"{target}: was changed by another process meanwhile; run the command again")
    try:
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise changed from e
    try:
        with contextlib.suppress(OSError):
            _lock(directory, wait=True)
        same = os.path.samestat(os.fstat(directory), os.stat(target))
        if not same or Manifest.from_json((target / MANIFEST).read_text(encoding="utf-8")) != expected:
            raise changed
        yield
    finally:
        os.close(directory)


def _is_ours(directory: Path) -> bool:
    try:
        return f'"format": "{FORMAT}"' in (directory / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _may_replace(target: Path) -> bool:
    """Whether a directory is a bundle, damaged perhaps, and holds nothing that could be anything else."""
    return _is_ours(target) and all(p.suffix in _SUFFIXES and not p.is_dir() for p in target.iterdir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(work: Path, target: Path) -> None:
    if not target.exists():
        os.rename(work, target)
    elif not _exchange(work, target):
        # A file system that cannot exchange two names: for a moment no bundle has the name, but both are whole.
        aside = work.with_name(work.name + _ASIDE)
        os.rename(target, aside)
        os.rename(work, target)
        os.rename(aside, work)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories' names atomically (Linux `renameat2`, RENAME_EXCHANGE); False where that cannot be had."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)


def umask() -> int:
    """The permissions a new file of this process lacks."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
