"""Straight lines that wire the wings: one function per thing a user asks for.

Nothing is imported here: what can be refused without a model has no time for torch.
"""
