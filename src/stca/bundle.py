"""The deployment artifact: a directory whose `manifest.json` names every file with its SHA-256.

`docs/bundle_format.md` is the specification. Loading executes and unpickles nothing, and trusts nothing: a file that is
missing, changed, extra or outside the directory is refused before any engine library sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stca import folders
from stca.errors import BuildError, BundleError
from stca.manifest import FORMAT, MANIFEST, MOST_BYTES, WEIGHTS, FileEntry, Manifest, is_sealed, weights_version
from stca.signature import SIGNATURE, Key, check_signature, signature_of

# What a bundle's files end in; a directory with anything else is not replaced by a bundle.
_SUFFIXES = (".json", ".onnx", ".safetensors", ".plan", ".weights", ".sig", ".rows", ".digests")


def require_folder(path: str | os.PathLike[str]) -> None:
    """Raises BundleError when there is no directory, which is found out in no time."""
    if not os.path.isdir(path):  # unlike Path's, also False for names that cannot exist
        if os.path.isfile(path):
            raise BundleError(f"{os.fspath(path)}: is a file; name the bundle's folder")
        raise BundleError(f"{os.fspath(path)}: no such bundle directory; make one with `stca export`")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are all what its manifest says."""

    path: Path
    manifest: Manifest

    def file(self, graph: str) -> Path:
        """Path of a graph's ONNX file."""
        return self.path / self.manifest.graphs[graph].file

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: Key | None = None) -> Bundle:
        """Read the manifest and hold every file against it.

        Args:
            path: the bundle's directory.
            trusted: public key of the only one whose bundles are taken; None takes anyone's.

        Raises:
            BundleError: naming the first file or field that is not as it should be, and what to do.
        """
        require_path(path)
        require_folder(path)
        root = Path(path)
        if os.path.lexists(root / MANIFEST) and not (root / MANIFEST).is_file():
            raise BundleError(f"{root}: {MANIFEST} is not a plain file inside the bundle; copy the bundle again")
        try:
            read = _manifest_of(root)
            if trusted is not None:
                check_signature(root, read, trusted)
            text = read.decode("utf-8")  # of bytes, so that no line end changes unseen
        except FileNotFoundError as e:
            raise BundleError(f"{root}: has no {MANIFEST}; this is not a bundle, or its export did not finish") from e
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is not text in UTF-8"
            raise BundleError(f"{root / MANIFEST}: cannot be read ({why}); check its owner and mode, or copy it") from e
        try:
            manifest = Manifest.from_json(text)
        except BundleError as e:
            raise BundleError(f"{root}: {e}") from e
        _check_files(root, manifest)
        if not is_sealed(text):
            raise BundleError(f"{root}: {MANIFEST} was changed; copy the bundle again or export it anew")
        return cls(root, manifest)


def require_path(path: str | os.PathLike[str]) -> None:
    """Whether it is a path at all.

    Raises:
        BundleError: when it is of another kind, or longer than any.
    """
    named = folders.named(path)
    if named is None:
        raise BundleError(f"a bundle's path is text or a Path, not {type(path).__name__:.40}")
    if not named:
        raise BundleError("a bundle's path is empty; name its folder")
    if len(named) > folders.LONGEST_PATH:
        raise BundleError(f"a bundle's path has {len(named)} characters, which no file system takes; name its folder")


def _manifest_of(root: Path) -> bytes:
    """The manifest as it lies there, which is not read to its end when it is too large.

    Raises:
        BundleError: when it is.
    """
    read = folders.read(root / MANIFEST, MOST_BYTES)
    if len(read) > MOST_BYTES:
        raise BundleError(f"{root}: {MANIFEST} is larger than {MOST_BYTES >> 20} MiB; export the bundle again")
    return read


