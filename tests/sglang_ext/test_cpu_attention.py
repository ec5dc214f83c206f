"""Attention in rectangles against one call per request; without SGLang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sglang_ext.cpu_attention import attend_decode, attend_extend, attention, rectangles


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("decodes", [True, False], ids=["decode", "prefill behind a cached prefix"])
def test_rectangles_attend_as_single_requests_do(num_heads: int, num_kv_heads: int, decodes: bool):
    generator = torch.Generator().manual_seed(num_heads)
    num_requests, head_size, places = 23, 16, 2000
    key_cache, value_cache = (
        torch.randn(places, num_kv_heads, head_size, generator=generator) for _ in ("keys", "values")
    )
    table = torch.randperm(places, generator=generator)[: num_requests * 80].view(num_requests, 80).int()
    requests = torch.randperm(num_requests, generator=generator)
    lengths = torch.randint(1, 70, (num_requests,), generator=generator).tolist()
    new = [1] * num_requests if decodes else [int(torch.randint(1, n + 1, (), generator=generator)) for n in lengths]
    query = torch.randn(sum(new), num_heads, head_size, generator=generator)

    planned = rectangles(table, requests, lengths, new)
    output = attention(query, key_cache, value_cache, planned, scaling=0.3)

    assert 1 < len(planned) < num_requests
    start = 0
    for request, length, count in zip(requests.tolist(), lengths, new, strict=True):
        cached = table[request, :length].long()
        position = torch.arange(length - count, length)
        expected = F.scaled_dot_product_attention(
            query[start : start + count].transpose(0, 1)[None],
            key_cache[cached].transpose(0, 1)[None],
            value_cache[cached].transpose(0, 1)[None],
            attn_mask=torch.arange(length) <= position[:, None],
            scale=0.3,
            enable_gqa=True,
        )[0].transpose(0, 1)
        torch.testing.assert_close(output[start : start + count], expected, atol=2e-6, rtol=1e-5)
        start += count
    assert start == len(query)


def test_requests_of_one_length_need_neither_padding_nor_mask():
    table = torch.arange(32).view(4, 8).int()
    (rectangle,) = rectangles(table, torch.arange(4), [8] * 4, [1] * 4)
    assert rectangle.real_queries is None
    assert rectangle.visible is None
    assert rectangle.cache_rows.tolist() == list(range(32))


def test_a_pass_without_requests_has_no_rectangles():
    assert rectangles(torch.zeros(0, 8).int(), torch.zeros(0).long(), [], []) == []


@pytest.mark.parametrize(
    ("hook", "changed"),
    [
        (attend_decode, {"sliding_window_size": 0}),
        (attend_decode, {"is_cross_attn": True}),
        (attend_extend, {"sliding_window_size": 16}),
        (attend_extend, {"causal": False}),
        (attend_extend, {"encoder_lens": torch.ones(1)}),
    ],
)
def test_what_rectangles_do_not_express_goes_to_sglang(hook: Callable[..., Any], changed: dict[str, Any]):
    options = {"scaling": 1.0, "causal": True, "is_cross_attn": False, "sliding_window_size": None} | changed
    tensors = (torch.ones(1), torch.zeros(1), torch.ones(1), torch.ones(1), options.pop("encoder_lens", None))
    assert hook(lambda *arguments, **given: (arguments, given), "backend", *tensors, **options) == (
        ("backend", *tensors), options,
    )  # fmt: skip
