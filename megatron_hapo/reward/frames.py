"""Messages between the pool and a reward worker: JSON after its length, which no reader can be made to execute."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_READ_BYTES = 1 << 16


class FrameError(ValueError):
    """What came is not a frame."""


class FrameReader:
    """Takes bytes as they come, gives messages."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._buffer = b""

    def feed(self, received: bytes) -> list[Any]:
        """The messages that are complete with these bytes.

        Raises:
            FrameError: a message is too long or is not JSON.
        """
        self._buffer += received
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise FrameError(f"a message of {length} bytes; at most {self._max_bytes} are expected")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(_decode(self._buffer[_LENGTH.size : end]))
            self._buffer = self._buffer[end:]
        return messages


def encode_frame(message: Any) -> bytes:
    """The bytes of a message; lone surrogates and NUL in its strings survive."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def receive_frame(connection: socket.socket) -> Any | None:
    """The next message of a blocking socket; None when the other end closed it."""
    header = _receive_exactly(connection, _LENGTH.size)
    body = None if header is None else _receive_exactly(connection, _LENGTH.unpack(header)[0])
    return None if body is None else _decode(body)


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, _READ_BYTES))
        except ConnectionResetError:  # the pool was killed with an answer unread
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
        raise FrameError(f"a message is not JSON: {error}") from None
