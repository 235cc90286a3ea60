"""One kept connection to a server that speaks HTTP/1.1, at little cost: load leaves processors to who is measured."""

from __future__ import annotations

import re
import socket
from typing import Final

from stca.errors import UsageError

_LONGEST_HEAD: Final = 1 << 16
_CLOSE: Final = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_SIZE: Final = re.compile(rb"([0-9a-f]{1,15})[ \t]*(;.*)?\r\n", re.IGNORECASE | re.DOTALL)
# Answers that end with their head.
_NO_BODY: Final = (204, 304)


class SpeaksOtherwiseError(Exception):
    """What answers speaks another protocol."""


class Connection:
    """Asks one thing at a time. Not to be shared between threads.

    Args:
        host, port: of the server.
        seconds: longest wait for it to take or send anything.
    """

    def __init__(self, host: str, port: int, seconds: float = 60.0) -> None:
        self._at, self._seconds = (host, port), seconds
        name = f"[{host}]" if ":" in host else host
        self._host = f"Host: {name}:{port}\r\n"
        self._socket: socket.socket | None = None
        self._read = bytearray()  # and not taken yet

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, bytes]:
        """Send a request and read the answer: its status, its headers as they came, and its body.

        Raises:
            OSError: when the server is not to be had, or went away; the next `ask` connects anew.
            SpeaksOtherwiseError: when the answer is not HTTP/1.1's.
            UsageError: when the path or a header has characters that HTTP has not.
        """
        said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        text = f"{method} {path} HTTP/1.1\r\n{self._host}Content-Length: {len(body)}\r\n{said}\r\n"
        try:
            head = text.encode("latin-1")
        except UnicodeEncodeError as e:
            raise UsageError(
                f"{text[e.start]!a} is no character of an HTTP header; leave it out of path and headers"
            ) from e
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._at, self._seconds)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(head + body)
            status, found = 100, b""
            while status < 200:  # "continue", and the like
                found = self._until(b"\r\n\r\n")
                status = _status(found)
            made = b"" if status in _NO_BODY else self._body(found)
            if _CLOSE.search(found) is not None:
                self.close()
            return status, found, made
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Go away."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._read = None, bytearray()

    def _body(self, head: bytes) -> bytes:
        if (length := _LENGTH.search(head)) is not None:
            return self._take(int(length[1]))
        if _CHUNKED.search(head) is None:
            if _CLOSE.search(head) is None:
                raise SpeaksOtherwiseError
            while self._came():  # the end of the connection is the body's
                pass
            return self._take(len(self._read))
        parts = []
        while (size := _size(self._until(b"\r\n"))) > 0:
            parts.append(self._take(size))
            self._until(b"\r\n")
        while self._until(b"\r\n") != b"\r\n":  # trailers
            pass
        return b"".join(parts)

    def _until(self, end: bytes) -> bytes:
        while (at := self._read.find(end)) < 0:
            if len(self._read) > _LONGEST_HEAD:
                raise SpeaksOtherwiseError
            self._more()
        return self._take(at + len(end))

    def _take(self, count: int) -> bytes:
        while len(self._read) < count:
            self._more()
        taken = bytes(self._read[:count])
        del self._read[:count]
        return taken

    def _more(self) -> None:
        if not self._came():
            raise ConnectionResetError("the server closed the connection")

    def _came(self) -> bool:
        """Whether there is more, which is read then."""
        assert self._socket is not None
        came = self._socket.recv(1 << 16)
        self._read += came
        return bool(came)


def _status(head: bytes) -> int:
    if (found := re.match(rb"HTTP/1\.1 (\d{3})[ \r]", head)) is None:
        raise SpeaksOtherwiseError
    return int(found[1])


def _size(line: bytes) -> int:
    """Of a chunk."""
    if (found := _SIZE.fullmatch(line)) is None:
        raise SpeaksOtherwiseError
    return int(found[1], 16)
