"""The block of host memory that holds a rank's released state."""

from __future__ import annotations

import pytest
import torch

from megatron_hapo.trainer.host_arena import ALIGNMENT, HostArena


def test_a_block_is_as_large_as_its_parts_and_they_do_not_overlap() -> None:
    arena = HostArena()
    sizes = [1000, 1, ALIGNMENT, 5_000_001]
    parts = arena.parts(sizes)
    assert [len(part) for part in parts] == sizes
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [part.unique().tolist() for part in parts] == [[0], [1], [2], [3]]
    assert arena.num_bytes < sum(sizes) + len(sizes) * ALIGNMENT
    assert all((part.data_ptr() - parts[0].data_ptr()) % ALIGNMENT == 0 for part in parts)


def test_a_block_is_kept_while_its_size_serves() -> None:
    arena = HostArena()
    first = arena.parts([3000, 500])[0].data_ptr()
    assert arena.parts([2900, 512])[0].data_ptr() == first
    assert arena.parts([]) == []
    assert arena.num_bytes == 0
    assert [len(part) for part in arena.parts([7])] == [7]


def test_a_block_is_registered_with_cuda_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registration gets the block's address and size, once for each block."""
    calls: list[tuple] = []

    class Runtime:
        def __getattr__(self, name: str):
            return lambda *arguments: calls.append((name, *arguments)) or 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    arena = HostArena()
    [part] = arena.parts([ALIGNMENT])
    address = part.data_ptr()
    arena.parts([ALIGNMENT])
    assert calls == [("cudaHostRegister", address, ALIGNMENT, 0)]
    arena.parts([])
    assert calls[1:] == [("cudaHostUnregister", address)]
