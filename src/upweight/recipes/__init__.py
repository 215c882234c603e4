"""Straight lines that wire the wings: one function per thing a user asks for."""

from upweight.recipes.check import check
from upweight.recipes.score import sample_file, score_file
from upweight.recipes.stages import check_stages, train_stages
from upweight.recipes.train import Result, train_model

__all__ = [
    "Result",
    "check",
    "check_stages",
    "sample_file",
    "score_file",
    "train_model",
    "train_stages",
]
