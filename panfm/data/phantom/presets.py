"""Two ways in which heart and adipose dominate a body.

`transient`: they are drawn with far more contrast, and that is all; patience outgrows it.
`lasting`: besides, stature and adiposity are written into every organ, so that a hidden piece of a weak organ is
cheaply guessed from heart and adipose, and heart and adipose are scanned in nearly everyone, so that nothing
forces a model to do without them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What sets one phantom apart from another."""

    amplitude: dict[str, float]
    """Organ -> contrast against its surroundings, as a share of the scanner's range: the dominance knob."""
    nuisance: dict[str, float]
    """Organ -> sd of what its traits show of nothing else, against a signal of unit variance."""
    redundancy: float
    """Sd of stature and adiposity in every trait of every organ, against a signal of unit variance."""
    noise: float
    """Sd of the voxel noise, as a share of the scanner's range."""
    scan_odds: dict[str, float]
    """Organ -> log-odds that it is scanned in an average patient of a site that has the scanner."""


_NUISANCE = {"brain": 0.5, "heart": 1.3, "adipose": 1.5, "liver": 0.6, "kidney": 0.5, "spleen": 0.5, "pancreas": 0.5}

PRESETS = {
    "transient": Preset(
        amplitude={
            "brain": 0.042,
            "heart": 0.24,
            "adipose": 0.30,
            "liver": 0.06,
            "kidney": 0.042,
            "spleen": 0.042,
            "pancreas": 0.06,
        },
        nuisance=_NUISANCE,
        redundancy=0.0,
        noise=0.025,
        scan_odds=dict.fromkeys(_NUISANCE, 1.0),
    ),
    "lasting": Preset(
        amplitude={
            "brain": 0.036,
            "heart": 0.24,
            "adipose": 0.30,
            "liver": 0.05,
            "kidney": 0.036,
            "spleen": 0.036,
            "pancreas": 0.05,
        },
        nuisance=_NUISANCE,
        redundancy=1.2,
        noise=0.025,
        scan_odds={**dict.fromkeys(_NUISANCE, 0.8), "heart": 4.0, "adipose": 4.0},
    ),
}
