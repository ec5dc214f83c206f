"""The demo's task and its initial model."""

import random
import subprocess
import sys

import pytest

from megatron_hapo.data import arithmetic
from megatron_hapo.data.arithmetic import demonstration, problems


def test_solutions_are_correct_and_end_in_the_answer():
    for problem in problems(size=300, seed=0, min_terms=2, max_terms=6, max_number=20):
        expression = problem.question.removesuffix("=")
        assert problem.answer == str(eval(expression))
        assert problem.solution.split("Answer: ")[1] == problem.answer
        steps = problem.solution.split(" Answer:")[0].split(" ")
        assert all(str(eval(left)) == right for left, right in (step.split("=") for step in steps))
        assert all(int(step.split("=")[1]) >= 0 for step in steps)
        assert problem.data_source == "arithmetic"


def test_same_arguments_give_same_problems_and_seeds_differ():
    assert problems(size=50, seed=3) == problems(size=50, seed=3)
    assert problems(size=50, seed=3) != problems(size=50, seed=5)


def test_even_and_odd_seeds_never_share_a_question():
    train = {p.question for p in problems(size=2000, seed=0, min_terms=3, max_terms=4)}
    held_out = {p.question for seed in (1, 7) for p in problems(size=200, seed=seed, min_terms=3, max_terms=4)}
    assert len(train) == 2000
    assert not train & held_out


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_terms": 1}, "min_terms"),
        ({"min_terms": 5, "max_terms": 4}, "min_terms"),
        ({"max_number": 0}, "max_number"),
        ({"min_terms": 2, "max_terms": 2, "max_number": 2}, "different questions"),
    ],
)
def test_contradictory_bounds_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        problems(size=100, seed=0, **bounds)


def test_demonstrations_drop_carries_and_nothing_else():
    rng = random.Random(0)
    carry = arithmetic.Problem(question="7+8-3=", answer="12", solution="7+8=15 15-3=12 Answer: 12")
    assert demonstration(carry, rng, slip=0.0) == carry.solution
    assert demonstration(carry, rng, slip=1.0) == "7+8=5 5-3=2 Answer: 2"
    borrow = arithmetic.Problem(question="9+9-9=", answer="9", solution="9+9=18 18-9=9 Answer: 9")
    assert demonstration(borrow, rng, slip=1.0) == "9+9=8 8-9=-1 Answer: -1"
    plain = arithmetic.Problem(question="4+5-3=", answer="6", solution="4+5=9 9-3=6 Answer: 6")
    assert demonstration(plain, rng, slip=1.0) == plain.solution


def test_the_task_needs_no_torch():
    script = "import sys, megatron_hapo.data.arithmetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_demo_model_loads_in_transformers_and_is_reproducible(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_hapo.data.demo_model import make_demo_model

    losses = []
    for name in ("one", "two"):
        make_demo_model(tmp_path / name, seed=1, steps=3, batch_size=8, progress=lambda _, loss: losses.append(loss))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert losses[2] < losses[0]
    assert losses[:3] == losses[3:]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)

    config = models[0].config
    assert config.num_attention_heads % 2 == 0
    assert config.num_key_value_heads % 2 == 0
    assert models[0].generation_config.eos_token_id == config.eos_token_id

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7+8="}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|user|>7+8=<|assistant|>"
    assert len(tokenizer.encode(rendered)) == 6
    assert tokenizer.decode(tokenizer.encode("7+8=15 Answer: 15, ä")) == "7+8=15 Answer: 15, ä"
    longest = max(problems(size=500, seed=0, min_terms=3, max_terms=4), key=lambda p: len(p.solution))
    assert len(tokenizer.encode(longest.solution)) < 40


def test_the_demo_model_can_have_experts(tmp_path):
    from megatron_hapo.data.demo_model import make_demo_model
    from megatron_hapo.model.families import read_shape

    losses = []
    make_demo_model(tmp_path, steps=3, batch_size=8, experts=8, progress=lambda _, loss: losses.append(loss))
    assert losses[2] < losses[0]
    shape = read_shape(tmp_path)
    assert shape.moe is not None
    assert (shape.moe.num_experts, shape.moe.top_k, shape.moe.dense_layers) == (8, 2, frozenset())
