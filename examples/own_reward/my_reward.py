"""A reward with two parts: whether the answer is right, and the share of the steps before it that are right."""

import re


def score(response, row):
    """The parts for a response such as `7+8=15 15-3=12 Answer: 12`, with their total; row has the data's columns."""
    answers = re.findall(r"Answer: *(-?\d{1,9})", response)
    right = float(answers[-1:] == [row["answer"]])
    steps = re.findall(r"(-?\d{1,9})([+-]\d{1,9})=(-?\d{1,9})", response)
    good = sum(int(before) + int(term) == int(after) for before, term, after in steps)
    share = good / len(steps) if steps else 0.0
    return {"total": right + 0.5 * share, "correct": right, "steps": share}
