"""A real engine on the CPU, compared with transformers: temperatures, log-probs, seeds, stops and weight updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from megatron_hapo.algorithm.step_statistics import steering
from megatron_hapo.config import AlgorithmConfig
from megatron_hapo.entropy import EntropyStats, adaptive_temperature, entropy_from_logits, entropy_stats
from megatron_hapo.errors import RolloutError, WeightSyncError
from megatron_hapo.resharding.checksum import engine_slices, tensor_checksum
from megatron_hapo.types import AdaptiveTemperature, GroupRequest, Prompt, Rollout, Sampling, WeightBucket
from sglang_ext import temperature
from sglang_ext.engine import Engine
from sglang_ext.engine_config import EngineConfig
from tests.sglang_ext.engine_process import RemoteEngine, running_engine
from tests.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="module")
def engine(tiny_qwen3: Path) -> Iterator[RemoteEngine]:
    # Fewer cache tokens than 32 sequences need, so that requests wait and are retracted.
    with running_engine(tiny_qwen3, kv_cache_tokens=1024, releases_memory=True) as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_qwen3: Path):
    return load_reference(tiny_qwen3)


@pytest.fixture(scope="module")
def stats(reference) -> EntropyStats:
    token_ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 64)))
    with torch.no_grad():
        return entropy_stats(entropy_from_logits(reference(token_ids).logits).flatten())


def load_reference(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_prompts(count: int, *, length: int = 8) -> list[Prompt]:
    rng = np.random.default_rng(count)
    return [
        Prompt(uid=f"p{i}", token_ids=ids.astype(np.int32), ground_truth="", data_source="test")
        for i, ids in enumerate(rng.integers(0, 256, (count, length)))
    ]


def response_logits(reference, rollout: Rollout) -> Tensor:
    """[R, V] float32, logits from which each response token was sampled."""
    token_ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
    with torch.no_grad():
        logits_TV = reference(torch.from_numpy(token_ids).long()[None]).logits[0]
    return logits_TV[len(rollout.prompt.token_ids) - 1 : -1]


def assert_log_probs_are_at_recorded_temperatures(reference, rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        logits_RV = response_logits(reference, rollout) / torch.tensor(rollout.temperatures)[:, None]
        expected_R = torch.log_softmax(logits_RV, -1).gather(1, torch.tensor(rollout.response_ids).long()[:, None])
        torch.testing.assert_close(torch.tensor(rollout.rollout_log_probs), expected_R[:, 0], atol=2e-3, rtol=0)


EOS = 258  # of the byte-level tokenizer
SAMPLING = Sampling(samples=3, temperature=1.2, max_response_tokens=24, seed=5)


TWO_TEMPERATURES = AlgorithmConfig.model_validate(
    {"adaptive_temperature": {"enabled": False}, "multi_temperature": {"enabled": True, "tau": 0.3}}
)


def test_the_prompt_of_a_group_goes_through_the_model_once(engine: RemoteEngine) -> None:
    engine.generate(make_prompts(1), Sampling(samples=1, temperature=1.0, max_response_tokens=1, seed=0))
    engine.cached_tokens()
    sampling = Sampling(samples=4, temperature=1.0, max_response_tokens=2, seed=0)
    groups = engine.generate(make_prompts(2, length=40), sampling)
    assert [len(group) for group in groups] == [4, 4]
    # The last token of a prompt is always computed: the first token of the response follows from it.
    assert sorted(engine.cached_tokens()) == [0, 0, *[39] * 8]


def test_requests_that_start_together_are_one_message(engine: RemoteEngine) -> None:
    engine.sent_requests()
    engine.generate(make_prompts(3), Sampling(samples=4, temperature=1.0, max_response_tokens=2, seed=0))
    assert engine.sent_requests() == [3, 12]  # the prompts, then their samples


def test_responses_leave_the_prefix_cache_when_they_finish(engine: RemoteEngine) -> None:
    sampling = Sampling(samples=1, temperature=1.0, max_response_tokens=16, seed=0)
    (prompt,) = make_prompts(1, length=21)
    ((rollout,),) = engine.generate([prompt], sampling)
    engine.cached_tokens()
    continued = replace(prompt, token_ids=np.concatenate([prompt.token_ids, rollout.response_ids]))
    engine.generate([continued], sampling)
    assert engine.cached_tokens() == [21]


@pytest.mark.parametrize("sign", ["signed", "reference", "two temperatures"])
def test_temperatures_are_those_of_the_formula(engine, reference, stats, sign):
    if sign == "two temperatures":
        adaptive = steering(TWO_TEMPERATURES, stats)
    else:
        adaptive = AdaptiveTemperature(stats=stats, tau=0.3, sign=sign)
    assert adaptive is not None
    groups = engine.generate(make_prompts(4), replace(SAMPLING, adaptive=adaptive))
    rollouts = [rollout for group in groups for rollout in group]
    assert len(rollouts) == 12
    for rollout in rollouts:
        entropy_R = entropy_from_logits(response_logits(reference, rollout) / 1.2)
        expected_R = adaptive_temperature(entropy_R, 1.2, adaptive.stats, tau=0.3, sign=adaptive.sign)
        torch.testing.assert_close(torch.from_numpy(rollout.temperatures), expected_R, atol=1e-4, rtol=0)
        if sign == "two temperatures":
            hot_R = entropy_R.log() > stats.pivot
            torch.testing.assert_close(expected_R, torch.where(hot_R, 1.2 * 1.3, 1.2 * 0.7))
    spread = np.concatenate([rollout.temperatures for rollout in rollouts])
    assert spread.max() - spread.min() > 0.05  # otherwise the test would prove nothing
    assert_log_probs_are_at_recorded_temperatures(reference, rollouts)


def test_an_engine_runs_no_process_that_detokenizes(engine):
    titles = [" ".join(process.cmdline()).strip() for process in psutil.Process().children(recursive=True)]
    assert [title for title in titles if title.startswith("sglang::")] == ["sglang::scheduler"]


def test_without_statistics_every_token_is_at_the_base_temperature(engine, reference):
    rollouts = [rollout for group in engine.generate(make_prompts(3), SAMPLING) for rollout in group]
    assert all((rollout.temperatures == np.float32(1.2)).all() for rollout in rollouts)
    assert_log_probs_are_at_recorded_temperatures(reference, rollouts)


def test_a_cut_keeps_the_most_likely_tokens_and_log_probs_are_among_them(engine, reference, stats):
    """At the adaptive temperature; requests wait and are retracted, and keep what they have."""
    adaptive = AdaptiveTemperature(stats=stats, tau=0.3)
    sampling = replace(SAMPLING, samples=4, max_response_tokens=60, adaptive=adaptive, top_p=0.5, top_k=67)
    uncut = engine.generate(make_prompts(8), sampling)
    groups = engine.generate(make_prompts(8), replace(sampling, keep_cut=True))
    ids = [[rollout.response_ids.tolist() for group in part for rollout in group] for part in (uncut, groups)]
    assert ids[0] == ids[1]
    assert uncut[0][0].kept is None
    limited = 0
    for rollout in (rollout for group in groups for rollout in group):
        log_p_RV = torch.log_softmax(
            response_logits(reference, rollout) / torch.tensor(rollout.temperatures)[:, None], -1
        )
        ends = np.cumsum(rollout.kept.lengths)
        for place, token in enumerate(rollout.response_ids.tolist()):
            kept = torch.from_numpy(
                rollout.kept.token_ids[ends[place] - rollout.kept.lengths[place] : ends[place]]
            ).long()
            log_p_V, least = log_p_RV[place], log_p_RV[place][kept].min()
            dropped_V = torch.ones_like(log_p_V).index_fill(0, kept, 0).bool()
            assert log_p_V[dropped_V].max() <= least + 1e-4
            mass = float(log_p_V[kept].exp().sum())
            assert mass - float(least.exp()) <= 0.5 + 1e-4
            assert mass >= 0.5 - 1e-4 or len(kept) == 67
            limited += mass < 0.5 - 1e-4
            among = float(log_p_V[token] - log_p_V[kept].logsumexp(0))
            assert float(rollout.rollout_log_probs[place]) == pytest.approx(among, abs=1e-4)
    assert 0 < limited < sum(len(response) for response in ids[0]), "one of both limits never applied"


def test_requests_of_every_kind_share_a_batch_and_do_not_disturb_each_other(engine, stats):
    """Greedy, base and adaptive requests end at different times, so that rows are merged and filtered throughout."""
    numbers = temperature.row_parameters(AdaptiveTemperature(stats=stats, tau=0.3))
    kinds = [{"custom_params": {"hapo": numbers}}, {"custom_params": {"hapo": []}}, {"temperature": 0.0}]
    prompts, parameters = [], []
    for i, prompt in enumerate(make_prompts(9)):
        kind = {"temperature": 1.2, "custom_params": {"hapo": []}} | kinds[i % 3]
        prompts.append(prompt.token_ids.tolist())
        parameters.append(kind | {"max_new_tokens": 4 + 5 * i, "sampling_seed": i, "ignore_eos": True})
    together = engine._answers(prompts, parameters)
    for prompt, own, answer in zip(prompts, parameters, together, strict=True):
        if own["temperature"] > 0:  # beside a greedy request SGLang draws from sorted probabilities: other tokens
            continue
        assert answer["output_ids"] == engine._answers([prompt], [own])[0]["output_ids"]
    for i in range(0, 9, 3):
        temperatures = together[i]["meta_info"]["hapo_temperature"]
        assert len(temperatures) == len(together[i]["output_ids"])
        assert len(set(temperatures)) > 1


def test_a_seed_determines_a_response_whatever_the_batch_contains(engine, stats):
    sampling = replace(SAMPLING, max_response_tokens=60, adaptive=AdaptiveTemperature(stats=stats, tau=0.3))
    prompts = make_prompts(20)
    together = engine.generate(prompts, sampling)
    alone = engine.generate(prompts[7:8], sampling)
    again = engine.generate(prompts[::-1], sampling)
    for index in range(3):
        tokens = [rollouts[index].response_ids.tolist() for rollouts in (together[7], alone[0], again[12])]
        assert tokens[0] == tokens[1] == tokens[2]
        np.testing.assert_allclose(together[7][index].temperatures, alone[0][index].temperatures, atol=1e-5)
    assert len({tuple(rollout.response_ids) for group in together for rollout in group}) == 60
    other = engine.generate(prompts[7:8], replace(sampling, seed=6))
    assert other[0][0].response_ids.tolist() != alone[0][0].response_ids.tolist()


def test_stop_token_is_kept_and_ends_the_response(engine):
    stops = tuple(range(0, 258, 4))
    rollouts = engine.generate(make_prompts(4), replace(SAMPLING, stop_token_ids=stops, max_response_tokens=100))
    for rollout in (rollout for group in rollouts for rollout in group):
        assert rollout.finish_reason == "stop"
        assert rollout.response_ids[-1] in {*stops, EOS}
        assert not set(rollout.response_ids[:-1]) & {*stops, EOS}
        assert len(rollout.rollout_log_probs) == len(rollout.temperatures) == len(rollout.response_ids)


def test_response_ends_at_its_longest_length(engine):
    rollouts = engine.generate(make_prompts(2), replace(SAMPLING, max_response_tokens=5, samples=1))
    assert [(len(r.response_ids), r.finish_reason) for (r,) in rollouts] == [(5, "length")] * 2


def test_greedy_equals_transformers_and_records_temperature_zero(engine, reference):
    assert_greedy_equals(engine, reference)


def test_requests_that_cannot_fit_are_refused(engine):
    with pytest.raises(RolloutError, match="context_tokens=512"):
        engine.generate(make_prompts(1), replace(SAMPLING, max_response_tokens=600))


def assert_greedy_equals(engine: RemoteEngine, reference, *, version: int = 0) -> None:
    prompts = make_prompts(3)
    greedy = Sampling(samples=1, temperature=0.0, max_response_tokens=12, seed=0)
    for prompt, (rollout,) in zip(prompts, engine.generate(prompts, greedy), strict=True):
        prompt_ids = torch.from_numpy(prompt.token_ids).long()[None]
        expected = reference.generate(prompt_ids, max_new_tokens=12, do_sample=False)[0, prompt_ids.shape[1] :]
        assert rollout.response_ids.tolist() == expected.tolist()
        assert (rollout.temperatures == 0).all()
        assert rollout.policy_version == version


# ----- weight updates


def make_bucket(tensors: dict[str, Tensor]) -> WeightBucket:
    parts, size = [], 0
    for tensor in tensors.values():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        parts.append(np.pad(raw, (0, -len(raw) % 16)))
        size += len(parts[-1])
    return WeightBucket(
        names=tuple(tensors),
        shapes=tuple(tuple(t.shape) for t in tensors.values()),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in tensors.values()),
        data=np.concatenate(parts),
    )


def make_checksums(tensors: dict[str, Tensor], *, tp: int = 1) -> dict[str, list[int]]:
    return {
        name: [tensor_checksum(s) for s in engine_slices(name, tensor, tp=tp, num_heads=4, num_kv_heads=2)]
        for name, tensor in tensors.items()
    }


def load(engine: RemoteEngine, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    for part in (names[:5], names[5:]):
        engine.load_bucket(make_bucket({name: tensors[name] for name in part}))


def update(engine: RemoteEngine, model, version: int) -> None:
    """A whole update of an engine with tp=1, after `begin_weight_update` if that has been called."""
    engine.begin_weight_update()
    load(engine, model.state_dict())
    engine.verify(make_checksums(model.state_dict()))
    engine.end_weight_update(version)
    engine.resume()


def test_update_verifies_and_generates_from_the_new_weights(engine, reference, tmp_path):
    new = load_reference(write_tiny_qwen3(tmp_path, seed=1))
    engine.begin_weight_update()
    load(engine, new.state_dict())
    engine.verify(make_checksums(new.state_dict()))
    with pytest.raises(RolloutError, match="begin_weight_update"):
        engine.generate(make_prompts(1), SAMPLING)
    engine.end_weight_update(7)
    assert_greedy_equals(engine, new, version=7)

    engine.begin_weight_update()
    load(engine, reference.state_dict())
    engine.end_weight_update(8)
    assert_greedy_equals(engine, reference, version=8)


def test_one_wrong_value_is_found_by_name(engine, reference):
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = dict(reference.state_dict())
    corrupt = tensors[name].clone()
    corrupt[3, 5] = torch.nextafter(corrupt[3, 5], torch.tensor(9.0))
    engine.begin_weight_update()
    engine.load_bucket(make_bucket({name: corrupt}))
    with pytest.raises(WeightSyncError, match=rf"{name}: the engine's rank 0 holds other values") as caught:
        engine.verify(make_checksums(tensors))
    assert str(caught.value).count("holds other values") == 1
    engine.load_bucket(make_bucket({name: tensors[name]}))
    engine.verify(make_checksums(tensors))
    engine.end_weight_update(0)


def test_verification_covers_every_tensor_in_both_directions(engine, reference):
    checksums = make_checksums(reference.state_dict())
    checksums["model.layers.9.mlp.up_proj.weight"] = checksums.pop("model.norm.weight")
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match=r"model.norm.weight: no checksum.*layers.9.* has no such tensor"):
        engine.verify(checksums)
    engine.end_weight_update(0)


def test_failed_updates_raise_and_leave_the_engine_alive(engine, reference):
    name = "model.layers.0.mlp.down_proj.weight"
    bucket = make_bucket({name: torch.zeros(3, 3)})
    with pytest.raises(WeightSyncError, match="begin_weight_update"):
        engine.load_bucket(bucket)
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match=f"loading {name}"):
        engine.load_bucket(bucket)
    engine.begin_weight_update()  # again
    load(engine, reference.state_dict())  # SGLang may have written a part of the tensor
    engine.end_weight_update(0)
    assert_greedy_equals(engine, reference)


def test_an_engine_that_has_released_memory_refuses_work_until_it_has_all_again(engine, reference):
    """On a CPU only the engine's state changes; the calls that it allows are the same as on a GPU."""
    engine.release_memory(("kv_cache", "weights"))
    engine.release_memory(("kv_cache",))  # nothing happens twice
    engine.begin_weight_update()
    with pytest.raises(
        WeightSyncError,
        match=r"load_bucket requires the memory of the weights.* has released the memory of its kv_cache and weights",
    ):
        load(engine, reference.state_dict())
    engine.take_memory(("weights",))
    load(engine, reference.state_dict())
    engine.verify(make_checksums(reference.state_dict()))
    engine.end_weight_update(0)
    with pytest.raises(RolloutError, match="has released the memory of its kv_cache"):
        engine.generate(make_prompts(1), SAMPLING)
    engine.take_memory(("kv_cache",))
    assert_greedy_equals(engine, reference)
    engine.release_memory(("weights",))
    engine.take_memory(("weights",))
    with pytest.raises(RolloutError, match=r"advance requires weights .* has lost its weights"):
        engine.generate(make_prompts(1), SAMPLING)
    engine.begin_weight_update()
    load(engine, reference.state_dict())
    engine.end_weight_update(0)


