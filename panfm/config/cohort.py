"""Where a simulation takes its sites from: phantoms, real images shared out, or folders that exist already."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from panfm.config.base import Config, Name, Positive, Seed, Uncoupled


class PhantomSiteConfig(Config):
    """One phantom hospital."""

    organs: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Organs it scans."""
    subjects: Positive
    """Patients it has."""
    age_shift: Annotated[float, Field(ge=-10.0, le=10.0)] = 0.0
    """Its patients' mean age against the cohort's, in standard deviations."""


class PhantomCohortConfig(Uncoupled):
    """A cohort of whole-body phantoms, written as NIfTI files."""

    kind: Literal["phantom"]
    preset: Literal["transient", "lasting"] = "transient"
    """Which dominance: `transient` (training outgrows it) or `lasting` (it does not)."""
    seed: Seed = 0
    """The draw of the cohort, apart from the run's seed."""
    holdout_subjects: Positive = 300
    """Patients with all organs, at no site: the probe's test set."""
    sites: Annotated[dict[Name, PhantomSiteConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_site_draws_the_held_out_patients(self) -> Self:
        if "holdout" in self.sites:
            raise ValueError("sites.holdout: the name of the held-out patients, expected another")
        return self


class RealImagesCohortConfig(Uncoupled):
    """Three sites made from the real scans under $PANFM_REAL_DATA."""

    kind: Literal["real-images"]
    seed: Seed = 0
    """The split of the hippocampus volumes over sites and held-out subjects."""
    holdout_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of hippocampus subjects held out for the probe."""
    limit: Positive | None = None
    """At most this many hippocampus volumes; all when left out."""


class ModalitySiteConfig(Config):
    """One hospital that has some modalities."""

    streams: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Streams it has images of."""


class PhantomModalitySiteConfig(ModalitySiteConfig):
    """One phantom hospital that has some modalities."""

    subjects: Positive
    """Patients it has, shared out evenly over its streams: each patient has one image."""


class StreamCohortConfig(Uncoupled):
    """A cohort whose sites are described by their streams; every patient has one image."""

    held_out: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Streams that no site has. The holdout folder has training images of them too, so that a probe can be fitted."""
    sites: Mapping[Name, ModalitySiteConfig]

    @property
    def named_streams(self) -> tuple[str, ...]:
        """Every stream that is somewhere, in the order of the description."""
        at_sites = [stream for site in self.sites.values() for stream in site.streams]
        return tuple(dict.fromkeys([*at_sites, *self.held_out]))

    @model_validator(mode="after")
    def _places_are_apart(self) -> Self:
        for name, site in self.sites.items():
            if name == "holdout":
                raise ValueError("sites.holdout: the name of the held-out patients, expected another")
            if both := [stream for stream in site.streams if stream in self.held_out]:
                raise ValueError(f"sites.{name}.streams: {both[0]!r} is held out, expected no site to have it")
        return self


class ModalitiesCohortConfig(StreamCohortConfig):
    """Phantom pictures of ten modalities that show the same shapes, written as PNG files."""

    kind: Literal["modalities"]
    seed: Seed = 0
    """The draw of the cohort, apart from the run's seed."""
    holdout_subjects: Positive = 60
    """Patients per stream at no site: the probe's test set. As many again to fit on for a held-out stream."""
    sites: Annotated[dict[Name, PhantomModalitySiteConfig], Field(min_length=1)]


class RealModalitiesCohortConfig(StreamCohortConfig):
    """The real pictures of six modalities under $PANFM_REAL_DATA, each modality at one place."""

    kind: Literal["real-modalities"]
    sites: Annotated[dict[Name, ModalitySiteConfig], Field(min_length=1)]

    @model_validator(mode="after")
    def _modalities_are_disjoint(self) -> Self:
        held = [stream for site in self.sites.values() for stream in site.streams] + list(self.held_out)
        modalities = [stream.rpartition("-")[2] for stream in held]
        if twice := [modality for modality in modalities if modalities.count(modality) > 1]:
            raise ValueError(f"sites: modality {twice[0]!r} stands at two places, expected one")
        return self


class FolderCohortConfig(Uncoupled):
    """Sites that exist already: `sites/<name>/` and optionally `holdout/` under one folder."""

    kind: Literal["folder"]
    path: str


CohortConfig = Annotated[
    PhantomCohortConfig
    | ModalitiesCohortConfig
    | RealImagesCohortConfig
    | RealModalitiesCohortConfig
    | FolderCohortConfig,
    Field(discriminator="kind"),
]
