"""The errors a user can meet.

PeriluneError                 caught only in the command line: one line, exit code 1
  RecipeError (ValueError)    a recipe or an override is wrong: file, key, what was found, what is allowed (exit code 2)
  DataError                   input data is unusable: path, record, what was expected
    UnknownIdError            a user or an item that the data do not have: which
  CheckpointError             a checkpoint is missing, truncated, altered or of another shape: which file and why
  NumericsError               training met NaN or infinity too often: step, quantity, last good checkpoint
  BackendError                an op cannot run on the requested backend: why, and what would
  EngineError                 a generation request is invalid or cannot be served

Wrong arguments to functions of `ops`, `nn` and `optim` are plain `ValueError` and `TypeError`.
"""

from __future__ import annotations

from typing import TypeVar

_Error = TypeVar("_Error", bound="PeriluneError")


class PeriluneError(Exception):
    """Base of every error that is the user's to mend; its text is one clear line."""


class RecipeError(PeriluneError, ValueError):
    """A recipe, or a command-line override of one, is not valid."""


class DataError(PeriluneError):
    """Input data cannot be used."""


class UnknownIdError(DataError):
    """A user or an item is named that the data do not have."""


class CheckpointError(PeriluneError):
    """A checkpoint cannot be read or written."""


class NumericsError(PeriluneError):
    """Training produced non-finite numbers too many times in a row."""


class BackendError(PeriluneError):
    """An op was asked of a backend that cannot serve it."""


class EngineError(PeriluneError):
    """A generation request cannot be served."""


def missing_extra(kind: type[_Error], who: str, package: str | None, extra: str) -> _Error:
    """Return what to raise where an optional package is not installed.

    Args:
        kind: of error.
        who: needs it, with the verb: "serving needs".
        package: its name; of an ImportError, `error.name`.
        extra: of perilune's extras, the one that has it.
    """
    return kind(f"{who} the optional package {package}; install it with: pip install 'perilune[{extra}]'")
