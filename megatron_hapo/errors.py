"""The errors that this project raises on purpose. All can be pickled, since Ray sends them between processes."""


class HapoError(Exception):
    """Base class of all errors that a user can act on."""


class ConfigError(HapoError, ValueError):
    """A config that cannot work. `faults` has one line per fault, so that all are shown at once."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults

    def __reduce__(self):
        return (type(self), (self.faults,))


class DataError(HapoError, ValueError):
    """Training or evaluation data that cannot be used."""


class RolloutError(HapoError, RuntimeError):
    """A rollout engine failed, or does not sample from the distribution that the method defines."""


class RewardError(HapoError, RuntimeError):
    """The reward workers cannot work at all. A response that cannot be scored is not an error: it counts as wrong."""


class TrainingError(HapoError, RuntimeError):
    """Training cannot continue: a loss or gradient is not finite, or a rank failed."""


class RankDiedError(TrainingError):
    """The process of a trainer rank died. The Ray launcher restarts the ranks."""


class WeightSyncError(HapoError, RuntimeError):
    """An engine does not hold the trainer's weights after a sync."""
