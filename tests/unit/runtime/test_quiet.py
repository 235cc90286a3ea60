"""A serving process writes no file and opens no socket that it was not asked to: nor do the libraries it loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Between a process and libc, so that native code's calls are seen as well as Python's. Nothing gets out.
GUARD = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static void note(const char* what) {
  FILE* out = fopen(getenv("GUARD"), "a");
  if (out != NULL) fprintf(out, "%s\n", what), fclose(out);
}
int socket(int domain, int type, int protocol) {
  (void)domain, (void)type, (void)protocol;
  note("socket");
  errno = EACCES;
  return -1;
}
int getaddrinfo(const char* node, const char* service, const struct addrinfo* hints, struct addrinfo** found) {
  (void)service, (void)hints, (void)found;
  note(node != NULL ? node : "getaddrinfo");
  return EAI_FAIL;
}
"""
SERVE = """
import sys
import numpy as np
from stca import probe
from stca.runtime import Request, Session
session = Session.load(sys.argv[1], threads=1)
inputs = probe.single(session.manifest.graphs["request"].inputs, 3, 2, np.random.default_rng(0))
for _ in range(2):
    session.score(Request(inputs, "u", 1))
print("scored", flush=True)
sys.stdin.read()
"""


class Server:
    """A process that loaded a session and scored, with a home of its own and the guard before libc."""

    def __init__(self, folder: Path, library: Path, bundle: Path, **variables: str) -> None:
        self.home, self.calls = folder / "home", folder / "calls"
        self.home.mkdir(parents=True)
        # Nothing of the tests' own environment: ONNX Runtime's telemetry is off where it sees a CI's variables.
        environment = {n: os.environ[n] for n in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if n in os.environ} | {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "TMPDIR": str(self.home),
            "GUARD": str(self.calls),
            "LD_PRELOAD": str(library),
            "PYTHONDONTWRITEBYTECODE": "1",
            **variables,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(bundle)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "scored\n"

    def seen(self) -> tuple[list[str], list[str]]:
        """Names of files it wrote, and sockets it opened or hosts it looked up."""
        files = sorted(p.name for p in self.home.rglob("*") if p.is_file())
        return files, self.calls.read_text().split() if self.calls.exists() else []

    def end(self) -> str:
        """What it printed besides, until it was told to end."""
        return self.process.communicate(timeout=60)[0]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="the guard is C, and Linux's")
def test_no_files_and_no_sockets_of_anybodys(bundle_dir, tmp_path):
    """With ONNX Runtime's telemetry on, the same guard sees its files at once and its socket some nine seconds later.

    The quiet process is looked at when that has happened.
    """
    (tmp_path / "guard.c").write_text(GUARD)
    library = tmp_path / "guard.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "guard.c")]
    subprocess.run(command, check=True, capture_output=True)
    quiet = Server(tmp_path / "quiet", library, bundle_dir)
    loud = Server(tmp_path / "loud", library, bundle_dir, ORT_DISABLE_TELEMETRY="0")
    try:
        ends = time.monotonic() + 60
        while not all(loud.seen()) and time.monotonic() < ends:
            time.sleep(0.2)
        files, calls = loud.seen()
        assert "deviceid" in files
        assert calls, "the guard, or this time, is too short to see a socket"
        assert quiet.seen() == ([], [])
        assert quiet.end() == ""
        assert quiet.seen() == ([], [])
    finally:
        for server in (quiet, loud):
            server.process.kill()
            server.process.wait()
