"""Correct variants, which every case has to accept.  SPEC ZOO-1 to ZOO-3."""

from refimpl.variants.zoo.member import Member
from refimpl.variants.zoo.members import ZOO

__all__ = ["ZOO", "Member"]
