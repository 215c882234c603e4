"""Straight lines that wire the wings: one function per thing a user asks for."""

from upweight.recipes.check import check
from upweight.recipes.score import sample_file, score_file
from upweight.recipes.train import Result, train_model

__all__ = ["Result", "check", "train_model", "sample_file", "score_file"]
