"""The job that `megatron-hapo init` writes: sums as data, a reward of the user's own, a config and a small model.

`examples/own_reward` holds the same files, without the model; a test compares them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_hapo.data import arithmetic
from megatron_hapo.errors import HapoError

REWARD = '''\
"""A reward with two parts: whether the answer is right, and the share of the steps before it that are right."""

import re


def score(response, row):
    """The parts for a response such as `7+8=15 15-3=12 Answer: 12`, with their total; row has the data's columns."""
    answers = re.findall(r"Answer: *(-?\\d{1,9})", response)
    right = float(answers[-1:] == [row["answer"]])
    steps = re.findall(r"(-?\\d{1,9})([+-]\\d{1,9})=(-?\\d{1,9})", response)
    good = sum(int(before) + int(term) == int(after) for before, term, after in steps)
    share = good / len(steps) if steps else 0.0
    return {"total": right + 0.5 * share, "correct": right, "steps": share}
'''

CONFIG = """\
# A job for two CPU cores. Paths are relative to the folder where you start it, my_reward.py's to this file.
name: first
steps: 12
device: cpu                      # auto: a GPU, if there is one

model:
  path: model                    # any Hugging Face folder; `init` wrote a small one that makes mistakes in sums

data:
  train: {type: file, path: train.jsonl}
  eval: {type: file, path: eval.jsonl}

reward:
  scorer: my_reward.py:score
  wrong: 0.0                     # of a response on which my_reward.py fails
  workers: 1

batch:
  prompts_per_step: 32
  samples_per_prompt: 8
  prompts_per_minibatch: 8

rollout:
  dtype: float32                 # on GPUs: bfloat16
  max_prompt_tokens: 32
  max_response_tokens: 40
  max_running_requests: 128
  kv_cache_tokens: 12288         # on GPUs leave it out

trainer:
  dtype: float32                 # on GPUs: bfloat16
  max_tokens_per_microbatch: 4096

optimizer:
  lr: 2.0e-4
  warmup_steps: 3
  weight_decay: 0.0

eval:
  every: 6
  temperature: 1.0
  top_p: 1.0

checkpoint:
  every: 0                       # only at the end and on interruption
"""

SIZES = {"train.jsonl": (400, 0), "eval.jsonl": (100, 1)}
"""Rows and seed of each data file; an even and an odd seed never give the same question."""
MODEL_STEPS = 800


def write_job(folder: Path, *, model_steps: int = MODEL_STEPS, progress: Callable[[str], None] = print) -> None:
    """Write a job that is ready to run into a new or empty folder.

    Args:
        model_steps: updates of the model's pre-training, which takes about a minute by default.
        progress: gets a line per file.
    Raises:
        HapoError: the folder is not empty, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise HapoError(f"{folder}: is not empty; choose a new folder")
        for name, text in job_files().items():
            (folder / name).write_text(text)
            progress(f"wrote {folder / name}")
        progress(f"pre-training a small model into {folder / 'model'}, about a minute")
        _write_model(folder / "model", steps=model_steps)
    except OSError as error:
        raise HapoError(f"{folder}: cannot be written: {error.strerror}") from None


def job_files() -> dict[str, str]:
    """The text of each file of the job."""
    data = {
        name: "".join(
            json.dumps({"prompt": problem.question, "answer": problem.answer}) + "\n"
            for problem in arithmetic.problems(size=size, seed=seed, min_terms=3, max_terms=4)
        )
        for name, (size, seed) in SIZES.items()
    }
    return {"config.yaml": CONFIG, "my_reward.py": REWARD, **data}


def _write_model(folder: Path, *, steps: int) -> None:
    """Write the model under another name first, so that an interruption leaves no folder that looks whole."""
    from transformers.utils.logging import disable_progress_bar

    from megatron_hapo.data.demo_model import make_demo_model

    disable_progress_bar()
    partial = folder.with_suffix(".partial")
    make_demo_model(partial, steps=steps)
    os.replace(partial, folder)
