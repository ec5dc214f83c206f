"""The sizes of the trainer's process grid, and which layers each pipeline stage holds. Imports no torch.

The rules for layers are Megatron's (0.19.2, `get_num_layers_to_build`, `get_transformer_layer_offset`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from megatron_hapo.config.faults import Fault
from megatron_hapo.config.section import Ranks, Section


class ParallelSizes(Section):
    """Sizes of the trainer's process grid."""

    tp: Ranks = 1
    """Tensor parallel size."""
    pp: Ranks = 1
    """Pipeline parallel size."""
    vpp: Ranks = 1
    """Interleaved pipeline: the layers are cut into pp * vpp chunks, of which stage s holds s, s + pp, s + 2 pp and so
    on. This shrinks the pipeline's bubble to 1 / vpp and sends vpp times as many messages."""
    first_stage_layers: Ranks | None = None
    """Layers of the first pipeline stage, which also holds the embedding. `None`: as many as each middle stage."""
    last_stage_layers: Ranks | None = None
    """Layers of the last pipeline stage, which also holds the output head and the loss. `None`: as many as each middle
    stage."""
    cp: Ranks = 1
    """Context parallel size: each sequence is split over this many ranks."""
    dp: Ranks = 1
    """Data parallel size."""
    ep: Ranks = 1
    """Expert parallel size: the experts of a mixture-of-experts model are distributed over this many groups of the
    tp * dp ranks of a pipeline stage."""
    etp: Ranks = 1
    """Expert tensor parallel size: each expert is sharded over this many neighbouring ranks of a tp group, which then
    also share its tokens. 1 keeps experts whole: small experts compute faster that way, and need ep to fit in memory.
    """

    @classmethod
    def for_world(cls, world_size: int, **sizes: int | None) -> Self:
        """These sizes, all but dp, with the dp that uses every rank of a world.

        Raises:
            ValueError: a size is not positive, or their product does not divide the world size.
        """
        replica = cls.model_validate({**sizes, "dp": 1})
        if world_size % replica.world_size:
            raise ValueError(
                f"the world size {world_size} must be a multiple of tp={replica.tp} * pp={replica.pp} * "
                f"cp={replica.cp} = {replica.world_size}"
            )
        return replica.model_copy(update={"dp": world_size // replica.world_size})

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def stage_size(self) -> int:
        """Number of ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    def chunks(self, num_layers: int, stage: int) -> list[range]:
        """The layers of each chunk of a pipeline stage; `faults(num_layers)` must be empty."""
        sizes = [size // self.vpp for size in self._stage_sizes(num_layers)]
        starts = [sum(sizes[:stage]) + chunk * sum(sizes) for chunk in range(self.vpp)]
        return [range(start, start + sizes[stage]) for start in starts]

    def faults(self, num_layers: int) -> Iterator[tuple[str, str]]:
        """Why the layers cannot be distributed over the pipeline stages: (name of the size, what is wrong)."""
        if self.pp == 1:
            yield from ((fault.key, fault.message) for fault in self._needs_pipeline(""))
            return
        ends = self._uneven_ends()
        left, middle = num_layers - sum(ends.values()), self.pp - len(ends)
        if left < middle or (left > 0 and middle == 0) or (middle and left % middle):
            uneven = "".join(f", {name}={layers}" for name, layers in ends.items())
            yield "pp", f"{num_layers} layers do not split evenly over pp={self.pp}{uneven}"
            return
        for size in sorted(set(self._stage_sizes(num_layers))):
            if size % self.vpp:
                yield "vpp", f"the {size} layers of a stage do not split evenly into vpp={self.vpp} chunks"

    def grid_faults(self, prefix: str = "") -> Iterator[Fault]:
        """Sizes that contradict each other, whatever the model.

        Args:
            prefix: precedes the names of the sizes, e.g. "parallel." where they are settings.
        """
        yield from self._needs_pipeline(prefix)
        if self.tp % self.etp:
            yield Fault(f"{prefix}etp", f"must divide {prefix}tp={self.tp}, got {self.etp}", (f"{prefix}tp",))
        elif self.tp * self.dp % (self.etp * self.ep):
            yield Fault(
                f"{prefix}ep",
                f"must divide {prefix}tp * {prefix}dp / {prefix}etp = {self.tp * self.dp // self.etp}, got {self.ep}",
                (f"{prefix}tp", f"{prefix}dp", f"{prefix}etp"),
            )

    def check_world(self, world_size: int) -> None:
        """Check that a world of this size can be laid out.

        Raises:
            ValueError: the sizes contradict each other or need another number of ranks.
        """
        if faults := [f"{fault.key} {fault.message}" for fault in self.grid_faults()]:
            raise ValueError("; ".join(faults))
        if world_size != self.world_size:
            raise ValueError(
                f"tp={self.tp} * pp={self.pp} * cp={self.cp} * dp={self.dp} = {self.world_size} must equal the world "
                f"size, got {world_size} ranks"
            )

    def _needs_pipeline(self, prefix: str) -> Iterator[Fault]:
        """Settings of a pipeline where there is none."""
        if self.pp == 1:
            interleaved = {"vpp": self.vpp} if self.vpp > 1 else {}
            for name, given in (interleaved | self._uneven_ends()).items():
                yield Fault(f"{prefix}{name}", f"needs {prefix}pp of at least 2, got {given}", (f"{prefix}pp",))

    def _uneven_ends(self) -> dict[str, int]:
        ends = {"first_stage_layers": self.first_stage_layers, "last_stage_layers": self.last_stage_layers}
        return {name: layers for name, layers in ends.items() if layers is not None}

    def _stage_sizes(self, num_layers: int) -> list[int]:
        """Number of layers of each stage."""
        first, last = self.first_stage_layers, self.last_stage_layers
        middle = self.pp - len(self._uneven_ends())
        each = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
        sizes = [each] * self.pp
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        return sizes
