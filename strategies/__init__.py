"""Flower strategies: how replies become the next global model."""

from strategies.grouped import GroupedMean, RoundOutcome
from strategies.memory import Memory
from strategies.site_private import SitePrivateMean

__all__ = ["GroupedMean", "Memory", "RoundOutcome", "SitePrivateMean"]
