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


_NUISANCE = {"brain": 0.9, "heart": 1.3, "adipose": 1.5, "liver": 0.9, "kidney": 0.9, "spleen": 0.9, "pancreas": 0.9}

PRESETS = {
    "transient": Preset(
        amplitude={
            "brain": 0.075,
            "heart": 0.27,
            "adipose": 0.3,
            "liver": 0.1,
            "kidney": 0.075,
            "spleen": 0.075,
            "pancreas": 0.09,
        },
        nuisance=_NUISANCE,
        redundancy=0.0,
        noise=0.025,
        scan_odds={**dict.fromkeys(_NUISANCE, 0.9), "heart": 2.5, "adipose": 2.5},
    ),
    "lasting": Preset(
        amplitude={
            "brain": 0.035,
            "heart": 0.3,
            "adipose": 0.33,
            "liver": 0.045,
            "kidney": 0.035,
            "spleen": 0.035,
            "pancreas": 0.04,
        },
        nuisance=_NUISANCE,
        redundancy=1.0,
        noise=0.025,
        scan_odds={**dict.fromkeys(_NUISANCE, 0.8), "heart": 5.0, "adipose": 5.0},
    ),
}
