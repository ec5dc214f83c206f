"""Where an engine rank puts the pieces of parameters that it serves in float8, until it can quantize them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_hapo.resharding.float8_rows import Float8Rows, quantize_rows
from megatron_hapo.resharding.plan import Piece

STAGED_BYTES = 1 << 30
"""Limit of what is staged before a channel that runs ahead of the others has to wait."""


class StagedMatrices(Mapping[str, Tensor]):
    """An engine rank's parameters as one transfer writes them; a new object for each.

    A quantized parameter has a matrix in the transfer's dtype only from its first piece to its last, which quantizes it
    on its own device. Senders go through the parameters in the plan's order, so that few are staged at once: about one
    for each group of trainer ranks that hold different layers. Within a host a channel that runs ahead has to wait
    (`admits`), so `limit_bytes` and the parameters that one bucket touches are the most; between hosts the rounds of
    messages keep channels in step. There is never a copy of the whole model.

    Args:
        parameters: in the plan's order; each is served as it is sent, [rows, columns], or in float8.
        dtype: of the transfer.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor | Float8Rows], dtype: torch.dtype, *, limit_bytes: int = STAGED_BYTES
    ):
        self._dtype, self._limit_bytes = dtype, limit_bytes
        self._plain = {name: value for name, value in parameters.items() if not isinstance(value, Float8Rows)}
        self._quantized = {name: value for name, value in parameters.items() if isinstance(value, Float8Rows)}
        self._missing = {name: rows.weight.numel() for name, rows in self._quantized.items()}
        """Elements that have not been written yet."""
        self._positions = {name: position for position, name in enumerate(parameters)}
        self._staged: dict[str, Tensor] = {}
        self.peak_bytes = 0
        """The most that was staged at once."""

    def __getitem__(self, name: str) -> Tensor:
        """The matrix into which the pieces of this parameter go; memory for it is allocated with the first."""
        if name in self._plain:
            return self._plain[name]
        if name not in self._staged:
            self._staged[name] = torch.empty(
                self._quantized[name].weight.shape, dtype=self._dtype, device=self.device_of(name)
            )
            self.peak_bytes = max(self.peak_bytes, self.staged_bytes)
        return self._staged[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def staged_bytes(self) -> int:
        """Bytes that are staged now."""
        return sum(matrix.nbytes for matrix in self._staged.values())

    def device_of(self, name: str) -> torch.device:
        """The device of a parameter."""
        return self._plain[name].device if name in self._plain else self._quantized[name].weight.device

    def position(self, pieces: Sequence[Piece]) -> int:
        """The place in the plan's order of the first of these pieces."""
        return self._positions[pieces[0].parameter]

    def admits(self, pieces: Sequence[Piece]) -> bool:
        """Whether these pieces can be written without staging more than the limit."""
        new = {piece.parameter for piece in pieces} & self._quantized.keys() - self._staged.keys()
        more = sum(self._quantized[name].weight.numel() for name in new) * self._dtype.itemsize
        return not more or self.staged_bytes + more <= self._limit_bytes

    def written(self, piece: Piece) -> None:
        """Quantizes the parameter of a piece that has been written, if it was the last."""
        name = piece.parameter
        if name not in self._quantized:
            return
        self._missing[name] -= piece.rows * piece.columns
        if not self._missing[name]:
            quantize_rows(self._staged.pop(name), out=self._quantized[name])
