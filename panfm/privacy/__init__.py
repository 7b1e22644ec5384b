"""Differential privacy: guarantees, per-patient gradients, noise, the ledger of the privacy spent."""
