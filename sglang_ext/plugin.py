"""The SGLang plugin: adaptive temperature, seeded sampling, experts of paused requests, and weight updates that report
every failure. Hooks into SGLang's internals (0.5.23) are registered only here.

SGLang finds `register` through the entry point group `sglang.srt.plugins` and runs it in its main process and in every
scheduler process. It only logs a plugin that fails, which is why `sglang_ext.engine.Engine.self_test` exists.

A request opts in with `sampling_params["custom_params"] = {REQUEST_KEY: [...]}`, the six numbers of
`temperature.row_parameters`, or an empty list for the base temperature; requests without the key are sampled as if this
plugin did not exist. The numbers live in a tensor beside the batch's temperatures and are filtered and merged with
them: nothing here is global to the engine, and a batch may mix requests of every kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hapo.private_folder import current_folder, shared_memory_prefix
from sglang_ext import (
    batch_invariance,
    cpu_attention,
    cpu_layers,
    float8,
    host_memory,
    online_quantization,
    temperature,
)

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

REQUEST_KEY = "hapo"
"""Key in a request's custom_params that marks it as one of this project."""
TEMPERATURE_KEY = "hapo_temperature"
"""Key in an answer's meta_info: T_t of each sampled token, for requests with an adaptive temperature."""
_UNSEEDED = 42  # SGLang's own seed for requests without one, in its deterministic mode


def register() -> None:
    """Registers every hook; SGLang calls it once in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    srt = "sglang.srt."
    info = srt + "sampling.sampling_batch_info.SamplingBatchInfo."
    results = srt + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
    for target, hook, hook_type in (
        # `adjusted_*` are SGLang's placeholders for subclasses, called at the end of each operation.
        (info + "adjusted_from_schedule_batch", _after_creation, HookType.AFTER),
        (info + "adjusted_filter_batch", _after_filter, HookType.AFTER),
        (info + "adjusted_merge_batch", _after_merge, HookType.AFTER),
        (info + "copy_for_forward", _after_copy, HookType.AFTER),
        # After penalties, logit bias, grammar mask; before the division by temperature, softmax and top-p.
        (srt + "layers.sampler.Sampler._preprocess_logits", _after_preprocess_logits, HookType.AFTER),
        (srt + "layers.sampler.Sampler.forward", _after_sampling, HookType.AFTER),
        (
            srt + "model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor",
            _around_weight_update,
            HookType.AROUND,
        ),
        (srt + "managers.schedule_batch.release_req", _before_release, HookType.BEFORE),
        (results + "_maybe_collect_routed_experts", _after_collecting_routes, HookType.AFTER),
        (results + "_handle_finish_state_updated_req", _before_decoded, HookType.BEFORE),
        (srt + "managers.load_snapshot.shm_path_for", _in_private_folder, HookType.AFTER),
        (
            srt + "distributed.device_communicators.shm_broadcast.make_shm_name",
            _of_private_folder,
            HookType.AFTER,
        ),
    ):
        HookRegistry.register(target, hook, hook_type)
    modules: list[tuple[Any, dict[str, str], HookType]] = []
    if online_quantization.requested():
        modules.append((online_quantization, online_quantization.AROUND, HookType.AROUND))
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        modules += [
            (float8, float8.TARGETS, HookType.REPLACE),
            (host_memory, host_memory.TARGETS, HookType.REPLACE),
            (cpu_attention, cpu_attention.AFTER, HookType.AFTER),
            (cpu_attention, cpu_attention.AROUND, HookType.AROUND),
            (cpu_layers, cpu_layers.AROUND, HookType.AROUND),
        ]
        if batch_invariance.requested():
            modules.append((batch_invariance, batch_invariance.AROUND, HookType.AROUND))
    for module, hooks, hook_type in modules:
        for target, name in hooks.items():
            HookRegistry.register(target, getattr(module, name), hook_type)


@dataclass
class _Rows:
    """The attribute `hapo` of a SamplingBatchInfo; None where no request of the batch has the key."""

    adaptive: Tensor | None
    """[R, 6] float32, each row's parameters, on the batch's device; None where all rows keep their base temperature."""
    recorded: dict[str, _HostColumn] | None = None
    """Set by the hook on the logits, consumed by the hook on the sampler's result."""


# ----- rows of a batch, from its creation on


