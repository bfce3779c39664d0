"""`emma-hf serve`: Transformers' OpenAI-compatible server for one EMMA.

The server, its queue and its answers are Transformers' own (`transformers serve`, 5.x). What is added stands between it
and its clients: requests are checked before they run, errors have OpenAI's form and the right status, and an answer
that nobody waits for any more is not computed to its end.
"""

import asyncio
import contextlib
import copy
import inspect
import logging
import socket
import sys
import threading
import time
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from .requests import ChatRequest, Limits, RequestError, read_request

if int(transformers.__version__.split(".")[0]) < 5:
    raise MissingPackageError(
        f"`emma-hf serve` needs the server of Transformers 5: got Transformers {transformers.__version__}. Install it "
        'with `pip install "emma-hf[serve]" "transformers>=5.16.1"`.'
    )
try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
except ImportError as error:
    raise MissingPackageError(
        f"`emma-hf serve` needs FastAPI, uvicorn and openai beside Transformers 5.16.1 or newer: {error}. Install them "
        'with `pip install "emma-hf[serve]"`.'
    ) from error

logger = logging.getLogger(__name__)
# What a client gets where it says nothing, as in Transformers' own server.
DEFAULT_MAX_TOKENS = 1024
ROUTES = {"/v1/chat/completions", "/v1/models", "/health"}
# Set when the client of the request that runs has gone.
_client_gone: ContextVar[threading.Event] = ContextVar("client_gone")


def serve(
    model: EmmaForConditionalGeneration,
    processor: EmmaProcessor,
    name: str,
    listener: socket.socket,
    limits: Limits | None = None,
) -> None:
    """Answer requests until interrupted.

    Args:
        model: in eval mode, where it is to compute.
        processor: of the same checkpoint.
        name: under which clients ask for it.
        listener: bound socket; see `listen`.
        limits: of one request.
    """
    host, port = listener.getsockname()[:2]
    print(f"emma-hf: {name} answers at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    server = uvicorn.Server(uvicorn.Config(build_app(model, processor, name, limits), log_level="warning"))
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: any free one).

    Raises:
        EmmaError: an address that is not this machine's, or a port in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EmmaError(
            f"`--host` and `--port` must name an address of this machine that is free: got {host}:{port} ({error})."
        ) from error


def build_app(
    model: EmmaForConditionalGeneration, processor: EmmaProcessor, name: str, limits: Limits | None = None
) -> "FastAPI":
    """The server as an ASGI application; the arguments are those of `serve`."""
    limits = limits or Limits()
    manager = _OneModel(name, model, processor)
    state = GenerationState()
    # How many other handlers there are differs from version to version; their routes go below.
    handlers: dict[str, Any] = {
        name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")
    }
    handlers["chat_handler"] = _ChatHandler(manager, state, limits)
    app = build_server(model_manager=manager, generation_state=state, **handlers)
    # The others load models that a client names, forget them for everybody, or take their requests unchecked.
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    for kind, answer in (
        (RequestError, _refused),
        (RequestValidationError, _malformed),
        (HTTPException, _http_error),
    ):
        app.add_exception_handler(kind, answer)
    app.add_middleware(_ClientMiddleware, limit=limits.request_bytes)
    return app


class _OneModel(ModelManager):
    """Has the model that was given, and no other."""

    def __init__(self, name: str, model: EmmaForConditionalGeneration, processor: EmmaProcessor) -> None:
        super().__init__()
        self.force_model = name
        self._loaded = model, processor
        self._created = int(time.time())

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded

    def list_models(self, *args: Any) -> list[dict]:
        model = {"id": self.force_model, "object": "model", "owned_by": "emma-hf", "created": self._created}
        return [{**model, "status": {"value": "loaded"}}]

    # Its name in older versions of Transformers.
    get_gen_models = list_models


