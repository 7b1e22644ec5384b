"""Self-supervised objectives, masking policies, and the local loop that uses them."""

from panfm.objectives.learner import Learner
from panfm.objectives.loop import TrainResult

__all__ = ["Learner", "TrainResult"]
