"""A third backbone costs its file and a line of the registry: done in a copy of the tree, which then trains with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import copy_packages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("panfm", "strategies", "server", "client", "simulations")
BACKBONE = '''"""A small convolutional network of MONAI over the tokens of one stream, on a grid of 2 x 2 x 1."""

import torch
from monai.networks.blocks import ResidualUnit
from torch import nn

from panfm.models.backbone import Backbone, Encoded
from panfm.models.tokens import gather_tokens

GRID = (2, 2, 1)


class GridNetwork(Backbone):
    """Residual units over the grid; hidden patches are zero."""

    def __init__(self, width, depth, heads, config):
        super().__init__()
        self.units = nn.ModuleList(ResidualUnit(3, width, width, subunits=1, norm=None) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, layout, *, saliency=None, keep_blocks=False, route="experts", exploration=None):
        grid = tokens.new_zeros(len(tokens), GRID[0] * GRID[1] * GRID[2], tokens.shape[2])
        subject = torch.arange(len(tokens))[:, None].expand_as(layout.patch_index)
        grid[subject[layout.valid], layout.patch_index[layout.valid]] = tokens[layout.valid]
        features, blocks = grid.transpose(1, 2).unflatten(2, GRID), []
        for unit in self.units:
            features = unit(features)
            blocks.append(gather_tokens(features.flatten(2).transpose(1, 2), layout.patch_index))
        cls = features.flatten(2).mean(dim=2)
        return Encoded(self.norm(cls), self.norm(blocks[-1]), layout, tuple(blocks) if keep_blocks else (), None)

    def last_layers(self, count):
        return [*self.units[len(self.units) - count :], self.norm]

    def numbers_per_token(self):
        return [4 * self.norm.normalized_shape[0]] * len(self.units)
'''
LINE = '        "grid-network": "panfm.models.grid_network:GridNetwork",\n'
RUN = """
name = "third"
seed = 3
organs = ["brain"]
streams.brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
model.backbone = "grid-network"
masking.policy = "random"
train = { rounds = 1, local-steps = 2, batch-size = 3 }
"""
TRAIN = """
import sys
from pathlib import Path
import safetensors.torch
import torch
from panfm.config import parse_run
from panfm.models import build_model
from server.run_folder import RunFolder
from simulations.engines.job import Job
from simulations.engines.local import run as run_local

sites, run_dir, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
run = parse_run(text)
RunFolder.create(run_dir, run)
run_local(Job(sites, run_dir))
before = build_model(run).state_dict()
after = safetensors.torch.load_file(run_dir / "model" / "model.safetensors")
assert before.keys() == after.keys()
print(sorted(name for name in after if not torch.equal(before[name], after[name])))
"""
PRIVATE = """
[objective]
standardise = false
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 40
noise-multiplier = 1.0
sample-rate = 0.5
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree with the third backbone in it."""
    copy = tmp_path_factory.mktemp("tree")
    copy_packages(copy, *PACKAGES)
    (copy / "panfm" / "models" / "grid_network.py").write_text(BACKBONE)
    registry = copy / "panfm" / "registry.py"
    first, found, rest = registry.read_text().partition("BACKBONES = Registry(\n")
    start, brace, entries = rest.partition("{\n")
    registry.write_text(first + found + start + brace + LINE + entries)
    return copy


def touched(copy: Path) -> list[str]:
    """Files of the copy that the tree does not have like this."""
    files = (path.relative_to(copy) for path in copy.rglob("*.py"))
    return sorted(
        str(file)
        for file in files
        if not (ROOT / file).exists() or (ROOT / file).read_bytes() != (copy / file).read_bytes()
    )


def python(tree: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that imports the copy."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_backbone_costs_two_files(tree):
    assert touched(tree) == ["panfm/models/grid_network.py", "panfm/registry.py"]


@pytest.mark.slow
def test_it_trains_a_round_and_is_averaged(tree, tmp_path, write_site):
    for name in ("alpha", "beta"):
        write_site(tmp_path / "sites" / name, name, ("brain",))
    done = python(tree, TRAIN, str(tmp_path / "sites"), str(tmp_path / "run"), RUN)
    assert done.returncode == 0, done.stderr
    moved = done.stdout.splitlines()[-1]
    assert "backbone.units.1.conv.unit0.conv.weight" in moved
    assert "streams.brain-mr.project.weight" in moved
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"alpha"' in lines[0]
    assert '"beta"' in lines[0]
    assert '"backbone"' in lines[0]


REFUSED = """
import sys
import numpy as np
from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.errors import ConfigError
from panfm.training.trainer import Trainer

def train(text):
    images = {"brain-mr": np.zeros((4, 1, 8, 8, 8), np.float32)}
    store = ImageStore(tuple("abcd"), ("train",) * 4, images, {"brain-mr": np.arange(4)})
    trainer = Trainer(parse_run(text))
    trainer.train(store, np.arange(4), first_step=0, num_steps=1, site="a", round_number=1)

for text in sys.argv[1:]:
    try:
        train(text)
    except ConfigError as error:
        print(error)
"""


@pytest.mark.slow
def test_it_is_refused_where_it_does_not_declare_or_have_what_is_needed(tree):
    texts = RUN + PRIVATE, RUN.replace("grid-network", "grid-networks"), RUN.replace('"random"', '"sgm"')
    done = python(tree, REFUSED, *texts)
    private, unknown, guided = done.stdout.splitlines()
    assert 'model.backbone: "grid-network" does not declare whether it couples patients' in private
    assert "model.backbone: found 'grid-networks', expected one of " in unknown
    assert "model.backbone: it has no saliency" in guided
