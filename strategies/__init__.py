"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome

__all__ = ["GroupedMean", "RoundOutcome"]
