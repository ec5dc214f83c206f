"""All settings of a run: typed, frozen, checked together before anything starts. Imports no torch."""

from megatron_hapo.config.algorithm_settings import AlgorithmConfig
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.loading import Draft, dump_config, load_config, read_config
from megatron_hapo.config.settings import (
    ArithmeticData,
    BatchConfig,
    Config,
    DataSource,
    DynamicSamplingConfig,
    FileData,
    LaunchConfig,
    OverlongConfig,
    ParallelConfig,
    ProfileConfig,
    RewardConfig,
    RolloutConfig,
    TaskData,
    TrainerConfig,
    WeightSyncConfig,
    parse_bytes,
)

__all__ = [
    "AlgorithmConfig",
    "ArithmeticData",
    "BatchConfig",
    "Config",
    "DataSource",
    "Draft",
    "DynamicSamplingConfig",
    "Fault",
    "FileData",
    "LaunchConfig",
    "OverlongConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RewardConfig",
    "RolloutConfig",
    "TaskData",
    "TrainerConfig",
    "WeightSyncConfig",
    "dump_config",
    "load_config",
    "parse_bytes",
    "read_config",
]
