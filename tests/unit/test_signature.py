"""Signed bundles: only the trusted key's holder's are taken, whatever else is right about the others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.errors import one_line

from stca import commands
from stca.bundle import Bundle, seal, sign, writing
from stca.errors import BundleError, StcaError
from stca.runtime import Session

PEM, RAW = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo


def _keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, RAW, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return _keys(tmp_path, "ours")


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


def test_the_trusted_keys_bundles_are_taken(bundle, keys, capsys):
    private, public = keys
    assert commands.main(["sign", str(bundle), "--key", str(private)]) == 0
    assert Bundle.load(bundle).manifest == Bundle.load(bundle, trusted=public).manifest
    session = Session.load(bundle, trusted=public.read_bytes())
    session.swap(bundle)
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "ours.pem", "ours.pub.pem"]


def test_any_other_is_refused(bundle, keys, tmp_path):
    private, public = keys
    with pytest.raises(BundleError, match="is not signed"):
        Session.load(bundle, trusted=public)
    sign(bundle, _keys(tmp_path, "theirs")[0])
    with pytest.raises(BundleError, match=r"not signed by the holder of .*ours\.pub\.pem"):
        Session.load(bundle, trusted=public)
    sign(bundle, private)
    session = Session.load(bundle, trusted=public)
    seal(bundle, Bundle.load(bundle).manifest.__class__(**{**vars(Bundle.load(bundle).manifest), "max_history": 7}))
    assert Bundle.load(bundle).manifest.max_history == 7  # resealed: its digests are right
    for load in (lambda: Session.load(bundle, trusted=public), lambda: session.swap(bundle)):
        with pytest.raises(BundleError, match="changed after that"):
            load()
    (bundle / "manifest.sig").write_bytes(b"short")
    with pytest.raises(BundleError, match="not signed by"):
        Bundle.load(bundle, trusted=public)


def test_a_changed_file_is_refused_though_the_manifest_is_signed(bundle, keys):
    private, public = keys
    sign(bundle, private)
    (bundle / "weights.safetensors").write_bytes((bundle / "weights.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"weights\.safetensors was changed"):
        Bundle.load(bundle, trusted=public)


def test_a_signed_bundle_is_replaced_like_any_other(bundle, keys):
    sign(bundle, keys[0])
    manifest = Bundle.load(bundle).manifest
    with writing(bundle) as (work, commit):
        for name in manifest.files:
            shutil.copy(bundle / name, work / name)
        commit(manifest)
    assert not (bundle / "manifest.sig").exists()  # it was of the manifest before
    Bundle.load(bundle)


def test_openssl_can_check_it(bundle, keys):
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    sign(bundle, keys[0])
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", keys[1]]
    command += ["-in", bundle / "manifest.json", "-sigfile", bundle / "manifest.sig"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_keys_that_are_none(bundle, keys, tmp_path):
    private, public = keys
    other = ec.generate_private_key(ec.SECP256R1())
    wrong = {
        "junk": b"junk",
        "curve": other.private_bytes(PEM, RAW, serialization.NoEncryption()),
        "locked": ed25519.Ed25519PrivateKey.generate().private_bytes(
            PEM, RAW, serialization.BestAvailableEncryption(b"secret")
        ),
        "public": public.read_bytes(),
    }
    for pem in wrong.values():
        with pytest.raises(StcaError, match=r"the given key: (is|has) "):
            sign(bundle, pem)
    for pem in (b"junk", private.read_bytes(), other.public_key().public_bytes(PEM, PUBLIC)):
        with pytest.raises(StcaError, match=r"the given key: (is|has) "):
            Bundle.load(bundle, trusted=pem)
    for place in (tmp_path / "nowhere", tmp_path, "a\0b"):
        with pytest.raises(StcaError, match="cannot be read"):
            Bundle.load(bundle, trusted=place)
    assert not (bundle / "manifest.sig").exists()


def test_files_without_an_end_are_not_read_to_it(bundle, keys):
    private, public = keys
    sign(bundle, private)
    os.truncate(bundle / "manifest.sig", 1 << 40)
    with one_line(BundleError, "not signed by the holder"):
        Bundle.load(bundle, trusted=public)
    for key, use in ((public, lambda: Bundle.load(bundle, trusted=public)), (private, lambda: sign(bundle, private))):
        os.truncate(key, 1 << 40)
        with one_line(StcaError, key.name, "larger than any key"):
            use()


def test_a_key_of_the_other_kind_is_told_what_it_is(bundle, keys, tmp_path):
    private, public = keys
    locked = tmp_path / "locked.pem"
    key = ed25519.Ed25519PrivateKey.generate()
    locked.write_bytes(key.private_bytes(PEM, RAW, serialization.BestAvailableEncryption(b"word")))
    for wrong, words in ((public, ("is a public key", "private")), (locked, ("has a password", "openssl pkey"))):
        with one_line(StcaError, str(wrong), *words):
            sign(bundle, wrong)
    with one_line(StcaError, str(private), "is a private key", "-pubout"):
        Bundle.load(bundle, trusted=private)
