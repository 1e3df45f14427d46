"""Object stores on this machine: moto's for s3://, a small one for gs://, and faults on the way.

The server for gs:// answers what tensorstore asks of Google's JSON API: whole and ranged reads,
puts and deletes with the generation that they must meet, and lists within bounds.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from gptjax import storage

BUCKET = "lab"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A header and its body are two writes; the second would wait 40 ms for the client's late ACK.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """A server in a thread of its own, on a free port of this machine."""

    daemon_threads = True

    def __init__(self, handler: type[_Handler], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), handler)
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent of a client that went: what stands on standard error is the tested command's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Gcs(Server):
    """Google Cloud Storage's JSON API over a dict: name -> (content, generation)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()
        super().__init__(_Gcs)


class _Gcs(_Handler):
    server: Gcs

    def _met(self, query: dict[str, list[str]], name: str) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted[0]) == self.server.objects.get(name, (b"", 0))[1]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query, objects = parse_qs(url.query), self.server.objects
        _, _, name = url.path.partition("/o/")
        if not name:
            first, end = (query.get(key, [""])[0] for key in ("startOffset", "endOffset"))
            prefix = query.get("prefix", [""])[0]
            names = [n for n in sorted(objects) if n >= first and (not end or n < end)]
            items = [{"name": n} for n in names if n.startswith(prefix)]
            return self.answer(200, json.dumps({"items": items}).encode())
        name = unquote(name)
        if name not in objects:
            return self.answer(404)
        content, generation = objects[name]
        if (unless := query.get("ifGenerationNotMatch")) and int(unless[0]) == generation:
            return self.answer(304)
        if (span := self.headers.get("Range")) is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            size, part = len(content), content[int(first) : int(last) + 1 if last else None]
            spans = f"bytes {first}-{int(first) + len(part) - 1}/{size}"
            return self.answer(206, part, x_goog_generation=str(generation), Content_Range=spans)
        return self.answer(200, content, x_goog_generation=str(generation))

    def do_POST(self) -> None:
        query, content = parse_qs(urlsplit(self.path).query), self.body()
        (name,) = query["name"]
        with self.server.lock:
            if not self._met(query, name):
                return self.answer(412)
            generation = next(self.server.generations)
            self.server.objects[name] = (content, generation)
        told = {
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
        }
        return self.answer(200, json.dumps(told | {"size": str(len(content))}).encode())

    def do_DELETE(self) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path.partition("/o/")[2])
        with self.server.lock:
            if name not in self.server.objects:
                return self.answer(404)
            if not self._met(parse_qs(url.query), name):
                return self.answer(412)
            del self.server.objects[name]
        return self.answer(204)


# What a proxy does with a request, told by its method and path: pass it on ("pass"), answer 503
# ("busy"), close the connection instead of an answer, before ("unheard") or after ("unanswered")
# the request is passed on, pass it on twice ("twice"), or so many seconds late (a number), or answer
# a status of `STATUS`.
Fault = Callable[[str, str], str | float]
STATUS = {"forbidden": 403, "refused": 412}  # answers in place of the store's


class Proxy(Server):
    """Passes requests on, but for what `fault` says."""

    def __init__(self, url: str, fault: Fault = lambda method, path: "pass") -> None:
        self.target, self.fault, self.scheme = urlsplit(url).netloc, fault, ""
        self.requests: list[tuple[str, str]] = []
        super().__init__(_Proxy)

    def leave(self) -> None:
        """Nobody answers, nor listens at the port any more."""
        self.fault = lambda method, path: "unheard"  # to connections that are open
        self.close()

    def come_back(self) -> None:
        """To the port that it had."""
        self.fault = lambda method, path: "pass"
        Server.__init__(self, _Proxy, self.server_address[1])


class _Proxy(_Handler):
    server: Proxy

    def _pass(self) -> None:
        content, fault = self.body(), self.server.fault(self.command, self.path)
        self.server.requests.append((self.command, self.path))
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "busy":
            return self.answer(503, b"slow down")
        if fault in STATUS:
            return self.answer(STATUS[fault])
        if fault == "unheard":
            return self._hang_up()
        for _ in range(2 if fault == "twice" else 1):
            target = http.client.HTTPConnection(self.server.target)
            target.request(self.command, self.path, content, dict(self.headers))
            response = target.getresponse()
            received = response.read()
            target.close()
            if fault == "twice" and response.status < 300:
                continue
        if fault == "unanswered":
            return self._hang_up()
        with contextlib.suppress(ConnectionError):
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(received)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(received)
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


@contextlib.contextmanager
def served(scheme: str) -> Iterator[Proxy]:
    """An empty store for a scheme, behind a proxy that this process and its children ask."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if scheme == "s3":
            from moto.server import ThreadedMotoServer

            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            host, port = server.get_host_and_port()
            url = f"http://{host}:{port}"
            connection = http.client.HTTPConnection(f"{host}:{port}")
            connection.request("POST", "/moto-api/reset")
            connection.getresponse().read()
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            connection.close()
        else:
            store = Gcs()
            stack.callback(store.close)
            url = store.url
        proxy = Proxy(url)
        stack.callback(proxy.close)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
        storage._open.cache_clear()
        yield proxy
        storage._open.cache_clear()
