"""Federated pre-training of pan-organ foundation models: the library (torch only, knows nothing of Flower)."""

__version__ = "0.1.0"
