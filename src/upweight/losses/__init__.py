"""Log-probs -> one value per item. Pure functions and the tables that name them."""

from upweight.losses.advantages import GROUP_ADVANTAGES as GROUP_ADVANTAGES
from upweight.losses.pair import PAIR_LOSSES as PAIR_LOSSES
from upweight.losses.policy import AGGREGATIONS as AGGREGATIONS
from upweight.losses.policy import KL_ESTIMATORS as KL_ESTIMATORS
from upweight.losses.reward import bradley_terry as bradley_terry
from upweight.types import PairLogps as PairLogps

__all__ = [
    "AGGREGATIONS",
    "GROUP_ADVANTAGES",
    "KL_ESTIMATORS",
    "PAIR_LOSSES",
    "PairLogps",
    "bradley_terry",
]
