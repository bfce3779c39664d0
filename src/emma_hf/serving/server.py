"""`emma-hf serve`: Transformers' OpenAI-compatible server for one EMMA.

The application, the queue for the model and the form of the answers are Transformers' own (`transformers serve`).
What is added stands between it and its clients: requests are checked before they run, errors have OpenAI's form and the
right status, and an answer that nobody waits for any more is not computed to its end.

Of `transformers.cli.serving` it uses `build_server`, `ModelManager`, `GenerationState`, `DirectStreamer` and, of
`ChatCompletionHandler`, the private `_build_completion` and `_build_chunk_sse`: these are the same in 5.16.1 to 5.24,
and nobody promises them for another version.
"""

import asyncio
import copy
import inspect
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from ..model.errors_emma import EmmaError, MissingPackageError
from ..model.modeling_emma import EmmaForConditionalGeneration
from ..model.processing_emma import EmmaProcessor
from .errors import RequestError, error_object
from .limits import Limits
from .requests import ChatRequest, read_request
from .stop_texts import StopTextFilter

if int(transformers.__version__.split(".")[0]) < 5:
    raise MissingPackageError(
        f"`emma-hf serve` needs the server of Transformers 5: got Transformers {transformers.__version__}. Install it "
        'with `pip install "emma-hf[serve]" "transformers>=5.16.1"`.'
    )
try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from openai.types.completion_usage import CompletionUsage
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import DirectStreamer, GenerationState

    from .middleware import ClientMiddleware, client_gone
except ImportError as error:
    raise MissingPackageError(
        f"`emma-hf serve` needs FastAPI, uvicorn and openai beside Transformers 5.16.1 or newer: {error}. Install them "
        'with `pip install "emma-hf[serve]"`.'
    ) from error

logger = logging.getLogger(__name__)
# What a client gets where it says nothing, as in Transformers' own server.
DEFAULT_MAX_TOKENS = 1024
ROUTES = {"/v1/chat/completions", "/v1/models", "/health"}
STREAM_END = "data: [DONE]\n\n"


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
        limits: limits for one request.
    """
    app = build_app(model, processor, name, limits)
    host, port = listener.getsockname()[:2]
    print(f"emma-hf: {name} answers at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port` (0: any free one).

    Raises:
        EmmaError: an address this machine does not own, or a port already in use.
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
    manager = _SingleModelManager(name)
    state = GenerationState()
    # How many other handlers there are differs from version to version; their routes go below.
    handlers: dict[str, Any] = {
        name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")
    }
    handlers["chat_handler"] = _ChatHandler(manager, state, model, processor, limits)
    app = build_server(model_manager=manager, generation_state=state, **handlers)
    # The others load models that a client names, forget them for everybody, or take their requests unchecked.
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_api_route("/v1/models/{requested:path}", manager.find_model, methods=["GET"])
    for route in app.router.routes:
        if "GET" in route.methods:
            route.methods.add("HEAD")
    for kind, answer in (
        (RequestError, _refused),
        (RequestValidationError, _malformed),
        (HTTPException, _http_error),
    ):
        app.add_exception_handler(kind, answer)
    app.add_middleware(ClientMiddleware, limits=limits)
    return app


class _SingleModelManager(ModelManager):
    """Names one model, which is loaded already, and no other."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.force_model = name
        self._created = int(time.time())

    def list_models(self, *args: Any) -> list[dict]:
        model = {"id": self.force_model, "object": "model", "owned_by": "emma-hf", "created": self._created}
        return [{**model, "status": {"value": "loaded"}}]

    # Its name in older versions of Transformers.
    get_gen_models = list_models

    def find_model(self, requested: str) -> dict:
        """The model by its name.

        Raises:
            RequestError: another name.
        """
        if requested != self.force_model:
            raise RequestError(
                f"This server has one model, {self.force_model!r}: got {requested[:60]!r}.",
                404,
                "model_not_found",
                "model",
            )
        return self.list_models()[0]


