"""The viewer as a folder of static pages, or served on the loopback interface."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.view.data_pages import DataPages
from megatron_hapo.observe.view.record_files import recorded_runs

PLOTLY = "plotly.min.js"
SCRIPTS = ("data.js", "scales.js", "plots.js", "tokens.js", "lists.js", "pages.js", PLOTLY)
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def asset(name: str) -> str:
    """The text of one of the viewer's files."""
    if name == PLOTLY:
        return get_plotlyjs()
    return (files("megatron_hapo.observe.view") / "assets" / name).read_text(encoding="utf-8")


def write_view(run_dirs: Sequence[Path], folder: Path | None = None) -> Path:
    """Path of the first page of the viewer for these runs, in `folder` or else in `view` in the first run's folder.

    Raises:
        DataError: a run has no records, or the pages cannot be written.
    """
    pages = DataPages(recorded_runs(run_dirs))
    folder = folder or run_dirs[0] / "view"
    try:
        for name in ("index.html", "view.css", *SCRIPTS):
            _write(folder / name, asset(name))
        for name, text in pages.all():
            _write(folder / "data" / f"{name}.js", text)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {one_line(error.strerror)}") from error
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def serve_view(run_dirs: Sequence[Path]) -> None:
    """Serve the pages until Ctrl-C, and print their address.

    Raises:
        DataError: a run has no records.
    """
    server, address = view_server(run_dirs)
    print(f"{address}  (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()


def view_server(run_dirs: Sequence[Path]) -> tuple[ThreadingHTTPServer, str]:
    """A server of the pages on a free port of the loopback interface, and the address of the first page.

    Data is read from the records when a page asks for it. The address holds a random word, without which the server
    answers nothing: other users of the machine can connect to the port, too.

    Raises:
        DataError: a run has no records.
    """
    pages = _GrowingPages(run_dirs)
    word = secrets.token_urlsafe(16)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, pages, f"/{word}/"))
    return server, f"http://127.0.0.1:{server.server_port}/{word}/index.html"


class _GrowingPages:
    """The data pages of runs that may go on: a new index has what has been recorded, or removed, since the last one."""

    def __init__(self, run_dirs: Sequence[Path]):
        self._run_dirs = run_dirs
        self._lock = threading.Lock()
        self._runs = recorded_runs(run_dirs)
        self._pages = DataPages(self._runs)

    def text(self, name: str) -> str:
        """See DataPages."""
        with self._lock:
            if name == "index" and (runs := recorded_runs(self._run_dirs)) != self._runs:
                self._runs, self._pages = runs, DataPages(runs)
            pages = self._pages
        return pages.text(name)


class _Handler(BaseHTTPRequestHandler):
    """Answers with the viewer's own files and with data pages."""

    def __init__(self, pages: _GrowingPages, prefix: str, *arguments: object):
        self._pages, self._prefix = pages, prefix
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(self._prefix)
        try:
            if path == name:
                raise KeyError(path)
            if name.startswith("data/") and name.endswith(".js"):
                text = self._pages.text(name.removeprefix("data/").removesuffix(".js"))
            elif name in ("index.html", "view.css", *SCRIPTS):
                text = asset(name)
            else:
                raise KeyError(name)
        except KeyError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        except DataError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=one_line(error))
            return
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{_TYPES[Path(name).suffix]}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: a line per data file would hide the address."""
