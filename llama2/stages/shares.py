"""Data mixes by share (§3.2.2, Training Details): how many pairs there are when every share is reached.

The paper's helpfulness model takes half of its pairs from elsewhere, its safety model a tenth. A mix that cannot be
reached with what there is would be another mix: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llama2.errors import UserError

_ROUNDING = 1e-9


def total_pairs(there: Mapping[str, int], shares: Mapping[str, float], repeated: frozenset[str] = frozenset()) -> float:
    """The pairs of all sets together. `there` counts what each set holds; those without a share are taken whole.

    Where every set has a share, the scarcest decides. A set in `repeated` may be drawn from more than once. UserError
    where the shares leave nothing for the others, do not add up to 1 without others, or ask for more than there is.
    """
    for name in shares:
        if not there[name]:
            raise UserError(f"preferences.{name}: no pair is left for its share of {shares[name]:g}",
                            "mend the data, or leave out the set")
    rest = 1 - sum(shares.values())
    whole = {name: count for name, count in there.items() if name not in shares}
    if whole and rest < _ROUNDING:
        raise UserError(f"the shares add up to {1 - rest:g}, which leaves nothing for: {', '.join(whole)}",
                        "lower them")
    if not whole and abs(rest) > _ROUNDING:
        raise UserError(f"the shares add up to {1 - rest:g}, and no set is taken whole to be the rest",
                        "make them add up to 1, or leave one set without a share")
    if not whole:
        scarce = {name: share for name, share in shares.items() if name not in repeated}
        wanted = [there[name] / share for name, share in (scarce or shares).items()]
        total = min(wanted) if scarce else max(wanted)
    elif sum(whole.values()):
        total = sum(whole.values()) / rest
    else:
        raise UserError(f"nothing is left of {', '.join(whole)}, which the shares of the other sets refer to",
                        "mend the data, or what leaves it out")
    for name, share in shares.items():
        if round(share * total) > there[name] and name not in repeated:
            raise _unreachable(name, share, total, there[name], rest + share)
    return total


def _unreachable(name: str, share: float, total: float, there: int, room: float) -> UserError:
    """`room`: what the sets with other shares leave for this one and those taken whole."""
    possible = there * room / (total * (room - share) + there)
    scale = 10 ** (2 - math.floor(math.log10(possible)))
    wanted = round(share * total)
    return UserError(
        f"preferences.{name}: a share of {share:g} of {round(total):,} pairs is {wanted:,}, it has {there:,}",
        f"lower --preferences.{name}.share to {math.floor(possible * scale) / scale:g}, draw pairs more than once with "
        f"--preferences.{name}.repeat true, or give every set a share: then the scarcest decides how many there are")
