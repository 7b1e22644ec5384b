"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome
from strategies.server_step import Memory
from strategies.site_dp_mean import SiteDpMean

__all__ = ["GroupedMean", "Memory", "RoundOutcome", "SiteDpMean"]