class _ChatHandler(ChatCompletionHandler):
    """Checks each request, prepares it off the event loop, and generates its answer on Transformers' thread."""

    def __init__(
        self,
        manager: _SingleModelManager,
        state: "GenerationState",
        model: EmmaForConditionalGeneration,
        processor: EmmaProcessor,
        limits: Limits,
    ) -> None:
        super().__init__(manager, state)
        self._limits = limits
        self._name = manager.force_model
        self._model, self._processor = model, processor
        self._positions = model.config.position_count
        # One thread, because decoded images are large, because each thread keeps memory of its own for the next, and
        # because fast tokenizers are not made for several threads at once.
        self._preparer = ThreadPoolExecutor(1, "prepare")

    async def handle_request(self, body: dict, request_id: str) -> Any:
        try:
            request = await asyncio.to_thread(self._read, body)
            # Neither the encoded nor the decoded images are needed while the answer waits for its turn.
            body.clear()
            inputs = await asyncio.get_running_loop().run_in_executor(self._preparer, self._prepare, request)
            length = inputs["input_ids"].shape[1]
            config = self._generation_config(request, length)
            inputs["logits_processor"] = LogitsProcessorList([_CancelAndSeedProcessor(client_gone.get(), request.seed)])
            if request.stream:
                return StreamingResponse(
                    self._stream(request_id, request, inputs, config), media_type="text/event-stream"
                )
            sequence = await asyncio.shield(self._generate(inputs, config))
            return JSONResponse(self._completion(request_id, request, sequence[0, length:].tolist(), length, config))
        except RequestError:
            raise
        except _ClientGoneError:
            # Nobody reads it. The status is the one that proxies log for this.
            return JSONResponse({}, status_code=499)
        except Exception as error:
            # Left to the server, it would also cut the connection.
            return JSONResponse(_internal_error(error), status_code=500)

    def _read(self, body: dict) -> ChatRequest:
        max_images = (self._positions - 1) // self._processor.image_seq_length
        return read_request(body, self._name, self._limits, max_images, self._positions)

    def _prepare(self, request: ChatRequest) -> Any:
        """The arguments of `generate` for a request, whose messages are gone afterwards."""
        options: dict[str, Any] = {} if request.instructions is None else {"instructions": request.instructions}
        try:
            request.decode_images()
            inputs = self._processor.apply_chat_template(
                request.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **options,
            )
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        finally:
            request.messages.clear()
        inputs = inputs.to(self._model.device, self._model.dtype)
        if request.stop:
            criterion = StopStringCriteria(self._processor.tokenizer, list(request.stop))
            inputs["stopping_criteria"] = StoppingCriteriaList([criterion])
        return inputs

    def _generation_config(self, request: ChatRequest, length: int) -> Any:
        """The model's own, with what the request says, for a prompt of `length` tokens."""
        room = self._positions - length
        if room < 1:
            raise RequestError(
                f"This model's maximum context length is {self._positions} tokens. A prompt must leave room for an "
                f"answer in the model's {self._positions} positions: got {length} tokens. Shorten it, or send fewer "
                "pictures.",
                400,
                "context_length_exceeded",
                "messages",
            )
        config = copy.deepcopy(self._model.generation_config)
        config.max_new_tokens = min(request.max_tokens or DEFAULT_MAX_TOKENS, room)
        if request.temperature is not None:
            config.do_sample = request.temperature > 0
            config.temperature = request.temperature or None
        if request.top_p is not None and config.do_sample:
            config.top_p = request.top_p
        return config

    def _generate(self, inputs: dict, config: Any, streamer: Any = None) -> "asyncio.Future":
        """The sequences that `generate` returns, once it was this request's turn."""
        manager = self.generation_state.get_manager(self._name)
        return manager.async_submit(self._model.generate, **inputs, generation_config=config, streamer=streamer)

    def _completion(self, request_id: str, request: ChatRequest, ids: list[int], length: int, config: Any) -> dict:
        stop_filter = StopTextFilter(request.stop)
        text = stop_filter.push(self._processor.decode(ids, skip_special_tokens=True)) + stop_filter.finish()
        finish_reason = _finish_reason(ids, config, stop_filter)
        return self._build_completion(
            request_id, text, self._name, finish_reason=finish_reason, usage=_usage(length, ids)
        )

    async def _stream(
        self, request_id: str, request: ChatRequest, inputs: dict, config: Any
    ) -> AsyncGenerator[str, None]:
        """The events of an answer, the last of which is `STREAM_END` also after an error."""
        queue: asyncio.Queue = asyncio.Queue()
        tokenizer = self._processor.tokenizer.backend_tokenizer
        streamer = DirectStreamer(tokenizer, asyncio.get_running_loop(), queue)
        generation = self._generate(inputs, config, streamer)

        def end(done: asyncio.Future) -> None:
            # Also where it fails: the streamer then reports no end. Where nobody waits any more, nobody asks why.
            done.exception()
            queue.put_nowait(None)

        generation.add_done_callback(end)
        stop_filter = StopTextFilter(request.stop)
        try:
            yield self._build_chunk_sse(request_id, role="assistant", model=self._name)
            while (piece := await queue.get()) is not None:
                if text := stop_filter.push(piece):
                    yield self._build_chunk_sse(request_id, content=text, model=self._name)
            length = inputs["input_ids"].shape[1]
            ids = (await asyncio.shield(generation))[0, length:].tolist()
            if text := stop_filter.finish():
                yield self._build_chunk_sse(request_id, content=text, model=self._name)
            finish_reason = _finish_reason(ids, config, stop_filter)
            yield self._build_chunk_sse(
                request_id, finish_reason=finish_reason, model=self._name, usage=_usage(length, ids)
            )
        except _ClientGoneError:
            return
        except Exception as error:
            yield f"data: {json.dumps(_internal_error(error))}\n\n"
        yield STREAM_END


