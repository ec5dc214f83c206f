"""Reads untrusted YAML: limits on size, nesting and the expansion of aliases; errors do not quote the text."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Digits of an integer. Python refuses to print those of more than 4300, even in messages about them."""
MAX_VALUES = 100_000
"""Values of a file after aliases have been expanded."""


class UnreadableYamlError(ValueError):
    """Text that is not a mapping of settings; the message says why, in one line, without quoting the text."""


def read_yaml(path: Path) -> DictConfig:
    """The mapping in a file, with interpolations not yet resolved.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableYamlError: it cannot be read, or is not a mapping of settings.
    """
    try:
        if path.exists() and not path.is_file():  # a directory; or a device or pipe, which would never end
            raise UnreadableYamlError("cannot be read: it is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of symbolic links
        if isinstance(error, UnreadableYamlError):
            raise
        raise UnreadableYamlError(
            f"cannot be read: {getattr(error, 'strerror', None) or 'not a usable path'}"
        ) from None
    if len(content) > MAX_BYTES:
        raise UnreadableYamlError(f"cannot be read: it has more than {MAX_BYTES} bytes")
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise UnreadableYamlError("cannot be read: it is not UTF-8 text") from None


def parse_yaml(text: str) -> DictConfig:
    """The mapping that the text holds; an empty text is an empty mapping.

    Raises:
        UnreadableYamlError: it is not a mapping of settings.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return OmegaConf.create({})
        _check_size(root)
        if not isinstance(root, yaml.MappingNode):
            raise UnreadableYamlError(f"must be a mapping of settings, got {_KINDS[type(root)]}")
        if not all(isinstance(key, yaml.ScalarNode) and key.value.isidentifier() for key, _ in root.value):
            raise UnreadableYamlError("is not a file of settings: a key at the top level is not the name of a setting")
        loaded = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        raise UnreadableYamlError(f"cannot be read: {_explain(error)}") from None
    except RecursionError:
        raise UnreadableYamlError(f"cannot be read: it is nested more than {MAX_DEPTH} levels deep") from None
    except UnreadableYamlError:
        raise
    # YAML tags and values that Python's constructors refuse raise many types, e.g. OverflowError for a date.
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UnreadableYamlError(f"cannot be read: not valid YAML ({type(error).__name__})") from None
    assert isinstance(loaded, DictConfig)
    return loaded


def _explain(error: yaml.MarkedYAMLError) -> str:
    """What the parser says, without the words of the text that it quotes."""
    said = ": ".join(part for part in (error.context, error.problem) if part) or "not valid YAML"
    said = re.sub(r"'\w[^']*'", "'...'", said)  # punctuation and names of tokens, such as ',' and '<stream end>', stay
    said = said.partition("duplicate key ")[0] + "a duplicate key" if "duplicate key " in said else said
    mark = error.problem_mark or error.context_mark
    return f"{said} in line {mark.line + 1}, column {mark.column + 1}" if mark else said


_KINDS = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a list"}


def _check_size(root: yaml.Node) -> None:
    """Check nesting and size of a graph of nodes, in which an alias is a second edge to the same node."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise UnreadableYamlError(f"cannot be read: it is nested more than {MAX_DEPTH} levels deep")
        if id(node) in open_nodes:
            raise UnreadableYamlError("cannot be read: an alias contains itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            match node:
                case yaml.MappingNode():
                    children = [child for pair in node.value for child in pair]
                case yaml.SequenceNode():
                    children = node.value
                case _:
                    children = []
                    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
                        raise UnreadableYamlError(f"cannot be read: an integer has more than {MAX_DIGITS} digits")
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
            open_nodes.remove(id(node))
            if sizes[id(node)] > MAX_VALUES:
                raise UnreadableYamlError(f"cannot be read: it has more than {MAX_VALUES} values")
        return sizes[id(node)]

    size(root, 0)
