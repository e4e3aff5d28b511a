"""User errors: one line, no traceback. Also checks of arguments."""

import contextlib
import difflib
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeGuard, get_args

from capsexp.text import printable, printable_lines

_problems: ContextVar[list[str] | None] = ContextVar("problems", default=None)


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints it and exits with code 2.

    Args:
        problems: one line for each known problem, so that the user can fix all of them at once.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Notes:
    """Lines to print after the work, for problems that do not stop it."""

    errors: list[str] = field(default_factory=list)
    """Mistakes of the user; the exit code is 2."""
    warnings: list[str] = field(default_factory=list)
    """Other problems; the exit code stays 0."""

    def error(self, line: str) -> None:
        """Add a mistake of the user, unless it is noted already."""
        if line not in self.errors:
            self.errors.append(line)

    def warning(self, line: str) -> None:
        """Add a warning, unless it is noted already."""
        if line not in self.warnings:
            self.warnings.append(line)

    def print_warnings(self) -> None:
        """Print the warnings on stderr, one line each."""
        for line in self.warnings:
            print(f"capsexp: {printable(line)}", file=sys.stderr)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is an int or a float; Python also counts True and False as ints."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer; a bool is not one here."""
    return isinstance(value, int) and not isinstance(value, bool)


def refuse(problem: str) -> None:
    """Raise the error of a wrong argument; inside `collecting`, note it and let the constructor go on.

    Raises:
        ValueError: the problem, outside `collecting`.
    """
    problems = _problems.get()
    if problems is None:
        raise ValueError(problem)
    problems.append(problem)


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect the problems that `refuse` and the `require_…` functions find, so that all are reported.

    A constructor goes on with a value that was refused, up to `stop_if_refused`. An error that follows from
    the value is ignored.
    """
    problems: list[str] = []
    token = _problems.set(problems)
    try:
        yield problems
    except Exception:
        if not problems:
            raise
    finally:
        _problems.reset(token)


@contextlib.contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Add the problems of a UserError inside to a list, and go on."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def stop_if_refused() -> None:
    """End a constructor whose arguments were refused, before it passes them on; see `collecting`.

    Raises:
        ValueError: all problems so far.
    """
    if problems := _problems.get():
        raise ValueError("; ".join(problems))


def require_at_least_1(**values: int | Sequence[int] | None) -> None:
    """Check constructor arguments: numbers, or non-empty lists of numbers, that are >= 1. None is allowed.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        if value is None:
            continue
        numbers = [value] if isinstance(value, int) else list(value)
        if not numbers or min(numbers) < 1:
            kind = "must be >= 1" if isinstance(value, int) else "must be a list of numbers >= 1"
            refuse(f"{name} {kind}, got {value}")


def require_positive(**values: int | float | None) -> None:
    """Check constructor arguments: finite numbers > 0. None is allowed.

    Raises:
        ValueError: naming the argument and its value.
    """
    require_in("(0, inf)", **values)


def require_not_negative(**values: int | float | None) -> None:
    """Check constructor arguments: finite numbers >= 0. None is allowed.

    Raises:
        ValueError: naming the argument and its value.
    """
    require_in("[0, inf)", **values)


def require_finite(**values: int | float | None) -> None:
    """Check constructor arguments: finite numbers of any sign. None is allowed.

    Raises:
        ValueError: naming the argument and its value.
    """
    require_in("(-inf, inf)", **values)


def require_in(interval: str, **values: int | float | None) -> None:
    """Check constructor arguments: numbers in an interval, such as "(0, 1]". None is allowed.

    Raises:
        ValueError: naming the argument, the interval and the value.
    """
    for name, value in values.items():
        if value is not None and not is_in(interval, value):
            refuse(f"{name} must be {describe(interval)}, got {value}")


def is_in(interval: str, value: int | float) -> bool:
    """Return whether a number is in an interval, such as "(0, 1]" or "[0, inf)"; NaN never is."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_above = value > low if interval[0] == "(" else value >= low
    return is_above and (value < high if interval[-1] == ")" else value <= high)


def describe(interval: str) -> str:
    """Return an interval for a message."""
    return {"(0, inf)": "> 0", "[0, inf)": ">= 0", "(-inf, inf)": "finite"}.get(interval, f"in {interval}")


def require_at_most(limit: int, **values: int | None) -> None:
    """Check constructor arguments against the largest number that this machine can do. None is allowed.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        if value is not None and value > limit:
            refuse(f"{name} must be <= {limit}, got {value}")


def require_seed(**values: int) -> None:
    """Check constructor arguments that are seeds: 0 … 2^63 - 1, which torch takes.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, value in values.items():
        if not 0 <= value < 2**63:
            refuse(f"{name} must be an integer from 0 to 2^63 - 1, got {value}")


def require_literal(allowed: Any, **values: object) -> None:
    """Check constructor arguments that are annotated with a `Literal`.

    Raises:
        ValueError: naming the argument, the options of the Literal and its value.
    """
    for name, value in values.items():
        if value not in get_args(allowed):
            refuse(f"{name} must be one of {', '.join(get_args(allowed))}, got {value}")


def print_error(error: UserError) -> int:
    """Print each problem of a user error on stderr; return the exit code."""
    for problem in error.problems:
        print(f"capsexp: {printable_lines(problem)}", file=sys.stderr)
    return error.exit_code


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that this error ends; above 128 for Ctrl-C and signals."""
    if isinstance(error, Stopped):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return error.exit_code if isinstance(error, UserError) else 1


def is_interruption(error: BaseException) -> bool:
    """Whether the user or the system stopped the process."""
    return exit_code(error) > 128 or isinstance(error, Preempted)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Stopped(KeyboardInterrupt):
    """A signal that ends the process where nothing needs to be saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class RunStopped(UserError):  # noqa: N818 - a signal or a stop, not always an error
    """A run that ended early.

    Args:
        problem: the reason.
        exit_code: 1 for a failure; 130 and 143 after Ctrl-C and SIGTERM, as shells expect.
    """

    def __init__(self, problem: str, *, exit_code: int) -> None:
        super().__init__(problem)
        self.exit_code = exit_code


class JobFailed(UserError):  # noqa: N818 - a result in the table of a sweep
    """A job of a sweep that did not complete its run."""

    exit_code = 1


class Preempted(SystemExit):
    """The end of a process that its scheduler stops and may start again."""


class DataError(UserError, ValueError):
    """Data that are missing, damaged or unexpected. The message says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `: did you mean 'x'?` for the nearest known name, or all known names if they are few."""
    known = sorted(set(known))
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6) or same_leaf[:1]
    if not close:
        key_of_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [key_of_leaf[near] for near in difflib.get_close_matches(leaf, key_of_leaf, n=1, cutoff=0.75)]
    if close:
        return f": did you mean {close[0]!r}?"
    return f"; choose from {', '.join(known)}" if len(known) <= 20 else ""
