"""All settings of a run: typed, frozen, checked together before anything starts. Imports no torch."""

from megatron_hapo.config.algorithm_settings import AlgorithmConfig
from megatron_hapo.config.data_settings import CurriculumConfig, OverlongConfig, RewardConfig, Source
from megatron_hapo.config.data_sources import (
    ArithmeticData,
    CheckedSumsData,
    ColumnsConfig,
    EvalSet,
    FileData,
    PromptText,
    TaskData,
)
from megatron_hapo.config.faults import Fault
from megatron_hapo.config.loading import Draft, config_as_yaml, dump_config, load_config, read_config
from megatron_hapo.config.parallel_sizes import ParallelSizes
from megatron_hapo.config.rollout_settings import (
    DynamicSamplingConfig,
    EvalConfig,
    RolloutConfig,
    SetSampling,
    WeightSyncConfig,
)
from megatron_hapo.config.settings import Config, LaunchConfig, ProfileConfig
from megatron_hapo.config.sources import files_of, merge, read_sources, settings_of
from megatron_hapo.config.trainer_settings import BatchConfig, ParallelConfig, TrainerConfig, parse_bytes

__all__ = [
    "AlgorithmConfig",
    "ArithmeticData",
    "BatchConfig",
    "CheckedSumsData",
    "ColumnsConfig",
    "Config",
    "CurriculumConfig",
    "Draft",
    "DynamicSamplingConfig",
    "EvalConfig",
    "EvalSet",
    "Fault",
    "FileData",
    "LaunchConfig",
    "OverlongConfig",
    "ParallelConfig",
    "ParallelSizes",
    "ProfileConfig",
    "PromptText",
    "RewardConfig",
    "RolloutConfig",
    "SetSampling",
    "Source",
    "TaskData",
    "TrainerConfig",
    "WeightSyncConfig",
    "config_as_yaml",
    "dump_config",
    "files_of",
    "load_config",
    "merge",
    "parse_bytes",
    "read_config",
    "read_sources",
    "settings_of",
]
