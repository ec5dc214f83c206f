"""A server on this machine, in a thread, that is asked by POST in JSON; tests say what it answers."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Before it sends anything."""


def says(text: str, finish_reason: str = "stop") -> Reply:
    """A judge's reply."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(body=json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


@dataclass
class JudgeServer:
    """A server that runs."""

    url: str
    answer: Callable[[str, int], Reply]
    """From the text of the last message, or else the body, and the number of requests before that had the same."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies, in their order."""
    paths: set[str] = field(default_factory=set)
    authorizations: set[str | None] = field(default_factory=set)
    at_once: int = 0
    """Largest number of requests under way."""


@contextlib.contextmanager
def judge_server(answer: Callable[[str, int], Reply], port: int = 0) -> Iterator[JudgeServer]:
    """The server, while the context is open."""
    lock = threading.Lock()
    counts: dict[str, int] = {}
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal under_way
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][-1]["content"] if "messages" in body else json.dumps(body, sort_keys=True)
            with lock:
                state.requests.append(body)
                state.paths.add(self.path)
                state.authorizations.add(self.headers["Authorization"])
                under_way += 1
                state.at_once = max(state.at_once, under_way)
                before = counts[text] = counts.get(text, -1) + 1
            reply = state.answer(text, before)
            time.sleep(reply.seconds)
            with lock:
                under_way -= 1
            with contextlib.suppress(OSError):  # the client did not wait
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", port), Handler)
    state = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
