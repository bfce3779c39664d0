"""What stands between a client and the application: the sizes of requests, and whether their clients still wait."""

import asyncio
import contextlib
import threading
from contextvars import ContextVar
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from .errors import RequestError, error_object
from .limits import Limits

# Set when the client of the request that runs has gone.
client_gone: ContextVar[threading.Event] = ContextVar("client_gone")


class ClientMiddleware:
    """Refuses bodies that `limits` do not allow, and tells a request that its client has gone.

    A body counts among those that wait from its first byte until its request was answered.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._waiting_bytes = 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            messages = [await self._receive(receive)]
        except ClientDisconnect:
            return
        except RequestError as error:
            # What is left of the body is not the beginning of another request.
            headers = {"connection": "close"} if error.status == 408 else {"retry-after": "1"}
            content = error_object(str(error), error.status)
            await JSONResponse(content, error.status, headers)(scope, receive, send)
            return
        size = len(messages[0]["body"])
        try:
            await self._answer(scope, messages, receive, send)
        finally:
            self._waiting_bytes -= size

    async def _receive(self, receive: Any) -> dict:
        """The whole body in one message, whose bytes count as waiting from here on.

        Raises:
            RequestError: too large, alone or together with the others, or too slow.
            ClientDisconnect: its client left before its end.
        """
        body, size, more, refusal = bytearray(), 0, True, None
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                # Most clients read no answer before they have sent everything: a refused body is read on, but not kept.
                while more and size <= 8 * self._limits.request_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    refusal = self._refusal(size, len(part)) or refusal
                    if refusal is None:
                        body += part
                        self._waiting_bytes += len(part)
                    else:
                        self._waiting_bytes -= len(body)
                        body.clear()
            if refusal is not None:
                raise refusal
            return {"type": "http.request", "body": bytes(body), "more_body": False}
        except BaseException as error:
            self._waiting_bytes -= len(body)
            if isinstance(error, TimeoutError):
                raise RequestError(
                    f"A request must arrive within {self._limits.receive_seconds:g} seconds: got {size} bytes of one. "
                    "Send smaller pictures.",
                    408,
                ) from error
            raise

    def _refusal(self, size: int, added: int) -> RequestError | None:
        """Why a body of `size` bytes until now, the last `added` of them not yet counted, is not kept."""
        limits = self._limits
        if size > limits.request_bytes:
            return RequestError(
                f"A request may have at most {limits.request_bytes} bytes: got more. Send smaller pictures.", 413
            )
        if self._waiting_bytes + added > limits.waiting_bytes:
            return RequestError(
                f"Requests that wait may have at most {limits.waiting_bytes} bytes together: got more. Ask again "
                "later.",
                503,
            )
        return None

    async def _answer(self, scope: dict, messages: list[dict], receive: Any, send: Any) -> None:
        """The application's answer, whose `client_gone` is set as soon as the client has gone."""
        gone = threading.Event()
        client_gone.set(gone)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        watching = asyncio.create_task(watch())

        async def replay() -> dict:
            # Not kept: the application has a copy of its own.
            if messages:
                return messages.pop()
            await asyncio.shield(watching)
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, replay, send)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