# ----- updates while responses are unfinished


def of_any_length(stats: EntropyStats) -> Sampling:
    """Sampling in which responses end by chance, after 65 tokens on average."""
    adaptive = AdaptiveTemperature(stats=stats, tau=0.3)
    return replace(SAMPLING, samples=4, max_response_tokens=300, stop_token_ids=(7, 77, 177), adaptive=adaptive)


def advance_until(engine: RemoteEngine, rollouts: dict, count: int, sampling: Sampling, *, prompts=()) -> None:
    """Adds finished responses to `rollouts`, by prompt and sample, until there are at least `count`."""
    while len(rollouts) < count:
        finished = engine.advance(1, {n: GroupRequest(prompt, sampling) for n, prompt in enumerate(prompts)})
        rollouts |= {(number, index): rollout for number, index, rollout in finished}
        prompts = ()


def assert_tokens_are_of_their_versions(rollouts: Sequence[Rollout], models: dict, stats: EntropyStats) -> None:
    """Temperatures and log-probs are those of the version that a token carries, given all tokens before it.

    If the engine had kept anything computed by the old weights, a new token's log-prob would match neither version.
    """
    for rollout in rollouts:
        of_version = {version: response_logits(model, rollout) for version, model in models.items()}
        logits_RV = torch.stack([of_version[v][token] for token, v in enumerate(rollout.policy_versions.tolist())])
        expected_R = adaptive_temperature(entropy_from_logits(logits_RV / 1.2), 1.2, stats, tau=0.3)
        torch.testing.assert_close(torch.from_numpy(rollout.temperatures), expected_R, atol=2e-4, rtol=0)
        log_probs_RV = torch.log_softmax(logits_RV / torch.from_numpy(rollout.temperatures)[:, None], -1)
        expected_R = log_probs_RV.gather(1, torch.from_numpy(rollout.response_ids).long()[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(rollout.rollout_log_probs), expected_R, atol=2e-3, rtol=0)


@pytest.mark.parametrize("in_flight", ["pause", "abort"])
def test_unfinished_responses_continue_or_start_again_from_the_new_weights(
    engine, reference, stats, tmp_path, in_flight
) -> None:
    new = load_reference(write_tiny_qwen3(tmp_path, seed=1))
    update(engine, reference, 20)
    sampling, prompts, rollouts = of_any_length(stats), make_prompts(8), {}
    # The cache holds only some of the 32 responses, so that others have not begun.
    advance_until(engine, rollouts, 1, sampling, prompts=prompts)
    engine.begin_weight_update(in_flight)
    update(engine, new, 21)
    advance_until(engine, rollouts, 32, sampling)

    models = {20: reference, 21: new}
    assert_tokens_are_of_their_versions(list(rollouts.values()), models, stats)
    kinds = {key: tuple(np.unique(rollout.policy_versions)) for key, rollout in rollouts.items()}
    assert all((np.diff(rollout.policy_versions) >= 0).all() for rollout in rollouts.values())
    assert {(20,), (21,), (20, 21)} - set(kinds.values()) == (set() if in_flight == "pause" else {(20, 21)})
    again = engine.generate(prompts, sampling)  # nothing in the prefix cache was computed by the old weights
    assert_tokens_are_of_their_versions([rollout for group in again for rollout in group], models, stats)
    for number, index in (key for key, kind in kinds.items() if kind == (21,)):
        fresh, first = again[number][index], rollouts[number, index]
        assert fresh.response_ids.tolist() == first.response_ids.tolist()
    update(engine, reference, 22)


# ----- engines of their own


@pytest.mark.slow
def test_self_test_names_the_missing_plugin(tiny_qwen3):
    with (
        pytest.raises(RolloutError, match=r"expected the temperatures.*SGLANG_PLUGINS"),
        running_engine(tiny_qwen3, variables={"SGLANG_PLUGINS": "another"}),
    ):
        pass


@pytest.mark.slow
def test_two_ranks_sample_update_and_verify_like_one(stats, tmp_path):
    """The vocabulary of 262 is padded and sharded unevenly."""
    old = load_reference(write_tiny_qwen3(tmp_path / "old"))
    new = load_reference(write_tiny_qwen3(tmp_path / "new", seed=1))
    with running_engine(tmp_path / "old", tp=2) as engine:
        assert_greedy_equals(engine, old)
        engine.begin_weight_update()
        load(engine, new.state_dict())
        checksums = make_checksums(new.state_dict(), tp=2)
        engine.verify(checksums)
        checksums["model.layers.0.mlp.down_proj.weight"][1] += 1
        with pytest.raises(
            WeightSyncError, match=r"rank 1: .*down_proj.weight: the engine's rank 1 holds other values"
        ):
            engine.verify(checksums)
        engine.end_weight_update(1)
        assert_greedy_equals(engine, new, version=1)

        rollouts: dict = {}
        advance_until(engine, rollouts, 1, of_any_length(stats), prompts=make_prompts(8))
        engine.begin_weight_update("pause")
        load(engine, old.state_dict())
        engine.end_weight_update(2)
        engine.resume()
        advance_until(engine, rollouts, 32, of_any_length(stats))
        assert_tokens_are_of_their_versions(list(rollouts.values()), {1: new, 2: old}, stats)
        assert {len(np.unique(rollout.policy_versions)) for rollout in rollouts.values()} == {1, 2}


def test_configs_that_cannot_work_are_refused_before_anything_starts(tmp_path):
    config = EngineConfig(
        model_path=write_tiny_qwen3(tmp_path, kv_heads=1),
        device="cpu",
        dtype="float32",
        tp=2,
        max_running_requests=8,
        memory_fraction=0.1,
        kv_cache_tokens=100,
        context_tokens=200,
        seed=0,
    )
    with pytest.raises(RolloutError, match=r"kv_cache_tokens=100 must .*; on a CPU tp=2 must divide the model's 1 key"):
        Engine(config)
    with pytest.raises(RolloutError, match=r"required on a CPU; no config\.json"):
        Engine(replace(config, kv_cache_tokens=None, model_path=tmp_path / "absent"))
