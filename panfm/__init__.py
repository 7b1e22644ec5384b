"""Federated pre-training of pan-organ foundation models: the library (torch only, knows nothing of Flower).

    panfm.load("runs/demo")      a trained model: embeddings, tokens, an nn.Module
    panfm.runs("runs")           data frames of rounds, sites and probes
    @panfm.objective("mine")     a plug-in of your own; also masking, backbone, mean, reader

These names are imported when they are first used (`panfm/notebook/public_names.py`); their types are in `__init__.pyi`.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from panfm.notebook.public_names import public_name

    return public_name(name)
