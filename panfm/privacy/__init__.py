"""Differential privacy: per-patient gradients, noise, the ledger of what was spent."""

from panfm.privacy.ledger import Ledger, Limits, Permit
from panfm.privacy.private_step import train_privately

__all__ = ["Ledger", "Limits", "Permit", "train_privately"]
