"""The shipped jobs: complete; each loads, fits its GPUs at its model's real sizes, and matches its name."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import yaml

from megatron_hapo.checks.preflight import check_layout
from megatron_hapo.config import Config, FileData, dump_config, load_config
from megatron_hapo.data.hub_rows import is_hub_name, parse_hub_name
from megatron_hapo.model.families import FAMILIES, Shape
from megatron_hapo.sizing.command import shape_at

ROOT = Path(__file__).parents[2]
HF_CONFIGS = ROOT / "tests/fixtures/hf_configs"
MODELS = ("qwen2.5_math_1.5b", "qwen2.5_math_7b", "qwen3_8b", "qwen3_14b", "llama3.1_8b", "llama3.2_3b")
METHODS = ("hapo", "dapo", "grpo")
JOBS = sorted(path for folder in ("recipe", "paper", "large") for path in (ROOT / "configs" / folder).glob("*.yaml"))
RESPONSES = {"qwen2.5": 10240, "qwen3": 12288, "llama": 4096}
"""Longest response of the authors' recipes."""


def hf_config(config: Config) -> Path:
    """The real config.json of a job's model."""
    (path,) = HF_CONFIGS.glob(f"*--{config.model.path.name}.json")
    return path


def is_known(path: Path) -> bool:
    return json.loads(path.read_text())["model_type"] in FAMILIES


def recipe(model: str, method: str = "hapo", values: str = "recipe") -> Config:
    return load_config(ROOT / "configs" / values / f"{model}_{method}.yaml")


def test_every_model_has_every_method_with_both_sets_of_values() -> None:
    expected = {f"{v}/{model}_{method}" for v, model, method in product(("recipe", "paper"), MODELS, METHODS)}
    found = {f"{path.parent.name}/{path.stem}" for path in JOBS if path.parent.name != "large"}
    assert found == expected


