"""Which layers each pipeline stage holds, in one run or, interleaved, in several chunks. Pure; no torch.

Megatron's rule (0.19.2, `get_num_layers_to_build`, `get_transformer_layer_offset`), for who must know it of every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the layers of a model are dealt out over pipeline stages."""

    pp: int = 1
    vpp: int = 1
    """Chunks of a stage: of the pp x vpp runs that the layers are cut into, stage s holds s, s + pp, s + 2 pp ..."""
    first_stage_layers: int | None = None
    """Layers of the first stage, where it has not as many as the others (it holds the embedding too)."""
    last_stage_layers: int | None = None
    """The same of the last stage (it holds the output head)."""

    @classmethod
    def of(cls, sizes: object) -> Pipeline:
        """From what has these settings among others."""
        return cls(**{field.name: getattr(sizes, field.name) for field in fields(cls)})

    def chunks(self, num_layers: int, stage: int) -> list[range]:
        """The layers of each chunk of a stage; `faults` must be empty."""
        sizes = [size // self.vpp for size in self._stage_sizes(num_layers)]
        starts = [sum(sizes[:stage]) + chunk * sum(sizes) for chunk in range(self.vpp)]
        return [range(start, start + sizes[stage]) for start in starts]

    def faults(self, num_layers: int) -> Iterator[tuple[str, str]]:
        """Why so many layers cannot be dealt out: (name of the setting, what is wrong)."""
        ends = {
            name: layers
            for name in ("first_stage_layers", "last_stage_layers")
            if (layers := getattr(self, name)) is not None
        }
        told = "".join(f", {name}={layers}" for name, layers in ends.items())
        if self.pp == 1:
            for name in ends:
                yield name, f"needs a pipeline of at least 2 stages, and pp is 1; got {ends[name]}"
            if self.vpp > 1:
                yield "vpp", f"needs a pipeline of at least 2 stages, and pp is 1; got {self.vpp}"
            return
        left, middle = num_layers - sum(ends.values()), self.pp - len(ends)
        if left < middle or (left > 0 and middle == 0) or (middle and left % middle):
            yield "pp", f"{num_layers} layers do not split over pp={self.pp}{told}"
            return
        for size in sorted(set(self._stage_sizes(num_layers))):
            if size % self.vpp:
                yield "vpp", f"the {size} layers of a stage do not split into vpp={self.vpp} chunks"

    def _stage_sizes(self, num_layers: int) -> list[int]:
        first, last = self.first_stage_layers, self.last_stage_layers
        middle = self.pp - (first is not None) - (last is not None)
        each = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
        sizes = [each] * self.pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        return sizes
