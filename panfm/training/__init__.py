"""Self-supervised objectives, masking policies, and the local loop that uses them."""

from panfm.training.learner import Learner
from panfm.training.loop import TrainResult

__all__ = ["Learner", "TrainResult"]
