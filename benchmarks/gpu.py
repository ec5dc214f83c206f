"""What one GPU shows, in one command of less than 8 minutes: correctness and speed of every part that only a GPU takes.

    python benchmarks/gpu.py [--toy] [--parts kernels head ...] [--minutes 7.5]

Needs torch, triton, transformers and megatron-core with their dependencies, and pydantic, omegaconf and safetensors;
neither SGLang nor Ray. Parts run in processes of their own, in the order below; each is timed and printed at once, even
if a later one fails or hangs, and a part that would start after the minutes are over is left out. The last line is all
of it as JSON. The exit code is 1 if a part failed. `--toy`: sizes for a CPU, where the same code runs without Triton,
CUDA IPC and NCCL; its times mean nothing.

- kernels: the Triton kernels against their twins in torch, also beyond 2^31 logits, with GB/s next to a plain copy
- head: the fused output head, TFLOP/s and peak memory, against the plain one; also with float32 logits
- slots: transfers between two processes through slots of three sizes, GB/s next to a plain copy; where
  torch_memory_saver is installed, also into memory that is paused and resumed in between
- rank: a trainer rank: updates, checkpoint, reload, memory turns; the optimizer on the host with 1 and with all threads
- layers: four layers of Qwen3-8B's shape on micro-batches of random lengths, by padded rectangles and without padding
- hook: the sampler's adaptive temperature at 256 x 151,936, without one wait of the host; the sort of a seeded top-p
- bits: checksums and float8 rounding, equal to the CPU's
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PART_SECONDS = 150
"""After this long a part counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the parts work on."""

    device: str
    vocab: int
    rows: int
    """Of logits in timed kernels."""
    large_rows: int
    """Rows whose logits are more than 2^31, or 0."""
    hidden: int
    head_rows: int
    slots_mib: tuple[int, ...]
    layers: int
    tokens: int
    """Of a micro-batch."""
    requests: int
    """Of a decoding batch."""
    repeats: int


GPU = Sizes(
    device="cuda", vocab=151_936, rows=4096, large_rows=14_400, hidden=4096, head_rows=8192, slots_mib=(4, 32, 128),
    layers=4, tokens=16_384, requests=256, repeats=5,
)  # fmt: skip
TOY = Sizes(
    device="cpu", vocab=1003, rows=32, large_rows=0, hidden=64, head_rows=64, slots_mib=(1,), layers=1, tokens=256,
    requests=4, repeats=1,
)  # fmt: skip


def main() -> int:
    """Runs the parts and prints what they found."""
    arguments = parse_arguments()
    sizes, start, report = TOY if arguments.toy else GPU, time.monotonic(), {}
    if sizes.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --toy runs the same code on a CPU", file=sys.stderr)
        return 2
    report["machine"] = machine(sizes.device)
    print(report["machine"], flush=True)
    for name in arguments.parts:
        began = time.monotonic()
        if began - start > 60 * arguments.minutes:
            report[name] = {"left out": "no time"}
        else:
            report[name] = in_own_process(PARTS[name], sizes)
            report[name]["seconds"] = round(time.monotonic() - began, 1)
        print(f"{name}: {json.dumps(report[name])}", flush=True)
    print(json.dumps(report))
    return int(any("error" in part for part in report.values() if isinstance(part, dict)))


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="what one GPU shows")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, in this order")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part starts later")
    return parser.parse_args()


def machine(device: str) -> dict[str, str]:
    """Versions and the device."""
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}


def in_own_process(part: Callable[[Sizes], dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """What the part found; its error, if it failed or did not end."""
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return executor.submit(guarded, part, sizes).result(timeout=PART_SECONDS)
    except Exception as error:  # its process died, or is too slow; the other parts are still worth their time
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        for process in list((executor._processes or {}).values()):
            process.kill()
        executor.shutdown(wait=False, cancel_futures=True)


def guarded(part: Callable[[Sizes], dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Runs in the part's process: what it found, or its error, whose traceback is printed where it happened."""
    warnings.filterwarnings("ignore")
    try:
        return part(sizes)
    except Exception as error:  # reported, and counted in the exit code; the other parts are still worth their time
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


