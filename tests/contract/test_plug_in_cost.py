"""The files that a new part costs, counted by adding one to a copy of the tree and training with it."""

import filecmp
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cases import copy_packages

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = "panfm/registry.py"


@dataclass(frozen=True)
class PlugIn:
    """A part that somebody adds."""

    table: str
    """Of the registry, by its first line."""
    line: str
    """For that table."""
    files: dict[str, str]
    """Path -> text."""
    use: str
    """Program that trains with the plug-in, run after `PRELUDE`."""


PRELUDE = """
import numpy as np
import panfm
from panfm.config import parse_run
from panfm.data.store import ImageStore
from panfm.privacy.private_step import PrivateGradient
from panfm.training.trainer import Trainer

assert panfm.__file__.startswith(ROOT), panfm.__file__
STREAMS = 'brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }'
TRAIN = 'rounds = 1\\nlocal-steps = 2\\nbatch-size = 4'
PRIVACY = '''[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 8
noise-multiplier = 1.0
sample-rate = 0.9
'''

def read(extra):
    return parse_run(f'name = "added"\\n[streams]\\n{STREAMS}\\n[train]\\n{TRAIN}\\n{extra}')

def train(extra):
    '''Two plain steps and two private ones.'''
    images = np.random.default_rng(0).random((8, 1, 8, 8, 4), dtype=np.float32)
    everyone = np.arange(8)
    store = ImageStore(tuple('abcdefgh'), ('train',) * 8, {'brain-mr': images}, {'brain-mr': everyone})
    trainer = Trainer(read(extra))
    before = trainer.shared_state()
    words = {'first_step': 0, 'num_steps': 2, 'site': 'a', 'round_number': 1}
    assert trainer.train(store, everyone, **words).num_skipped == 0
    after = trainer.shared_state()
    assert any(not np.array_equal(value, after[name]) for name, value in before.items())
    trainer = Trainer(read(extra + PRIVACY))
    source = PrivateGradient(trainer, trainer.patch_features(store), everyone)
    assert all(trainer.step(source, number) for number in range(2))
"""

OBJECTIVE = PlugIn(
    table="OBJECTIVES",
    line='"shrink": "panfm.training.objectives.shrink:ShrinkConfig",',
    files={
        "panfm/training/objectives/shrink.py": '''"""Predict zero from every hidden token."""

from torch import nn

from panfm.config.objective import ObjectiveConfig
from panfm.models.heads import ObjectiveHeads
from panfm.training.objectives.interface import Objective, mean_over


class ShrinkConfig(ObjectiveConfig):
    implementation = "panfm.training.objectives.shrink:ShrinkObjective"
    name: str = "shrink"
    power: int = 2

    def couplings(self):
        return iter(())



class ShrinkObjective(Objective):
    needs_teacher = False

    def __init__(self, config, model, seed):
        self.config = config

    @staticmethod
    def build_heads(config, width, num_features):
        return ObjectiveHeads({"shrink": nn.Linear(width, 1)})

    def targets(self, teacher, features, mask, full):
        return {}

    def loss(self, student, output, targets):
        predicted = student.heads.shrink(output.predictions).squeeze(-1).abs() ** self.config.power
        return mean_over(predicted, output.mask.hidden.valid)
'''
    },
    use="""
from panfm.models import build_model
from panfm.models.sizes import sizes_of

text = '[objective]\\nname = "shrink"\\npower = 4\\n[masking]\\npolicy = "random"\\n'
run = read(text)
assert run.objective.power == 4
assert sizes_of(run).parameters == sum(parameter.numel() for parameter in build_model(run).parameters())
train(text)
""",
)
MASKING_POLICY = PlugIn(
    table="MASKING_POLICIES",
    line='"root": "panfm.training.root_policy:RootPolicy",',
    files={
        "panfm/training/root_policy.py": '''"""Hide more of the streams that the model leans on."""

from panfm.training.policies import MaskingPolicy, saliency_couplings


class RootPolicy(MaskingPolicy):
    is_guided = True
    couplings = staticmethod(saliency_couplings)

    def scores(self, relative, num_subjects, step, generator):
        return relative.sqrt()
'''
    },
    use="""
assert 'root' in read('[masking]\\npolicy = "root"\\n').masking.policy
masking = '[masking]\\npolicy = "root"\\nsaliency = "attention"\\n'
for scope in ('subject', 'site', 'federation'):
    train(f'[objective]\\nstandardise = false\\n{masking}scope = "{scope}"\\n')
""",
)
PLUG_INS = {"objective": OBJECTIVE, "masking policy": MASKING_POLICY}


def add(plug_in: PlugIn, tree: Path) -> None:
    """Write its files, and its line into its table."""
    for path, text in plug_in.files.items():
        (tree / path).write_text(text)
    registry = (tree / REGISTRY).read_text().splitlines()
    start = next(number for number, line in enumerate(registry) if line.startswith(f"{plug_in.table} = Registry("))
    end = next(number for number, line in enumerate(registry) if number > start and line.strip() == "},")
    registry.insert(end, f"        {plug_in.line}")
    (tree / REGISTRY).write_text("\n".join(registry) + "\n")


def touched(tree: Path) -> set[str]:
    """Files of a tree that the repository lacks, or has otherwise."""
    paths = [path.relative_to(tree).as_posix() for path in tree.rglob("*.py")]
    return {path for path in paths if not (ROOT / path).exists() or not filecmp.cmp(ROOT / path, tree / path, False)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLUG_INS)
def test_a_plug_in_costs_its_files_and_a_line_of_the_registry(tmp_path, kind):
    plug_in = PLUG_INS[kind]
    copy_packages(tmp_path, "panfm")
    add(plug_in, tmp_path)
    assert touched(tmp_path) == {*plug_in.files, REGISTRY}
    script = f"ROOT = {str(tmp_path)!r}\n{PRELUDE}{plug_in.use}"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
