"""Lets Megatron-Core 0.19 run on a CPU over gloo. Call `install()` before megatron.core is imported.

Only for CPU trainer processes, since it replaces torch functions process-wide; a GPU process never imports this module.
Nothing here changes logic: each entry replaces a call that Megatron makes without checking for CUDA, or that NCCL
supports and gloo does not, or that costs a CPU more than it is worth.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")


def install() -> None:
    """Patch torch.cuda for a process without a GPU; a second call does nothing."""
    if torch.cuda.is_available():
        raise AssertionError("the CPU compatibility module must not be used where CUDA is available")
    if getattr(torch, "_megatron_hapo_cpu", False):
        return
    torch._megatron_hapo_cpu = True  # type: ignore[attr-defined]
    _no_flash_mla()
    _one_gloo_device()
    _no_compilation()
    _device_queries()
    _random_state()
    _streams()
    _device_arguments()
    _optimizer_type_names()
    _megatron_generators()
    _uneven_collectives()
    _rotation()


def _no_flash_mla() -> None:
    """The GPU set-up has this package, which loads NVIDIA's driver when it is imported. Without one (a node that
    converts, or the head of a cluster) that is an OSError, where Megatron expects an ImportError."""
    sys.modules.setdefault("flash_mla", None)  # type: ignore[arg-type]


def _one_gloo_device() -> None:
    """All process groups share the first one's connection thread. Each of Megatron's twenty has one of its own in
    torch, which wakes up a hundred times a second: together 7 % of the time of a rank that trains a small model."""
    from torch.distributed import distributed_c10d

    module: Any = distributed_c10d
    gloo = module.ProcessGroupGloo
    create_first = module._create_gloo_process_group
    devices: list[Any] = []

    def create(given: Any, backend_options: Any) -> Any:
        if not devices:
            first = create_first(given, backend_options)
            devices.extend(first.options._devices)
            return first
        options = gloo._Options()
        options._devices, options._timeout, options._threads = devices, given.timeout, 2
        group = gloo(given.store, given.group_rank, given.group_size, options)
        group.options.global_ranks_in_group, group.options.group_name = given.global_ranks_in_group, given.group_id
        return group

    # torch reads the name when it registers gloo, for the first group of a process.
    module._create_gloo_process_group = create


def _no_compilation() -> None:
    """Megatron's jit_fuser is torch.compile, which would need a C++ compiler and minutes. The decorator alone imports
    all of dynamo and inductor: 5 of the 11 seconds that a rank takes to start."""

    def unchanged(model: Any = None, **options: Any) -> Any:
        return (lambda function: function) if model is None else model

    torch.compile = unchanged  # type: ignore[assignment]


def _returns(value: Any = None) -> Callable[..., Any]:
    # a new function each time: torch rejects one object under two names
    return lambda *args, **kwargs: value


def _device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _returns(_CPU)
    for name in ("synchronize", "empty_cache", "set_device", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, _returns())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, _returns(0))
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returns(), _returns()


def _random_state() -> None:
    """The CUDA generator is the CPU generator."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(seed) and None)


def _streams() -> None:
    class Stream:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        wait_stream = wait_event = synchronize = _returns()

        def record_event(self, *args: Any) -> Event:
            return Event()

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream)

        def __hash__(self) -> int:
            return 0

    class Event(Stream):
        record = wait = _returns()
        query = _returns(True)
        elapsed_time = _returns(0.0)

    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream, cuda.default_stream = _returns(Stream()), _returns(Stream())
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = _returns()  # type: ignore[method-assign]


def _device_arguments() -> None:
    """device="cuda", device=0, pin_memory=True and .cuda() mean the CPU."""

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if isinstance(device, int) or str(device).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return wrapped

    makers = "tensor as_tensor zeros ones empty full arange rand randn zeros_like ones_like empty_like full_like"
    for name in makers.split():
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]


def _optimizer_type_names() -> None:
    """Megatron's optimizers ask whether param.type() is 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _megatron_generators() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    random_module: Any = megatron_random
    random_module._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random_module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The dispatcher copies split sizes to the host and expects numpy only when it moved them.
    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _uneven_collectives() -> None:
    """Gather and scatter parts of different sizes, as the ranks that share an expert (etp) do with their tokens."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    module: Any = mappings
    even_gather, even_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gather, scatter


def _rotation() -> None:
    """The rotary embedding of plain heads, which costs a small model as much as its attention."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_hapo.model.cpu_kernels import rotate

    module: Any = rope_utils
    composed = module._apply_rotary_pos_emb_bshd

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        mla_rotary_interleaved: bool = False,
        mscale: float = 1.0,
        **others: Any,
    ) -> torch.Tensor:
        plain = not (rotary_interleaved or mla_rotary_interleaved or others) and mscale == 1
        if plain and t.dtype == torch.float32 and t.shape[-1] == freqs.shape[-1]:
            return rotate(t, freqs)
        return composed(t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **others)

    module._apply_rotary_pos_emb_bshd = apply