def _after_creation(_result: None, info: SamplingBatchInfo, batch: ScheduleBatch, _vocab_size: int) -> None:
    parameters: list[Any] = [(r.sampling_params.custom_params or {}).get(REQUEST_KEY) for r in batch.reqs]
    if all(p is None for p in parameters):
        _set_rows(info, None)
        return
    # Greedy rows (SGLang turns temperature 0 into top_k 1) are left alone, so that rounding cannot flip a near tie.
    numbers = [
        tuple(p) if p and r.sampling_params.top_k > 1 else temperature.NEUTRAL
        for p, r in zip(parameters, batch.reqs, strict=True)
    ]
    adaptive = any(row[0] > 0 for row in numbers)
    _set_rows(info, _Rows(_to_device(numbers, torch.float32, info.device) if adaptive else None))
    if info.sampling_seed is None:
        # The sampler derives each token from (seed, position) wherever this tensor is set. SGLang itself sets it only
        # in its deterministic mode, which also replaces the matrix kernels and refuses CPUs.
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        seeds = [_UNSEEDED if seed is None else seed for seed in seeds]
        info.sampling_seed = _to_device(seeds, torch.int64, info.device)


def _after_filter(_result: None, info: SamplingBatchInfo, _keep: list[int], keep_R: Tensor) -> None:
    rows = _rows(info)
    if rows is not None and rows.adaptive is not None:
        _set_rows(info, _Rows(rows.adaptive[keep_R]))


def _after_merge(_result: None, info: SamplingBatchInfo, other: SamplingBatchInfo) -> None:
    """`info` already holds the rows of both: first its own, then `other`'s."""
    mine, theirs = _rows(info), _rows(other)
    if mine is None and theirs is None:
        return
    counts = (len(info) - len(other), len(other))
    parts = (None if mine is None else mine.adaptive, None if theirs is None else theirs.adaptive)
    _set_rows(info, _Rows(_join(parts, counts, torch.tensor(temperature.NEUTRAL))))
    if mine is None or theirs is None:  # SGLang merges the seeds only where both sides have them
        seeds = (info.sampling_seed, None) if theirs is None else (None, other.sampling_seed)
        info.sampling_seed = _join(seeds, counts, torch.tensor(_UNSEEDED))


def _after_copy(result: SamplingBatchInfo, info: SamplingBatchInfo) -> None:
    rows = _rows(info)  # SGLang copies declared fields only; what is recorded belongs to one forward pass
    _set_rows(result, None if rows is None else _Rows(rows.adaptive))


def _rows(info: SamplingBatchInfo) -> _Rows | None:
    return getattr(info, "hapo", None)


def _set_rows(info: SamplingBatchInfo, rows: _Rows | None) -> None:
    info.hapo = rows  # type: ignore[attr-defined]


def _to_device(values: list, dtype: torch.dtype, device: str) -> Tensor:
    from sglang.srt.utils.common import is_pin_memory_available

    host = torch.tensor(values, dtype=dtype, pin_memory=is_pin_memory_available(device))
    return host.to(device, non_blocking=True)


def _join(parts: tuple[Tensor | None, Tensor | None], counts: tuple[int, int], default: Tensor) -> Tensor | None:
    """Both parts concatenated, an absent one filled with `default` rows; None if both are absent."""
    present = next((part for part in parts if part is not None), None)
    if present is None:
        return None
    default = default.to(present)
    filled = [
        default.expand(count, *default.shape) if part is None else part
        for part, count in zip(parts, counts, strict=True)
    ]
    return torch.cat(filled)


# ----- one forward pass


def _after_preprocess_logits(logits_RV: Tensor, _sampler: Sampler, _logits: Tensor, info: SamplingBatchInfo) -> None:
    """Divides each row in place by 1 + tau h; SGLang's own division by T then makes it a division by T_t."""
    rows = _rows(info)
    if rows is None or rows.adaptive is None or info.is_all_greedy:
        return
    assert len(rows.adaptive) == len(logits_RV), f"{len(logits_RV)} rows, {len(rows.adaptive)} with parameters"
    base_R = info.temperatures.view(-1)
    entropy_R = temperature.entropy_at_temperature(logits_RV, base_R)
    factor_R = temperature.temperature_factor(entropy_R, rows.adaptive)
    logits_RV.div_(factor_R[:, None])  # exactly 1 without adaptive temperature, which leaves the row's bits
    rows.recorded = {TEMPERATURE_KEY: _HostColumn(base_R * factor_R)}


