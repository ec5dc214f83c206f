"""The curves of one or more runs as an interactive page: one file that opens from disk and needs no network."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_hapo.errors import DataError, one_line
from megatron_hapo.observe.metrics import METRICS_FILE, read_metrics
from megatron_hapo.observe.record_schema import FOLDER
from megatron_hapo.observe.report import STAGES
from megatron_hapo.observe.view.build_view import PLOTLY, asset

PAGE = "report.html"
METRICS = (
    "eval/accuracy", "reward/accuracy", "reward/mean", "entropy/mean", "response_length/mean",
    "response_length/truncated", "loss/clip_fraction_low", "loss/clip_fraction_high", "temperature/mean",
    "temperature/min", "temperature/max", "rollout/logprob_abs_diff", "grad_norm", "time/step",
    *(f"time/{stage}" for stage in STAGES),
)  # fmt: skip
_OF_ONE_RUN = ("name", "seed", "output_dir")
"""Settings that differ between the seeds of one experiment."""
_SCRIPTS = ("data.js", "scales.js", "plots.js", "report.js")
_WATCH_SECONDS = 3.0

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Line:
    """What the page draws as one line: a run, or the seeds of one experiment."""

    name: str
    folders: list[Path]
    runs: list[Rows]

    def points(self, metric: str) -> list[list[float]]:
        """[step, mean over seeds, lowest, highest] in the order of steps; only [step, value] for a single run."""
        values: dict[float, list[float]] = {}
        for rows in self.runs:
            for row in rows:
                if (value := row.get(metric)) is not None and abs(value) < 1e100:
                    values.setdefault(row["step"], []).append(value)
        if len(self.runs) == 1:
            return [[step, found[-1]] for step, found in sorted(values.items())]
        return [[step, sum(found) / len(found), min(found), max(found)] for step, found in sorted(values.items())]


def write_report_page(run_dirs: Sequence[Path], *, live: bool = False) -> Path:
    """Path of the page of these runs, `report.html` in the folder of the first.

    Args:
        live: the page loads itself again every few seconds.
    Raises:
        DataError: a folder has no metrics, or the page cannot be written.
    """
    lines = joined_seeds(run_dirs)
    path = run_dirs[0] / PAGE
    data = {
        "live": live,
        "stages": STAGES,
        "lines": [
            {"name": line.name, "metrics": {name: points for name in METRICS if (points := line.points(name))}}
            for line in lines
        ],
        "views": [view for run_dir in run_dirs if (view := _view(run_dir, path.parent)) is not None],
        "without_pages": [
            one_line(run_dir)
            for run_dir in run_dirs
            if _view(run_dir, path.parent) is None and any((run_dir / FOLDER).glob("step_*.parquet"))
        ],
    }
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(_document(data), encoding="utf-8")
        partial.replace(path)  # a browser never reads half a page
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def joined_seeds(run_dirs: Sequence[Path]) -> list[Line]:
    """The runs as lines; those whose configs differ in nothing but name, seed and output folder are one line.

    Raises:
        DataError: a folder has no metrics.
    """
    lines: dict[str, Line] = {}
    for number, run_dir in enumerate(run_dirs):
        rows = read_metrics(run_dir / METRICS_FILE)
        if not rows:
            raise DataError(f"{run_dir}: no metrics in {METRICS_FILE}; it must be the folder of a run")
        key = _experiment(run_dir / "config.yaml") or str(number)
        name = one_line(run_dir.resolve().name)
        line = lines.setdefault(key, Line(name, [], []))
        line.folders.append(run_dir)
        line.runs.append(rows)
    return [
        line if len(line.runs) == 1 else Line(f"{line.name}, {len(line.runs)} seeds", line.folders, line.runs)
        for line in lines.values()
    ]


def _experiment(config: Path) -> str | None:
    """The settings that the seeds of one experiment share, as text; None if the folder has no readable config."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(settings, dict):
        return None
    return repr(sorted((str(name), repr(value)) for name, value in settings.items() if name not in _OF_ONE_RUN))


def _view(run_dir: Path, report_folder: Path) -> dict[str, Any] | None:
    """Where the viewer's pages of a run are, and which steps they have; None if there are none."""
    page = run_dir / "view" / "index.html"
    steps = sorted(folder.name for folder in (run_dir / "view" / "data" / "0").glob("step_*") if folder.is_dir())
    if not (page.is_file() and steps):
        return None
    address = os.path.relpath(page, report_folder)
    return {"name": one_line(run_dir.resolve().name), "address": address, "files": steps}


def _document(data: dict[str, Any]) -> str:
    script = "\n".join(map(asset, _SCRIPTS)).replace("</", "<\\/")
    plotly, style = asset(PLOTLY), asset("view.css")
    # Plotly inserts styles, and makes the pictures that its plots can be downloaded as.
    policy = (
        f"default-src 'none'; script-src '{_hash(plotly)}' '{_hash(script)}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'"
    )
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">
<title>Training curves</title>
<style>{style}</style>
</head>
<body>
<main id="main"></main>
<script type="application/json" id="data">{text}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def watch(run_dirs: Sequence[Path], draw: Callable[..., list[Path]]) -> None:
    """Draws the runs and prints where, draws again whenever their metrics change, until Ctrl-C, and then once more, as
    pages that stay as they are. Waits for runs that have made no step yet.

    Raises:
        DataError: a folder does not exist, or a run had made no step at the end.
    """
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            raise DataError(f"{run_dir}: no such folder; it must be the folder of a run")
    drawn: list[tuple[int, int]] | None = None
    printed = False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if (now := _changed(run_dirs)) != drawn:
                first, drawn = drawn is None, now
                try:
                    paths = draw(live=True)
                except DataError as error:  # also for a moment, when a run starts again
                    if first:
                        print(f"waiting for the first step: {error}", flush=True)
                else:
                    if not printed:
                        print(*paths, sep="\n", flush=True)
                    printed = True
            time.sleep(_WATCH_SECONDS)
    draw(live=False)


def _changed(run_dirs: Sequence[Path]) -> list[tuple[int, int]]:
    found = []
    for run_dir in run_dirs:
        with contextlib.suppress(OSError):
            status = (run_dir / METRICS_FILE).stat()
            found.append((status.st_mtime_ns, status.st_size))
    return found
