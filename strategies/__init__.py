"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome
from strategies.memory import Memory

__all__ = ["GroupedMean", "Memory", "RoundOutcome"]
