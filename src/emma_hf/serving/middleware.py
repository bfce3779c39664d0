"""What stands between a client and the application: the size of a request, and whether its client still waits."""

import asyncio
import contextlib
import threading
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse

from .errors import error_object

# Set when the client of the request that runs has gone.
client_gone: ContextVar[threading.Event] = ContextVar("client_gone")


class ClientMiddleware:
    """Refuses bodies over `limit` bytes, and tells the request that its client has gone."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        # Most clients read no answer before they have sent everything; what is too much is read on, but not kept.
        while more and size <= 8 * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self._limit:
                body += part
            else:
                body.clear()
        if size > self._limit:
            text = f"A request may have at most {self._limit} bytes: got more. Send smaller pictures."
            await JSONResponse(error_object(text, 413), status_code=413)(scope, receive, send)
            return

        gone = threading.Event()
        client_gone.set(gone)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        watching = asyncio.create_task(watch())
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> dict:
            if (message := next(messages, None)) is not None:
                return message
            await asyncio.shield(watching)
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, replay, send)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
