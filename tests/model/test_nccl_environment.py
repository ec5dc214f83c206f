"""NCCL's and the allocator's settings in trainer ranks and engines."""

from __future__ import annotations

import pytest

from megatron_hapo.errors import WeightSyncError
from megatron_hapo.launch.ray.engine_actor import actor_options
from megatron_hapo.model.nccl_environment import (
    COMPARED,
    SHARED,
    check_agreement,
    nccl_environment,
    settings_in_effect,
    without_expandable_segments,
)
from megatron_hapo.model.rank_environment import environment


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*COMPARED, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def engine_environment(*, loopback: bool, device: str = "cuda") -> dict[str, str]:
    return actor_options(1, device, None, loopback=loopback)["runtime_env"]["env_vars"]


def test_ranks_and_engines_that_can_join_one_group_have_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")  # the user's own value
    for variables in (environment("cuda", loopback=False), engine_environment(loopback=False)):
        assert {name: variables[name] for name in SHARED} == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}
        assert "NCCL_SOCKET_IFNAME" not in variables  # members on several hosts need a real interface


def test_the_processes_of_one_host_stay_on_its_loopback_interface() -> None:
    for variables in (environment("cuda", loopback=True), engine_environment(loopback=True)):
        assert variables["NCCL_SOCKET_IFNAME"] == variables["GLOO_SOCKET_IFNAME"] == "lo"
        assert not SHARED.keys() & variables.keys()


def test_sglang_keeps_a_value_that_is_set() -> None:
    """It sets its own only where there is none, so that what the launcher sets is in effect."""
    from importlib.util import find_spec
    from pathlib import Path

    folder = find_spec("sglang")
    assert folder is not None
    assert folder.submodule_search_locations is not None
    source = (Path(next(iter(folder.submodule_search_locations))) / "srt/entrypoints/engine.py").read_text()
    for name in nccl_environment(loopback=False):
        assert f'"{name}" not in os.environ' in source


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("expandable_segments:True", ""),
        ("max_split_size_mb:128,expandable_segments:True,garbage_collection_threshold:0.6",
         "max_split_size_mb:128,garbage_collection_threshold:0.6"),
    ],
)  # fmt: skip
def test_engines_do_not_inherit_expandable_segments(monkeypatch: pytest.MonkeyPatch, value: str, kept: str) -> None:
    assert "PYTORCH_CUDA_ALLOC_CONF" not in engine_environment(loopback=True)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, value)
        assert engine_environment(loopback=True)[name] == kept
        assert name not in environment("cuda", loopback=True)  # a trainer rank keeps what it inherits
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert "PYTORCH_ALLOC_CONF" not in without_expandable_segments()


def test_engines_on_a_cpu_need_none_of_it() -> None:
    assert not {*SHARED, "NCCL_SOCKET_IFNAME"} & engine_environment(loopback=True, device="cpu").keys()


def test_members_that_disagree_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    same = settings_in_effect()
    assert same == {"NCCL_ALGO": "Ring"}
    check_agreement({"trainer rank 0": same, "trainer rank 1": dict(same)})
    engine = {**same, "NCCL_CUMEM_ENABLE": "0"}
    with pytest.raises(WeightSyncError) as caught:
        check_agreement({"trainer rank 0": same, "trainer rank 1": same, "engine 0, rank 0": engine})
    assert str(caught.value) == (
        "connecting: trainer rank 0 has NCCL_CUMEM_ENABLE=, but engine 0, rank 0 has NCCL_CUMEM_ENABLE=0; members of "
        "one NCCL group need the same value: set it in the environment of every host"
    )


def test_ranks_and_engines_use_the_algorithm_of_sglangs_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sets that itself in engines of several ranks, also where the environment has another one."""
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    for loopback in (True, False):
        rank = environment("cuda", loopback=loopback, deterministic=True)
        options = actor_options(1, "cuda", None, loopback=loopback, deterministic=True)
        assert rank["NCCL_ALGO"] == options["runtime_env"]["env_vars"]["NCCL_ALGO"] == "allreduce:tree"
        assert "NCCL_ALGO" not in environment("cuda", loopback=loopback)
