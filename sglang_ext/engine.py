"""One SGLang engine: starts it, proves that it samples as the formula says, generates, and receives weights.

A plain object; one thread may wait for responses while another brings weights. It needs a process of its own (a Ray
actor), because it starts child processes and, on a CPU, because the process needs `sglang_ext.cpu.environment` before
it starts. SGLang opens no network port beyond loopback for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.resharding.receiving import ReceiveRequest
from megatron_hapo.types import AdaptiveTemperature, FinishReason, InFlight, Prompt, Rollout, Sampling, WeightBucket
from sglang_ext import receive, self_test, temperature, verify
from sglang_ext.plugin import REQUEST_KEY, TEMPERATURE_KEY

logger = logging.getLogger(__name__)

Finished = tuple[int, int, Rollout]
"""A response: the number of its prompt, its index among the prompt's samples, and itself."""

_IDLE_SECONDS = 60.0
"""The scheduler may still put away the last batch when its answers have come."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one engine needs to start."""

    model_path: Path
    """Hugging Face folder."""
    device: Literal["cpu", "cuda"]
    dtype: str
    """float32 or bfloat16."""
    tp: int
    ep: int = 1
    """1, or tp: each rank holds whole experts."""
    max_running_requests: int
    memory_fraction: float
    """Share of each GPU's memory for weights and KV cache; without effect on a CPU."""
    kv_cache_tokens: int | None
    """Required on a CPU; on a GPU None lets the memory fraction decide."""
    context_tokens: int
    """Longest prompt and response together."""
    seed: int
    read_weights: bool = True
    """False: start with random weights, whatever the folder holds; the first weight update brings the true ones."""
    gives_memory_back: bool = False
    """Its GPUs are a trainer's too, in turn: see `release_memory`."""


