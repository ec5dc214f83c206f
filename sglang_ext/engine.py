"""One SGLang engine: starts it, proves that it samples as the formula says, generates, and receives weights.

A plain object; it needs a process of its own (a Ray actor), because it starts child processes and, on a CPU, because
the process needs `sglang_ext.cpu.environment` before it starts. SGLang opens no network port beyond loopback for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.types import AdaptiveTemperature, FinishReason, Prompt, Rollout, Sampling, WeightBucket
from sglang_ext import receive, self_test, temperature, weights
from sglang_ext.plugin import REQUEST_KEY, TEMPERATURE_KEY

logger = logging.getLogger(__name__)

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
        self._policy_version = 0
        self._updating = self._flushed = False
        self._proved = config.read_weights  # random weights give all tokens much the same chance, at any temperature
        self._given_back: frozenset[str] = frozenset()
        self._weights_lost = False
        # Ranks of one node meet through a file: torch's TCP store would listen on every interface, without a token.
        self._scratch = tempfile.TemporaryDirectory(prefix="megatron-hapo-engine-")
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{self._scratch.name}/rendezvous"
        self._engine = sglang.Engine(**_server_arguments(config))
        try:
            self.self_test()
        except BaseException:
            self.shutdown()
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """`sampling.samples` rollouts of each prompt, in the prompts' order.

        A response depends on (sampling.seed, prompt.uid, sample index) and on the weights, not on the other prompts,
        except for rounding: batches of other sizes may take other matrix kernels.

        Raises:
            RolloutError: SGLang aborted a request, or prompt and response do not fit the engine.
        """
        if self._updating:
            raise RolloutError("the engine is between begin_weight_update and end_weight_update; it cannot generate")
        if self._given_back or self._weights_lost:
            raise RolloutError("the engine has given back its memory or its weights; it cannot generate")
        self._check_lengths(prompts, sampling)
        # Samples of a prompt stand together: after the first prefill batch the prefix cache serves the others.
        # SGLang's own `n` would give all samples of a prompt the same seed.
        requests = [
            (prompt, _request(sampling, seed=sample_seed(sampling.seed, prompt.uid, index)))
            for prompt in prompts
            for index in range(sampling.samples)
        ]
        if not requests:
            return [[] for _ in prompts]
        answers = self._answers([p.token_ids.tolist() for p, _ in requests], [parameters for _, parameters in requests])
        rollouts = [
            _rollout(prompt, answer, sampling, self._policy_version)
            for (prompt, _), answer in zip(requests, answers, strict=True)
        ]
        return [rollouts[i * sampling.samples : (i + 1) * sampling.samples] for i in range(len(prompts))]

    def self_test(self) -> None:
        """Proves on this model that temperatures and log-probs are what the formula says.

        Raises:
            RolloutError: what was expected, what came, and the likely cause.
        """
        vocab_size = self._engine.tokenizer_manager.model_config.vocab_size
        self_test.run(self._answers, vocab_size=vocab_size, dtype=self._config.dtype)
        if self._engine.flush_cache().success is not True:
            raise RolloutError("SGLang did not flush its cache after the self-test")

    def begin_weight_update(self) -> None:
        """First call of an update; no generation until the last. An update that failed half-way is begun anew."""
        if self._updating:
            return
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

    def receive_weights(self, request: receive.Request) -> None:
        """Every rank fills its own parameters from the trainer ranks; between begin and end.

        Raises:
            WeightSyncError: names what did not come, from whom, or does not fit.
        """
        self._update(request.payload(Path(self._scratch.name)), receive.RECEIVE, "receiving weights", flush=True)

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
        self._update(weights.checksum_payload(checksums), weights.VERIFY, "verifying weights")

    def end_weight_update(self, policy_version: int) -> None:
        """Last call of an update: the engine now holds this version, and nothing cached from another.

        The first one of an engine that has not read its weights proves the sampling again, on the true ones; or, if
        the engine has given back its KV cache, `take_memory` does.
        """
        _expect(self._engine.end_weight_update(), "end_weight_update")
        if not self._flushed:
            flushed = self._engine.flush_cache()
            _expect((flushed.success, flushed.message), "flushing the KV cache")
        self._updating = self._flushed = self._weights_lost = False
        self._policy_version = policy_version
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
        flushed = self._engine.loop.run_until_complete(manager.flush_cache(timeout_s=_IDLE_SECONDS))
        if flushed.success is not True:
            raise RolloutError(f"the engine did not come to rest within {_IDLE_SECONDS:g} s: {flushed.message}")

    def take_memory(self, parts: Sequence[str]) -> None:
        """Take memory again that was given back; weights must then be loaded, by a whole update, before generation."""
        if wanted := [part for part in parts if part in self._given_back]:
            if self._config.device == "cuda":
                self._engine.resume_memory_occupation(tags=wanted)
            self._given_back -= {*wanted}
            self._prove()

    @property
    def policy_version(self) -> int:
        """Version of the weights that the engine holds."""
        return self._policy_version

    def shutdown(self) -> None:
        """Ends SGLang's processes."""
        self._engine.shutdown()
        self._scratch.cleanup()

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
        "custom_weight_loader": [weights.VERIFY, receive.RECEIVE],
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


def _rollout(prompt: Prompt, answer: dict, sampling: Sampling, policy_version: int) -> Rollout:
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
    if not len(response_ids) == len(log_probs) == len(temperatures):
        raise RolloutError(
            f"SGLang's answer to prompt {prompt.uid} has {len(response_ids)} tokens, {len(log_probs)} log-probs and "
            f"{len(temperatures)} temperatures"
        )
    reason: FinishReason = "stop" if finish["type"] == "stop" else "length"
    return Rollout(
        prompt=prompt,
        response_ids=response_ids,
        rollout_log_probs=log_probs,
        temperatures=temperatures,
        finish_reason=reason,
        policy_version=policy_version,
    )


def _expect(answer: Any, what: str) -> None:
    """Raises with SGLang's message where it answers (False, message), which it does instead of raising."""
    success, message = (answer[0], answer[1]) if isinstance(answer, tuple | list) else (answer, "")
    if success is not True:
        raise WeightSyncError(f"{what}: {message or answer}")
