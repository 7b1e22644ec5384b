"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome
from strategies.memory import Memory
from strategies.site_dp_mean import SiteDpMean

__all__ = ["GroupedMean", "Memory", "RoundOutcome", "SiteDpMean"]
