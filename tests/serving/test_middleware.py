"""Bodies that wait, too large or too slow ones, and what is free again afterwards."""

import asyncio
import json

import pytest

from emma_hf.serving.limits import Limits

pytest.importorskip("starlette", reason='needs `pip install "emma-hf[serve]"`')

from emma_hf.serving.middleware import ClientMiddleware

LIMITS = Limits(request_bytes=60, waiting_bytes=100)


class Server:
    """An application that reads each body and answers when it is let go, behind the middleware."""

    def __init__(self, limits: Limits) -> None:
        self.application = ClientMiddleware(self.answer, limits)
        self.go = asyncio.Event()
        self.read: list[bytes] = []

    async def answer(self, scope, receive, send) -> None:
        self.read.append((await receive())["body"])
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    """One request to a `Server`, whose body arrives in the pieces that are sent."""

    def __init__(self, server: Server) -> None:
        self.pieces: asyncio.Queue = asyncio.Queue()
        self.sent: list[dict] = []
        self.task = asyncio.create_task(server.application({"type": "http"}, self.pieces.get, self.keep))

    async def keep(self, message: dict) -> None:
        self.sent.append(message)

    async def send(self, *sizes: int, end: bool = True) -> None:
        for number, size in enumerate(sizes, start=1):
            more = not end or number < len(sizes)
            self.pieces.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        for _ in range(10):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self.pieces.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self.task, 30)

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 30)
        return self.sent[0]["status"]

    def message(self) -> str:
        return json.loads(self.sent[1]["body"])["error"]["message"]


def test_bodies_that_wait_share_one_limit():
    async def run() -> None:
        server = Server(LIMITS)
        first, over, small, empty = (Client(server) for _ in range(4))
        await first.send(30, 30)
        # The first of its pieces would fit; it is read to its end, and nothing of it is kept.
        await over.send(30, 11, 10)
        assert await over.status() == 503
        assert over.message() == "Requests that wait may have at most 100 bytes together: got more. Ask again later."
        assert (b"retry-after", b"1") in over.sent[0]["headers"]
        assert over.pieces.empty()
        await small.send(40)
        # Full to the last byte, and what has no body is answered.
        await empty.send(0)
        assert [len(body) for body in server.read] == [60, 40, 0]
        server.go.set()
        assert [await client.status() for client in (first, small, empty)] == [200] * 3
        again = [Client(server), Client(server)]
        await again[0].send(60)
        await again[1].send(40)
        assert [await client.status() for client in again] == [200, 200]

    asyncio.run(run())


@pytest.mark.parametrize("how", ["too large", "too slow", "gone"])
def test_what_is_not_answered_waits_no_longer(how):
    async def run() -> None:
        server = Server(Limits(request_bytes=60, waiting_bytes=60, receive_seconds=0.05))
        client = Client(server)
        if how == "too large":
            await client.send(50, 11)
            assert await client.status() == 413
            assert client.message() == "A request may have at most 60 bytes: got more. Send smaller pictures."
        elif how == "too slow":
            await client.send(50, end=False)
            assert await client.status() == 408
            assert "must arrive within 0.05 seconds: got 50 bytes of one" in client.message()
            assert (b"connection", b"close") in client.sent[0]["headers"]
        else:
            await client.send(50, end=False)
            await client.leave()
            assert not client.sent
        server.go.set()
        whole = Client(server)
        await whole.send(60)
        assert await whole.status() == 200

    asyncio.run(run())