def _after_sampling(
    _result: Tensor,
    _sampler: Sampler,
    logits_output: LogitsProcessorOutput,
    sampling_info: SamplingBatchInfo,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    """Passes on what was recorded; SGLang appends entry i of each column to request i's meta_info.

    Its scheduler does so only for tokens that it keeps, in order: neither for an unfinished chunk of a prompt, nor for
    the token that the overlapped schedule computes after a request's last. A retracted request keeps its columns.
    """
    rows = _rows(sampling_info)
    if rows is not None:
        # Set to None as well: CUDA graph runners may reuse the output object.
        logits_output.customized_info = rows.recorded  # type: ignore[assignment]
        rows.recorded = None


class _HostColumn:
    """One number per row, copied to the host asynchronously: only reading it waits for the GPU."""

    def __init__(self, values_R: Tensor):
        self._copied: torch.cuda.Event | None = None
        self._values: list[float] = []
        self._host_R = values_R
        if values_R.is_cuda:
            self._host_R = torch.empty(values_R.shape, dtype=values_R.dtype, pin_memory=True)
            self._host_R.copy_(values_R, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._copied = copied

    def __getitem__(self, row: int) -> float:
        if not self._values:
            if self._copied is not None:
                self._copied.synchronize()
            self._values = self._host_R.tolist()
        return self._values[row]


# ----- experts of requests that are paused


def _before_release(*, req: Req, req_to_token_pool: ReqToTokenPool, **_: Any) -> None:
    """Keeps the experts that a request has used so far, before it is retracted.

    When it continues, SGLang computes its prefix anew, with new weights after an update, and records other experts over
    those that sampled its tokens.
    """
    if not req.return_routed_experts or not req.output_ids:
        return  # without a token it starts afresh
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    capturer = get_global_experts_capturer()
    if capturer is None:
        return
    kept = _kept_routes(req)
    # Nothing new where a request is retracted again before it has sampled a token.
    more = capturer.get_topk(
        req_pool_idx=req.kv.req_pool_idx,  # type: ignore[arg-type]  # not None while it holds KV
        seqlen=len(req.origin_input_ids) + len(req.output_ids),
        req_to_token_pool=req_to_token_pool,
        start_len=0 if kept is None else len(kept),
    )
    req.hapo_routes = more if kept is None else torch.cat([kept, more])  # type: ignore[attr-defined]


def _after_collecting_routes(_result: None, _processor: Any, req: Req) -> None:
    """Puts back the experts that were kept."""
    kept = _kept_routes(req)
    if kept is not None and req.routed_experts is not None:
        req.routed_experts[: len(kept)] = kept


def _kept_routes(req: Req) -> Tensor | None:
    return getattr(req, "hapo_routes", None)


# ----- the prefix cache


def _before_decoded(_processor: Any, req: Req, *_args: Any) -> None:
    """Keeps finished responses out of the prefix cache: nothing continues them, and the next update empties it.

    Prompts are in it from their prefill on. Without this a tenth of a small model's decoding is spent on the tree.
    """
    if req.finished() and REQUEST_KEY in (req.sampling_params.custom_params or {}):
        req.skip_radix_cache_insert = True


# ----- what SGLang's processes share


def _in_private_folder(path: str, _instance: str) -> str:
    """A path for the file of load statistics, which SGLang never removes: in the engine's folder, which is removed."""
    folder = current_folder()
    return path if folder is None else str(folder / Path(path).name)


def _of_private_folder(name: str, _kind: str) -> str:
    """A name for a segment in /dev/shm with which it is removed together with the engine's folder."""
    return name if current_folder() is None else f"{shared_memory_prefix()}{name}"


# ----- weight updates


def _around_weight_update(
    original: Callable[..., tuple[bool, str]], updater: WeightUpdater, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """Runs the update, and returns (False, message) if it failed on any rank.

    Without this an exception would end the scheduler process, and a failure on any rank but 0, the only one that
    answers, would be lost.
    """
    try:
        success, message = original(updater, *args, **kwargs)
    except Exception as error:  # the model's own loading code may raise anything
        success, message = False, f"{type(error).__name__}: {error}"
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return success, message
    outcomes: list[Any] = [None] * group.world_size
    dist.all_gather_object(outcomes, (success, message), group=group.cpu_group)
    failures = [f"rank {rank}: {message}" for rank, (success, message) in enumerate(outcomes) if not success]
    return (False, "; ".join(failures)) if failures else (success, message)