def test_names_are_unique_and_no_job_says_more_than_its_parts() -> None:
    names = [load_config(path).name for path in JOBS]
    assert len(set(names)) == len(names)
    for path in JOBS:
        assert len(path.read_text().splitlines()) == 2, f"{path.name}: settings belong into configs/parts"


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("path", JOBS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_job_fits_its_gpus(path: Path, spec: str) -> None:
    """With Transformer Engine, which is optional, and without. A model of a family that the project cannot read yet is
    only loaded."""
    config = load_config(path, [f"model.spec={spec}"])
    assert config.parallel.gpu_memory == "80GiB"
    model = hf_config(config)
    if is_known(model):
        assert [str(fault) for fault in check_layout(config, shape_at(model))] == []
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    assert config.trainer.max_tokens_per_microbatch >= longest


def commands_of_the_examples() -> dict[str, list[str]]:
    """Config and overrides of each example for two nodes, of which each gives 4 of 8 GPUs to trainer ranks."""
    examples = ROOT / "examples"
    comments = {
        "slurm": (examples / "slurm/train.sbatch").read_text().replace(" \\\n#", ""),
        "ssh": (examples / "ssh/train.sh").read_text(),
    }
    found = {name: re.findall(r"\S*qwen3_8b\S*|\w+\.\w+=\d+", text) for name, text in comments.items()}
    _, job = yaml.safe_load_all((examples / "kubernetes/train.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return {**found, "kubernetes": container["args"][container["args"].index("train") + 1 :]}


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("example", ["slurm", "ssh", "kubernetes"])
def test_an_example_of_two_nodes_has_as_many_ranks_as_its_nodes_and_fits(example: str, spec: str) -> None:
    path, *overrides = commands_of_the_examples()[example]
    assert any(override.startswith("parallel.dp=") for override in overrides)
    config = load_config(ROOT / path, [*overrides, f"model.spec={spec}"])
    assert config.parallel.world_size == 2 * 4
    if example != "ssh":  # whose command ends in dots
        assert config.rollout.engines * config.rollout.tp == 2 * 4
    assert check_layout(config, shape_at(hf_config(config))) == []


@pytest.mark.parametrize("model", MODELS)
def test_the_recipes_have_the_authors_values(model: str) -> None:
    """Section by section what recipe/*.sh of the authors' repository sets."""
    config = recipe(model)
    batch, algorithm, optimizer = config.batch, config.algorithm, config.optimizer
    assert (batch.prompts_per_step, batch.samples_per_prompt, batch.prompts_per_minibatch) == (512, 16, 32)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_grad) == (1e-6, 10, 0.1, 1.0)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (0.2, 0.2, 10.0)
    assert algorithm.advantage == "token_level_group_average"
    assert algorithm.entropy.pivot == 0.8
    assert (algorithm.adaptive_clip.alpha, algorithm.redistribution.beta) == (1.0, 1.0)
    assert algorithm.adaptive_temperature.tau == 0.05
    assert (config.rollout.temperature, config.rollout.max_prompt_tokens) == (1.0, 1024)
    (response,) = (length for prefix, length in RESPONSES.items() if model.startswith(prefix))
    assert config.rollout.max_response_tokens == response
    assert config.reward.overlong.buffer_tokens == (0 if model.startswith("llama") else 4096)
    assert (config.eval.temperature, config.eval.top_p, config.eval.samples) == (0.5, 0.7, 8)


@pytest.mark.parametrize("model", MODELS)
def test_paper_and_recipe_differ_in_what_the_paper_says(model: str) -> None:
    ours, paper = recipe(model), recipe(model, values="paper")
    temperature, redistribution = paper.algorithm.adaptive_temperature, paper.algorithm.redistribution
    assert (paper.algorithm.clip_low, paper.algorithm.clip_high) == (0.2, 0.28)
    assert (temperature.tau, temperature.rule, redistribution.neutral_zone) == (0.1, "z_score", "base")
    assert paper.algorithm.advantage_fallback is None
    assert (paper.reward.correct, paper.reward.wrong) == (1.0, 0.0)
    assert paper.rollout.max_response_tokens == (4096 if model.startswith("llama") else 10240)
    same = {"name", "algorithm", "rollout", "reward", "dynamic_sampling"}
    assert paper.model_dump(exclude=same) == ours.model_dump(exclude=same)
    assert paper.reward.overlong == ours.reward.overlong


def test_the_preset_of_the_released_code_has_its_defects(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    bases = f"{ROOT}/configs/recipe/qwen2.5_math_7b_hapo.yaml, {ROOT}/configs/presets/released.yaml"
    path.write_text(f"base: [{bases}]\nname: released\n")
    released, ours = load_config(path), recipe("qwen2.5_math_7b")
    entropy = released.algorithm.entropy
    assert (entropy.sign, entropy.source, entropy.floor) == ("reference", "micro_batch", 1e-8)
    assert released.dynamic_sampling.max_generation_batches == 16
    assert released.model_dump(exclude={"name", "algorithm"}) == ours.model_dump(exclude={"name", "algorithm"})
    assert released.algorithm.model_dump(exclude={"entropy"}) == ours.algorithm.model_dump(exclude={"entropy"})


@pytest.mark.parametrize(("model", "values"), product(MODELS, ("recipe", "paper")))
def test_the_baselines_differ_in_the_method_only(model: str, values: str) -> None:
    hapo, dapo, grpo = (recipe(model, method, values) for method in METHODS)
    for baseline in (dapo, grpo):
        algorithm = baseline.algorithm
        assert algorithm.advantage == "group_mean"
        parts = (algorithm.adaptive_temperature, algorithm.adaptive_clip, algorithm.redistribution)
        assert not any(part.enabled for part in parts)
        method = {"name", "algorithm"}
        assert baseline.model_dump(exclude=method) == hapo.model_dump(exclude=method)
        assert (algorithm.clip_low, algorithm.clip_high) == (hapo.algorithm.clip_low, hapo.algorithm.clip_high)
    assert hapo.dynamic_sampling.enabled
    assert (dapo.algorithm.aggregation, grpo.algorithm.aggregation) == ("token_mean", "sequence_mean_token_mean")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_true_configs_of_every_known_family_can_be_planned(family: str) -> None:
    """Runs over whatever families the project reads, so that a new one is planned without a change here."""
    from megatron_hapo.sizing.memory import GIB
    from megatron_hapo.sizing.search import Cluster, Limits, search
    from megatron_hapo.sizing.throughput import GPUS
    from tests.sizing.test_planner import WORKLOAD

    for path in HF_CONFIGS.glob("*.json"):
        if json.loads(path.read_text())["model_type"] != family:
            continue
        shape: Shape = shape_at(path)
        cluster = Cluster(gpus=256, gpu_bytes=80 * GIB, gpu=GPUS["h100"])
        plans, _ = search(shape, WORKLOAD, cluster, Limits(max_cp=2))
        assert all(plan.trainer.total <= 80 * GIB for plan in plans), path.name


def test_the_papers_evaluation_is_an_overlay_of_every_job(tmp_path: Path) -> None:
    sets = {"aime24", "aime25", "amc", "math500", "minerva", "olympiad"}
    for job in ("recipe/qwen3_8b_hapo", "paper/llama3.2_3b_grpo"):
        path = tmp_path / "job.yaml"
        path.write_text(f"base: [{ROOT}/configs/{job}.yaml, {ROOT}/configs/eval/math.yaml]\n")
        config = load_config(path)
        assert config.data.eval_sets.keys() == sets
        for source in config.data.eval_sets.values():
            assert isinstance(source, FileData)
            assert all(is_hub_name(name) and parse_hub_name(name) for name in source.paths)
            assert source.prompt_template is not None
            assert source.prompt_template.endswith('on its own line after "Answer:".')
            how = config.eval.of_set(source, max_response_tokens=10)
            assert (how.samples, how.temperature, how.top_p) == (8, 0.5, 0.7)
        dump_config(config, tmp_path / "dumped.yaml")
        assert load_config(tmp_path / "dumped.yaml") == config
