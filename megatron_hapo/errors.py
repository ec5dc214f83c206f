"""The errors that this project raises on purpose. All can be pickled, since Ray sends them between processes."""

_LONGEST_LINE = 2000


def one_line(text: object) -> str:
    """The text as one printable line: control characters and lone surrogates are escaped, and a long text is cut."""
    line = " ".join(str(text).split())
    if len(line) > _LONGEST_LINE:
        line = line[:_LONGEST_LINE] + " ..."
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class HapoError(Exception):
    """Base class of all errors that a user can act on."""


class ConfigError(HapoError, ValueError):
    """A config that cannot work. `faults` has one line per fault, so that all are shown at once."""

    def __init__(self, faults: list[str]):
        self.faults = [one_line(fault) for fault in faults]
        super().__init__("\n".join(self.faults))

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