class _ChatHandler(ChatCompletionHandler):
    """Checks each request and prepares it off the event loop; Transformers generates and formats the answer."""

    def __init__(self, manager: _OneModel, state: "GenerationState", limits: Limits) -> None:
        super().__init__(manager, state)
        self._limits = limits
        self._name = manager.force_model
        self._model, self._processor = manager.load_model_and_processor()
        self._positions = self._model.config.get_text_config().max_position_embeddings
        self._preparing = threading.Lock()

    async def handle_request(self, body: dict, request_id: str) -> Any:
        try:
            return await self._answer(body, request_id)
        except RequestError:
            raise
        except _ClientGone:
            # Nobody reads it. The status is the one that proxies log for this.
            return JSONResponse({}, status_code=499)
        except Exception as error:
            # Left to the server, it would also cut the connection. Its text may tell of the machine; the log has it.
            logger.exception("A request failed.")
            return _error(f"The server failed on this request ({type(error).__name__}). Its log says why.", 500)

    async def _answer(self, body: dict, request_id: str) -> Any:
        request, inputs = await asyncio.to_thread(self._prepare, body)
        inputs["logits_processor"] = LogitsProcessorList([_Watch(_client_gone.get(), request.seed)])
        config = self._generation_config(request, inputs["input_ids"].shape[1])
        answer = _Answer(self, request)
        if request.stop:
            criterion = StopStringCriteria(self._processor.tokenizer, list(request.stop))
            inputs["stopping_criteria"] = StoppingCriteriaList([criterion])
        run = answer._streaming if request.stream else answer._non_streaming
        manager = self.generation_state.get_manager(self._name)
        result = run(request_id, self._model, self._processor, self._name, inputs, config, gen_manager=manager)
        return result if request.stream else await result

    def _prepare(self, body: dict) -> tuple[ChatRequest, Any]:
        most = (self._positions - 1) // self._processor.image_seq_length
        request = read_request(body, self._name, self._limits, most)
        options = {} if request.instructions is None else {"instructions": request.instructions}
        try:
            # Fast tokenizers are not made for several threads at once.
            with self._preparing:
                inputs = self._processor.apply_chat_template(
                    request.messages,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    **options,
                )
        except ValueError as error:
            raise RequestError(str(error)) from error
        return request, inputs.to(self._model.device, self._model.dtype)

    def _generation_config(self, request: ChatRequest, length: int) -> Any:
        """The model's own, with what the request says, for a prompt of `length` tokens."""
        room = self._positions - length
        if room < 1:
            raise RequestError(
                f"A prompt must leave room for an answer in the model's {self._positions} positions: got {length} "
                "tokens. Shorten it, or send fewer pictures.",
                code="context_length_exceeded",
            )
        config = copy.deepcopy(self._model.generation_config)
        config.max_new_tokens = min(request.max_tokens or DEFAULT_MAX_TOKENS, room)
        if request.temperature is not None:
            config.do_sample = request.temperature > 0
            config.temperature = request.temperature or None
        if request.top_p is not None and config.do_sample:
            config.top_p = request.top_p
        return config


class _Answer(ChatCompletionHandler):
    """Formats the answer to one request, which ends before the first of its stop texts."""

    def __init__(self, handler: _ChatHandler, request: ChatRequest) -> None:
        super().__init__(handler.model_manager, handler.generation_state)
        self._stop = request.stop
        self._held = ""
        self._stopped = False

    def _build_completion(self, request_id: str, content: str, model_id: str, **kwargs: Any) -> dict:
        content, found = self._before_stop(content)
        if found:
            kwargs["finish_reason"] = "stop"
        return super()._build_completion(request_id, content, model_id, **kwargs)

    def _build_chunk_sse(self, request_id: str = "", content: str | None = None, **kwargs: Any) -> str:
        if not self._stop:
            return super()._build_chunk_sse(request_id, content=content, **kwargs)
        if content is not None:
            content = self._pass_on(content)
            return super()._build_chunk_sse(request_id, content=content, **kwargs) if content else ""
        if kwargs.get("finish_reason") is None:
            return super()._build_chunk_sse(request_id, **kwargs)
        rest = (
            ""
            if self._stopped or not self._held
            else super()._build_chunk_sse(request_id, content=self._held, model=kwargs.get("model"))
        )
        if self._stopped:
            kwargs["finish_reason"] = "stop"
        return rest + super()._build_chunk_sse(request_id, **kwargs)

    def _before_stop(self, text: str) -> tuple[str, bool]:
        first = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=-1)
        return (text[:first], True) if first >= 0 else (text, False)

    def _pass_on(self, content: str) -> str:
        """What of the text so far cannot be the beginning of a stop text any more."""
        if self._stopped:
            return ""
        text, self._stopped = self._before_stop(self._held + content)
        keep = (
            0
            if self._stopped
            else max(
                (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length])),
                default=0,
            )
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _ClientGone(Exception):
    """Ends the generation of an answer that nobody waits for."""


class _Watch(LogitsProcessor):
    """Runs in the thread that generates, before each token: ends what is not awaited, and applies the seed.

    Requests wait in one queue for that thread, so a seed that was set when one of them came in would be another's.
    """

    def __init__(self, gone: threading.Event, seed: int | None) -> None:
        self._gone, self._seed = gone, seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._gone.is_set():
            raise _ClientGone
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        return scores


class _ClientMiddleware:
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
        if size > self._limit:
            text = f"A request may have at most {self._limit} bytes: got more. Send smaller pictures."
            await _error(text, 413)(scope, receive, send)
            return

        gone = threading.Event()
        _client_gone.set(gone)

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


def _error(message: str, status: int, code: str | None = None) -> "JSONResponse":
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status)


def _refused(_: "Request", error: Any) -> "JSONResponse":
    return _error(str(error), error.status, error.code)


def _malformed(_: "Request", error: Any) -> "JSONResponse":
    reasons = "; ".join(f"{reason.get('msg')}" for reason in error.errors()[:3])
    return _error(f"The body of a request must be a JSON object: {reasons}.", 400)


def _http_error(request: "Request", error: Any) -> "JSONResponse":
    if error.status_code == 404:
        return _error(f"This server has {', '.join(sorted(ROUTES))}: got {request.url.path[:60]!r}.", 404)
    return _error(str(error.detail), error.status_code)
