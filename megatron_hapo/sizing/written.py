"""A plan as a config file, which is a job of its own: what the plan chose, on top of what was asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_hapo.config import files_of, load_config, merge
from megatron_hapo.errors import ConfigError, HapoError
from megatron_hapo.sizing.from_config import inexpressible, placement_settings, plan_settings
from megatron_hapo.sizing.memory import GIB
from megatron_hapo.sizing.search import Cluster, Plan, describe
from megatron_hapo.sizing.tables import title


def write_plan(
    plans: Sequence[Plan], path: Path, *, base: Path | None, asked: Mapping[str, Any], cluster: Cluster
) -> Plan:
    """Write the best plan that a config can express, on top of `base`; returns it.

    Without a base the file is a part, which a config can build on.

    Args:
        asked: settings of the command line, which the plan was made for.

    Raises:
        HapoError: no plan can be expressed, the file cannot be written, or a run would refuse it; nothing is written.
    """
    plan = next((plan for plan in plans if not inexpressible(plan)), None)
    if plan is None:
        raise HapoError(f"--write: every plan needs what the config has no setting for, e.g. {inexpressible(plans[0])}")
    settings = merge(asked, merge(placement_settings(cluster.placement), plan_settings(plan)))
    if base is not None:
        if path.resolve() in files_of(base):
            raise HapoError(f"--write: {path}: {base} builds on this file, which cannot build on itself")
        settings = {"base": os.path.relpath(base.parent.resolve() / base.name, path.parent.resolve()), **settings}
    header = f"# {title(cluster)}: {describe(plan.layout)}; {plan.trainer.total / GIB:.1f} GiB a trainer GPU.\n"
    try:
        _write_checked(path, header + OmegaConf.to_yaml(OmegaConf.create(settings)), complete=base is not None)
    except OSError as error:
        raise HapoError(f"--write: {path}: cannot be written: {error.strerror}") from error
    return plan


def _write_checked(path: Path, text: str, *, complete: bool) -> None:
    """Write a file that a run accepts, or none. What was there before stays until then."""
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
