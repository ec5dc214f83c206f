"""Write train.jsonl and eval.jsonl, each row with a prompt and an answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_hapo.data.arithmetic import problems


def main() -> None:
    """Write both files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, size, seed in (("train", 2000, 0), ("eval", 200, 1)):
        rows = [
            {"prompt": problem.question, "answer": problem.answer}
            for problem in problems(size=size, seed=seed, min_terms=4, max_terms=5, max_number=12)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {size} problems")


if __name__ == "__main__":
    main()
