"""Values between the driver and torchrun's ranks survive encoding unchanged; other types are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_hapo.entropy import EntropyStats
from megatron_hapo.launch.torchrun.messages import decode, encode
from megatron_hapo.observe.spans import Span, Timeline
from megatron_hapo.resharding.plan import Block, Channel, OwnedBlock, Parameter, Piece, SendingTask
from megatron_hapo.resharding.transfer import Rendezvous, Transfer
from megatron_hapo.types import KeptTokens, TokenScores, TrainBatch, WeightBucket

BATCH = TrainBatch(
    token_ids=np.arange(5, dtype=np.int32),
    sequence_lengths=np.array([5]),
    response_lengths=np.array([3]),
    temperatures=np.ones(3, np.float32),
    rollout_log_probs=np.array([-0.1, -np.inf, np.nan], np.float32),
    kept=KeptTokens(np.array([7, 2, 3, 4], np.int32), np.array([2, 1, 1], np.int32)),
    advantages=np.zeros(1, np.float32),
    token_data={"reasoning": np.array([True, False, True])},
    stats=EntropyStats(pivot=0.1, log_max=float("inf"), log_min=-2.0, rms=1 / 3, num_tokens=3),
)
PIECE = Piece("a.weight", 1, 2, 3, 4)
VALUES = [
    None,
    [1, 2.5, "text", True, 2**63],
    {"a": 1, 2: [None]},
    (Path("/run/x"), ()),
    SendingTask((Channel(0, 1, 2, (PIECE,), (PIECE, PIECE)),), (OwnedBlock(PIECE, "hf", 0, 1),)),
    [(Parameter("p", 2, 3, (Block("t", 0, 0, 2, 3, 0, 0),)),)],
    Transfer(folder="/dev/shm/x", number=1, plan="f", dtype="float32", slot_bytes=8, deadline_seconds=0.1),
    Transfer(
        folder="/dev/shm/x",
        number=2,
        plan="f",
        dtype="bfloat16",
        slot_bytes=8,
        deadline_seconds=0.1,
        rendezvous=Rendezvous(
            host="h",
            port=1,
            generation=0,
            trainer_ranks=4,
            engine_ranks=2,
            ranks_per_engine=1,
            backend="gloo",
            hosts=(0, 0, 1, 1, 0, 2),
        ),
    ),
    {"lm_head.weight": [2**64 - 1]},
    Timeline("trainer rank 0", "host", [Span("update", 1_700_000_000_123_456_789, 1_700_000_000_123_456_790)]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_survive_encoding(value: object) -> None:
    restored = decode(encode(value))
    assert restored == value
    assert type(restored) is type(value)


def test_arrays_keep_dtype_shape_and_bits() -> None:
    scores = TokenScores(
        log_probs=np.empty(0, np.float32),
        rollout_temperature_log_probs=np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
        entropies=np.array(2.0, np.float64),
    )
    bucket = WeightBucket(names=("x",), shapes=((3,),), dtypes=("bfloat16",), data=np.arange(6, dtype=np.uint8))
    batch, (rows, restored), restored_bucket = decode(encode([BATCH, ([3, 1], scores), bucket]))
    assert rows == [3, 1]
    assert batch.stats == BATCH.stats
    assert batch.token_data["reasoning"].dtype == bool
    np.testing.assert_array_equal(batch.token_data["reasoning"], BATCH.token_data["reasoning"])
    for got, want in ((batch, BATCH), (batch.kept, BATCH.kept), (restored, scores), (restored_bucket, bucket)):
        for name, array in vars(want).items():
            if isinstance(array, np.ndarray):
                np.testing.assert_array_equal(getattr(got, name), array)
                assert getattr(got, name).dtype == array.dtype
    assert batch.token_ids.flags.aligned
    assert batch.token_ids.flags.writeable  # so that torch can share the memory


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), Exception("x"), b"bytes"])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent"):
        encode([value])


def test_an_unknown_record_name_is_refused() -> None:
    forged = encode(PIECE).replace(b'"Piece"', b'"print"')
    with pytest.raises(KeyError):
        decode(forged)
