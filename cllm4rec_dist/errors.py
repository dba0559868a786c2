"""Errors that tell users what to fix.

Every error from bad input has four parts: the field, its value, the violated constraint and the cure; the constructor
requires all four. Broken invariants of the code are `assert`s instead.
"""


class CLLM4RecError(Exception):
    """Base of all errors from input, configuration or files.

    Args:
        field: what is wrong, in the user's terms (`optimizer.lr`, `ratings.csv line 12`, `--resume`).
        value: its value.
        constraint: the violated rule, as a clause (`must be a positive number`).
        cure: what to do, as a sentence.

    Attributes:
        exit_status: exit status of a command that ends with this error.
    """

    exit_status = 2

    def __init__(self, field: str, value: object, constraint: str, cure: str) -> None:
        self.field, self.value, self.constraint, self.cure = field, value, constraint, cure
        super().__init__(f"{field}: {value!r} {constraint}. {cure}")

    def __reduce__(self) -> tuple[object, ...]:
        # Ray and multiprocessing pickle errors: rebuild them from the four parts, not from the message.
        return type(self), (self.field, self.value, self.constraint, self.cure)


class ConfigError(CLLM4RecError):
    """A run configuration, recipe or DeepSpeed file that cannot be used."""


class DataError(CLLM4RecError):
    """Raw input (interactions, texts) that cannot be read or breaks a rule."""


class CorpusError(CLLM4RecError):
    """A built corpus that is missing, damaged or does not match the run."""


class CheckpointError(CLLM4RecError):
    """A checkpoint that is absent, incomplete or of another backbone, corpus or tokenizer."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with missing or changed files; another checkpoint may be intact."""


class FaultError(CLLM4RecError):
    """A run that cannot continue although its input is valid: a lost, hung or diverged rank, a loss spike."""

    exit_status = 1


class RankError(FaultError):
    """A rank that was lost, hangs, failed or diverged, reported by the other ranks.

    Args:
        message: names the rank, and the collectives that it and the waiting ranks are at.
        cure: what to do, as a sentence.
    """

    def __init__(self, message: str, cure: str) -> None:
        super().__init__("ranks", message, "ends the run", cure)
        self.args = (f"{message}. {cure}",)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.value, self.cure)
