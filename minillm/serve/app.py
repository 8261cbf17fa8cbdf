"""The HTTP server: routes, keys, limits, and a shutdown that finishes or fails every request."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minillm.engine.request import Piece
from minillm.llm import LLM
from minillm.serve.answer import Answer, error_body, event
from minillm.serve.body import Call, parse_chat, parse_completion, parse_json
from minillm.serve.worker import Busy, Closing, EngineFailed, Job, Worker

MAX_BODY_BYTES = 4 * 2**20
GRACE_S = 10.0


class Service:
    """The answers to each route, over one worker."""

    def __init__(self, llm: LLM, worker: Worker, api_key: str | None) -> None:
        self.llm, self.worker, self.api_key = llm, worker, api_key
        self.model = llm.folder.name
        blocks, size = llm.engine.load.num_blocks, llm.engine.options.block_size
        self.room = min(llm.config.max_positions, blocks * size)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/completions", self.guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    def guarded(
        self, handler: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        """The same for those who have the key, with every refusal in the API's words."""

        async def answer(request: HTTPRequest) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.api_key is not None and not hmac.compare_digest(given.encode(), self.api_key.encode()):
                return _refuse(401, "the API key is missing or wrong: send it as 'Authorization: Bearer …'")
            try:
                return await handler(request)
            except ValueError as error:
                return _refuse(400, str(error))
            except Busy as error:
                return _refuse(429, str(error), "rate_limit_error", {"Retry-After": "1"})
            except Closing as error:
                return _refuse(503, str(error), "server_error")
            except EngineFailed as error:
                return _refuse(500, str(error), "server_error")

        return answer

    async def health(self, request: HTTPRequest) -> Response:
        """Whether requests are taken, and how full the engine is."""
        load = self.llm.engine.load
        state = {
            "status": "ok" if self.worker.alive else "closing",
            "requests": self.worker.under_way,
            "running": load.running,
            "waiting": load.waiting,
            "blocks_used": load.used_blocks,
            "blocks": load.num_blocks,
        }
        return JSONResponse(state, 200 if self.worker.alive else 503)

    async def models(self, request: HTTPRequest) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "minillm"}]})

    async def completions(self, request: HTTPRequest) -> Response:
        """Continue texts."""
        body = parse_json(await _read(request))
        self._check_model(body)
        return await self._answer(request, parse_completion(body))

    async def chat(self, request: HTTPRequest) -> Response:
        """Answer a conversation."""
        body = parse_json(await _read(request))
        self._check_model(body)
        return await self._answer(request, await run_in_threadpool(parse_chat, body, self.llm.tokenizer, self.room))

    async def _answer(self, http: HTTPRequest, call: Call) -> Response:
        asked = len(call.prompts) * call.params.n
        if asked > self.worker.max_queue:
            raise ValueError(f"{asked} requests in one call, but at most {self.worker.max_queue} may be under way")
        requests = await run_in_threadpool(self.llm.prepare, call.prompts, call.params)
        answer, listener = Answer(self.model, call, requests), _Listener(asyncio.get_running_loop())
        job = Job(requests, listener.deliver)
        self.worker.submit(job)
        if call.stream:
            return StreamingResponse(self._events(job, answer, listener), media_type="text/event-stream")
        gone = asyncio.ensure_future(_disconnected(http))
        try:
            async for _ in listener.pieces(gone):
                pass
        finally:
            gone.cancel()
            self.worker.cancel(job)
        return JSONResponse(answer.whole())

    async def _events(self, job: Job, answer: Answer, listener: _Listener) -> AsyncIterator[str]:
        """The stream; when the client leaves, it is closed and the job with it."""
        seen: set[tuple[int, int]] = set()
        try:
            async for piece in listener.pieces():
                text = answer.event(piece, first=(piece.index, piece.sample) not in seen)
                seen.add((piece.index, piece.sample))
                if text is not None:
                    yield text
            yield answer.last_event()
        except Exception as error:
            yield event(error_body(str(error) or type(error).__name__, "server_error"))
        finally:
            self.worker.cancel(job)

    def _check_model(self, body: dict[str, Any]) -> None:
        if body.get("model", self.model) != self.model:
            raise HTTPException(404, f"the model {body['model']!r} is not here; this server has {self.model!r}")


class _Listener:
    """What the worker's thread says, for a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    def deliver(self, item: Piece | Exception | None) -> None:
        """Called in the worker's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def pieces(self, gone: asyncio.Future | None = None) -> AsyncIterator[Piece]:
        """Every piece until the end; raises the error that ended them, and ends when `gone` comes first."""
        while True:
            turn = asyncio.ensure_future(self._queue.get())
            await asyncio.wait([turn, gone] if gone else [turn], return_when=asyncio.FIRST_COMPLETED)
            if not turn.done():
                turn.cancel()
                return
            item = turn.result()
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item


async def _read(request: HTTPRequest) -> bytes:
    """The body, if it is not too long."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is above {MAX_BODY_BYTES >> 20} MiB")
    return bytes(raw)


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refuse(error.status_code, error.detail)


def _refuse(
    status: int, message: str, kind: str = "invalid_request_error", headers: dict[str, str] | None = None
) -> Response:
    return JSONResponse(error_body(message, kind), status, headers)


class Server(uvicorn.Server):
    """Uvicorn, that tells the worker when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace_s: float) -> None:
        super().__init__(config)
        self.worker, self.grace_s = worker, grace_s

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGINT or SIGTERM: requests under way may finish; a second one ends them at once."""
        self.worker.close(0.0 if self.should_exit else self.grace_s)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """After the last answer: the worker ends too, before the process does."""
        await super().shutdown(sockets)
        self.worker.close()
        await asyncio.to_thread(self.worker.join)


def serve(
    llm: LLM, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None, max_queue: int = 256, grace_s: float = GRACE_S
) -> None:  # fmt: skip
    """Answer until SIGINT or SIGTERM. Raises `ValueError` for an address that cannot be had, or one without a key."""
    if not api_key and not _is_loopback(host):
        raise ValueError(f"--host {host} can be reached by others: give --api-key, or set MINILLM_API_KEY")
    listener = _listen(host, port)
    worker = Worker(llm, max_queue)
    service = Service(llm, worker, api_key or None)
    config = uvicorn.Config(
        service.app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=int(grace_s) + 5
    )
    shown = f"[{host}]" if ":" in host else host
    print(f"minillm serves {service.model} at http://{shown}:{listener.getsockname()[1]}/v1 (Ctrl-C ends)", flush=True)
    Server(config, worker, grace_s).run([listener])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port {port}: give a number from 0 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
