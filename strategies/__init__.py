"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome
from strategies.site_dp_mean import SiteDpMean
from strategies.strategy_memory import Memory

__all__ = ["GroupedMean", "Memory", "RoundOutcome", "SiteDpMean"]
