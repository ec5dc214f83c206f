"""The errors that this project raises on purpose; all of them survive pickling between Ray processes."""


class HapoError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(HapoError, ValueError):
    """A config that cannot work; carries one line per fault, so that all are shown at once."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults

    def __reduce__(self):
        return (type(self), (self.faults,))


class DataError(HapoError, ValueError):
    """Training or evaluation data that cannot be used."""


class RolloutError(HapoError, RuntimeError):
    """The rollout engine failed, or does not sample as the formula says."""


class RewardError(HapoError, RuntimeError):
    """The reward workers cannot work at all; one response that fails is no error, it scores as wrong."""


class TrainingError(HapoError, RuntimeError):
    """The update cannot go on: a non-finite loss or gradient, a rank that failed."""


class WeightSyncError(HapoError, RuntimeError):
    """An engine does not hold the trainer's weights."""
