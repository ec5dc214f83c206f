"""Writes a plan as a config file that `train` accepts: the plan's settings on top of the requested ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_hapo.config import files_of, load_config, merge
from megatron_hapo.errors import ConfigError, HapoError
from megatron_hapo.sizing.from_config import placement_settings, plan_settings
from megatron_hapo.sizing.memory import GIB
from megatron_hapo.sizing.search import Cluster, LayoutPlan, describe
from megatron_hapo.sizing.tables import title


def write_plan(plan: LayoutPlan, path: Path, *, base: Path | None, asked: Mapping[str, Any], cluster: Cluster) -> None:
    """Write the settings of a plan to a config file that builds on `base`.

    Args:
        base: without one, the file is not a complete config, but one that others can name in `base:`.
        asked: settings from the command line that the plan was made for.

    Raises:
        HapoError: the file cannot be written, or `train` would reject it; nothing is written.
    """
    settings = merge(asked, merge(placement_settings(cluster.placement), plan_settings(plan)))
    if base is not None:
        if path.resolve() in files_of(base):
            raise HapoError(f"--write: {path}: {base} builds on this file; write to another one")
        settings = {"base": os.path.relpath(base.parent.resolve() / base.name, path.parent.resolve()), **settings}
    header = f"# {title(cluster)}: {describe(plan.layout)}; {plan.trainer.total / GIB:.1f} GiB on a trainer GPU.\n"
    try:
        _write_checked(path, header + OmegaConf.to_yaml(OmegaConf.create(settings)), complete=base is not None)
    except OSError as error:
        raise HapoError(f"--write: {path}: cannot be written: {error.strerror}") from error


def _write_checked(path: Path, text: str, *, complete: bool) -> None:
    """Write the file, if `train` accepts it; an existing file is replaced only then.

    Args:
        complete: whether the text is a complete config, so that it can be checked.
    """
    if path.exists() and not path.is_file():
        raise HapoError(f"--write: {path}: is not a file")
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        if complete:
            load_config(partial)
        partial.replace(path)
    except ConfigError as error:
        raise ConfigError([f"--write: {line.replace(str(partial), str(path))}" for line in error.faults]) from None
    finally:
        partial.unlink(missing_ok=True)
