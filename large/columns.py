"""Columns that a script writes: those of a user's rows that are called alike would be lost."""

from utils import InputError


def refuse(row, written, where):
    """Rows of an earlier run hold them all: a bool `ended` and, once scored, `score` and `length`.
    They are taken, and written anew; in other rows the columns are the user's own."""
    ours = type(row.get("ended")) is bool and ("score" in row) == ("length" in row)
    if taken := () if ours else sorted(written & row.keys()):
        raise InputError(f"{where}: field '{taken[0]}' is written by this script; rename yours")
