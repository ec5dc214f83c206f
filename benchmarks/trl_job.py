"""The demo's job in TRL's GRPOTrainer; run by against_trl.py in an environment that has TRL.

Prints one JSON line a step: {"step": N, "seconds": S, "cpu_seconds": C}. A step is one generation batch with all of its
optimizer updates. Not a project module: it imports TRL, which the project does not depend on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_hapo.data.arithmetic import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--max-response-tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [
        {"prompt": [{"role": "user", "content": problem.question}], "answer": str(problem.answer)}
        for problem in problems(size=4000, seed=0, min_terms=3, max_terms=4, max_number=9)
    ]
    batch = options.prompts * options.samples
    config = GRPOConfig(
        output_dir=str(options.out),
        use_cpu=True,
        bf16=False,
        learning_rate=2e-4,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        num_generations=options.samples,
        generation_batch_size=batch,
        per_device_train_batch_size=batch // options.updates,
        max_completion_length=options.max_response_tokens,
        temperature=1.0,
        max_steps=options.steps * options.updates,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )

    def exact(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
        def stated(text: str) -> str:
            found = re.findall(r"answer\s*:\s*([^\n]+)", text, re.IGNORECASE)
            return (found[-1] if found else text.rpartition("=")[2]).strip().removesuffix(".")

        return [
            1.0 if stated(completion[0]["content"]) == truth else -1.0
            for completion, truth in zip(completions, answer, strict=True)
        ]

    GRPOTrainer(
        model=str(options.model),
        reward_funcs=exact,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_Clock(options.updates)],
    ).train()


class _Clock(TrainerCallback):
    def __init__(self, updates: int):
        self._updates, self._begun, self._cpu = updates, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step % self._updates == 0:
            self._begun, self._cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self._updates == 0:
            figures = {
                "step": state.global_step // self._updates,
                "seconds": time.perf_counter() - self._begun,
                "cpu_seconds": time.process_time() - self._cpu,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
