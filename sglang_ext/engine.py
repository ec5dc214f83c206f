"""One SGLang engine: it starts SGLang, proves that it samples by the formula, generates, and receives weights.

A plain object. One thread may update weights while others wait for responses. It needs a process of its own (a Ray
actor), because it starts child processes and because, on a CPU, the process needs `sglang_ext.cpu.environment` before
it starts. SGLang opens no network port beyond loopback for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.model.families import read_shape
from megatron_hapo.model.rank_environment import importing
from megatron_hapo.observe.spans import SpanRecorder, Timeline, recorded
from megatron_hapo.private_folder import PrivateFolder
from megatron_hapo.protocols import Finished
from megatron_hapo.resharding.hosts import this_host
from megatron_hapo.resharding.receiving import ReceiveRequest
from megatron_hapo.types import GroupRequest, InFlight, WeightBucket
from sglang_ext import batch_invariance, online_quantization, receive, self_test, verify
from sglang_ext.engine_config import EngineConfig, check_engine_config, server_arguments
from sglang_ext.engine_state import EngineState, Verb, Weights
from sglang_ext.responses import rollout_of, sample_seed, sampling_parameters

_IDLE_SECONDS = 60.0
"""The scheduler may still be finishing the last batch when its answers have come."""


class Engine:
    """protocols.RolloutEngine over SGLang.

    Once the constructor returns, it holds version 0 of the weights: those of `model_path`, or random ones. Calls that
    its state does not allow are refused by the table in `engine_state`.
    """

    def __init__(self, config: EngineConfig):
        """Starts the engine and proves its sampling.

        Raises:
            RolloutError: the config cannot work, or the self-test failed; no process is left behind.
        """
        check_engine_config(config)
        with importing():
            from sglang_ext.token_engine import TokenEngine  # imports SGLang, which needs its process's environment

        # Weights reach the engine's ranks in shared memory. torch's default passes file descriptors, whose other end
        # can be gone before the last rank has opened it.
        torch.multiprocessing.set_sharing_strategy("file_system")
        self.spans = SpanRecorder(config.name)
        self._config = config
        self._state = EngineState(weights=Weights.LOADED if config.read_weights else Weights.RANDOM)
        self._routes = read_shape(config.model_path).routes if config.returns_routes else None
        self._calls: dict[int, _Call] = {}
        self._num_aborts = 0  # updates that have aborted requests
        self._expected: dict[str, list[int]] = {}  # checksums of the buckets of the open update
        # Ranks of one node meet through a file: torch's TCP store would listen on every interface, without a token.
        self._scratch = PrivateFolder()
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{self._scratch.path}/rendezvous"
        if config.deterministic and config.device == "cpu":
            os.environ |= batch_invariance.ENVIRONMENT  # of the processes that SGLang starts
        if config.quantization == "fp8":
            os.environ |= online_quantization.ENVIRONMENT
        try:
            with self._scratch.for_temporary_files():  # SGLang's sockets, which it would leave behind
                arguments = server_arguments(config, returns_routes=self._routes is not None)
                self._engine: Any = TokenEngine(**arguments)  # whose types call optional what a started one has
        except BaseException:
            self._scratch.close()
            raise
        self._loop = _LoopThread(self._engine.loop)
        self._engine.loop = self._loop  # type: ignore[assignment]  # SGLang's engine calls run_until_complete alone
        try:
            self.self_test()
        except BaseException:
            self.shutdown()
            raise

    def shutdown(self) -> None:
        """Ends SGLang's processes, and removes what they would leave behind."""
        self._engine.shutdown()
        self._loop.close()
        self._scratch.close()

    def host(self) -> str:
        """The host of the engine's processes."""
        return this_host()

    def start_profile(self) -> None:
        """Begin to record the calls of the verbs that are marked as recorded."""
        self.spans.start()

    def finish_profile(self) -> Timeline:
        """What has been recorded since `start_profile`."""
        return self.spans.finish()

    def _moved(self, verb: Verb, parts: Sequence[str] = ()) -> None:
        self._state = self._state.after(verb, parts)

    # ----- generation

    @recorded
    def advance(self, call: int, requests: Mapping[int, GroupRequest]) -> list[Finished]:
        """Starts the responses of these groups, and waits until one of the call's has finished.

        A response depends on (sampling.seed, prompt.uid, sample index) and on the weights, not on the other prompts,
        except for rounding: batches of other sizes may use other matrix kernels.

        Args:
            call: the generation call to which the responses belong. It advances until it has all of them, in one
                thread at a time.
            requests: by number; responses come back under the same number.
        Returns:
            The call's responses that have finished since it last advanced, at least one.
        Raises:
            RolloutError: SGLang aborted a request, prompt and response do not fit the engine, or the engine's state
                does not allow generation.
        """
        self._state.check("advance")
        for request in requests.values():
            self._check_length(request)
        state = self._calls.setdefault(call, _Call())
        if requests:
            state.unfinished += sum(request.sampling.samples for request in requests.values())
            started = self._loop.start(self._respond_to_all(requests, state))
            state.started = [*(earlier for earlier in state.started if not earlier.done()), started]
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

    def _check_length(self, request: GroupRequest) -> None:
        length, longest = len(request.prompt.token_ids), request.sampling.max_response_tokens
        if length + longest > self._config.context_tokens:
            raise RolloutError(
                f"a prompt of {length} tokens and max_response_tokens={longest} need {length + longest} tokens; the "
                f"engine was started with context_tokens={self._config.context_tokens}"
            )

    async def _respond_to_all(self, requests: Mapping[int, GroupRequest], call: _Call) -> None:
        await asyncio.gather(*(self._respond_to_group(number, requests[number], call) for number in requests))

    async def _respond_to_group(self, number: int, request: GroupRequest, call: _Call) -> None:
        # The prompt goes through the model once; then the samples find it in the prefix cache. SGLang's own `n` does
        # the same, but gives all samples one seed.
        if request.sampling.samples > 1:
            await self._prefill(request, call)
        await asyncio.gather(
            *(self._respond(number, request, index, call) for index in range(request.sampling.samples))
        )

    async def _prefill(self, request: GroupRequest, call: _Call) -> None:
        parameters = sampling_parameters(request.sampling, seed=0) | {"max_new_tokens": 0}
        try:
            await self._answer(input_ids=request.prompt.token_ids.tolist(), sampling_params=parameters)
        except Exception as error:  # any error is raised in the caller of `advance`
            call.finished.put(error)

    async def _respond(self, number: int, request: GroupRequest, index: int, call: _Call) -> None:
        prompt, sampling = request.prompt, request.sampling
        seed = sample_seed(sampling.seed, prompt.uid, index)
        routes = self._routes if sampling.keep_routes else None
        try:
            while True:
                num_aborts = self._num_aborts
                answer: Any = await self._answer(
                    input_ids=prompt.token_ids.tolist(),
                    sampling_params=sampling_parameters(sampling, seed=seed),
                    return_sampling_mask=sampling.keep_cut,
                    return_routed_experts=routes is not None,
                )
                if answer["meta_info"]["finish_reason"]["type"] != "abort" or num_aborts == self._num_aborts:
                    break  # otherwise a weight update has aborted it, and it starts again
            call.finished.put((number, index, rollout_of(prompt, answer, sampling, routes=routes)))
        except Exception as error:  # any error is raised in the caller of `advance`
            call.finished.put(error)

    def self_test(self) -> None:
        """Proves on this model that temperatures and log-probs are those of the formula, and that it returns experts.

        Raises:
            RolloutError: what was expected, what came, and the likely cause.
        """
        self._state.check("self_test")
        vocab_size = self._engine.tokenizer_manager.model_config.vocab_size
        dtype = "fp8" if self._config.quantization == "fp8" else self._config.dtype
        self_test.run(self._answers, vocab_size=vocab_size, dtype=dtype)
        if self._routes is not None:
            self_test.check_routes(self._answers, self._routes, vocab_size=vocab_size)
        if self._config.deterministic:
            self_test.check_exact(
                self._answers, self._engine.flush_cache, vocab_size=vocab_size, prefilled=self._config.device == "cpu"
            )
        if self._engine.flush_cache().success is not True:
            raise RolloutError("SGLang did not flush its cache after the self-test")
        self._moved("self_test")

    def _answers(self, prompts: list[list[int]], parameters: list[dict], **options: Any) -> list[dict]:
        """SGLang's answers to these requests, in their order; `options` are lists with an entry a request."""
        answers = self._loop.run_until_complete(self._answer(input_ids=prompts, sampling_params=parameters, **options))
        assert isinstance(answers, list)
        return answers

    async def _answer(self, **request: Any) -> Any:
        """SGLang's answer or answers to a request, with log-probs; its `Engine.generate` lacks some fields of one."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        generator = self._engine.tokenizer_manager.generate_request(
            GenerateReqInput(return_logprob=True, **request), None
        )
        return await anext(generator)

    # ----- weight updates

    def begin_weight_update(self, in_flight: InFlight | None = None) -> None:
        """Opens an update; no token is sampled until its end. Does nothing if a failed update is still open.

        Args:
            in_flight: `finish`: waits for unfinished responses; others are refused until the end. `pause`: responses
                wait, unfinished ones with the tokens that they have, until `resume`; then they continue with the new
                weights, with nothing cached from the old. `abort`: the same, but unfinished ones start again. None: as
                the engine was configured.
        """
        self._expected = {}
        if self._state.updating:
            return
        in_flight = in_flight or self._config.in_flight
        # With random weights nothing is in flight, and the end of the update generates to prove the sampling.
        if in_flight != "finish" and self._state.proved:
            self._moved("pause")
            self._loop.run_until_complete(self._pause(abort=in_flight == "abort"))
        _expect(self._engine.begin_weight_update(), "begin_weight_update")
        self._moved("begin_weight_update")

    async def _pause(self, *, abort: bool) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        # `retract` takes requests back to the queue and frees what they have cached; new ones wait outside.
        await self._engine.tokenizer_manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        if abort:
            self._num_aborts += 1
            self._engine.tokenizer_manager.abort_request(abort_all=True)

    @recorded
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
        what = f"loading {bucket.names[0]} ... {bucket.names[-1]}"
        self._update("load_bucket", serialized, "flattened_bucket", what)
        self._expected |= bucket.checksums or {}

    def prepare_receiving(self, plans: Sequence[str]) -> None:
        """Stores each rank's part of the plan (`resharding.receiving.receiver_plan`), for all `receive_weights`."""
        receive.write_plans(self._scratch.path, plans)

    @recorded
    def receive_weights(self, request: ReceiveRequest) -> None:
        """Opens an update, unless one is open, and fills every rank's parameters from the trainer ranks.

        Raises:
            WeightSyncError: names what did not arrive, from which rank, or does not fit.
        """
        self.begin_weight_update()
        payload = receive.payload(request, self._scratch.path)
        # The same request flushes what was cached under the old weights.
        self._update("receive_weights", payload, receive.RECEIVE, "receiving weights", flush=True)

    @recorded
    def verify(self, checksums: dict[str, list[int]]) -> None:
        """Compares what every rank's parameters hold with the trainer's checksums, in an open update.

        Args:
            checksums: for each Hugging Face name, `tensor_checksum` of each rank's slice (`checksum.engine_slices`).
        Raises:
            WeightSyncError: names tensor and rank; also a tensor without checksum, or a checksum without tensor.
        """
        for name, sums in checksums.items():
            if len(sums) != self._config.tp:
                raise WeightSyncError(f"{name}: {len(sums)} checksums for an engine with tp={self._config.tp}")
        self._update("verify", verify.checksum_payload(checksums), verify.VERIFY, "verifying weights")

    def _update(self, verb: Verb, tensors: Any, load_format: str, what: str, *, flush: bool = False) -> None:
        """One request to SGLang in an open update."""
        self._state.check(verb)
        answer = self._engine.update_weights_from_tensor(tensors, load_format=load_format, flush_cache=flush)
        _expect(answer, what)
        self._moved(verb)

    @recorded
    def end_weight_update(self, policy_version: int) -> None:
        """Closes the update: the engine now holds this version, and nothing cached from another.

        Checksums that came with buckets are verified first. The first end on an engine that has not read its weights
        proves the sampling again, on the real ones; if the engine does not hold all of its memory, `take_memory` does.
        """
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        self._state.check("end_weight_update")
        if self._expected:
            self.verify(self._expected)
        _expect(self._engine.end_weight_update(), "end_weight_update")
        if not self._state.flushed:
            flushed = self._engine.flush_cache()
            _expect((flushed.success, flushed.message), "flushing the KV cache")
        # Marks the tokens that each paused request has as of the version before.
        version = UpdateWeightVersionReqInput(new_version=str(policy_version), abort_all_requests=False)
        self._loop.run_until_complete(self._engine.tokenizer_manager.update_weight_version(version))
        self._moved("end_weight_update")
        self._prove_if_due()

    def _prove_if_due(self) -> None:
        if self._state.due_for_proof:
            self.self_test()

    def resume(self) -> None:
        """Lets responses continue that an update has paused, after its end."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        self._state.check("resume")
        if self._state.paused:
            request = ContinueGenerationReqInput(torch_empty_cache=False)
            self._loop.run_until_complete(self._engine.tokenizer_manager.continue_generation(request))
            self._moved("resume")

    # ----- memory

    def release_memory(self, parts: Sequence[str]) -> None:
        """Releases GPU memory, `kv_cache` or `weights`, until `take_memory`; the content is lost.

        On a CPU SGLang (0.5.23) cannot: memory and contents stay, and only the engine's state changes.
        """
        if not self._config.releases_memory:
            raise RolloutError("release_memory: the engine was started without releases_memory")
        self._state.check("release_memory")
        if held := [part for part in parts if part not in self._state.released]:
            self._wait_until_idle()
            if self._config.device == "cuda":
                self._engine.release_memory_occupation(tags=held)
            self._moved("release_memory", held)

    def _wait_until_idle(self) -> None:
        manager: Any = self._engine.tokenizer_manager  # the engine's own flush_cache takes no time limit
        flushed = self._loop.run_until_complete(manager.flush_cache(timeout_s=_IDLE_SECONDS))
        if flushed.success is not True:
            raise RolloutError(f"the engine did not become idle within {_IDLE_SECONDS:g} s: {flushed.message}")

    def take_memory(self, parts: Sequence[str]) -> None:
        """Allocates released memory again; weights must then be loaded, by a whole update, before generation."""
        if released := [part for part in parts if part in self._state.released]:
            if self._config.device == "cuda":
                self._engine.resume_memory_occupation(tags=released)
            self._moved("take_memory", released)
            self._prove_if_due()


@dataclass
class _Call:
    """The responses that one caller of `advance` waits for."""

    unfinished: int = 0
    finished: SimpleQueue[Finished | Exception] = field(default_factory=SimpleQueue)
    started: list[Future[None]] = field(default_factory=list)
    """The event loop keeps no reference to what it runs."""


T = TypeVar("T")


class _LoopThread:
    """SGLang's event loop, running in a thread of its own, so that several threads can wait for what it does."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def start(self, awaitable: Awaitable[T]) -> Future[T]:
        """Runs this in the loop; returns its future result."""

        async def outcome() -> T:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(outcome(), self._loop)

    def run_until_complete(self, awaitable: Awaitable[T]) -> T:
        """Runs this in the loop and waits; returns its result."""
        return self.start(awaitable).result()

    def close(self) -> None:
        """Stops the loop and ends its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _expect(answer: Any, what: str) -> None:
    """Raises with SGLang's message where it answers (False, message), which it does instead of raising."""
    success, message = (answer[0], answer[1]) if isinstance(answer, tuple | list) else (answer, "")
    if success is not True:
        raise WeightSyncError(f"{what}: {message or answer}")
