"""The local server: the page's files by name, and its questions. On 127.0.0.1 only, and for pages of its own only."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Lock
from typing import Any

from memopt.web.api import MOST_NBYTES, QUESTIONS, respond

HOST = "127.0.0.1"
#: address -> file of the page and its type: nothing else is read, whatever a request names.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}": (name, "text/javascript; charset=utf-8")
        for name in ("app.js", "engine.js", "fields.js", "form.js", "results.js")
    },
}
#: Everything from here, nothing from elsewhere, and in no frame of another page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def page_file(name: str) -> bytes:
    """A file of the page, from the installed package."""
    return files("memopt.web").joinpath("page", name).read_bytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "memopt"
    sys_version = ""
    #: Seconds that a connection may be silent.
    timeout = 30
    server: Server

    def do_GET(self) -> None:
        if not self._of_this_machine():
            return
        path = self.path.partition("?")[0]
        if path not in FILES:
            self._error(404, "there is nothing at this address")
            return
        name, kind = FILES[path]
        self._send(200, page_file(name), kind)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self._of_this_machine():
            return
        question = self.path.removeprefix("/api/")
        length = self.headers.get("Content-Length", "")
        if self.path == question or question not in QUESTIONS:
            self._error(404, "there is no question at this address")
        elif self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            self._error(415, "a question is application/json")
        elif self.headers.get("Transfer-Encoding") or not (length.isascii() and length.isdigit()):
            self._error(411, "a question says its length")
        elif len(length) > 9 or int(length) > MOST_NBYTES:
            self._error(413, f"a question has at most {MOST_NBYTES:,} bytes")
        else:
            body = self.rfile.read(int(length))
            if question == "plan":  # seconds of work; one after the other, so that estimates keep their pace
                with self.server.planning:
                    status, text = respond(question, body)
            else:
                status, text = respond(question, body)
            self._send(status, text.encode())

    def _of_this_machine(self) -> bool:
        """Whether the request names this server: a page elsewhere whose name was pointed at 127.0.0.1 does not, and a
        browser says which page asks."""
        names = {f"{host}:{self.server.server_port}" for host in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site", "none")
        from_here = origin is None or origin in {f"http://{name}" for name in names}
        if self.headers.get("Host") in names and from_here and (site in ("none", "same-origin") or self._navigation()):
            return True
        self._error(403, "only pages of this server, on this machine, are answered")
        return False

    def _navigation(self) -> bool:
        """A link to the page, with its settings, may be followed from anywhere."""
        return self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate"

    def _error(self, status: int, sentence: str) -> None:
        """What is left of the request is not read, so that the connection ends."""
        self.close_connection = True
        self._send(status, json.dumps({"error": sentence}).encode())

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors of http.server's own (a method that is not known, a line that is too long)."""
        self._error(int(code), (message or self.responses.get(code, ("not understood",))[0]).lower())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what people ask stays theirs."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        """``port=0`` is one that is free. Raises OSError for one that is taken."""
        super().__init__((HOST, port), Handler)
        self.planning = Lock()

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error of the server."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)
