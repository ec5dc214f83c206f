"""Shell completion of the command line: commands, options, choices, files, and the keys of settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Literal

import shtab

from megatron_hapo.config.resumption import setting_keys
from megatron_hapo.sizing.command import path_argument

SHELLS = ("bash", "zsh")

_SETTINGS_FUNCTION = "_megatron_hapo_settings"
_WITHOUT_SPACE = """
_megatron_hapo() {
  _shtab_megatron_hapo "$@"
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace 2> /dev/null
}
complete -o bashdefault -F _megatron_hapo megatron-hapo
"""
"""Bash would end a setting's `key=` with a space."""


def completion_script(parser: argparse.ArgumentParser, shell: Literal["bash", "zsh"]) -> str:
    """The script that makes a shell complete the commands of this parser."""
    keys = sorted(setting_keys())
    for action in _arguments(parser):
        of_action: Any = action  # argparse's actions have no field for it; shtab reads this one
        if action.type is path_argument:
            of_action.complete = shtab.FILE
        elif action.dest == "overrides":
            of_action.complete = {"bash": _SETTINGS_FUNCTION, "zsh": _SETTINGS_FUNCTION}
    values = " ".join(f"{key}=" for key in keys)
    functions = {
        "bash": f'{_SETTINGS_FUNCTION}() {{\n  compgen -W "{values}" -- "$1"\n}}\n',
        "zsh": f"{_SETTINGS_FUNCTION}() {{\n  compadd -S '' -- {values}\n}}\n",
    }
    script = shtab.complete(parser, shell=shell, preamble=functions[shell])
    return script + _WITHOUT_SPACE if shell == "bash" else script


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _arguments(command)
        else:
            yield action
