"""Messages of bytes over a socket, with time limits."""

import socket
import struct
import time

LENGTH = struct.Struct("!Q")


class Closed(Exception):
    """The other end is closed."""


class Channel:
    """One end of a connection between two processes; each message is preceded by its length.

    Attributes:
        end: The socket, which is readable when a message has arrived.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, message: bytes, seconds: float | None = None) -> None:
        """Send a message. Raises Closed, or TimeoutError where it takes longer than `seconds`."""
        self.end.settimeout(seconds)
        try:
            self.end.sendall(LENGTH.pack(len(message)) + message)
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed from error

    def receive(self, seconds: float | None = None) -> bytes:
        """Wait for a message. Raises Closed, or TimeoutError where it takes longer than `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        (length,) = LENGTH.unpack(self._read(LENGTH.size, end))
        return self._read(length, end)

    def close(self) -> None:
        """Close this end."""
        self.end.close()

    def _read(self, length: int, end: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self.end.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
            try:
                part = self.end.recv(min(length - len(parts), 1 << 20))
            except TimeoutError:
                raise
            except OSError as error:
                raise Closed from error
            if not part:
                raise Closed
            parts += part
        return bytes(parts)
