"""Errors a person can act on.

Every error that bad input can cause names four things: the field, the value it has, the constraint it breaks and
the cure. The constructor asks for all four, so an error that leaves one out cannot be written. Broken invariants of
our own code are `assert`s and never these.
"""


class CLLM4RecError(Exception):
    """Base of every error that input, configuration or files can cause.

    Args:
        field: what is wrong, as the user knows it (`optimizer.lr`, `ratings.csv line 12`, `--resume`).
        value: the value found.
        constraint: the rule that it breaks, as a clause (`must be a positive number`).
        cure: what to do about it, as a sentence.

    Attributes:
        exit_status: of a command that ends with it.
    """

    exit_status = 2

    def __init__(self, field: str, value: object, constraint: str, cure: str) -> None:
        self.field, self.value, self.constraint, self.cure = field, value, constraint, cure
        super().__init__(f"{field}: {value!r} {constraint}. {cure}")

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing carry errors between processes: rebuild from the four parts, not from the message.
        return type(self), (self.field, self.value, self.constraint, self.cure)


class ConfigError(CLLM4RecError):
    """A run configuration, recipe or DeepSpeed file that cannot be used."""


class DataError(CLLM4RecError):
    """Raw input (interactions, texts) that cannot be read or breaks a rule."""


class CorpusError(CLLM4RecError):
    """A built corpus that is missing, damaged or made for something else."""


class CheckpointError(CLLM4RecError):
    """A checkpoint that is absent, incomplete or belongs to another backbone, corpus or tokenizer."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are missing or not what was committed; another one may be whole."""


class FaultError(CLLM4RecError):
    """A run that cannot go on although its input is right: a lost, hung or diverged rank, a loss that explodes."""

    exit_status = 1


class RankError(FaultError):
    """A rank that was lost, hangs, failed or went another way, as the other ranks see it.

    Args:
        message: names the rank, and where it and those who wait for it are.
        cure: what to do about it, as a sentence.
    """

    def __init__(self, message: str, cure: str) -> None:
        super().__init__("ranks", message, "ends the run", cure)
        self.args = (f"{message}. {cure}",)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.value, self.cure)
