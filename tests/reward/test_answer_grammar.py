import pytest

from megatron_hapo.reward.answer_grammar import is_expression, is_literal, unparsable_score
from tests.reward.hostile_responses import PAYLOADS


@pytest.mark.parametrize(
    "text",
    [
        "3*4 + (5 - 1)/2",
        "-x**2*cos(x)/2 + C",
        "-4*(-2*x - 8)**(3/2)/3 + C",
        "exp(-x**2) + E**(-x**2)",
        "2*X**3 - 5*Y + 1.5e3",
        "log(x, 2) + sqrt(2)*pi",
        "4!/2 + 7//2 - 9%4",
        "x**2 + constant",
        "x**2 + c_1",
        "(1 + 2)**2",
        " 7\n",
        "x**999",
    ],
)
def test_honest_expressions_pass(text):
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9",
        "9**(9**9)",
        "2**1000",
        "2**-1000",
        "100!",
        "(5)!",
        "4!!",
        "x.real",
        "1..real",
        "1.real",
        "f'{x}'",
        "'x'",
        "x if x else y",
        "x; y",
        "lambda",
        "Symbol(x)",
        "sympify(x)",
        "open(x)",
        "exec",
        "__import__",
        "_",
        "x_" * 20,
        "[1]",
        "x == 1",
        "x = 1",
        "1 # 2",
        "\\",
        "x\x00",
        "\u0660",
        "\u2032",
        "\ud800",
        "(" * 50 + "1" + ")" * 50,
        "1+" * 5000 + "1",
        "9" * 50,
        "1e999999999",
        "1e+999999999",
        "0x10",
    ],
)
def test_other_expressions_are_rejected(text):
    assert not is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        "[[0, 1], [2, -3.5]]",
        "['A', \"B\",]",
        "(1, 2)",
        "'ABC'",
        "[True, None]",
        "",
        "[['_', 'Q'], ['Q', '_']]",
    ],
)
def test_literals_pass(text):
    assert is_literal(text)


@pytest.mark.parametrize(
    "text",
    [
        *("[x]", "A", "f'x'", "b'x'", "'a' + 'b'", "[1][x]", "'x'.upper()", "1 .real", "1.real", "[i for i in 'ab']"),
        *(
            "{1: 2}",
            "'\\x41'",
            "'\n'",
            "9" * 50,
            "[" * 50,
            "[1, " * 9000,
            "Trues",
            "1e9",
            "*[1]",
            "'" + "x" * 200 + "'",
        ),
        "\x00",
    ],
)
def test_text_that_is_not_a_literal_is_rejected(text):
    assert not is_literal(text)


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_passes(name):
    text = PAYLOADS[name].format(canary="/x", pid=1)
    assert not is_literal(text) or name == "quoted_call"  # scorers of literals do not parse strings again
    assert not is_expression(text.strip("'"))


def test_an_answer_equal_to_the_expected_text_is_passed_on():
    entry = {"answer": "ABCA", "metadata": {}}
    assert unparsable_score(" ABCA", dataset="string_insertion", entry=entry) is None
    assert unparsable_score("ABCB", dataset="string_insertion", entry=entry) == 0.0
    board = {"answer": "Q _", "metadata": {"valid_answers": ["_ Q", "Q _"]}}
    assert unparsable_score("_ Q", dataset="n_queens", entry=board) is None
    assert unparsable_score("Q Q", dataset="n_queens", entry=board) == 0.0


def test_a_composite_task_is_checked_like_its_source_dataset():
    entry = {"answer": "1 + 2", "metadata": {"source_dataset": "countdown"}}
    assert unparsable_score("__import__('os')", dataset="composite", entry=entry) == 0.01
    assert unparsable_score("__import__('os')", dataset="chain_sum", entry=entry) is None


@pytest.mark.parametrize("dataset", ["countdown", "simple_integration"])
def test_an_expression_in_quotes_is_checked_like_one_without(dataset):
    entry = {"answer": "x", "metadata": {}}
    assert unparsable_score("'x**2 + C'", dataset=dataset, entry=entry) is None
    assert unparsable_score("'open(x)'", dataset=dataset, entry=entry) is not None
    assert unparsable_score("'x' + 'y'", dataset=dataset, entry=entry) is not None
