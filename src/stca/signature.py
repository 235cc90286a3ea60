"""Who made a bundle: a detached Ed25519 signature of its manifest, which holds the digest of every other file.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` writes them; `manifest.sig` is the raw signature, 64 bytes,
so that `openssl pkeyutl -verify -rawin` can check it too. Needs the extra `sign`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stca import folders
from stca.errors import BundleError, StcaError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE = "manifest.sig"
# A key's PEM text, or the path of a file with one.
Key: TypeAlias = str | os.PathLike[str] | bytes
# Of Ed25519; and more than any key in PEM, whatever text stands before it.
_SIGNATURE_BYTES, _MOST_KEY_BYTES = 64, 1 << 16


def signature_of(manifest: bytes, private_key: Key) -> bytes:
    """The signature of a manifest's bytes, 64 bytes.

    Raises:
        StcaError: when the key cannot be read or is none of Ed25519.
    """
    serialization, ed25519 = _library()
    pem = _pem(private_key)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (TypeError, ValueError) as e:
        what = "is no private key in PEM; make one with `openssl genpkey -algorithm ed25519`"
        if b"PUBLIC KEY-----" in pem:
            what = "is a public key, which only checks; sign with the private key that it was made from"
        elif isinstance(e, TypeError):  # as cryptography says it of one
            what = "has a password; `openssl pkey -in KEY -out private.pem` writes it without one"
        raise StcaError(f"{_name(private_key)}: {what}") from e
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise StcaError(f"{_name(private_key)}: is no Ed25519 key; make one with `openssl genpkey -algorithm ed25519`")
    return bytes(key.sign(manifest))


def check_signature(root: Path, manifest: bytes, trusted: Key) -> None:
    """Refuse a manifest that the holder of the trusted key did not sign.

    Args:
        root: the bundle's directory, which holds the signature.
        manifest: the manifest's bytes, as they will be used.
        trusted: the public key.

    Raises:
        BundleError: when there is no signature, or it is of other bytes or by another key.
        StcaError: when the key cannot be read or is none of Ed25519.
    """
    key = _public(trusted)
    from cryptography.exceptions import InvalidSignature

    file = root / SIGNATURE
    try:
        signature = b"" if file.exists() and not file.is_file() else folders.read(file, _SIGNATURE_BYTES)
    except FileNotFoundError as e:
        raise BundleError(f"{root}: is not signed; sign it with `stca sign`, or load it without a trusted key") from e
    except OSError as e:
        raise BundleError(f"{file}: cannot be read ({e.strerror}); copy the bundle again") from e
    try:
        key.verify(signature, manifest)
    except InvalidSignature as e:
        raise BundleError(
            f"{root}: was not signed by the holder of {_name(trusted)}, or was changed after that; get it from its "
            "maker, and sign it again after each build or refit"
        ) from e


def _public(trusted: Key) -> Ed25519PublicKey:
    serialization, ed25519 = _library()
    pem = _pem(trusted)
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as e:
        what = "a private key, which stays with its holder" if b"PRIVATE KEY-----" in pem else "no public key in PEM"
        raise StcaError(
            f"{_name(trusted)}: is {what}; write the public one with `openssl pkey -in private.pem -pubout`"
        ) from e
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise StcaError(f"{_name(trusted)}: is no Ed25519 key; only those are taken")
    found: Ed25519PublicKey = key
    return found


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as e:
        raise StcaError("signatures need the package cryptography; install the extra: pip install 'stca[sign]'") from e
    return serialization, ed25519


def _pem(key: Key) -> bytes:
    if isinstance(key, bytes):
        return key
    try:
        pem = folders.read(Path(key), _MOST_KEY_BYTES)
    except (OSError, TypeError, ValueError) as e:
        why = getattr(e, "strerror", None) or "it is no path"
        raise StcaError(f"{_name(key)}: the key cannot be read ({why}); name a file in PEM") from e
    if len(pem) > _MOST_KEY_BYTES:
        raise StcaError(f"{_name(key)}: is larger than any key; name a file in PEM")
    return pem


def _name(key: Key) -> str:
    return "the given key" if isinstance(key, bytes) else str(key)[:200]
