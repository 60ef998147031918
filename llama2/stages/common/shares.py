"""Data mixes by share (§3.2.2, Training Details): the number of pairs when every share is reached.

The paper's helpfulness model takes half of its pairs from elsewhere, its safety model a tenth. A
mix that cannot be reached with what there is would be another mix: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llama2.errors import UserError

_ROUNDING = 1e-9


def count_pairs(
    there: Mapping[str, int], shares: Mapping[str, float], repeated: frozenset[str] = frozenset()
) -> float:
    """Return the number of pairs of all sets together. `there` counts what each set holds; those
    without a share are taken whole.

    Where every set has a share, the scarcest decides. A set in `repeated` may be drawn from more
    than once. UserError where the shares leave nothing for the others, do not add up to 1 without
    others, or ask for more than there is.
    """
    for name in shares:
        if not there[name]:
            raise UserError(
                f"preferences.{name}: no pair is left for its share of {shares[name]:g}",
                "mend the data, or leave out the set",
            )

    rest = 1 - sum(shares.values())
    others = {name: count for name, count in there.items() if name not in shares}
    if others and rest < _ROUNDING:
        raise UserError(
            f"the shares add up to {1 - rest:g}, which leaves nothing for: {', '.join(others)}",
            "lower them",
        )
    if not others and abs(rest) > _ROUNDING:
        raise UserError(
            f"the shares add up to {1 - rest:g}, and no set is taken whole to be the rest",
            "make them add up to 1, or leave one set without a share",
        )

    if not others:
        scarce = {name: share for name, share in shares.items() if name not in repeated}
        wanted = [there[name] / share for name, share in (scarce or shares).items()]
        total = min(wanted) if scarce else max(wanted)
    elif sum(others.values()):
        total = sum(others.values()) / rest
    else:
        raise UserError(
            f"nothing is left of {', '.join(others)}, which the shares of the other sets refer to",
            "mend the data, or what leaves it out",
        )

    short = [
        name
        for name, share in shares.items()
        if round(share * total) > there[name] and name not in repeated
    ]
    if short:
        raise _unreachable(short, there, shares, total)

    return total


def _unreachable(
    short: Sequence[str], there: Mapping[str, int], shares: Mapping[str, float], total: float
) -> UserError:
    """Name the sets in `short`, which have too few pairs, and the shares they would make up if
    taken whole."""
    taken = sum(count for name, count in there.items() if name in short or name not in shares)
    possible = taken / (1 - sum(share for name, share in shares.items() if name not in short))
    few = ", ".join(
        f"'{name}' has {there[name]:,} of {round(shares[name] * total):,} pairs" for name in short
    )
    lower = " and ".join(
        f"--preferences.{name}.share to {_floor(there[name] / possible):g}" for name in short
    )
    again = " ".join(f"--preferences.{name}.repeat true" for name in short)

    return UserError(
        f"the shares of {round(total):,} pairs cannot be reached: {few}",
        f"lower {lower}, draw pairs more than once with {again}, or give every set a share: then "
        "the scarcest decides how many pairs there are",
    )


def _floor(share: float) -> float:
    """Round down to three digits."""
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return math.floor(share * scale) / scale
