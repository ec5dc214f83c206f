"""All prompts of a run: those that it trains on, in their order, and the sets that it evaluates on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_hapo.config import Config, Source
from megatron_hapo.data.prompts import load_prompts
from megatron_hapo.data.sampling import PromptMixture, PromptSampler, PromptSource
from megatron_hapo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    """The training prompts in the order that the seed fixes, from the start.

    Raises:
        DataError: a source has no usable prompt.
    """
    data = config.data
    samplers = {
        name: PromptSampler(
            _named_prompts(name, source, config, tokenizer),
            seed=config.seed,
            shuffle=data.shuffle,
            curriculum=data.curriculum,
        )
        for name, source in data.train_sources.items()
    }
    return PromptMixture(samplers, data.weights) if isinstance(data.train, dict) else samplers[""]


def ordered_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Every training prompt once, source after source, in the order of the data.

    Raises:
        DataError: a source has no usable prompt.
    """
    sources = config.data.train_sources.items()
    return [prompt for name, source in sources for prompt in _named_prompts(name, source, config, tokenizer)]


def evaluation_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Prompt]]:
    """The prompts of each evaluation set by its name, which is empty for a single one.

    Raises:
        DataError: a set has no usable prompt.
    """
    return {name: _named_prompts(name, source, config, tokenizer) for name, source in config.data.eval_sets.items()}


def _named_prompts(name: str, source: Source, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """A source's prompts; the uids of a named one begin with its name, so that they are unique in the run."""
    prompts = load_prompts(
        source,
        tokenizer,
        chat_template=config.data.chat_template,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    ).prompts
    return [replace(prompt, uid=f"{name}/{prompt.uid}") for prompt in prompts] if name else list(prompts)