class _ClientGoneError(Exception):
    """Ends the generation of an answer that nobody waits for."""


class _CancelAndSeedProcessor(LogitsProcessor):
    """Runs in the thread that generates, before each token: ends what is not awaited, and applies the seed.

    Requests wait in one queue for that thread, so a seed that was set when one of them came in would be another's.
    """

    def __init__(self, gone: threading.Event, seed: int | None) -> None:
        self._gone, self._seed = gone, seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._gone.is_set():
            raise _ClientGoneError
        if self._seed is not None:
            torch.manual_seed(self._seed)
            self._seed = None
        return scores


def _finish_reason(ids: list[int], config: Any, stop_filter: StopTextFilter) -> str:
    """Why an answer of these tokens ended, in OpenAI's words."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = stop_filter.stopped or (ids and ids[-1] in ends)
    return "length" if len(ids) >= config.max_new_tokens and not ended else "stop"


def _usage(length: int, ids: list[int]) -> "CompletionUsage":
    return CompletionUsage(prompt_tokens=length, completion_tokens=len(ids), total_tokens=length + len(ids))


def _internal_error(error: Exception) -> dict[str, Any]:
    # The text of the error may tell of the machine.
    logger.error("A request failed.", exc_info=error)
    return error_object(f"The server failed on this request ({type(error).__name__}). Its log says why.", 500)


def _error(message: str, status: int, code: str | None = None, param: str | None = None) -> "JSONResponse":
    return JSONResponse(error_object(message, status, code, param), status_code=status)


def _refused(_: "Request", error: Any) -> "JSONResponse":
    return _error(str(error), error.status, error.code, error.param)


def _malformed(_: "Request", error: Any) -> "JSONResponse":
    reasons = "; ".join(f"{reason.get('msg')}" for reason in error.errors()[:3])
    return _error(f"The body of a request must be a JSON object: {reasons}.", 400)


def _http_error(request: "Request", error: Any) -> "JSONResponse":
    if error.status_code == 404:
        return _error(f"This server has {', '.join(sorted(ROUTES))}: got {request.url.path[:60]!r}.", 404)
    return _error(str(error.detail), error.status_code)
