"""Messages between the pool and a reward worker: a length, then JSON, which unlike pickle cannot run code."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_READ_BYTES = 1 << 16


class FrameError(ValueError):
    """The received bytes are not a valid frame."""


class FrameReader:
    """Assembles messages from bytes as they arrive."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._buffer = b""

    def feed(self, received: bytes) -> list[Any]:
        """The messages that these bytes complete.

        Raises:
            FrameError: a message is too long or is not JSON.
        """
        self._buffer += received
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise FrameError(f"received a message of {length} bytes; the limit is {self._max_bytes}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(_decode(self._buffer[_LENGTH.size : end]))
            self._buffer = self._buffer[end:]
        return messages


def encode_frame(message: Any) -> bytes:
    """The bytes of a message; lone surrogates and NUL in its strings are preserved."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def receive_frame(connection: socket.socket) -> Any | None:
    """The next message of a blocking socket; None if the other end has closed it."""
    header = _receive_exactly(connection, _LENGTH.size)
    body = None if header is None else _receive_exactly(connection, _LENGTH.unpack(header)[0])
    return None if body is None else _decode(body)


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, _READ_BYTES))
        except ConnectionResetError:  # the pool was killed before it read an answer
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"received a message that is not JSON: {error}") from None
