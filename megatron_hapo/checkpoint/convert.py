"""Converts between Hugging Face folders and Megatron checkpoints, on CPU ranks of this machine or under torchrun."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_hapo.checkpoint.manifest import check_manifest
from megatron_hapo.checkpoint.model_folder import (
    DTYPE_BYTES,
    atomic_folder,
    config_dtype,
    copy_companions,
    finish_folder,
    is_megatron_folder,
    partial_folder,
)
from megatron_hapo.checkpoint.progress import folder_growth_bar, progress_bar
from megatron_hapo.config import ParallelSizes
from megatron_hapo.config.output_paths import folder_fault
from megatron_hapo.errors import ConfigError, HapoError
from megatron_hapo.model.families import layout_faults, num_parameters, read_shape
from megatron_hapo.model.rank_environment import environment, importing, quieten, rendezvous_file

if TYPE_CHECKING:
    import numpy as np

    from megatron_hapo.model.parallel_layout import ParallelLayout

TIMEOUT_SECONDS = 3600.0
MAX_LOGIT_DIFFERENCE = 1e-3
"""Between the float32 logits of the two folders; a wrong weight causes differences as large as the logits."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion, and the process grid that carries it out."""

    direction: Literal["hf-to-megatron", "megatron-to-hf"]
    source: Path
    target: Path
    tp: int = 1
    pp: int = 1
    ep: int = 1
    dtype: str | None = None
    """Dtype of the written weights; None keeps the source's."""
    verify: bool = False
    """Compare the logits of both folders before the target is renamed to its final name."""

    @property
    def dtypes(self) -> tuple[str, str]:
        """Dtypes of the source and of the target."""
        source = config_dtype(self.source)
        return source, self.dtype or source

    @property
    def hf_folder(self) -> Path:
        """The Hugging Face side, under the name that it has during the conversion."""
        return self.source if self.direction == "hf-to-megatron" else partial_folder(self.target)

    @property
    def megatron_folder(self) -> Path:
        """The Megatron side, under the name that it has during the conversion."""
        return self.source if self.direction == "megatron-to-hf" else partial_folder(self.target)


def convert(job: Conversion) -> None:
    """Write the target folder, which gets its final name only when it is complete and, if requested, verified.

    Under torchrun every rank calls this, and the job's sizes split that world. Otherwise this starts the processes
    itself, as few as the sizes need.

    Raises:
        ConfigError: the source cannot be converted, or the target exists already; the target is unchanged.
        HapoError: a process died, the disk filled up, or the verification failed; nothing is left behind.
    """
    check(job)
    # On CPUs only: a conversion needs memory rather than speed, and the host has more of it.
    with _in_environment(environment("cpu", loopback=False)):
        _convert(job)


@contextlib.contextmanager
def _in_environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for this process and those that it starts meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _convert(job: Conversion) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _rank_main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", job)
        return
    world_size = job.pp * math.lcm(job.tp, job.ep)
    with tempfile.TemporaryDirectory(prefix="megatron-hapo-") as folder:
        executor = ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn"))
        try:
            ranks = [
                executor.submit(_rank_main, rank, world_size, rendezvous_file(Path(folder)), job)
                for rank in range(world_size)
            ]
            for rank in as_completed(ranks):
                rank.result()
        except BaseException as error:
            for process in list((executor._processes or {}).values()):  # they may wait for a failed rank for long
                process.kill()
            executor.shutdown(wait=True, cancel_futures=True)
            shutil.rmtree(partial_folder(job.target), ignore_errors=True)
            if isinstance(error, BrokenProcessPool):
                raise HapoError("a conversion process was killed (out of memory?); nothing was written") from error
            raise
        executor.shutdown()


def check(job: Conversion) -> None:
    """Check everything that can be known quickly from the files before any work starts.

    Large files are compared with their checksums by `load_weights`, each rank reading a share of them.

    Raises:
        ConfigError: lists all faults at once.
    """
    if not job.source.is_dir():
        raise ConfigError([f"{job.source}: no such folder"])
    check_manifest(job.source, quick=True)
    shape = read_shape(job.source)
    found = layout_faults(shape, ParallelSizes(tp=job.tp, pp=job.pp, ep=job.ep))
    faults = [f"--{name}: {message}" for name, message in found]
    is_megatron = is_megatron_folder(job.source)
    if job.direction == "megatron-to-hf" and not is_megatron:
        faults.append(f"{job.source}: is not a Megatron checkpoint (torch_dist)")
    if job.direction == "hf-to-megatron" and is_megatron:
        faults.append(f"{job.source}: is a Megatron checkpoint already")
    faults += target_faults(job.target, num_parameters(shape) * DTYPE_BYTES[job.dtypes[1]])
    if faults:
        raise ConfigError(faults)