# ----- measuring


def seconds_of(call: Callable[[], Any], sizes: Sizes, *, before: Callable[[], Any] = lambda: None) -> float:
    """The shortest of several runs; the first, which compiles, does not count on a GPU."""
    taken = []
    for _ in range(sizes.repeats + (sizes.device == "cuda")):
        before()
        synchronize(sizes)
        start = time.perf_counter()
        call()
        synchronize(sizes)
        taken.append(time.perf_counter() - start)
    return min(taken[1:] or taken)


def synchronize(sizes: Sizes) -> None:
    """Wait for the device."""
    if sizes.device == "cuda":
        torch.cuda.synchronize()


def copy_gbs(sizes: Sizes, num_bytes: int) -> float:
    """Bytes read and written per second by a plain copy on the device, 1e9."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    return round(2 * num_bytes / seconds_of(lambda: target.copy_(source), sizes) / 1e9, 1)


def peak_bytes(sizes: Sizes) -> int:
    """Largest memory that torch had allocated since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if sizes.device == "cuda" else 0


def error_of(mine: Tensor, other: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    other = other.double()
    return float((mine.double() - other).norm() / other.norm().clamp_min(1e-30))


# ----- parts


def kernels(sizes: Sizes) -> dict[str, Any]:
    """Statistics and gradients of rows of logits."""
    from megatron_hapo.logprobs import row_statistics as rows

    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(sizes.device).manual_seed(0)
        logits = torch.empty(number, sizes.vocab, dtype=torch.bfloat16, device=sizes.device)
        for part in logits.split(256):
            part.copy_(4 * torch.randn(part.shape, device=sizes.device, generator=generator))
        targets = torch.randint(sizes.vocab, (number,), device=sizes.device, generator=generator)
        return logits, targets, torch.rand(number, device=sizes.device, generator=generator) + 0.5

    def gradient_of(local_4N: Tensor, targets: Tensor, temperature: Tensor) -> rows.RowGradient:
        shard = rows.VocabShard.of(sizes.vocab, tp_group=None, vocab_size=None)
        statistics = rows.combine(local_4N, targets, temperature, shard)
        ones = torch.ones_like(temperature)
        return rows.row_gradient(statistics, temperature, ones, -0.5 * ones)

    found: dict[str, Any] = {}

    def compare(name: str, number: int, *, timed: bool) -> None:
        logits, targets, temperature = make(number)
        some = slice(number - min(number, 64), number)  # the twin's work arrays are large
        local = rows.local_statistics(logits, targets, temperature)
        twin = rows.local_statistics_in_tiles(logits[some], targets[some], temperature[some])
        found[f"{name}statistics error"] = error_of(local[:, some], twin)
        if timed:
            seconds = seconds_of(lambda: rows.local_statistics(logits, targets, temperature), sizes)
            found["statistics GB/s"] = round(logits.nbytes / seconds / 1e9, 1)
        gradient, expected = gradient_of(local, targets, temperature), logits[some].clone()
        rows.overwrite_with_gradient_in_tiles(expected, targets[some], gradient.of_rows(some))
        rows.overwrite_with_gradient(logits, targets, gradient)
        found[f"{name}gradient error"] = error_of(logits[some], expected)
        if timed:  # overwrites gradients with gradients: the values do not matter to the time
            seconds = seconds_of(lambda: rows.overwrite_with_gradient(logits, targets, gradient), sizes)
            found["gradient GB/s"] = round(2 * logits.nbytes / seconds / 1e9, 1)
            found["copy GB/s"] = copy_gbs(sizes, logits.nbytes)
        for kind in ("statistics", "gradient"):
            assert found[f"{name}{kind} error"] < 1e-2, found

    compare("", sizes.rows, timed=True)
    if sizes.large_rows:
        compare("beyond 2^31 ", sizes.large_rows, timed=False)
    return found


def head(sizes: Sizes) -> dict[str, Any]:
    """The fused output head against the plain function on logits."""
    from megatron_hapo.logprobs import vocab_parallel_log_probs_and_entropy
    from megatron_hapo.logprobs.fused_head import CHUNK_BYTES, fused_log_probs_and_entropy

    generator = torch.Generator(sizes.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=sizes.device, generator=generator).bfloat16()

    weight = (normal(sizes.vocab, sizes.hidden) / 64).requires_grad_()
    targets = torch.randint(sizes.vocab, (sizes.head_rows,), device=sizes.device, generator=generator)
    hidden = normal(sizes.head_rows, sizes.hidden).requires_grad_()
    found: dict[str, Any] = {}

    def run(rows: int, *, fused: bool, float32_logits: bool = False) -> list[Tensor]:
        weight.grad = hidden.grad = None
        part = hidden[:rows]
        if fused:
            scores = fused_log_probs_and_entropy(part, weight, targets[:rows], float32_logits=float32_logits)
        else:
            logits = part.float() @ weight.float().t() if float32_logits else part @ weight.t()
            scores = vocab_parallel_log_probs_and_entropy(logits, targets[:rows])
        log_probs, entropies = scores
        (log_probs.sum() + entropies.sum()).backward()
        assert hidden.grad is not None
        return [log_probs.detach(), entropies.detach(), hidden.grad[:rows].clone()]

    few = min(sizes.head_rows, 512)
    for mine, other in zip(run(few, fused=True), run(few, fused=False), strict=True):
        assert error_of(mine, other) < 0.05
    wide = [run(few, fused=fused, float32_logits=True) for fused in (True, False)]
    found["float32 logits error"] = error_of(wide[0][0], wide[1][0])
    assert found["float32 logits error"] < 1e-3, found  # TF32 is off by default
    del wide
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if sizes.device == "cuda" else 0
    seconds = seconds_of(lambda: run(sizes.head_rows, fused=True), sizes)
    products = 4 * 2 * sizes.head_rows * sizes.hidden * sizes.vocab  # logits twice, and the gradients of both factors
    found |= {"ms": round(1e3 * seconds, 1), "TFLOP/s": round(products / seconds / 1e12, 2)}
    found |= {"peak MiB": (peak_bytes(sizes) - held) >> 20, "chunk MiB": CHUNK_BYTES >> 20}
    seconds = seconds_of(lambda: run(sizes.head_rows, fused=True, float32_logits=True), sizes)
    found["float32 logits ms"] = round(1e3 * seconds, 1)
    return found


def slots(sizes: Sizes) -> dict[str, Any]:
    """Transfers of one matrix between two processes; on one GPU by CUDA IPC, on a CPU through shared memory."""
    found: dict[str, Any] = {}
    kinds = [(mib, False) for mib in sizes.slots_mib]
    if sizes.device == "cuda" and importlib.util.find_spec("torch_memory_saver"):
        kinds.append((sizes.slots_mib[1], True))
    else:
        found["paused memory"] = "needs a GPU and torch_memory_saver"
    for mib, paused in kinds:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            sender = multiprocessing.get_context("spawn").Process(target=send_slots, args=(folder, mib, sizes))
            sender.start()
            rate = receive_slots(folder, mib, sizes, paused=paused)
            found[f"{mib} MiB{', into paused memory' if paused else ''} GB/s"] = rate
            sender.join(30)
            assert sender.exitcode == 0
    found["copy GB/s"] = copy_gbs(sizes, 16 * max(sizes.slots_mib) << 20)
    return found


def one_channel(sizes: Sizes, mib: int) -> tuple[Any, int]:
    """A channel of square pieces that fill slots of this size, and the rows of its matrix."""
    from megatron_hapo.resharding.plan import Channel, Piece

    columns = 1024
    rows = (mib << 20) // (2 * columns)
    number = 16 if sizes.device == "cuda" else 2
    pieces = tuple(Piece("weight", row * rows, 0, rows, columns) for row in range(number))
    return Channel(source_rank=0, engine=0, engine_rank=0, sources=pieces, targets=pieces), number * rows


def transfer_in(folder: str, number: int, mib: int) -> Any:
    """The transfer's description."""
    from megatron_hapo.resharding.transfer import Transfer

    return Transfer(folder=folder, number=number, plan="p", dtype="bfloat16", slot_bytes=mib << 20, deadline_seconds=60)


def send_slots(folder: str, mib: int, sizes: Sizes) -> None:
    """The trainer's side, in a process of its own."""
    from megatron_hapo.resharding.transports import Sender

    channel, rows = one_channel(sizes, mib)
    matrix, sender = torch.empty(rows, 1024, dtype=torch.bfloat16, device=sizes.device), Sender(0)
    for sync in range(sizes.repeats + 1):
        matrix.fill_(sync + 1)
        sender.send([channel], {"weight": matrix}, transfer_in(folder, sync, mib))


def receive_slots(folder: str, mib: int, sizes: Sizes, *, paused: bool) -> float:
    """The engine's side; the best rate after the first transfer.

    Args:
        paused: release and restore the engine's memory before each transfer, as a colocated trainer's turn does.
    """
    from megatron_hapo.resharding.transports import Receiver

    channel, rows = one_channel(sizes, mib)
    saver: Any = None
    if paused:
        from torch_memory_saver import torch_memory_saver as saver  # type: ignore[import-not-found]

        saver.hook_mode = "torch"  # the other mode needs LD_PRELOAD
    with saver.region() if saver else contextlib.nullcontext():
        matrix = torch.zeros(rows, 1024, dtype=torch.bfloat16, device=sizes.device)
    receiver, rates = Receiver(), []
    for sync in range(sizes.repeats + 1):
        if saver:
            saver.pause()
            saver.resume()
        start = time.perf_counter()
        moved = receiver.receive(
            {0: channel.targets}, {"weight": matrix}, transfer_in(folder, sync, mib), engine=0, engine_rank=0
        )
        synchronize(sizes)
        rates.append(moved / (time.perf_counter() - start) / 1e9)
        assert bool((matrix == sync + 1).all()), f"transfer {sync} brought other values"
    return round(max(rates[1:]), 2)


def rank(sizes: Sizes) -> dict[str, Any]:
    """A trainer rank of 0.4 billion parameters on a GPU, and what its turns and its optimizer's place change."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), sizes)
        trainer = start(path, Path(folder), sizes)
        batch = scored_batch(trainer)
        times = [timed(lambda step=step: trainer.update(batch, step=step)) for step in (1, 2, 3)]
        found["update s"] = round(times[-1], 3)
        saved = Path(folder) / "saved"
        saved.mkdir()
        found["save s"] = round(timed(lambda: trainer.save_checkpoint(saved)), 2)
        after = trainer.update(batch, step=4)
        trainer.load_checkpoint(saved)
        again = trainer.update(batch, step=4)
        assert 0 < after["grad_norm"] < math.inf
        assert math.isclose(after["grad_norm"], again["grad_norm"], rel_tol=1e-3), (after, again)
        before = reserved(sizes)
        found["release s"] = round(timed(lambda: trainer.release_memory(("gradients", "optimizer"))), 3)
        found["freed MiB"] = (before - reserved(sizes)) >> 20
        found["take s"] = round(timed(lambda: trainer.take_memory(("optimizer", "gradients"))), 3)
        assert np.isfinite(trainer.update(batch, step=5)["grad_norm"])
    if sizes.device == "cuda":
        for threads in (1, os.cpu_count() or 1):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                seconds = executor.submit(update_on_host, sizes, threads).result(timeout=PART_SECONDS)
            found[f"update with the optimizer on the host, {threads} threads s"] = round(seconds, 3)
    return found


def update_on_host(sizes: Sizes, threads: int) -> float:
    """Seconds of an update whose optimizer is in host memory."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = start(write_model(Path(folder), sizes), Path(folder), sizes, cpu_offload=True)
        torch.set_num_threads(threads)
        batch = scored_batch(trainer)
        return min(timed(lambda step=step: trainer.update(batch, step=step)) for step in (1, 2, 3))


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A random Qwen3 for the rank."""
    from tests.tiny_model import write_tiny_qwen3

    large = {"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "intermediate": 4096}
    return write_tiny_qwen3(folder / "model", dtype="bfloat16", **(large if sizes.device == "cuda" else {}))


def start(model: Path, folder: Path, sizes: Sizes, *, cpu_offload: bool = False) -> Any:
    """A trainer of one rank, with the local layers."""
    from megatron_hapo.config import Config
    from megatron_hapo.trainer.rank_process import start_rank
    from tests.trainer.small_batches import make_config

    # A small step, since clipping leaves no gradient to tokens that have moved far.
    values = make_config(model, {"tp": 1}, lr=1e-6).model_dump()
    values["trainer"]["dtype"] = "bfloat16"
    if sizes.device == "cuda":
        values |= {"device": "cuda", "rollout": {**values["rollout"], "dtype": "bfloat16"}}
        values["model"]["spec"] = "local"
        values["optimizer"]["cpu_offload"] = cpu_offload
    config = Config.model_validate(values)
    return start_rank(config, device=sizes.device, rank=0, world_size=1, init_method=f"file://{folder / 'rendezvous'}")


def scored_batch(trainer: Any) -> Any:
    """A mini-batch with the old log-probs of this trainer."""
    from megatron_hapo.types import merge_scores
    from tests.trainer.small_batches import make_batch

    batch = make_batch()
    scores = merge_scores([trainer.log_probs(batch)], batch)
    return replace(batch, old_log_probs=scores.log_probs, token_data={"modulation": np.zeros_like(scores.log_probs)})


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call that ends with a value on the host."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def reserved(sizes: Sizes) -> int:
    """Bytes that torch holds of the GPU."""
    if sizes.device == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def layers(sizes: Sizes) -> dict[str, Any]:
    """Forward and backward passes of layers, by each way of attention; shapes differ between micro-batches."""
    if sizes.device == "cpu":
        from megatron_hapo.model import megatron_on_cpu

        megatron_on_cpu.install()
    from megatron_hapo.config import ParallelSizes
    from megatron_hapo.model import parallel_layout
    from megatron_hapo.model.build import build_model
    from megatron_hapo.model.packed_attention import PackedFormat, packed_params
    from megatron_hapo.sizing.from_config import peak_flops
    from megatron_hapo.sizing.memory import activation_bytes
    from megatron_hapo.sizing.parameters import Layout
    from megatron_hapo.sizing.throughput import model_flops
    from tests.shapes import QWEN3_8B, TINY

    device = torch.device(sizes.device, 0) if sizes.device == "cuda" else torch.device("cpu")
    rendezvous = tempfile.NamedTemporaryFile()  # noqa: SIM115  # used as long as this process lives
    parallel_layout.init_distributed(
        rank=0, world_size=1, init_method=f"file://{rendezvous.name}", device=device, timeout_seconds=60
    )
    grid = parallel_layout.initialize(ParallelSizes(), device=device, seed=0, timeout_seconds=60)
    shape = replace(QWEN3_8B if sizes.device == "cuda" else replace(TINY, head_dim=8), num_layers=sizes.layers)
    model: Any = build_model(shape, grid, dtype=torch.bfloat16, spec="local")[0].to(torch.bfloat16).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
        parameter.grad = torch.zeros_like(parameter)
    generator, batches = np.random.default_rng(0), []
    for _ in range(4 + sizes.repeats):
        cuts = np.sort(generator.choice(np.arange(1, sizes.tokens), 12, replace=False))
        batches.append(np.diff([0, *cuts, sizes.tokens]).tolist())
    ids = torch.randint(0, shape.vocab_size, (1, sizes.tokens), device=device)
    layout = Layout(tokens_per_microbatch=sizes.tokens, bytes_per_parameter=2)
    planned = activation_bytes(shape, layout, 0, in_flight=1, spec="local")
    found: dict[str, Any] = {"planned activations MiB": planned >> 20}
    forms: tuple[PackedFormat, ...] = ("rectangles", "varlen")
    for packed_format in forms:

        def run(lengths: list[int], packed_format: PackedFormat = packed_format) -> Tensor:
            boundaries = packed_params(lengths, device, packed_format=packed_format)
            # A processor in place of the output layer: only the layers are measured.
            hidden = model(
                ids, boundaries.positions[None], None, packed_seq_params=boundaries,
                output_processor=lambda hidden_states, **_: hidden_states, output_processor_context=None,
            )  # fmt: skip
            hidden.float().square().mean().backward()
            return hidden.detach()

        run(batches[0])
        synchronize(sizes)
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if sizes.device == "cuda" else 0
        start = time.perf_counter()
        for lengths in batches[1:]:
            found[f"{packed_format} mean square"] = float(run(lengths).float().square().mean())
        seconds = (time.perf_counter() - start) / len(batches[1:])
        length = float(np.mean([np.dot(part, part) / sum(part) for part in batches[1:]]))
        flops = model_flops(shape, tokens=sizes.tokens, length=length, response_share=0)
        found[f"{packed_format} ms"] = round(1e3 * seconds, 1)
        found[f"{packed_format} TFLOP/s"] = round(flops / seconds / 1e12, 2)
        if peak := peak_flops(sizes.device):
            found[f"{packed_format} MFU"] = round(flops / seconds / peak, 3)
        found[f"{packed_format} peak MiB"] = (peak_bytes(sizes) - held) >> 20
        found[f"{packed_format} host syncs"] = waits_of(lambda: run(batches[1]), sizes)
    first, second = (found[f"{form} mean square"] for form in forms)
    assert abs(first / second - 1) < 0.02, found
    return found


def waits_of(call: Callable[[], Any], sizes: Sizes) -> int:
    """How often the host waited for the GPU; 0 on a CPU."""
    if sizes.device == "cpu":
        call()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def hook(sizes: Sizes) -> dict[str, Any]:
    """The sampler's arithmetic for one decoding step."""
    from megatron_hapo.entropy import EntropyStats, entropy_from_logits
    from megatron_hapo.types import AdaptiveTemperature
    from sglang_ext.temperature import entropy_at_temperature, row_parameters, temperature_factor

    generator = torch.Generator(sizes.device).manual_seed(0)
    logits = 4 * torch.randn(sizes.requests, sizes.vocab, device=sizes.device, generator=generator)
    base = torch.ones(sizes.requests, device=sizes.device)
    stats = EntropyStats(pivot=1.0, log_max=1.8, log_min=0.0, rms=1.0, num_tokens=1)
    numbers = [row_parameters(AdaptiveTemperature(stats=stats, tau=0.3))] * sizes.requests
    parameters = torch.tensor(numbers, device=sizes.device)
    error = float((entropy_at_temperature(logits, base) - entropy_from_logits(logits)).abs().max())
    assert error < 1e-3, error

    def step() -> None:
        entropy = entropy_at_temperature(logits, base)
        logits.div_(temperature_factor(entropy, parameters)[:, None])

    if sizes.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if sizes.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {
        "entropy error": error,
        "ms": round(1e3 * seconds_of(step, sizes), 3),
        "sort ms": round(1e3 * seconds_of(lambda: logits.sort(-1, descending=True), sizes), 3),
    }


def bits(sizes: Sizes) -> dict[str, Any]:
    """What must be the same on both devices, bit for bit."""
    from megatron_hapo.resharding.checksum import tensor_checksum

    host = torch.randn(sizes.hidden, sizes.hidden + 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    device = host.to(sizes.device)
    assert tensor_checksum(device) == tensor_checksum(host)
    assert tensor_checksum(device[:, 1:-1]) == tensor_checksum(host[:, 1:-1])
    scale = host.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
    rounded = [(x.float() / scale.to(x.device)).to(torch.float8_e4m3fn).float().cpu() for x in (host, device)]
    assert torch.equal(*rounded)
    return {"checksum": tensor_checksum(host), "float8 values": int(rounded[0].unique().numel())}


PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "kernels": kernels,
    "head": head,
    "slots": slots,
    "rank": rank,
    "layers": layers,
    "hook": hook,
    "bits": bits,
}

if __name__ == "__main__":
    sys.exit(main())
