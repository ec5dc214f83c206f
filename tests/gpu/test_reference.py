"""The reference model beside a policy on a GPU, which never holds both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hapo.config import Config
from megatron_hapo.types import merge_scores, merge_tokens
from tests.gpu.test_trainer import SPECS, config_for
from tests.gpu.test_trainer_memory import LARGE, in_own_process
from tests.tiny_model import write_tiny_qwen3
from tests.trainer.test_trainer import make_batch

pytestmark = pytest.mark.needs("megatron.core")


def passes_of_a_rank(config: Config, rendezvous: str) -> dict[str, Any]:
    """Peak GPU bytes of the policy's forward pass and of the reference's, and their log-probs around an update."""
    import torch

    from megatron_hapo.trainer.rank_process import start_rank

    rank = start_rank(config, device="cuda", rank=0, world_size=1, init_method=rendezvous)
    batch, peaks = make_batch(), {}

    def peak_of(name: str, verb: Any) -> Any:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = verb(batch)
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
        return result

    def in_batch_order(part: Any) -> np.ndarray:
        return merge_tokens([(part[0], {"log_probs": part[1]})], batch.response_lengths)["log_probs"]

    policy = merge_scores([peak_of("policy", rank.log_probs)], batch).log_probs
    reference = in_batch_order(peak_of("reference", rank.reference_log_probs))
    held = rank._reference
    assert held is not None
    zeros = np.zeros_like(policy)
    token_data = {"modulation": zeros, "reference_log_probs": policy}
    rank.update(replace(batch, old_log_probs=policy, token_data=token_data, controls={"kl_coefficient": 0.1}), step=1)
    moved = merge_scores([rank.log_probs(batch)], batch).log_probs
    again = in_batch_order(rank.reference_log_probs(batch))
    back = merge_scores([rank.log_probs(batch)], batch).log_probs
    return {
        "peaks": peaks,
        "pinned": all(on_host.is_pinned() for _, on_host in held._pairs),
        "host bytes": held.host_bytes,
        "log_probs": (policy, reference, moved, again, back),
        "parameters": sum(parameter.numel() for parameter in rank.model[0].parameters()),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_the_pass_of_the_reference_needs_the_memory_of_the_policys(tmp_path: Path, spec: str) -> None:
    model = write_tiny_qwen3(tmp_path / "model", dtype="bfloat16", **LARGE)
    config = config_for(model, dtype="bfloat16", spec=spec)
    kl = config.algorithm.kl.model_copy(update={"enabled": True})
    config = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"kl": kl})})
    seen = in_own_process(passes_of_a_rank, config, f"file://{tmp_path / 'rendezvous'}")
    assert seen["pinned"]
    assert seen["host bytes"] == 2 * seen["parameters"]
    chunk = 64 << 20
    assert seen["peaks"]["reference"] <= seen["peaks"]["policy"] + chunk
    assert chunk < seen["host bytes"] / 4  # a second model would show
    policy, reference, moved, again, back = seen["log_probs"]
    np.testing.assert_allclose(reference, policy, atol=0.05)
    np.testing.assert_allclose(again, reference, atol=0.05)
    np.testing.assert_allclose(back, moved, atol=0.05)
    assert np.abs(moved - policy).mean() > 0
