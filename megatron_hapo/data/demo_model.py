"""The initial models of the small tasks: a small Qwen3 with a tokenizer, pre-trained briefly on sums.

Uses torch and transformers in one process. Most carries in the training solutions are dropped, so the model writes
well-formed solutions that are often wrong. That leaves something for reinforcement learning to improve, and tokens of
different entropy.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_hapo.data import arithmetic, checked_sums

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Task:
    """What a model is pre-trained on."""

    problems: Callable[..., list[arithmetic.Problem]]
    """Takes size and seed; the seed that is used here is even."""
    demonstration: Callable[..., str]
    """Takes a problem, a random generator and slip: a worked solution that drops carries."""
    slip: float
    """Probability that a carry is dropped."""
    num_problems: int
    """Number of different problems."""


TASKS = {
    arithmetic.DATA_SOURCE: Task(
        partial(arithmetic.problems, max_terms=4), arithmetic.demonstration, slip=0.65, num_problems=4000
    ),
    checked_sums.DATA_SOURCE: Task(checked_sums.problems, checked_sums.demonstration, slip=0.65, num_problems=20_000),
}


def make_demo_model(
    out: Path,
    *,
    task: Task = TASKS[arithmetic.DATA_SOURCE],
    seed: int = 0,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 3e-3,
    experts: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Write model and tokenizer as a Hugging Face folder. A seed gives the same weights each time on the same machine.

    Args:
        steps: number of updates; 0 writes the untrained model.
        experts: number of experts in each layer, of which a token uses two; 0: a Qwen3 without experts.
        progress: called after each update with its number, from 1, and its loss.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = (
        Qwen3MoeForCausalLM(make_moe_config(tokenizer, experts))
        if experts
        else Qwen3ForCausalLM(make_config(tokenizer))
    )
    examples = _examples(tokenizer, task, seed=seed, count=steps * batch_size)
    pad_id = _token_id(tokenizer, PAD)
    _pretrain(model, examples, pad_id=pad_id, steps=steps, batch_size=batch_size, lr=lr, progress=progress)
    model.save_pretrained(out)
    GenerationConfig(eos_token_id=_token_id(tokenizer, END), pad_token_id=pad_id).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that encodes any text: a token for each character of a sum, and one for the answer marker."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for end in range(2, len(arithmetic.ANSWER_MARKER) + 1):
        merges.append((arithmetic.ANSWER_MARKER[: end - 1], arithmetic.ANSWER_MARKER[end - 1]))
        pieces.append(arithmetic.ANSWER_MARKER[:end])
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (PAD, END, USER, ASSISTANT)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of half a million parameters, whose heads and KV heads divide over two tensor-parallel ranks."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_token_id(tokenizer, END),
        pad_token_id=_token_id(tokenizer, PAD),
        dtype="float32",
    )


def make_moe_config(tokenizer: PreTrainedTokenizerFast, experts: int) -> Qwen3MoeConfig:
    """The same sizes with experts of half the feed-forward size, two of which a token uses."""
    sizes = make_config(tokenizer).to_dict()
    sizes = {name: value for name, value in sizes.items() if name not in ("model_type", "architectures", "layer_types")}
    return Qwen3MoeConfig(
        **sizes, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True
    )


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"the tokenizer has no token {token}"
    return found


def _examples(tokenizer: PreTrainedTokenizerFast, task: Task, *, seed: int, count: int) -> list[tuple[list[int], int]]:
    """For each example, the token ids of question and solution, and how many of them belong to the question."""
    problems, rng = task.problems(size=task.num_problems, seed=2 * seed), random.Random(seed)
    examples = []
    for _ in range(count):
        problem = rng.choice(problems)
        messages = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer.encode(str(prompt), add_special_tokens=False)
        solution = task.demonstration(problem, rng, slip=task.slip) + END
        examples.append((prompt_ids + tokenizer.encode(solution, add_special_tokens=False), len(prompt_ids)))
    return examples


def _pretrain(
    model: Qwen3ForCausalLM | Qwen3MoeForCausalLM,
    examples: Sequence[tuple[list[int], int]],
    *,
    pad_id: int,
    steps: int,
    batch_size: int,
    lr: float,
    progress: Callable[[int, float], None] | None,
) -> None:
    """Train on each example once. The learning rate rises over the first tenth of the steps, then falls as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads gain little here, and the weights must not depend on their number
    model.train()
    for step in range(steps):
        warm, cool = (step + 1) / max(steps / 10, 1), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, warm) * cool
        input_ids, labels = _collate(examples[step * batch_size : (step + 1) * batch_size], pad_id)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval()
    torch.set_num_threads(threads)


def _collate(examples: Sequence[tuple[list[int], int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, both [examples, longest] int64 and padded on the right; only solutions have labels.

    Causal attention needs no mask for padding on the right.
    """
    longest = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, (ids, num_prompt) in enumerate(examples):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, num_prompt : len(ids)] = torch.tensor(ids[num_prompt:])
    return input_ids, labels
