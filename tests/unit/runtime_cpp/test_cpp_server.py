"""The example server in C++: its protocol, and that it outlives its clients."""

from __future__ import annotations

import contextlib
import resource
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from building import FLAGS, GOLDEN, MISSING, REPOSITORY, SANITIZERS, command, configure

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} to build the C++ runtime")


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp_server")
    # The check of an object's type asks the system through a pipe; where no descriptor is left, it reports any object.
    flags = f"-DCMAKE_CXX_FLAGS={FLAGS} -fsanitize={SANITIZERS} -fno-sanitize=vptr"
    configure(REPOSITORY / "examples" / "cpp_server", folder, f"-DCMAKE_PREFIX_PATH={installed}", flags)
    command("cmake", "--build", folder)
    return folder / "cpp_server"


class Client:
    """One connection, line by line."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.stream = self.socket.makefile("rw", encoding="utf-8")

    def ask(self, line: str) -> str:
        self.stream.write(line + "\n")
        self.stream.flush()
        return self.stream.readline().rstrip("\n")

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@contextlib.contextmanager
def serving(program: Path, *, descriptors: int | None = None, seconds: int = 30) -> Iterator[int]:
    """The example server on a free port; told to end, it ends at once and well, whoever is still connected."""

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    with subprocess.Popen(
        [program, GOLDEN / "log", "0", "none", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    ) as process:
        assert process.stdout is not None
        try:
            where, engine = process.stdout.readline().strip().split(", engine ")
            assert engine.startswith("none")
            yield int(where.split(":")[1])
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()


def test_wrong_ports_and_bundles_are_told(server: Path) -> None:
    for port in ("-1", "65536", "80x", " 80", "", "http"):
        wrong = [server, GOLDEN / "log", port, "none"]
        done = subprocess.run(wrong, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert done.stderr == f"'{port}' is no port; give a number from 1 to 65535, or 0 for a free one\n"
    nowhere = subprocess.run([server, GOLDEN / "nowhere"], capture_output=True, text=True, timeout=20)
    assert nowhere.returncode == 1
    assert "no such bundle" in nowhere.stderr


def test_protocol(server: Path) -> None:
    history = "history_item=1,2,3 history_action=0,1,3 user_segment=2 user_profile=0.5,1"
    targets = "request_device=1 target_item=7,999 target_price=1.5,2,0.25,0"
    with serving(server) as port:
        ask = Client(port).ask
        assert ask(f"score ann v1 {history} {targets}") == "ok 0 0 0 0"
        assert ask(f"score ann v1 {targets}") == "ok 0 0 0 0"
        assert ask("append ann v2 history_item=4 history_action=1") == "ok kept"
        assert ask("append bob v2 history_item=4 history_action=1") == "ok nothing"
        assert ask("stats") == "ok hits 1 misses 1 users 1 bytes 56"
        refused = "error 8 target_item: holds 1000 at [0]; it must be in [0, 999]"
        assert ask(f"score ann v2 {targets.replace('7,999', '1000,1')}") == refused
        assert ask("score ann v2 target_item=x").startswith("error 8 'x': not numbers")
        assert ask("score ann v2 colour=1").startswith("error 8 'colour=1'")
        assert ask("nonsense").startswith("error 8 'nonsense'")
        for line in (
            "\x1b[2Jé" + "y" * 1000,
            "score ann v2 target_item=1,\x1b" + "y" * 1000,
            "score ann v2 \x1b" + "y" * 1000,
        ):
            said = ask(line)
            assert said.isprintable()
            assert said.isascii()
            assert len(said) < 160
            assert "yyy...'" in said
        assert ask(f"swap {GOLDEN / 'nowhere'}").startswith("error 6 ")
        assert ask(f"swap {GOLDEN / 'log_other_weights'}").startswith("ok ")
        assert ask(f"score ann v2 {targets}").startswith("error 10 user 'ann'")
        assert ask("forget ann") == "ok nothing"


def test_connections_are_bounded(server: Path) -> None:
    with serving(server) as port:
        clients = [Client(port) for _ in range(64)]
        assert {c.ask("stats")[:2] for c in clients} == {"ok"}
        assert Client(port).stream.readline().startswith("error 0 busy: 64 connections")
        for client in clients[:8]:
            client.close()
        assert eventually(lambda: Client(port).ask("stats")).startswith("ok ")
        assert clients[9].ask("x" * (1 << 20)).startswith("error 8")


def test_it_outlives_the_descriptor_limit(server: Path) -> None:
    with serving(server, descriptors=24) as port:
        clients = [Client(port) for _ in range(40)]  # the system takes them; the server cannot yet
        assert clients[0].ask("stats").startswith("ok ")
        for client in clients[1:]:
            client.close()
        assert eventually(lambda: Client(port).ask("stats")).startswith("ok ")
        assert clients[0].ask("stats").startswith("ok ")


def test_clients_cannot_hold_a_place(server: Path) -> None:
    with serving(server, seconds=1) as port:
        assert Client(port).stream.readline() == ""  # nothing came of it
        dripping = Client(port)
        with contextlib.suppress(OSError):  # a line that never ends, and a client that is never silent
            for _ in range(200):
                dripping.socket.sendall(b"s")
                if select.select([dripping.socket], [], [], 0.05)[0]:
                    break
        assert dripping.stream.readline().startswith("error 8 line: did not end in time")
        assert Client(port).ask("stats").startswith("ok ")


def test_it_ends_whoever_does_not_read(server: Path) -> None:
    with serving(server) as port:
        deaf = Client(port)
        deaf.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # until neither side's buffers take any more
            for _ in range(100_000):
                deaf.socket.send(b"stats\n" * 1000)
        assert Client(port).ask("stats").startswith("ok ")


def eventually(ask: Callable[[], str]) -> str:
    """The first answer that is one, within a minute."""
    last = time.monotonic() + 60
    while time.monotonic() < last:
        with contextlib.suppress(OSError):
            if (answer := ask()).startswith("ok "):
                return answer
        time.sleep(0.1)
    return "none"
