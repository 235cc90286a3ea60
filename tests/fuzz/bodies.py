"""`python tests/fuzz/bodies.py`: requests that were changed, sent to a server of a golden bundle over HTTP and gRPC.

Each is answered with scores or with a refusal (4xx, in one line), and the server goes on. Changed are JSON trees, the
bytes of JSON, of tensors and of messages, the length of the JSON, the packing, the path, HTTP's own lines, and gRPC's
frames. A case depends on its number alone. What was found goes to `--out` line by line; the same command again goes on
where it stopped. Exit codes: 0 nothing went wrong, 1 something did, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import mutations
import numpy as np
import outcomes
from outcomes import Outcome

from stca import probe
from stca.bundle import Bundle
from stca.serve.http_body import HEADER_LENGTH
from stca.serve.messages import SERVICE, message

BUNDLE = Path(__file__).resolve().parents[1] / "golden" / "bundle-v1"
SECONDS = 20
KINDS = ("tree", "text", "binary", "packed", "path", "message", "contents", "lines", "frames")
DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}
# What the log of a server must not have: a failure that no error of ours stands for.
FAILED = '"event": "failed"'


class Asked:
    """A server of the golden bundle in a process of its own, and the request that is changed."""

    def __init__(self, log: Path) -> None:
        ports = [f for p in ("http", "grpc", "admin") for f in (f"--{p}-port", "0")]
        options = ["--body-mib", "4", "--max-targets", "2000", "--body-seconds", "2", "--json"]
        command = [sys.executable, "-m", "stca", "serve", f"m={BUNDLE}", *ports, *options]
        self.log, self._errors = log, log.open("wb")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        assert self.process.stdout
        self.ports: dict[str, int] = json.loads(self.process.stdout.readline())["ports"]
        specs = Bundle.load(BUNDLE).manifest.graphs["request"].inputs
        self.inputs = probe.single(specs, 4, 3, np.random.default_rng(0))
        self._connection = self._connected()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.ports['grpc']}")
        self._infer = self._channel.unary_unary(f"/{SERVICE}/ModelInfer")

    def close(self) -> None:
        self._connection.close()
        self._channel.close()
        self.process.terminate()
        self.process.wait(30)
        self._errors.close()

    def _connected(self, port: str = "http") -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=SECONDS)

    def http(self, path: str, body: bytes, headers: dict[str, str], port: str = "http") -> tuple[int, bytes]:
        connection = self._connection if port == "http" else self._connected(port)
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except Exception:
            connection.close()
            raise
        finally:
            if port != "http":
                connection.close()

    def grpc(self, data: bytes) -> tuple[str, str]:
        try:
            self._infer(data, timeout=SECONDS)
        except grpc.RpcError as e:
            return e.code().name, e.details() or ""
        return "OK", ""

    def raw(self, port: str, data: bytes) -> bytes:
        """What comes back on a connection of its own, until it ends or falls silent."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.ports[port]), timeout=0.05) as s, contextlib.suppress(OSError):
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            while part := s.recv(1 << 16):
                found += part
        return found

    def alive(self) -> bool:
        """Whether both doors still answer."""
        self._connection.close()
        try:
            ready = self.http("/v2/health/live", b"", {})[0] == 405  # it is there, and takes no POST
            self._channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=SECONDS)
        except (OSError, http.client.HTTPException, grpc.RpcError):
            return False
        return ready and self.process.poll() is None


def tree(asked: Asked) -> dict[str, Any]:
    """The request as JSON."""
    inputs = [
        {"name": n, "shape": list(x.shape), "datatype": DATATYPES[x.dtype.name], "data": x.tolist()}
        for n, x in asked.inputs.items()
    ]
    return {"id": "a", "inputs": inputs, "outputs": [{"name": "scores"}], "parameters": {"user": "ann", "version": 1}}


def binary(asked: Asked) -> tuple[bytes, bytes]:
    """The same as JSON and bytes."""
    made = tree(asked)
    for one in made["inputs"]:
        one["parameters"] = {"binary_data_size": asked.inputs[one["name"]].nbytes}
        del one["data"]
    return json.dumps(made).encode(), b"".join(x.tobytes() for x in asked.inputs.values())


