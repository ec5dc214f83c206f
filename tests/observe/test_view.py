"""The viewer's data against the records, and its pages in a real Chromium."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_hapo.errors import DataError
from megatron_hapo.observe.record_schema import SINCE_VERSION_2
from megatron_hapo.observe.view.build_view import view_server, write_view
from megatron_hapo.observe.view.data_pages import DataPages, utf16_ends
from megatron_hapo.observe.view.record_files import RecordFile, recorded_runs
from megatron_hapo.observe.view.token_statistics import token_statistics
from tests import chromium
from tests.observe.recorded import FLOATS, HOSTILE, response, some_rows, write_records
from tests.time_limits import patient


def content(text: str) -> Any:
    """What a data file hands to the page."""
    name, _, data = text.removeprefix("hapo.receive(").removesuffix(");\n").partition(", ")
    assert json.loads(name)
    return json.loads(data)


def test_a_group_holds_exactly_the_values_of_the_records(tmp_path):
    rows = some_rows()
    write_records(tmp_path, "step_00000001", rows[::-1])  # in any order
    group = content(DataPages(recorded_runs([tmp_path])).text("0/step_00000001/group_0"))
    assert [sample["sample"] for sample in group["samples"]] == [0, 1, 2, 3]
    for sample, row in zip(group["samples"], rows[:4], strict=True):
        assert sample["response"] == row["response"]
        assert np.frombuffer(base64.b64decode(sample["ids"]), "<i4").tolist() == row["response_ids"]
        assert np.frombuffer(base64.b64decode(sample["values"]["entropies"]), "<f4").tolist() == row["entropies"]
    assert "h" in group["samples"][2]["values"]
    assert "h" not in group["samples"][3]["values"]  # null in the records


def test_ends_count_as_javascript_does():
    text, ends = "a😀b", np.array([1, 1, 2, 3])
    assert utf16_ends(text, ends).tolist() == [1, 1, 3, 4]
    units = text.encode("utf-16-le")
    assert units[2 * 1 : 2 * 3].decode("utf-16-le") == "😀"


def test_every_data_file_is_the_one_that_is_served(tmp_path):
    write_records(tmp_path, "step_00000001", some_rows())
    pages = DataPages(recorded_runs([tmp_path]))
    files = dict(pages.all())
    assert {"index", "0/prompts", "0/step_00000001/tokens", "0/step_00000001/text_0"} <= files.keys()
    assert len([name for name in files if "/group_" in name]) == 3
    assert all(pages.text(name) == text for name, text in files.items())


@pytest.mark.parametrize(
    "name", ["2/prompts", "0/step_00000001/group_9", "0/step_00000001/text_1", "0/../../x", "0/x/y"]
)
def test_an_unknown_data_file_does_not_exist(tmp_path, name):
    write_records(tmp_path, "step_00000001", some_rows())
    with pytest.raises(KeyError):
        DataPages(recorded_runs([tmp_path])).text(name)


def test_forking_tokens_are_those_of_highest_mean_entropy(tmp_path):
    """Three tokens four times each; "if" has entropy 3 and is followed by "x" three times and "y" once."""
    entropies = {"if": 3.0, "x": 1.0, "y": 2.0, ".": 0.1}
    lines = [["if", "x", ".", "y"], ["if", "x", ".", "y"], ["if", "x", ".", "."], ["if", "y", "x", "."]]
    rows = [
        response(pieces, sample=i, entropies=[entropies[piece] for piece in pieces]) for i, pieces in enumerate(lines)
    ]
    found = token_statistics(RecordFile(write_records(tmp_path, "step_00000001", rows)))["forking"]
    assert [token["text"] for token in found] == ["if", "y", "x", "."]
    assert (found[0]["count"], found[0]["entropy"]) == (4, 3.0)
    assert [(f["text"], f["count"], f["entropy"]) for f in found[0]["followers"]] == [("x", 3, 1.0), ("y", 1, 2.0)]
    assert found[0]["examples"][-1] == [0, 3, 0]
    assert found[1]["followers"] == [{"id": found[2]["id"], "text": "x", "count": 1, "entropy": 1.0}]


def test_clipping_is_counted_by_quantile_of_entropy(tmp_path):
    """Twenty tokens in the order of their entropy: the highest two are clipped above, and one of the lowest below."""
    ratios, advantages = [1.0] * 20, [1.0] * 20
    ratios[18:], ratios[0], advantages[0], ratios[1] = [1.5, 1.5], 0.5, -1.0, 0.5
    row = response(
        ["a"] * 20, entropies=[0.1 * i for i in range(20)], importance_ratios=ratios, token_advantages=advantages
    )
    parts = token_statistics(RecordFile(write_records(tmp_path, "step_00000001", [row])))["quantiles"]
    assert [part["high"] for part in parts] == [0] * 9 + [1]
    assert [part["low"] for part in parts] == [0.5] + [0] * 9
    assert parts[9]["entropy"] == pytest.approx(1.85)
    assert [part["up"] for part in parts] == pytest.approx([0.05] + [0.1] * 9)
    assert [part["down"] for part in parts] == pytest.approx([0.05] + [0] * 9)


def test_records_of_version_1_are_shown(tmp_path):
    """They have rewards in single precision, their parts as a map, and neither answers nor what a scorer earned."""
    table = pq.read_table(write_records(tmp_path, "step_00000001", some_rows())).drop_columns(list(SINCE_VERSION_2))
    parts = pa.array([[("exact", 1.0)]] * len(table), pa.map_(pa.string(), pa.float32()))
    table = table.set_column(table.schema.get_field_index("reward_parts"), "reward_parts", parts)
    schema = pa.schema(
        [field.with_type(pa.float32()) if field.type == pa.float64() else field for field in table.schema]
    )
    schema = schema.with_metadata({"megatron_hapo.schema": "1"})
    pq.write_table(table.cast(schema), tmp_path / "rollouts/step_00000001.parquet")
    group = content(DataPages(recorded_runs([tmp_path])).text("0/step_00000001/group_0"))
    assert [sample["reward"] for sample in group["samples"]] == [1.0, -0.5, 0.0, 1.0]
    assert group["samples"][0]["parts"] == {"exact": 1.0}


def test_faults_of_records_are_named(tmp_path):
    with pytest.raises(DataError, match="no records in rollouts/"):
        write_view([tmp_path])
    path = write_records(tmp_path, "step_00000001", some_rows())
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["h"]), path)
    with pytest.raises(DataError, match="columns h are missing"):
        write_view([tmp_path])
    pq.write_table(table.replace_schema_metadata({"megatron_hapo.schema": "9"}), path)
    with pytest.raises(DataError, match="have schema 9"):
        write_view([tmp_path])
    pq.write_table(table, path)
    write_records(tmp_path, "step_00000002", [response(["a", "b"], entropies=[1.0])])
    with pytest.raises(DataError, match="entropies has another number of values"):
        write_view([tmp_path])
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        write_view([tmp_path])


def test_damaged_records_are_faults_of_the_data(tmp_path):
    """A few random bytes are changed; the file is then readable with other values, or a fault."""
    path = write_records(tmp_path, "step_00000001", some_rows())
    intact, draw, faults = path.read_bytes(), random.Random(0), []
    for _ in range(60):
        damaged = bytearray(intact)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            write_view([tmp_path])
        except DataError as fault:
            faults.append(str(fault))
    assert len(faults) > 30
    assert all(str(path) in fault for fault in faults)


@pytest.mark.parametrize("name", ["group", "sample", "prompt", "response", "response_ids", "token_ends"])
def test_a_response_without_a_value_that_the_pages_need_is_a_fault(tmp_path, name):
    rows = some_rows()
    write_records(tmp_path, "step_00000001", [rows[0] | {name: None}, *rows[1:]])
    with pytest.raises(DataError, match=f"{name} is missing in some rows"):
        write_view([tmp_path])


def test_the_server_answers_on_loopback_and_only_below_its_word(tmp_path):
    write_records(tmp_path, "step_00000001", some_rows())
    server, address = view_server([tmp_path])
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = address.removesuffix("index.html")
        with urllib.request.urlopen(f"{base}data/0/step_00000001/group_0.js") as answer:
            assert answer.read().decode() == DataPages(recorded_runs([tmp_path])).text("0/step_00000001/group_0")
        root = f"http://127.0.0.1:{server.server_port}/"
        for wrong in (f"{root}index.html", f"{root}data/index.js", f"{base}../../etc/passwd", f"{base}data/x.js"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(wrong)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs; the first with two steps and a response of 10,000 tokens."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    long = response([f" word{i % 97}" for i in range(10_000)], group=3, uid="long", seed=9)
    write_records(first, "step_00000001", [*some_rows(), long])
    write_records(first, "step_00000002", some_rows(2))
    write_records(second, "eval_00000002", some_rows(3))
    return [first, second]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[chromium.Page]:
    if chromium.PATH is None:
        pytest.skip(chromium.MISSING)
    with chromium.chromium(tmp_path_factory.mktemp("chromium")) as page:
        page.size(1300, 900)
        yield page


@pytest.fixture(scope="module")
def address(runs) -> str:
    return write_view(runs).as_uri()


def shown(page: chromium.Page) -> dict[str, str]:
    """The numbers of the token under the pointer, by column of the records."""
    page.wait("!document.getElementById('tip').hidden")
    cells = page.value("[...document.querySelectorAll('#tip td[data-key]')].map(c => [c.dataset.key, c.textContent])")
    return dict(cells)


def test_every_page_loads_without_a_fault_and_text_stays_text(page, address):
    step = f"{address}#/0/step_00000001"
    others = (
        "/tokens",
        "/group/0",
        "/group/1",
        "/group/1/0",
        "/group/2/1/3",
        "/group/3",
        "/group/0/with/1/eval_00000002/0",
    )
    for place in (address, step, *(f"{step}{other}" for other in others)):
        page.open(place)
        page.wait("[...document.querySelectorAll('.plot')].every(plot => plot.dataset.state === 'drawn')")
        assert page.value("document.querySelectorAll('.plot').length") == (5 if place.endswith("/tokens") else 0)
        assert page.value("document.querySelectorAll('.fault').length") == 0, place
        assert page.value("document.title") == "Responses"
    page.open(f"{step}/group/1")
    assert page.value("document.querySelector('[data-i=\"0\"]').textContent") == HOSTILE
    assert page.value("document.querySelector('.prompt-text').textContent") == HOSTILE
    assert page.faults == []


def test_a_hover_shows_the_numbers_of_the_records(page, address, runs):
    row = pq.read_table(runs[0] / "rollouts/step_00000001.parquet").to_pylist()[1]
    page.open(f"{address}#/0/step_00000001/group/0")
    page.hover("[data-sample='1'] [data-i='3']")
    numbers = shown(page)
    assert len(numbers) == 9
    for name, text in numbers.items():
        assert float(text) == pytest.approx(row[name][3], rel=1e-5), name
    assert page.value("document.querySelector('#tip td').textContent") == "“ 1”"
    assert "0.8 to 1.28" in page.value("document.getElementById('tip').textContent")


def test_numbers_that_were_not_recorded_are_a_dash(page, address):
    page.open(f"{address}#/0/step_00000001/group/0")
    page.hover("[data-sample='3'] [data-i='2']")
    numbers = shown(page)
    assert numbers["h"] == numbers["importance_ratios"] == "-"
    assert float(numbers["temperatures"]) > 0


def test_characters_of_several_tokens_and_control_characters_are_visible(page, address):
    page.open(f"{address}#/0/step_00000001/group/2/0")
    texts = page.value("[...document.querySelectorAll('[data-i]')].map(s => s.textContent)")
    assert texts[:2] == ["日本", "語"]
    assert texts[6:] == ["·", "·", "·", "😀", " é", "⟨U+202E⟩", "ab", "\t", "⟨U+0007⟩"]


def test_the_filters_filter(page, address):
    page.open(f"{address}#/0/step_00000001")
    groups = "[...document.querySelectorAll('[data-group]')].map(g => Number(g.dataset.group))"
    chips = "document.querySelectorAll('.chip').length"
    assert page.value(groups) == [0, 1, 2, 3]
    for name, value, expected, count in (
        ("source", "strings", [1, 2], 3),
        ("source", "", [0, 1, 2, 3], 8),
        ("finish", "truncated", [0], 1),
        ("finish", "failed", [0], 1),
        ("finish", "", [0, 1, 2, 3], 8),
        ("rewardHigh", "0.5", [0], 2),
        ("rewardHigh", "", [0, 1, 2, 3], 8),
        ("lengthLow", "100", [3], 1),
        ("lengthLow", "", [0, 1, 2, 3], 8),
        ("text", "日本語", [2], 2),
        ("text", "<script>", [1], 1),
    ):
        page.type_into(f"[data-filter='{name}']", value)
        page.wait(f"JSON.stringify({groups}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")
        assert page.value(chips) == count, (name, value)


def test_colours_follow_the_measure(page, address, runs):
    row = pq.read_table(runs[0] / "rollouts/step_00000001.parquet").to_pylist()[0]
    page.open(f"{address}#/0/step_00000001/group/0/0")
    page.type_into("[data-control='measure']", "h")
    colours = page.value("[...document.querySelectorAll('[data-i]')].map(s => s.style.backgroundColor)")
    blue, orange = "rgba(0, 114, 178", "rgba(213, 94, 0"
    assert [colour.startswith(orange if h > 0 else blue) for colour, h in zip(colours, row["h"], strict=True)] == [
        True
    ] * 8
    page.type_into("[data-control='measure']", "entropy")


def test_an_evaluation_is_coloured_by_what_it_has(tmp_path, page):
    recorded = ("policy_versions", "temperatures", "rollout_log_probs")
    rows = [row | {name: None for name in FLOATS if name not in recorded} | {"advantage": None} for row in some_rows()]
    write_records(tmp_path, "eval_00000001", rows)
    address = write_view([tmp_path]).as_uri()
    page.open(f"{address}#/0/eval_00000001")
    assert page.value("document.querySelector('main a').textContent") == "Group 0"  # no link to what it lacks
    page.open(f"{address}#/0/eval_00000001/group/0/0")
    assert page.value("document.querySelector('[data-control=measure]').value") == "surprisal"
    colours = page.value("[...document.querySelectorAll('[data-i]')].map(s => s.style.backgroundColor)")
    strength = [float(colour.rstrip(")").split(", ")[3]) for colour in colours]
    assert np.argmax(strength) == np.argmin(np.asarray(rows[0]["rollout_log_probs"]))
    assert "advantage" not in page.value("document.querySelector('.sample header').textContent")
    assert page.faults == []


def test_the_first_page_says_what_each_file_has(page, address):
    page.open(address)
    rows = page.value("[...document.querySelectorAll('tbody tr')].map(r => [...r.children].map(c => c.textContent))")
    assert rows[-1] == ["evaluation, step 2", "7", "3", "0.6429", "71.4 %", "9.286"]


def test_the_server_shows_what_was_recorded_since_it_started(tmp_path):
    write_records(tmp_path, "step_00000001", some_rows())
    server, address = view_server([tmp_path])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = address.removesuffix("index.html")

    def answer(name: str) -> str:
        with urllib.request.urlopen(f"{base}data/{name}.js") as response:
            return response.read().decode()

    try:
        assert "step_00000002" not in answer("index")
        write_records(tmp_path, "step_00000002", some_rows(2))
        (tmp_path / "rollouts/step_00000001.parquet").unlink()  # as record.keep does
        assert "step_00000002" in answer("index")
        assert "step_00000001" not in answer("index")
        assert answer("0/step_00000002/group_1")
    finally:
        server.shutdown()
        server.server_close()


def test_two_hundred_groups_of_a_thousand_tokens_open_at_once(tmp_path, page):
    words = [f" word{i}" for i in range(500)]
    once = [response(words, seed=sample, sample=sample) for sample in range(2)]
    rows = [row | {"group": group, "uid": f"p{group}"} for group in range(200) for row in once]
    write_records(tmp_path, "step_00000001", rows)
    address = write_view([tmp_path]).as_uri()
    seconds = []
    for place in ("", "/group/150"):
        begin = time.perf_counter()
        page.open(f"{address}#/0/step_00000001{place}")
        seconds.append(time.perf_counter() - begin)
    assert page.value("document.querySelectorAll('[data-i]').length") == 1000
    assert max(seconds) < patient(2)
    assert page.faults == []


def test_a_long_response_becomes_elements_as_one_scrolls(page, address):
    page.open(f"{address}#/0/step_00000001/group/3")
    count = "document.querySelectorAll('[data-i]').length"
    before = page.value(count)
    assert before < 5000
    page.value("(() => { const b = document.querySelector('.token-box'); b.scrollTop = b.scrollHeight; })()")
    page.wait(f"{count} > {before}")
    page.open(f"{address}#/0/step_00000001/group/3/0/9999")
    assert page.value(count) == 10_000
    assert page.value("document.querySelector('.cursor').textContent") == " word8"
    page.value("document.querySelector('.token-box').focus()")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert page.value("document.querySelector('.cursor').textContent") == " word7"


def test_the_same_prompt_of_another_run_is_beside_it(page, address, runs):
    page.open(f"{address}#/0/step_00000001/group/0")
    places = page.value("[...document.querySelector('[data-control=compare]').options].map(o => o.value)")
    assert places == ["", "0/step_00000002/0", "1/eval_00000002/0"]
    page.type_into("[data-control='compare']", "1/eval_00000002/0")
    page.wait("document.querySelectorAll('.columns.two > section').length === 2")
    headings = page.value("[...document.querySelectorAll('.columns h2')].map(h => h.textContent)")
    assert headings == [f"{runs[0].name}, step 1", f"{runs[1].name}, evaluation, step 2"]
    assert page.faults == []
