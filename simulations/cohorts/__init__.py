"""Cohorts: where a simulation takes its sites from. One class per kind describes, writes and recognises its cohorts.

A new kind costs its file and a line of `COHORTS`; its class derives from `cohort_source.CohortSource`.
"""

from panfm.registry import Registry

COHORTS = Registry(
    "cohort.kind",
    {
        "phantom": "simulations.cohorts.phantom:PhantomCohort",
        "modalities": "simulations.cohorts.picture_cohort:PictureCohort",
        "real-images": "simulations.cohorts.real_images:RealImagesCohort",
        "real-modalities": "simulations.cohorts.real_modalities:RealModalitiesCohort",
        "folder": "simulations.cohorts.cohort_source:FolderCohort",
    },
)
"""Kinds of `[cohort]`."""
