"""Whole-body phantoms: correlated patients, seven organs as a scanner gives them, labels, and missing scans.

They stand in for a cohort that is not public; every loader treats their files as real ones.
"""

from panfm.data.phantom.body import FACTORS, ORGANS
from panfm.data.phantom.cohort import write_cohort
from panfm.data.phantom.draw import Phantom, Subjects
from panfm.data.phantom.labels import LABELS
from panfm.data.phantom.memory import phantom_store
from panfm.data.phantom.presets import PRESETS

__all__ = ["FACTORS", "LABELS", "ORGANS", "PRESETS", "Phantom", "Subjects", "phantom_store", "write_cohort"]
