"""The HTTP side: who may ask, how much, and how an answer leaves.

The event loop never computes: requests are checked in threads, and the engine has its own.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hmac
import importlib.resources
import ipaddress
import json
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

from gptjax.config import UserError
from gptjax.serve import api
from gptjax.serve.job import Job, News

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise UserError(f"serving lacks module {error.name!r}: pip install 'gptjax[serve]'") from error

MOST_BYTES = 4 << 20  # of a body
MOST_WAITING = 512  # texts, those that are written included
MOST_CONNECTIONS = 1024
PATIENCE = 30.0  # seconds in which a body has to come
GONE = 499  # nginx's status of a client that has left
LOOK = 0.5  # seconds between two looks whether a client is still there
# Seconds, for the histograms.
BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, math.inf)


class Engine(Protocol):
    """What is asked of `serve.engine.Engine`."""

    counts: Any
    sizes: list[int]
    failed: bool

    @property
    def busy(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def submit(self, job: Job) -> None: ...
    def cancel(self, job: Job) -> None: ...


class Metrics:
    """What /metrics tells, in Prometheus's text format, version 0.0.4."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self.seconds = {
            "first_token": "to the first token of a request",
            "request": "from a request to the end of its answer",
        }
        self._seen: dict[str, list[float]] = {name: [0.0] * len(BOUNDS) for name in self.seconds}
        self._sums = dict.fromkeys(self.seconds, 0.0)

    def observe(self, name: str, seconds: float) -> None:
        self._sums[name] += seconds
        for i, bound in enumerate(BOUNDS):
            self._seen[name][i] += seconds <= bound

    def text(self) -> str:
        counts, lines = self._engine.counts, []

        def family(name: str, kind: str, help: str, values: Mapping[str, float]) -> None:
            lines.append(f"# HELP gptjax_{name} {help}.\n# TYPE gptjax_{name} {kind}")
            lines.extend(f"gptjax_{name}{labels} {value:g}" for labels, value in values.items())

        def total(name: str, help: str, value: float) -> None:
            family(f"{name}_total", "counter", help, {"": value})

        requests = {
            f'{{path="{path}",status="{status}"}}': n
            for (path, status), n in sorted(self.requests.items())
        }
        family("requests_total", "counter", "Answered requests", requests)
        total("prompt_tokens", "Tokens of prompts that were begun", counts.prompt_tokens)
        total("cached_tokens", "Of these, not read anew", counts.cached_tokens)
        total("text_tokens", "Tokens drawn", counts.text_tokens)
        total("steps", "Steps of the engine", counts.steps)
        writes = {f'{{rows="{size}"}}': counts.writes[size] for size in self._engine.sizes}
        family("writes_total", "counter", "Steps that drew tokens, by rows computed", writes)
        family("busy", "gauge", "Texts being read or written", {"": self._engine.busy})
        family("waiting", "gauge", "Texts that wait for a slot", {"": self._engine.waiting})
        for name, help in self.seconds.items():
            seen = self._seen[name]
            lines.append(
                f"# HELP gptjax_{name}_seconds Seconds {help}.\n"
                f"# TYPE gptjax_{name}_seconds histogram"
            )
            lines.extend(
                f'gptjax_{name}_seconds_bucket{{le="{"+Inf" if b == math.inf else f"{b:g}"}"}} {n:g}'
                for b, n in zip(BOUNDS, seen, strict=True)
            )
            lines.append(f"gptjax_{name}_seconds_sum {self._sums[name]:g}")
            lines.append(f"gptjax_{name}_seconds_count {seen[-1]:g}")
        return "\n".join(lines) + "\n"


