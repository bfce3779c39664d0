"""An HTTP download with a deadline for all of it: connecting, redirects, headers and body."""

import contextlib
import socket
import threading
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from typing import Any


def fetch(url: str, max_bytes: int, deadline: float) -> bytes:
    """Download from an `http` or `https` URL. Redirects lead to these protocols only.

    Args:
        url: address.
        max_bytes: one byte more than this is read at most, so that a longer body can be told.
        deadline: value of `time.monotonic()` at which the connections are closed.

    Returns:
        The body, or its first `max_bytes + 1` bytes.

    Raises:
        TimeoutError: the deadline passed.
        OSError, ValueError, http.client.HTTPException: an address that is none, or gives nothing.
    """
    sockets: list[socket.socket] = []
    late = threading.Event()

    def close() -> None:
        late.set()
        for one in sockets:
            # It may be closed already.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(sockets, deadline),
        _Https(sockets, deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    # A timeout of the sockets alone would start again with each byte that arrives.
    watchdog = threading.Timer(max(deadline - time.monotonic(), 0), close)
    watchdog.daemon = True
    watchdog.start()
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "emma-hf"})) as response:
            data = response.read(max_bytes + 1)
    except Exception as error:
        if late.is_set() or time.monotonic() >= deadline:
            raise TimeoutError from error
        raise
    finally:
        watchdog.cancel()
    if late.is_set():
        raise TimeoutError
    return data


class _Connection(HTTPConnection):
    """Tells which socket it uses, and connects before the deadline."""

    def __init__(self, *args: Any, sockets: list[socket.socket], deadline: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sockets, self._deadline = sockets, deadline

    def connect(self) -> None:
        # The C library would take the port modulo 65536 and ask another server.
        if not 0 < self.port < 65536:
            raise ValueError(f"a port is 1 to 65535: got {self.port}")
        # 0 would mean a socket that does not wait.
        self.timeout = max(self._deadline - time.monotonic(), 0.001)
        super().connect()
        self._sockets.append(self.sock)


class _SecureConnection(_Connection, HTTPSConnection):
    """The same with TLS."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, sockets: list[socket.socket], deadline: float) -> None:
        super().__init__()
        self._connection = partial(_Connection, sockets=sockets, deadline=deadline)

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, sockets: list[socket.socket], deadline: float) -> None:
        super().__init__()
        self._connection = partial(_SecureConnection, sockets=sockets, deadline=deadline)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._connection, request)