def target_faults(target: Path, num_bytes: int) -> Iterator[str]:
    """Why a folder of this size cannot be written to `target`; empty if it can."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        yield f"{target}: exists and is not empty; choose another folder or remove it"
        return
    for folder in (target, partial_folder(target)):
        if (fault := folder_fault(folder)) is not None:
            yield f"{target}: {fault}"
            return
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        yield f"{target}: needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on its disk"


def _rank_main(rank: int, world_size: int, init_method: str, job: Conversion) -> None:
    quieten()
    with importing():
        import torch

        from megatron_hapo.model import megatron_on_cpu

        megatron_on_cpu.install()
        from megatron_hapo.model import parallel_layout

    # Two threads touch new memory twice as fast as one.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    device = torch.device("cpu")
    parallel_layout.init_distributed(
        rank=rank, world_size=world_size, init_method=init_method, device=device, timeout_seconds=TIMEOUT_SECONDS
    )
    try:
        layout = parallel_layout.initialize(
            ParallelSizes.for_world(world_size, tp=job.tp, pp=job.pp, ep=job.ep),
            device=device,
            seed=0,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        if rank == 0:
            with atomic_folder(job.target):
                _convert_rank(job, layout)
        else:
            _convert_rank(job, layout)
    finally:
        parallel_layout.shutdown()


def _convert_rank(job: Conversion, layout: ParallelLayout) -> None:
    """Load, write and verify, on every rank together; rank 0 made the partial folder and will rename it."""
    import torch
    import torch.distributed as dist

    from megatron_hapo.checkpoint.hf_weights import write_hf_shards
    from megatron_hapo.checkpoint.weights import load_weights, save_weights
    from megatron_hapo.model.build import build_model

    dist.barrier()
    shape, (source_dtype, dtype) = read_shape(job.source), job.dtypes
    to_megatron = job.direction == "hf-to-megatron"
    model = build_model(shape, layout, dtype=getattr(torch, dtype if to_megatron else source_dtype))
    num_local = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
    # Megatron reads a whole checkpoint in one call, which reports no progress.
    local_bytes = num_local * DTYPE_BYTES[source_dtype] if to_megatron else None
    with progress_bar(f"reading {job.source.name}", local_bytes, show=dist.get_rank() == 0) as progress:
        load_weights(model, shape, layout, job.source, progress=progress, as_file_views=True)
    target = partial_folder(job.target)
    if to_megatron:
        whole_bytes = num_parameters(shape) * DTYPE_BYTES[dtype]
        with folder_growth_bar(target, f"writing {job.target.name}", whole_bytes, show=dist.get_rank() == 0):
            save_weights(model, layout, target)
        if dist.get_rank() == 0:
            copy_companions(job.source, target, dtype)
    else:
        own_bytes = num_local * DTYPE_BYTES[dtype] * layout.sizes.tp
        with progress_bar(f"writing {job.target.name}", own_bytes, show=dist.get_rank() == 0) as progress:
            part = write_hf_shards(model, shape, layout, target, dtype=getattr(torch, dtype), progress=progress)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        if dist.get_rank() == 0:
            weight_map = {name: file for part in parts if part for name, file in sorted(part.items())}
            finish_folder(target, job.source, weight_map, dtype)
    dist.barrier()
    if job.verify:
        del model
        _verify(job, layout)
    dist.barrier()


def _verify(job: Conversion, layout: ParallelLayout) -> None:
    """Print the largest difference of float32 logits between the two folders on a few random sequences.

    Raises:
        HapoError: on every rank, if the difference is more than rounding.
    """
    import torch
    import torch.distributed as dist

    from megatron_hapo.checkpoint.weights import load_weights
    from megatron_hapo.model.build import build_model
    from megatron_hapo.model.forward import sequence_logits

    shape = read_shape(job.megatron_folder)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(shape.vocab_size, (length,), generator=generator).tolist() for length in (7, 16, 33)]
    model = build_model(shape, layout, dtype=torch.float32)
    load_weights(model, shape, layout, job.megatron_folder)
    written = getattr(torch, job.dtypes[1])
    for chunk in model:
        for parameter in chunk.parameters():  # rounded as in the written folder, whose dtype may be narrower
            parameter.data = parameter.data.to(written).float()
    logits = sequence_logits(model, shape, layout, sequences)
    del model
    result = None
    if logits is not None and layout.reports and layout.dp_rank == 0:
        # In its own process: with Megatron's CPU compatibility installed, transformers computes wrong logits.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            reference = executor.submit(_transformers_logits, job.hf_folder, sequences).result()
        result = max(
            float((part - torch.from_numpy(want)).abs().max()) for part, want in zip(logits, reference, strict=True)
        )
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    worst = next(value for value in results if value is not None)
    if dist.get_rank() == 0:
        print(f"largest difference of logits (float32, {sum(map(len, sequences))} tokens): {worst:.3g}", flush=True)
    if not worst <= MAX_LOGIT_DIFFERENCE:  # NaN fails too
        raise HapoError(f"the logits of the two folders differ by {worst:.3g}; {job.target} was not written")


def _transformers_logits(folder: Path, sequences: list[list[int]]) -> list[np.ndarray]:
    """float32 logits of each sequence, [length, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0].numpy() for tokens in sequences]
