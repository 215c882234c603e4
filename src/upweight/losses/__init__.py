"""Log-probs -> one value per item. Pure functions and the tables that name them."""

from upweight.losses.pair import PAIR_LOSSES as PAIR_LOSSES
from upweight.types import PairLogps as PairLogps

__all__ = ["PAIR_LOSSES", "PairLogps"]
