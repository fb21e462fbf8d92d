"""Errors that the user can fix: shown as one message without a traceback."""

import difflib
from collections.abc import Iterable, Sequence


class SecVecError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 2


class ConfigError(SecVecError):
    """A wrong setting: what was given, what is allowed, the nearest match."""


class DataError(SecVecError):
    """A data file or a request for data that cannot be met: file, line, reason, remedy."""


class TooFewError(DataError):
    """There are fewer samples than the run asks for; `have` is how many there are."""

    def __init__(self, message: str, have: int):
        super().__init__(message)
        self.have = have


class ArtifactError(SecVecError):
    """An artifact on disk that is missing, broken or does not fit: path, reason, remedy."""


class GateError(SecVecError):
    """A trained vector or an aligned base that is not fit for its purpose: a result, not a user's mistake."""

    exit_code = 1


class DivergedError(SecVecError):
    """A training whose loss or weights are NaN or infinite: a result of its settings, and nothing to save."""

    exit_code = 1


class FailedJobs(SecVecError):
    """Some jobs of a multirun failed; `exit_code` is 2 when all of them did by a user's mistake."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def several(texts: Sequence[str], most: int) -> list[str]:
    """The first `most` texts, and how many more there are."""
    return [*texts[:most], *([f"and {len(texts) - most:,} more"] if len(texts) > most else [])]


def first_few(faults: Sequence[str]) -> str:
    """The first five of `faults`, each on a line of its own, and how many more there are."""
    return "\n  ".join(several(faults, 5))


def one_line(error: object, most: int | None = None) -> str:
    """The message of an error without its line breaks, at most `most` characters of it."""
    return " ".join(str(error).split())[:most]


def shortened(text: str, most: int) -> str:
    """The first `most` characters of `text`, and a mark where more follow."""
    return text if len(text) <= most else f"{text[:most]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""