class App:
    """Answers requests with an engine.

    Args:
        token: what a request has to bring; None: nothing.
        hosts: names by which it may be called; None: any. A page of another site that has its own
            name lead here is so kept out.

    Attributes:
        draining: set it, and what comes is refused while what was begun is finished.
    """

    def __init__(
        self,
        served: api.Served,
        engine: Engine,
        token: str | None = None,
        hosts: list[str] | None = None,
    ) -> None:
        self._served, self._engine, self._token = served, engine, token
        self.draining = False
        self.metrics = Metrics(engine)
        completion = self._complete(api.completion)
        chat_completion = self._complete(api.chat_completion)
        self.asgi = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                self._guarded("GET", "/metrics", self._metrics),
                self._guarded("GET", "/v1/models", self._models),
                self._guarded("GET", "/v1/models/{name:path}", self._model),
                self._guarded("POST", "/v1/completions", completion),
                self._guarded("POST", "/v1/chat/completions", chat_completion),
            ],
            exception_handlers={HTTPException: self._no_such, Exception: self._broken},
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or ["*"])],
        )

    def _guarded(
        self, method: str, path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        """A route that wants the token, and whose refusals are in OpenAI's form."""

        async def endpoint(request: Request) -> Response:
            try:
                self._check_token(request)
                response = await answer(request)
            except api.Refused as refusal:
                headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
                headers |= {"Retry-After": "1"} if refusal.status in (429, 503) else {}
                response = _json(refusal.form, refusal.status, headers)
            except ClientDisconnect:  # nobody reads it
                response = Response(status_code=GONE)
            self.metrics.requests[path, response.status_code] += 1
            return response

        return Route(path, endpoint, methods=[method])

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not same:
            raise api.Refused(
                "a token is needed: Authorization: Bearer ...", None, 401, "invalid_api_key"
            )

    async def _no_such(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = api.Refused(
            f"{request.method} {request.url.path[:60]}: {error.detail}", None, error.status_code
        )
        return _json(refusal.form, error.status_code, error.headers)

    async def _broken(self, request: Request, error: Exception) -> Response:
        return _json(api.Refused("a defect of the server", None, 500).form, 500)

    async def _page(self, request: Request) -> Response:
        # Nothing is loaded from elsewhere, and no other page may show this one in a frame.
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        )
        return HTMLResponse(_html(), headers={"Content-Security-Policy": policy})

    async def _health(self, request: Request) -> Response:
        state = "failed" if self._engine.failed else "draining" if self.draining else "ok"
        return _json({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return _json(api.models(self._served))

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._served.name:
            raise api.Refused(
                f"there is only {self._served.name!r}", "model", 404, "model_not_found"
            )
        return _json(api.model(self._served))

    def _complete(
        self, read: Callable[[api.Served, Any], api.Asked]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            self._check_open()
            body = await _body(request)
            asked = await run_in_threadpool(lambda: read(self._served, api.parse_json(body)))
            self._check_open()
            waiting = self._engine.busy + self._engine.waiting
            if waiting + len(asked.prompts) * asked.n > MOST_WAITING:
                raise api.Refused(
                    f"{waiting} texts are written or wait: try again later", None, 429, "busy"
                )
            written = _Written(self, request, asked, began)
            if asked.stream:
                return StreamingResponse(written.events(), media_type="text/event-stream")
            return _json(await written.whole())

        return endpoint

    def _check_open(self) -> None:
        if self._engine.failed:
            raise api.Refused("the engine has failed", None, 500, "failed")
        if self.draining:
            raise api.Refused("the server is shutting down", None, 503, "shutting_down")


class _Written:
    """An answer on its way. Its texts are written no further once the client is gone."""

    def __init__(self, app: App, request: Request, asked: api.Asked, began: float) -> None:
        self._app, self._request, self._asked, self._began = app, request, asked, began
        self._news: asyncio.Queue[tuple[int, News] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(index: int, news: News) -> None:
            loop.call_soon_threadsafe(lambda: self._news.put_nowait((index, news)))

        self._answer = api.Answer(app._served, asked, send)

    async def whole(self) -> api.Form:
        async for _ in self._changes():
            pass
        return self._answer.whole()

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        try:
            for form in self._answer.begin():
                yield _event(form)
            async for choice in self._changes():
                part = self._answer.part(choice)
                if part is not None:
                    yield _event(part)
            for form in self._answer.end():
                yield _event(form)
            yield b"data: [DONE]\n\n"
        except api.Refused as refusal:  # what began cannot become another status
            yield _event(refusal.form)
        except ClientDisconnect:
            return

    async def _changes(self) -> AsyncIterator[api.Choice]:
        """Each choice of which there is news.

        Raises:
            Refused: if the engine fails.
            ClientDisconnect: if the client is gone.
        """
        app, answer = self._app, self._answer
        watch = asyncio.create_task(self._watch())
        try:
            for choice in answer.choices:
                app._engine.submit(choice.job)
            first = True
            while not answer.done:
                item = await self._news.get()
                if item is None:
                    raise ClientDisconnect
                index, news = item
                choice = answer.choices[index]
                choice.take(news)
                if choice.finish == "failed":
                    raise api.Refused("the engine has failed", None, 500, "failed")
                if choice.finish and not news.ended:  # by a stop text, of which it does not know
                    app._engine.cancel(choice.job)
                if first and choice.drawn:
                    first = False
                    app.metrics.observe("first_token", time.monotonic() - self._began)
                yield choice
            app.metrics.observe("request", time.monotonic() - self._began)
        except UserError as error:  # the engine is closed
            raise api.Refused(str(error), None, 503) from None
        finally:
            watch.cancel()
            for choice in answer.choices:
                app._engine.cancel(choice.job)

    async def _watch(self) -> None:
        while not await self._request.is_disconnected():
            await asyncio.sleep(LOOK)
        self._news.put_nowait(None)


def _event(form: api.Form) -> bytes:
    return f"data: {json.dumps(form, allow_nan=False)}\n\n".encode()


def _json(form: api.Form, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII: what a refusal repeats of a request may be no text.
    content = json.dumps(form, allow_nan=False)
    return Response(content, status, headers, "application/json")


async def _body(request: Request) -> bytes:
    """A JSON body, no longer than it may be.

    Raises:
        Refused: on another type, which a page of another site could send unasked; on a length
            beyond MOST_BYTES; on one that does not come.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise api.Refused("Content-Type must be application/json", None, 415)
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise api.Refused(f"the body is longer than {MOST_BYTES} bytes", None, 413)
    except TimeoutError:
        raise api.Refused(f"the body did not come in {PATIENCE:g} s", None, 408) from None
    return body


@functools.cache
def _html() -> str:
    return (
        importlib.resources.files("gptjax.serve").joinpath("page.html").read_text(encoding="utf-8")
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(app: App, host: str, port: int, drain: float) -> int:
    """Serves until SIGTERM or Ctrl-C; the exit status.

    What was begun then goes on for `drain` seconds at most, while what comes is answered 503. A
    second signal ends it at once.

    Raises:
        UserError: if the port cannot be had.
    """
    config = uvicorn.Config(
        app.asgi, host, port, log_config=None, log_level="warning", access_log=False, lifespan="off",
        server_header=False, proxy_headers=False, ws="none", limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    return asyncio.run(_run(app, config, drain))


async def _run(app: App, config: uvicorn.Config, drain: float) -> int:
    server, loop = _Server(config), asyncio.get_running_loop()
    try:
        sockets = [config.bind_socket()]
    except SystemExit:
        raise UserError(f"cannot serve on {config.host}:{config.port}: choose another") from None
    sockets[0].listen(config.backlog)  # before anybody is told
    asked = asyncio.Event()

    def heard() -> None:
        if asked.is_set():
            server.should_exit = server.force_exit = True
        app.draining = True
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard)

    async def stop() -> None:
        """Ends the server once it is asked to and nothing is on its way, or the engine fails."""
        while not asked.is_set() and not app._engine.failed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), 1)
        until = time.monotonic() + drain
        tasks = server.server_state.tasks  # one for each request
        while tasks and time.monotonic() < until and not app._engine.failed:
            await asyncio.sleep(0.05)
        server.should_exit = True

    address = sockets[0].getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"serving {app._served.name} on http://{shown}:{address[1]}", file=sys.stderr, flush=True)
    ending = asyncio.create_task(stop())
    await server.serve(sockets)
    await ending
    return int(app._engine.failed)