class Engine:
    """Holds version 0 of the weights, once the constructor returns: those of `model_path`, or random ones."""

    def __init__(self, config: EngineConfig):
        """Starts the engine and proves its sampling.

        Raises:
            RolloutError: the config cannot work, or the self-test failed; no process is left behind.
        """
        _check_config(config)
        import sglang

        # Weights reach the engine's ranks in shared memory. torch's default passes file descriptors, whose other end
        # can be gone before the last rank has opened it.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self._config = config
        self._updating = self._flushed = self._paused = False
        self._drops = 0
        self._calls: dict[int, _Call] = {}
        self._proved = config.read_weights  # random weights give all tokens much the same chance, at any temperature
        self._given_back: frozenset[str] = frozenset()
        self._weights_lost = False
        # Ranks of one node meet through a file: torch's TCP store would listen on every interface, without a token.
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-hapo-engine-")
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{self._scratch.name}/rendezvous"
        self._engine = sglang.Engine(**_server_arguments(config))
        self._loop = _LoopThread(self._engine.loop)
        self._engine.loop = self._loop  # type: ignore[assignment]  # SGLang's engine calls run_until_complete alone
        try:
            self.self_test()
        except BaseException:
            self.shutdown()
            raise

    def advance(self, call: int, prompts: Mapping[int, Prompt], sampling: Sampling) -> list[Finished]:
        """Starts `sampling.samples` responses to each of these prompts, waits until one of the call's is finished.

        A response depends on (sampling.seed, prompt.uid, sample index) and on the weights, not on the other prompts,
        except for rounding: batches of other sizes may take other matrix kernels.

        Args:
            call: whose responses these are. A call advances until it has all of them, in one thread at a time.
            prompts: each under a number, with which its responses come back.
        Returns:
            The call's responses that have finished since it last advanced, at least one of them.
        Raises:
            RolloutError: SGLang aborted a request, or prompt and response do not fit the engine.
        """
        if self._updating and not self._paused:
            raise RolloutError("the engine is between begin_weight_update and end_weight_update; it cannot generate")
        if self._given_back or self._weights_lost:
            raise RolloutError("the engine has given back its memory or its weights; it cannot generate")
        self._check_lengths(list(prompts.values()), sampling)
        state = self._calls.setdefault(call, _Call())
        if prompts:
            state.unfinished += sampling.samples * len(prompts)
            state.started.append(self._loop.start(self._respond_to_all(prompts, sampling, state)))
        finished: list[Any] = [state.finished.get()]
        while not state.finished.empty():
            finished.append(state.finished.get())
        state.unfinished -= len(finished)
        if state.unfinished == 0:
            del self._calls[call]
        for response in finished:
            if isinstance(response, Exception):
                raise response
        return finished

    def self_test(self) -> None:
        """Proves on this model that temperatures and log-probs are what the formula says.

        Raises:
            RolloutError: what was expected, what came, and the likely cause.
        """
        vocab_size = self._engine.tokenizer_manager.model_config.vocab_size
        self_test.run(self._answers, vocab_size=vocab_size, dtype=self._config.dtype)
        if self._engine.flush_cache().success is not True:
            raise RolloutError("SGLang did not flush its cache after the self-test")

    def begin_weight_update(self, in_flight: InFlight = "finish") -> None:
        """First call of an update; no token is sampled until the last. An update that failed half-way is begun anew.

        Args:
            in_flight: `finish`: waits for unfinished responses; others are refused until the end. `pause`: responses
                wait, unfinished ones with the tokens that they have, until `resume`; then they go on from the new
                weights, with nothing cached from the old. `abort`: the same, but unfinished ones start anew.
        """
        if self._updating:
            return
        # With random weights nothing is in flight, and the end of the update generates to prove the sampling.
        if in_flight != "finish" and self._proved:
            self._paused = True
            self._loop.run_until_complete(self._pause(drop=in_flight == "abort"))
        _expect(self._engine.begin_weight_update(), "begin_weight_update")
        self._updating = True

    def load_bucket(self, bucket: WeightBucket) -> None:
        """Loads whole tensors under their Hugging Face names into every rank's slices."""
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

        # One copy into shared memory; each rank maps it and copies its slices from there, on a GPU too: that moves
        # 1/tp of the bytes to each device, and this process needs no context on any.
        data = torch.from_numpy(bucket.data if bucket.data.flags.writeable else bucket.data.copy()).share_memory_()
        metadata, start = [], 0
        for name, shape, dtype_name in zip(bucket.names, bucket.shapes, bucket.dtypes, strict=True):
            dtype = getattr(torch, dtype_name)
            num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            end = start + num_bytes
            metadata.append(FlattenedTensorMetadata(name, torch.Size(shape), dtype, start, end, num_bytes))
            start = -(-end // 16) * 16
        payload = {"flattened_tensor": data, "metadata": metadata}
        serialized = [MultiprocessingSerializer.serialize(payload, output_str=True) for _ in range(self._config.tp)]
        self._update(serialized, "flattened_bucket", f"loading {bucket.names[0]} ... {bucket.names[-1]}")

    def prepare_receiving(self, plans: Sequence[str]) -> None:
        """Take each rank's part of the plan (`receive.receiver_plan`), for all `receive_weights` to come."""
        receive.write_plans(Path(self._scratch.name), plans)

    def receive_weights(self, request: ReceiveRequest) -> None:
        """Every rank fills its own parameters from the trainer ranks; between begin and end.

        Raises:
            WeightSyncError: names what did not come, from whom, or does not fit.
        """
        payload = receive.payload(request, Path(self._scratch.name))
        self._update(payload, receive.RECEIVE, "receiving weights", flush=True)

    def verify(self, checksums: dict[str, list[int]]) -> None:
        """Compares what every rank's parameters hold with the trainer's checksums; between begin and end.

        Args:
            checksums: for each Hugging Face name, `tensor_checksum` of each rank's slice (`checksum.engine_slices`).
        Raises:
            WeightSyncError: names tensor and rank; also a tensor without checksum, or a checksum without tensor.
        """
        for name, sums in checksums.items():
            if len(sums) != self._config.tp:
                raise WeightSyncError(f"{name}: {len(sums)} checksums for an engine with tp={self._config.tp}")
        self._update(verify.checksum_payload(checksums), verify.VERIFY, "verifying weights")

    def end_weight_update(self, policy_version: int) -> None:
        """Last call of an update: the engine now holds this version, and nothing cached from another.

        The first one of an engine that has not read its weights proves the sampling again, on the true ones; or, if
        the engine has given back its KV cache, `take_memory` does.
        """
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        _expect(self._engine.end_weight_update(), "end_weight_update")
        if not self._flushed:
            flushed = self._engine.flush_cache()
            _expect((flushed.success, flushed.message), "flushing the KV cache")
        # Tells each paused request that the tokens which it has are of the version before.
        version = UpdateWeightVersionReqInput(new_version=str(policy_version), abort_all_requests=False)
        self._loop.run_until_complete(self._engine.tokenizer_manager.update_weight_version(version))
        self._updating = self._flushed = self._weights_lost = False
        self._prove()

    def _prove(self) -> None:
        """On the true weights, if the engine started without them, as soon as it can generate."""
        if not (self._proved or self._updating or self._given_back or self._weights_lost):
            self.self_test()
            self._proved = True

    def release_memory(self, parts: Sequence[str]) -> None:
        """Give back GPU memory, `kv_cache` or `weights`, until `take_memory`; what it held is lost.

        On a CPU SGLang (0.5.23) cannot: memory and contents stay, and the engine only keeps the books.
        """
        if not self._config.gives_memory_back:
            raise RolloutError("the engine was started without gives_memory_back")
        if wanted := [part for part in parts if part not in self._given_back]:
            self._wait_until_idle()
            if self._config.device == "cuda":
                self._engine.release_memory_occupation(tags=wanted)
            self._given_back |= {*wanted}
            self._weights_lost |= "weights" in wanted

    def _wait_until_idle(self) -> None:
        manager: Any = self._engine.tokenizer_manager  # the engine's own flush_cache takes no time limit
        flushed = self._loop.run_until_complete(manager.flush_cache(timeout_s=_IDLE_SECONDS))
        if flushed.success is not True:
            raise RolloutError(f"the engine did not come to rest within {_IDLE_SECONDS:g} s: {flushed.message}")

    def take_memory(self, parts: Sequence[str]) -> None:
        """Take memory again that was given back; weights must then be loaded, by a whole update, before generation."""
        if wanted := [part for part in parts if part in self._given_back]:
            if self._config.device == "cuda":
                self._engine.resume_memory_occupation(tags=wanted)
            self._given_back -= {*wanted}
            self._prove()

    def resume(self) -> None:
        """Lets responses go on that an update has paused, after its end."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        if self._paused:
            go_on = ContinueGenerationReqInput(torch_empty_cache=False)
            self._loop.run_until_complete(self._engine.tokenizer_manager.continue_generation(go_on))
            self._paused = False

    def shutdown(self) -> None:
        """Ends SGLang's processes."""
        self._engine.shutdown()
        self._loop.close()
        self._scratch.cleanup()

    async def _respond_to_all(self, prompts: Mapping[int, Prompt], sampling: Sampling, call: _Call) -> None:
        # Samples of a prompt stand together: after the first prefill batch the prefix cache serves the others.
        # SGLang's own `n` would give all samples of a prompt the same seed.
        await asyncio.gather(
            *(
                self._respond(number, prompt, index, sampling, call)
                for number, prompt in prompts.items()
                for index in range(sampling.samples)
            )
        )

    async def _respond(self, number: int, prompt: Prompt, index: int, sampling: Sampling, call: _Call) -> None:
        seed = sample_seed(sampling.seed, prompt.uid, index)
        try:
            while True:
                drops = self._drops
                answer: Any = await self._engine.async_generate(
                    input_ids=prompt.token_ids.tolist(),
                    sampling_params=_request(sampling, seed=seed),
                    return_logprob=True,
                )
                if answer["meta_info"]["finish_reason"]["type"] != "abort" or drops == self._drops:
                    break  # otherwise a weight update has dropped it
            call.finished.put((number, index, _rollout(prompt, answer, sampling)))
        except Exception as error:  # whatever it is, the caller of `advance` is to have it
            call.finished.put(error)

    async def _pause(self, *, drop: bool) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        # `retract` takes requests back to the queue and frees what they have cached; new ones wait outside.
        await self._engine.tokenizer_manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        if drop:
            self._drops += 1
            self._engine.tokenizer_manager.abort_request(abort_all=True)

    def _answers(self, prompts: list[list[int]], parameters: list[dict], **options: Any) -> list[dict]:
        """SGLang's answers to these requests, in their order; `options` are lists with an entry a request."""
        answers = self._engine.generate(input_ids=prompts, sampling_params=parameters, return_logprob=True, **options)
        assert isinstance(answers, list)
        return answers

    def _update(self, tensors: Any, load_format: str, what: str, *, flush: bool = False) -> None:
        """One request of an update; `flush` drops in the same request what was cached under the old weights."""
        if not self._updating:
            raise WeightSyncError(f"{what}: begin_weight_update has not been called")
        if "weights" in self._given_back:
            raise WeightSyncError(f"{what}: the engine has given back the memory of its weights")
        answer = self._engine.update_weights_from_tensor(tensors, load_format=load_format, flush_cache=flush)
        _expect(answer, what)
        self._flushed |= flush

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max((len(p.token_ids) for p in prompts), default=0)
        tokens = longest + sampling.max_response_tokens
        if tokens > self._config.context_tokens:
            raise RolloutError(
                f"a prompt of {longest} tokens and max_response_tokens={sampling.max_response_tokens} need {tokens} "
                f"tokens; the engine was started with context_tokens={self._config.context_tokens}"
            )


@dataclass
class _Call:
    """The responses that one caller of `advance` waits for."""

    unfinished: int = 0
    finished: SimpleQueue[Finished | Exception] = field(default_factory=SimpleQueue)
    started: list[Future[None]] = field(default_factory=list)
    """The loop itself does not keep what it runs."""


T = TypeVar("T")


class _LoopThread:
    """SGLang's event loop, running in a thread of its own, so that several threads can wait for what it does."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def start(self, awaitable: Awaitable[T]) -> Future[T]:
        async def outcome() -> T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(outcome(), self._loop)

    def run_until_complete(self, awaitable: Awaitable[T]) -> T:
        return self.start(awaitable).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def sample_seed(seed: int, uid: str, index: int) -> int:
    """Seed of one response, in [0, 2^63): the same in every process and Python version."""
    digest = hashlib.blake2b(f"{seed}\0{index}\0{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_config(config: EngineConfig) -> None:
    faults = []
    if config.device == "cpu" and config.kv_cache_tokens is None:
        faults.append("kv_cache_tokens is required on a CPU")
    if config.kv_cache_tokens is not None and config.kv_cache_tokens < config.context_tokens:
        faults.append(f"kv_cache_tokens={config.kv_cache_tokens} holds no sequence of {config.context_tokens} tokens")
    model_config = config.model_path / "config.json"
    if not model_config.is_file():
        faults.append(f"no config.json in {config.model_path}")
    elif config.device == "cpu":
        # On a GPU SGLang replicates key and value heads; on a CPU it pads the model with heads of zeros instead, a
        # layout that `verify` does not know.
        kv_heads = json.loads(model_config.read_text()).get("num_key_value_heads", config.tp)
        if kv_heads % config.tp:
            faults.append(f"on a CPU tp={config.tp} must divide the model's {kv_heads} key/value heads")
    if faults:
        raise RolloutError("; ".join(faults))


def _server_arguments(config: EngineConfig) -> dict[str, Any]:
    arguments = {
        "model_path": str(config.model_path),
        "skip_tokenizer_init": True,  # token ids in and out
        "dtype": config.dtype,
        "tp_size": config.tp,
        "ep_size": config.ep,
        "random_seed": config.seed,
        "context_length": config.context_tokens,
        "max_running_requests": config.max_running_requests,
        "max_total_tokens": config.kv_cache_tokens,
        "mem_fraction_static": config.memory_fraction,
        # flashinfer's sampler takes no seeds; without top-p both draw straight from the softmax.
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "weight_version": "0",
        "custom_weight_loader": [verify.VERIFY, receive.RECEIVE],
        # The prefix cache stays on: the samples of a group share their prompt. Weight updates flush it.
        "disable_radix_cache": False,
        # An idle scheduler would otherwise poll on a whole core, which the trainer can use.
        "sleep_on_idle": True,
        "log_level": "error",
        "enable_memory_saver": config.gives_memory_back and config.device == "cuda",
    }
    if not config.read_weights:
        arguments["load_format"] = "dummy"
    if config.device == "cpu":
        arguments |= {
            "device": "cpu",
            "attention_backend": "torch_native",
            # A share of the machine's memory, in which other processes count too: the engine would refuse to start
            # beside them. kv_cache_tokens bounds the cache.
            "mem_fraction_static": 0.95,
        }
        if config.dtype == "bfloat16":
            arguments["kv_cache_dtype"] = "bfloat16"  # SGLang refuses a quantized model's float8 one without AMX
    return arguments


def _request(sampling: Sampling, *, seed: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_response_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "no_stop_trim": True,
        "sampling_seed": seed,
        "custom_params": {REQUEST_KEY: adaptive_parameters(sampling.adaptive)},
    }


def adaptive_parameters(adaptive: AdaptiveTemperature | None) -> list[float]:
    """What a request carries for the hook."""
    return [] if adaptive is None or adaptive.tau == 0 else temperature.row_parameters(adaptive)


def _rollout(prompt: Prompt, answer: dict, sampling: Sampling) -> Rollout:
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    if finish["type"] == "abort":
        raise RolloutError(
            f"SGLang aborted a response to prompt {prompt.uid}: {finish.get('message', 'no reason given')}"
        )
    response_ids = np.asarray(answer["output_ids"], dtype=np.int32)
    log_probs = np.asarray([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float32)
    if sampling.temperature > 0 and adaptive_parameters(sampling.adaptive):
        temperatures = np.asarray(meta[TEMPERATURE_KEY], dtype=np.float32)
    else:
        temperatures = np.full(len(response_ids), sampling.temperature, dtype=np.float32)
    spans = meta["weight_versions"]
    versions = np.repeat(
        np.array([int(span["version"]) for span in spans], dtype=np.int32),
        [span["end"] - span["start"] for span in spans],
    )
    if not len(response_ids) == len(log_probs) == len(temperatures) == len(versions):
        raise RolloutError(
            f"SGLang's answer to prompt {prompt.uid} has {len(response_ids)} tokens, {len(log_probs)} log-probs, "
            f"{len(temperatures)} temperatures and {len(versions)} weight versions"
        )
    reason: FinishReason = "stop" if finish["type"] == "stop" else "length"
    return Rollout(
        prompt=prompt,
        response_ids=response_ids,
        rollout_log_probs=log_probs,
        temperatures=temperatures,
        policy_versions=versions,
        finish_reason=reason,
    )


def _expect(answer: Any, what: str) -> None:
    """Raises with SGLang's message where it answers (False, message), which it does instead of raising."""
    success, message = (answer[0], answer[1]) if isinstance(answer, tuple | list) else (answer, "")
    if success is not True:
        raise WeightSyncError(f"{what}: {message or answer}")
