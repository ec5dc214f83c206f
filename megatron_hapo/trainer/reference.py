"""The reference model on a trainer rank: weights in host memory, exchanged with the policy's while they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Bytes of weights that an exchange holds twice on the device."""


class ReferenceWeights:
    """A second set of this rank's parameters, which begins as a copy of the first.

    The device never holds both: an exchange moves the policy's weights to the place where the reference's were, chunk
    by chunk, and a second one back. Parameters stay the same tensors, so that Megatron's views of them stay valid, and
    the optimizer's master weights are not touched: where they are views of the parameters (float32), the exchange back
    restores every bit.

    Gathering of updated weights must have finished before (`optimizer.wait_for_weights`).

    Args:
        model: the rank's chunks.
    """

    def __init__(self, model: Sequence[torch.nn.Module]):
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for parameter in (parameter for chunk in model for parameter in chunk.parameters()):
            on_device = parameter.detach().view(-1)
            on_host = torch.empty_like(on_device, device="cpu", pin_memory=on_device.is_cuda)
            self._pairs.append((on_device, on_host))
        self._copy()
        self.is_initial = True
        """Whether this is still the model that the run started from."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(on_host.nbytes for _, on_host in self._pairs)

    def replace(self) -> None:
        """Make the policy's current weights the reference."""
        self._copy()
        self.is_initial = False

    @contextlib.contextmanager
    def in_place_of_policy(self) -> Iterator[None]:
        """Encloses what sees the reference's weights in the model's parameters, and may change them."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _copy(self) -> None:
        for on_device, on_host in self._pairs:
            on_host.copy_(on_device)

    @torch.no_grad()
    def _exchange(self) -> None:
        for on_device, on_host in self._pairs:
            size = max(1, CHUNK_BYTES // on_device.itemsize)
            for place, waiting in zip(on_device.split(size), on_host.split(size), strict=True):
                leaving = place.clone()
                place.copy_(waiting, non_blocking=True)
                waiting.copy_(leaving, non_blocking=True)
        if self._pairs and self._pairs[0][0].is_cuda:
            torch.cuda.synchronize()  # the host reads `waiting` only now; until then the stream keeps the order
