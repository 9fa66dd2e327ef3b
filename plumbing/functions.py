"""Functions of the user's, named on the command line: rewards and judges."""

import inspect
import math
import os
import pkgutil
import sys

from plumbing.errors import in_one_line


def load_function(spec, flag):
    """`module:function` -> that function of (prompts, responses), one number a response. Whatever
    the user's module or function raises is named by its flag."""
    from utils import backend  # which is not there yet when utils.py imports this file

    sys.path.insert(0, os.getcwd())
    with in_one_line(f"{flag} {spec}: expected module:function(prompts, responses)"):
        function = pkgutil.resolve_name(spec)
        inspect.signature(function).bind([], [])

    def numbers(prompts, responses):
        with in_one_line(f"{flag} {spec}: must return one finite number a response"):
            scores = backend.once(lambda: function(prompts, responses))
            scores = [float(score) for _, score in zip(responses, scores, strict=True)]
            if not all(map(math.isfinite, scores)):
                raise ValueError(f"found {scores}")
            return scores

    return numbers
