"""Shell completion in a real bash. zsh is not needed for the tests, so its script is only looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hapo import cli


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hapo", "completion", "bash"], capture_output=True, check=True
    )
    path.write_bytes(done.stdout)
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in ("megatron-hapo", *words))
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        f"_megatron_hapo megatron-hapo '{words[-1]}' '{words[-2] if len(words) > 1 else 'megatron-hapo'}'; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split()


def test_commands_options_and_choices(script) -> None:
    assert {"train", "check", "completion"} <= set(completed(script, ""))
    assert completed(script, "tr") == ["train"]
    assert completed(script, "train", "--d") == ["--dry-run"]
    assert completed(script, "quantize", "--format", "n") == ["nvfp4"]
    assert set(completed(script, "convert", "")) == {"hf-to-megatron", "megatron-to-hf"}


def test_files_and_then_settings(script, tmp_path) -> None:
    (tmp_path / "job.yaml").write_text("")
    assert completed(script, "train", "jo", folder=tmp_path) == ["job.yaml"]
    assert completed(script, "train", "job.yaml", "optimizer.l", folder=tmp_path) == ["optimizer.lr="]
    assert "rollout.tp=" in completed(script, "eval", "job.yaml", "rollout.", folder=tmp_path)


def test_the_script_of_zsh_has_commands_and_settings(capsys) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef megatron-hapo")
    assert "optimizer.lr=" in script


def test_another_shell_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "fish"])
    assert "argument shell: invalid choice: 'fish'" in capsys.readouterr().err
