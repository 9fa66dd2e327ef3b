"""Types of flags: what a value must be, checked by command_line.py before any work."""

from typing import Annotated

import tyro

Count = Annotated[int, ("at least 1", lambda x: x >= 1)]
Length = Annotated[int, ("at least 2", lambda x: x >= 2)]
Natural = Annotated[int, ("0 or more", lambda x: 0 <= x < 2**63)]
# up to 1e9: the square of what such a number scales is finite
Positive = Annotated[float, ("above 0, up to 1e9", lambda x: 0 < x <= 1e9)]
Weight = Annotated[float, ("from 0 to 1e9", lambda x: 0 <= x <= 1e9)]
Bound = Annotated[float, ("above 0 (inf: no bound)", lambda x: x > 0)]
Share = Annotated[float, ("from 0 to 1", lambda x: 0 <= x <= 1)]
LearningRate = Annotated[Positive, tyro.conf.arg(aliases=("--lr",))]
