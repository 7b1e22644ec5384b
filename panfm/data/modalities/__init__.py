"""Phantom pictures of ten modalities that show the same six shapes, one picture per patient.

They ask whether a model that sees many modalities finds what they have in common: the class of the shape is the same in
all of them, and intensities, textures and noise are not. Every loader treats the files as real ones.
"""

from panfm.data.modalities.cohort import write_modalities
from panfm.data.modalities.draw import Patient, draw_places, modality_store, patient_labels
from panfm.data.modalities.shapes import SHAPES

__all__ = ["SHAPES", "Patient", "draw_places", "modality_store", "patient_labels", "write_modalities"]
