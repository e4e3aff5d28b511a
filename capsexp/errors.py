"""What a user can put right: told in one line, without a traceback."""

import difflib
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints it and exits with code 2.

    Args:
        problems: one line each; all that are known, so that they can be mended in one go.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Notes:
    """What is told after the work, because it need not end it."""

    errors: list[str] = field(default_factory=list)
    """Of the user; the exit code is 2."""
    warnings: list[str] = field(default_factory=list)
    """Of what was found; the exit code stays 0."""

    def error(self, line: str) -> None:
        """Note what the user can put right, once."""
        if line not in self.errors:
            self.errors.append(line)

    def warning(self, line: str) -> None:
        """Note what is not as it should be, once."""
        if line not in self.warnings:
            self.warnings.append(line)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float; Python also counts True and False as ints."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_at_least_1(**values: int | Sequence[int] | None) -> None:
    """Check constructor arguments: a number must be >= 1, a list must hold such numbers; None is no value.

    Raises:
        ValueError: naming the argument and what it got.
    """
    for name, value in values.items():
        if value is None:
            continue
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or min(numbers) < 1:
            kind = "must be >= 1" if isinstance(value, int) else "must be a list of numbers >= 1"
            raise ValueError(f"{name} {kind}, got {value}")


def require_one_of(allowed: Collection[str], **values: str) -> None:
    """Check constructor arguments that name an option.

    Raises:
        ValueError: naming the argument, the options and what it got.
    """
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value}")


def print_error(error: UserError) -> int:
    """Print each problem of a user error on stderr; return the exit code."""
    for problem in error.problems:
        print(f"capsexp: {problem}", file=sys.stderr)
    return error.exit_code


def exit_code(error: BaseException) -> int:
    """The exit code of a process that this error ends; above 128 for Ctrl-C and signals."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return error.exit_code if isinstance(error, UserError) else 1


def is_interruption(error: BaseException) -> bool:
    """Whether the user or the system asked for this end."""
    return exit_code(error) > 128 or isinstance(error, Preempted)


class RunStopped(UserError):  # noqa: N818 - a signal or a stop, not always an error
    """A run that ended early for a reason which its message names.

    Args:
        problem: the reason.
        exit_code: 1 for a failure; 130 and 143 after Ctrl-C and SIGTERM, as shells expect.
    """

    def __init__(self, problem: str, *, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class JobFailed(UserError):  # noqa: N818 - the end of a job, told in the table of its sweep
    """A job of a sweep that did not complete its run."""

    exit_code = 1


class Preempted(SystemExit):
    """The end of a process whose scheduler takes the run away, and may start it again."""


class DataError(UserError, ValueError):
    """Data that are missing, damaged or not what they should be. The message says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or the known names when none is near."""
    known = sorted(set(known))
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or same_leaf[:1]
    if not close:
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        leaf = name.rsplit(".", 1)[-1]
        close = [leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    if close:
        return f": did you mean {close[0]!r}?"
    return f"; there is {', '.join(known)}" if len(known) <= 20 else ""