def of_grpc(asked: Asked, *, contents: bool) -> bytes:
    made = message("ModelInferRequest")(model_name="m", id="a")
    made.parameters["user"].string_param = "ann"
    for name, x in asked.inputs.items():
        one = made.inputs.add(name=name, datatype=DATATYPES[x.dtype.name], shape=x.shape)
        if contents:
            one.contents.int64_contents.extend(x.ravel().tolist())
        else:
            made.raw_input_contents.append(x.tobytes())
    return bytes(made.SerializeToString())


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, left out, put in, repeated or cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(found) + 1)
        how = rng.randrange(5)
        if how == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del found[at : at + rng.randint(1, 8)]
        elif how == 2:
            found[at:at] = rng.choice((b"\xff" * 9, b"\x00", b'"', b"[[[[", b"}", b"9" * 30, rng.randbytes(4)))
        elif how == 3:
            found += found[at : at + rng.randint(1, 60)]
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def frames(rng: random.Random) -> bytes:
    """The preface of HTTP/2, and frames of random kinds, lengths and streams."""
    data = rng.choice((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", rng.randbytes(24)))
    for _ in range(rng.randint(1, 8)):
        body = rng.randbytes(rng.choice((0, 4, 6, 8, 40)))
        length = rng.choice((len(body), len(body), 0, (1 << 24) - 1))
        data += struct.pack(">I", length)[1:] + bytes([rng.randrange(12), rng.randrange(256)])
        data += struct.pack(">I", rng.choice((0, 1, 3, 1 << 31))) + body
    return data


def look(asked: Asked, number: int) -> Outcome:
    """What becomes of a case."""
    rng, case = random.Random(number), str(number)
    kind = KINDS[number % len(KINDS)]
    if kind in ("message", "contents"):
        return _judged_grpc(case, *asked.grpc(flipped(rng, of_grpc(asked, contents=kind == "contents"))))
    if kind == "frames":
        asked.raw("grpc", frames(rng))
        return Outcome(case, "refused", "frames")
    path, headers = "/v2/models/m/infer", {"Content-Type": "application/json"}
    port = "admin" if rng.random() < 0.1 else "http"
    if port == "admin":
        path = f"/v2/models/m/{rng.choice(('append', 'warm', 'forget', 'swap'))}"
    if kind == "tree":
        made = tree(asked)
        for _ in range(rng.randint(1, 3)):
            mutations._change_in(rng, made)
        body = json.dumps(made).encode()
    elif kind in ("text", "path", "lines"):
        body = json.dumps(tree(asked)).encode()
        body = flipped(rng, body) if kind == "text" else body
    else:
        head, data = binary(asked)
        length = len(head) if rng.random() < 0.7 else rng.choice((0, 1, len(head) - 1, len(head) + len(data), 1 << 40))
        head, data = (flipped(rng, head), data) if rng.random() < 0.5 else (head, flipped(rng, data))
        body, headers[HEADER_LENGTH] = head + data, str(length)
    if kind == "packed":
        headers["Content-Encoding"] = rng.choice(("gzip", "gzip", "deflate", "br"))
        body = gzip.compress(body, 1) if rng.random() < 0.5 else flipped(rng, gzip.compress(body, 1))
    if kind in ("path", "lines"):
        start = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        start = flipped(rng, start if kind == "lines" else start[:60]) + (b"" if kind == "lines" else start[60:])
        answer = asked.raw(port, start + body)
        status = answer[9:12].decode("latin-1")
        return Outcome(case, "unexpected" if status.startswith("5") else "refused", f"HTTP {status}")
    return _judged_http(case, *asked.http(path, body, headers, port))


def _judged_http(case: str, status: int, body: bytes) -> Outcome:
    said = body[:300].decode("latin-1")
    if status == 200:
        return Outcome(case, "served")
    fine = 400 <= status < 500 and "\n" not in json.loads(body)["error"]
    return Outcome(case, "refused" if fine or status == 504 else "unexpected", f"{status} {said}")


def _judged_grpc(case: str, code: str, said: str) -> Outcome:
    wrong = code in ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "CANCELLED") or "\n" in said
    return Outcome(case, "served" if code == "OK" else "unexpected" if wrong else "refused", f"{code} {said}")


def found(cases: Iterable[str]) -> Iterator[Outcome]:
    """What became of each case, in order; a server that died is started again."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Asked(Path(folder, "log"))
        told = 0
        try:
            for case in cases:
                try:
                    outcome = look(asked, int(case))
                except (OSError, http.client.HTTPException) as e:
                    outcome = Outcome(case, "unexpected", f"{type(e).__name__}: {e}")
                if (outcome.kind in outcomes.BAD or int(case) % 200 == 199) and not asked.alive():
                    outcome = Outcome(case, "died", f"after {outcome.said}")
                    asked.close()
                    asked = Asked(Path(folder, f"log{case}"))
                failures = asked.log.read_text().count(FAILED)
                if failures > told:
                    outcome = Outcome(case, "wrong", f"the server's log has a failure: {outcome.said}")
                told = failures
                yield outcome
        finally:
            asked.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked and has not been run yet; returns the exit code."""
    return outcomes.command(__file__, found, argv, about=__doc__, rounds=5000, of="changed requests")


if __name__ == "__main__":
    sys.exit(main())
