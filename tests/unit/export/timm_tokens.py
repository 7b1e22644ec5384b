"""Loads exported folders with the real timm, in a process of its own: its libraries stay out of the others.

    python timm_tokens.py LIBRARIES FOLDER...

LIBRARIES holds timm and torchvision, which timm imports (`pip install --no-deps --target`). Each folder is an export
with `images.pt`; `tokens.pt` is added: CLS and patches [2, N, 1 + T, D], by `load_state_dict` and by `local-dir:`.

A torchvision built for CUDA cannot load its compiled operators beside a torch for CPU, and then fails on import, when
it describes two of them that it believes to be there. They are declared here, and nothing calls them; all of timm and
of torchvision's Python is the real one.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
OPERATORS += ("q" + OPERATORS[0],)

libraries, *folders = map(Path, sys.argv[1:])
sys.path.append(str(libraries))
declared = torch.library.Library("torchvision", "FRAGMENT")
try:
    torch.ops.load_library(libraries / "torchvision" / "_C.so")
except OSError:
    for operator in OPERATORS:
        declared.define(operator)

timm = import_module("timm")

for folder in folders:
    told = json.loads((folder / "metadata.json").read_text())["timm"]
    network = timm.create_model(told["architecture"], **told["arguments"])
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    images = torch.load(folder / "images.pt", weights_only=True)
    both = []
    with torch.inference_mode():
        for loaded in (network, timm.create_model(f"local-dir:{folder}", pretrained=True)):
            tokens = loaded.eval().forward_features(images)
            assert torch.equal(loaded(images), tokens[:, 0])
            both.append(torch.cat([tokens[:, :1], tokens[:, 1 + told["arguments"]["reg_tokens"] :]], dim=1))
    torch.save(torch.stack(both), folder / "tokens.pt")
