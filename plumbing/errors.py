"""A mistake of the user's is one line that says what is wrong and what to do."""

import contextlib
import functools


class InputError(Exception):
    """A mistake of the user's: run_cli prints it as one line and exits with code 2."""


def first_line(error):
    text = repr(error) if isinstance(error, SystemExit) else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__


print_once = functools.lru_cache(None)(print)


@contextlib.contextmanager
def in_one_line(problem):
    """Whatever fails within is an InputError: `problem (why)`."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may exit
        raise InputError(f"{problem} ({first_line(error)})") from None
