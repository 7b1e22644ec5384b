"""A training step reads nothing back from the device: neither a number, nor how many entries of a mask are set."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from panfm.registry import MASKING_POLICIES, OBJECTIVES
from panfm.training.gradient import BatchGradient
from panfm.training.trainer import Trainer
from tests.cases import quick
from tests.unit.training.test_supervised import labelled

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item")
EXPERTS = '[model]\nbackbone = "director-experts"\n'
TASK = '[task]\nlabel = "old"\nkind = "yes-no"\n'
AUGMENT = "[augment]\nrotation = 0.1\nnoise = 0.1\nblur = 0.1\n"
MODELS = ("", EXPERTS)
MORE = {
    "supervised": TASK,
    "views": AUGMENT,
    "view-regression": AUGMENT,
    "static": 'static-organs = ["heart"]\n',
    "sgm": "warmup-steps = 1\n",
}
"""What a choice needs besides its name."""
CASES = [
    *(
        (f'[objective]\nname = "{name}"\n{MORE.get(name, "")}', model)
        for name in OBJECTIVES.built_in
        for model in MODELS
    ),
    *((f'[masking]\npolicy = "{name}"\n{MORE.get(name, "")}', EXPERTS) for name in MASKING_POLICIES.built_in),
    ('[masking]\nscope = "subject"\nsaliency = "attention"\n', ""),
    ('[masking]\nscope = "federation"\nsaliency = "value"\n', ""),
    ('[objective]\nname = "mae"\n', AUGMENT),
]


def is_of_optimiser(event: FunctionEvent | None) -> bool:
    """Whether an event is inside AdamW's fused kernel: that for CPUs reads its step counters, which lie in the CPU's
    memory, one by one; that for GPUs reads them on the GPU."""
    return event is not None and (event.name == "aten::_fused_adamw_" or is_of_optimiser(event.cpu_parent))


@pytest.mark.parametrize(("choice", "model"), quick(CASES, 4))
def test_a_step_reads_nothing_from_the_device(make_run, make_store, choice, model):
    """The store lacks streams of some subjects, and the third step of the round is the one that is watched."""
    run = make_run(f"proximal-mu = 0.1\n{model}{choice}")
    store = make_store(run)
    trainer = Trainer(run)
    inputs = trainer.training_inputs(labelled(store) if run.task else store)
    source = BatchGradient(trainer, trainer.experts, inputs, np.arange(12), site="a", round_number=1)
    for number in range(2):
        source.record(trainer.step(source, number, {"brain-mr": 2.0}))
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        source.record(trainer.step(source, 2, {"brain-mr": 2.0}))
    seen = Counter(event.name for event in watched.events() if not is_of_optimiser(event))
    assert seen["aten::mm"] + seen["aten::addmm"] > 0
    assert {name: seen[name] for name in WAITS} == dict.fromkeys(WAITS, 0)
    assert source.result({}, {}).num_skipped == 0


def test_reading_a_number_would_be_seen():
    value = torch.ones(2)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        float(value.sum())
        _ = value[value > 0]
    seen = {event.name for event in watched.events()}
    assert set(WAITS[:2]) <= seen