def _check_files(root: Path, manifest: Manifest) -> None:
    present = {*names(root)} - {SIGNATURE}
    named = {MANIFEST, *manifest.names}
    if missing := sorted(named - present):
        raise BundleError(f"{root}: {missing[0]!r} is missing; copy the bundle again or export it anew")
    if extra := sorted(present - named):
        raise BundleError(
            f"{root}: {extra[0]!r} is not in the manifest; remove it, or copy the bundle again if that is another one's"
        )
    for graph in manifest.graphs.values():
        if missing := [name for name in (graph.file, graph.ids) if name and name not in manifest.files]:
            raise BundleError(f"{root}: graph file {missing[0]!r} is not among the manifest's files; export it anew")
    for engine in manifest.engines:
        if engine.file not in manifest.files:
            raise BundleError(
                f"{root}: engine file {engine.file!r} is not among the manifest's files; build the engine again"
            )
    for name, entry in manifest.files.items():
        file = root / name
        if file.parent != root or not file.is_file():  # a link may lead anywhere: what it leads to is what is digested
            raise BundleError(f"{root}: {name!r} is not a plain file inside the bundle; copy the bundle again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{root}: {name} has {size} bytes, the manifest says {entry['bytes']}; copy it again")
        if (digest := sha256_of(file)) != entry["sha256"]:
            raise BundleError(
                f"{root}: {name} was changed (SHA-256 {digest[:12]}…, expected {entry['sha256'][:12]}…); copy it again"
            )
    for table in manifest.tables or ():
        if table.digests not in manifest.files or table.file in manifest.files:
            raise BundleError(f"{root}: the digests of table {table.name!r} are not pinned; export the bundle anew")
        from stca import tables  # which needs numpy; a bundle without any does not

        mapped = tables.TableFile(root, table)
        if table.bytes <= tables.CHECKED_AT_LOAD:
            mapped.check()
    if WEIGHTS in manifest.files and _weights_version(manifest) != manifest.weights:
        raise BundleError(f"{root}: the weights' version is not the digest of {WEIGHTS}; export the bundle anew")


def _weights_version(manifest: Manifest) -> str:
    digests = [manifest.files[t.digests]["sha256"] for t in manifest.tables or ()]
    return weights_version(manifest.files[WEIGHTS]["sha256"], digests)


def names(root: str | os.PathLike[str]) -> list[str]:
    """Entries of a bundle's directory, but for what others keep there: volumes their versions (`..data`), file
    managers what they show (`.DS_Store`).
    """
    return [name for name in os.listdir(root) if not name.startswith(".")]


def seal(root: Path, manifest: Manifest) -> Bundle:
    """Write `manifest` into the directory `root` with the digests of the files that lie there, and with the weights'
    version that they make; tables have digests of their own.
    """
    apart = {MANIFEST, SIGNATURE, *(t.file for t in manifest.tables or ())}
    files = {
        p.name: FileEntry(sha256=sha256_of(p), bytes=p.stat().st_size)
        for p in sorted(root.iterdir())
        if p.name not in apart
    }
    sealed = dataclasses.replace(manifest, files=files)
    if sealed.tables:
        sealed = dataclasses.replace(sealed, weights=_weights_version(sealed))
    (root / MANIFEST).write_text(sealed.to_json(), encoding="utf-8")
    return Bundle(root, sealed)


