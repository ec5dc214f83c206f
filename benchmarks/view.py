"""Seconds until a browser shows a step's groups, one group's tokens, and the result of a search; needs Chromium.

python benchmarks/view.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_hapo.observe.view.build_view import view_server, write_view
from tests.chromium import Page, chromium
from tests.observe.recorded import response, write_records

REPEATS = 5
SEARCH = "[data-filter='text']"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        records = write_records(run, "step_00000001", rows(options.groups, options.samples, options.tokens))
        num_tokens = options.groups * options.samples * options.tokens
        start = time.perf_counter()
        address = write_view([run]).as_uri()
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (run / "view").rglob("*") if path.is_file())
        print(f"records {records.stat().st_size / num_tokens:.1f} bytes per token")
        print(f"pages written in {seconds:.1f} s, {size / num_tokens:.1f} bytes per token")
        print("| pages | step s | group s | search s |")
        print("| --- | ---: | ---: | ---: |")
        with chromium(Path(folder) / "profile") as page:
            page.size(1300, 900)
            for name, opened in (("from disk", lambda: nullcontext(address)), ("served", lambda: served([run]))):
                runs = []
                for _ in range(REPEATS):
                    with opened() as first:
                        runs.append(measured(page, first))
                best = [min(times) for times in zip(*runs, strict=True)]
                print(f"| {name} | " + " | ".join(f"{seconds:.2f}" for seconds in best) + " |", flush=True)
            assert not page.faults, page.faults


@contextmanager
def served(runs: list[Path]) -> Iterator[str]:
    """Address of a new server, which has read nothing yet."""
    server, address = view_server(runs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server:
        yield address
        server.shutdown()


def rows(groups: int, samples: int, tokens: int) -> list[dict[str, Any]]:
    return [
        response(
            [f" word{(group * samples + sample) * 31 + i}" for i in range(tokens)],
            seed=group * samples + sample, group=group, sample=sample, uid=f"prompt {group}",
        )
        for group in range(groups) for sample in range(samples)
    ]  # fmt: skip


def measured(page: Page, address: str) -> tuple[float, float, float]:
    """Seconds to load the page of a step in a new document, that of a group, and to search all responses."""

    def seconds(action: Callable[[], None], condition: str = "true") -> float:
        start = time.perf_counter()
        action()
        page.wait(condition)
        return time.perf_counter() - start

    group = seconds(lambda: page.open(f"{address}#/0/step_00000001/group/7"))
    step = seconds(lambda: page.open(f"{address}#/0/step_00000001"))
    count = "document.querySelector('.count').textContent"
    before = page.value(count)
    search = seconds(lambda: page.type_into(SEARCH, "word40001 word40002"), f"{count} !== {json.dumps(before)}")
    return step, group, search


if __name__ == "__main__":
    main()