def sign(path: str | os.PathLike[str], private_key: Key) -> Path:
    """Write the signature of a bundle's manifest into the bundle, and return its file.

    Args:
        path: the bundle's directory; every file is checked first.
        private_key: Ed25519, in PEM.

    Raises:
        BundleError: when the bundle is not whole, or cannot be written to.
        StcaError: when the key cannot be used.
    """
    root = Bundle.load(path).path
    try:
        manifest = _manifest_of(root)
        signature = signature_of(manifest, private_key)
        with tempfile.TemporaryDirectory(prefix=f".{root.resolve().name}.", dir=root.resolve().parent) as work:
            made = Path(work) / SIGNATURE  # beside the bundle: whoever loads it meanwhile sees no unknown file
            made.write_bytes(signature)
            os.replace(made, root / SIGNATURE)
    except OSError as e:
        raise BundleError(f"{root}: cannot be signed ({e.strerror}); check its owner and mode") from e
    return root / SIGNATURE


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
        mask = folders.umask()
        for p in work.iterdir():
            if p.stat().st_nlink == 1:  # a file that another bundle shares keeps the mode it has there
                p.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
            folders.sync(p)
        os.chmod(work, 0o777 & ~mask)
        folders.sync(work)
        with _still(target, replaces):
            folders.put(work, target)
        folders.sync(target.parent)
        return Bundle(target, done)

    try:
        yield work, commit
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise BundleError(f"{target}: cannot be written ({e.strerror}); free space or choose another --out") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after a swap this is the old bundle
        os.close(lock)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A private directory for intermediate files in the system's place for them.

    Those that earlier processes left there because they were killed are removed.

    Raises:
        BuildError: when none can be made.
    """
    place = Path(tempfile.gettempdir(), name)
    try:
        _remove_stale(place)
        work, lock = _workplace(place)
    except OSError as e:
        raise BuildError(f"{place.parent}: cannot be written ({e.strerror}); set TMPDIR to another directory") from e
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def place_for(path: str | os.PathLike[str]) -> Path:
    """Where a bundle for `path` would be written: of a link (`current`), what it points to is replaced.

    Raises:
        BundleError: when something is there that is not a bundle, or nothing can be written there. Ask before long
            work, not only after it.
    """
    target = Path(os.path.realpath(path))
    if _is_ours(target.parent):
        raise BundleError(f"{target}: lies inside the bundle {target.parent}; choose an --out outside of it")
    if target.exists() and (why := _why_kept(target)):
        raise BundleError(f"{target}: {why}; choose another --out or remove it")
    require_writable(target)
    return target


def require_writable(target: Path) -> None:
    """Raises BundleError when nothing can be written beside `target`, nor its folder made: found out by trying."""
    try:
        folder = next(p for p in target.absolute().parents if p.exists())
        os.rmdir(tempfile.mkdtemp(".tmp", f".{target.name}.", folder))
    except OSError as e:
        raise BundleError(f"{target}: cannot be written ({e.strerror}); choose another --out") from e


def _workplace(target: Path) -> tuple[Path, int]:
    """A fresh directory beside `target`, and the lock on it that says that someone is writing there."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        lock = os.open(work, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where directories cannot be locked, nobody takes them for left behind
            folders.lock(lock)
        if work.exists():  # and nobody took it for left behind before it was locked
            return work, lock
        os.close(lock)


def _remove_stale(target: Path) -> None:
    """Remove the work directories beside `target` whose writers were killed: those whose lock can be had."""
    ours = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.tmp")
    for left in [p for p in target.parent.iterdir() if ours.fullmatch(p.name)]:
        if left.with_name(left.name + folders.ASIDE).exists():
            continue  # killed between two renames: nothing has the bundle's name, and both are there to choose from
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                folders.lock(lock)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


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
            folders.lock(directory, wait=True)
        same = os.path.samestat(os.fstat(directory), os.stat(target))
        if not same or Manifest.from_json(_manifest_of(target).decode("utf-8")) != expected:
            raise changed
        yield
    finally:
        os.close(directory)


def _is_ours(directory: Path) -> bool:
    try:
        return f'"format": "{FORMAT}"'.encode() in folders.read(directory / MANIFEST, MOST_BYTES)
    except OSError:
        return False


def _why_kept(target: Path) -> str | None:
    """Why what is there stays; None for a bundle, damaged perhaps, with nothing that could be anything else."""
    if not _is_ours(target):
        return "exists and is not a bundle"
    others = sorted(p.name for p in target.iterdir() if p.suffix not in _SUFFIXES or p.is_dir())
    return f"holds {', '.join(others[:3])} beside the bundle" if others else None
