"""Try one local step of a run at a site: its cost, and everything that would leave. Nothing leaves."""

import resource
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from panfm.config import Releasable, RunConfig, dump_toml, experiment_hash
from panfm.config.site_description import LimitsConfig
from panfm.models import build_model
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.privacy.guarantees import checked_run
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.groups import has_group
from panfm.sharing.messages import Handshake, Invitation, RoundReply, RoundTask
from panfm.site.admission import check_floors, check_sizes, with_public_subjects
from panfm.site.approvals import Approvals, Decision
from panfm.site.site import Site


@dataclass(frozen=True)
class DryRun:
    """Cost of a run at a site, and the messages that would leave."""

    experiment: str
    """Hash of the description, by which the operator approves it."""
    decision: Decision | None
    """The operator's, if there is one."""
    lacks_start: bool
    """Whether it starts from a model whose hashes its description lacks; with them it has another hash."""
    handshake: Handshake
    reply: RoundReply
    bytes_up: int
    """Size of the whole reply."""
    seconds: float
    """Of a round of one local step, once it is warm."""
    memory_gib: float
    """Most memory that this process filled so far."""
    gpu_gib: float | None
    """Most memory of the GPU, if there is one."""
    sums: str = ""
    """What the run asks for besides rounds, and whether the site's limits let it leave; empty if nothing."""
    trains_on: str = ""
    """The column of the label table that the run trains on; empty if it reads none."""
    input_sums: str = ""
    """Line on the sums that the run asks for before round 1, for its constants of inputs; empty if it asks for none."""


def dry_run(folder: Path, run: RunConfig) -> DryRun:
    """Shake hands, and train one step of round 1, with private state and ledger in a temporary folder.

    Raises:
        PanfmError: the run would fail at this site.
    """
    checked_run(run)
    one_step = run.train.model_copy(update={"local_steps": 1})
    short = run.model_copy(update={"cohort": None, "start": None, "train": one_step})
    if run.summed_streams:
        from panfm.evaluate.input_sums import neutral_constants, with_constants  # most runs do without

        short = with_constants(short, {name: neutral_constants(run, name) for name in run.summed_streams})
    experiment = experiment_hash(run)
    with tempfile.TemporaryDirectory(prefix="panfm-dry-run-") as state:
        site = Site(folder, Path(state))
        decision = Approvals(folder, site.config).decisions().get(experiment)
        check_floors(run.train, with_public_subjects(run, site.config).patient_dp, site.config.limits)
        check_sizes(run, site.config.limits)
        limits = site.config.limits.model_copy(update={"smallest_steps": 1})
        elsewhere = {"ledger_dir": f"{state}/ledger", "state_dir": state}
        site.config = site.config.model_copy(update={"limits": limits, **elsewhere})
        handshake = site.handshake(Invitation(dump_toml(short)))
        task = _first_task(short, handshake)
        site.train_round(task)  # builds the model and fills the caches
        start = time.monotonic()
        reply = site.train_round(task)
        seconds = time.monotonic() - start
    return DryRun(
        experiment=experiment,
        decision=decision,
        lacks_start=run.start is not None and run.start.parameters is None,
        handshake=handshake,
        reply=reply,
        bytes_up=len(encode(Frame(Kind.ANSWER, reply.to_records()))),
        seconds=seconds,
        memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        gpu_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        sums=_sums(run, site.config.limits),
        trains_on=run.task.label if run.task else "",
        input_sums=_input_sums(run, handshake.streams, site.config.limits),
    )


def _input_sums(run: RunConfig, streams: Collection[str], limits: LimitsConfig) -> str:
    """Write a line on the sums that a run asks for before round 1, and whether they leave; empty if none.

    Args:
        streams: Those of the site.
    """
    names = [name for name in run.summed_streams if name in streams]
    if not names:
        return ""
    if Releasable.INPUT_SUMS not in limits.may_leave:
        return f"no sums of inputs, limits.may-leave lacks {Releasable.INPUT_SUMS.value}: {', '.join(names)}"
    return f"sums of what the tokenizers read, and of its squares: {', '.join(names)}"


def _sums(run: RunConfig, limits: LimitsConfig) -> str:
    """Write a line on the sums that a run asks for, and whether the site's limits let them leave; empty if none."""
    asked = []
    if run.probe.tasks:
        asked.append(f"after the last round for sums of features and labels: {', '.join(run.probe.tasks)}")
    if run.gate:
        asked.append(f"after every round for the measure of its gate ({run.gate.measure})")
    needed = Releasable.LOSS if not run.probe.tasks else Releasable.LABEL_SUMS
    given = "they leave" if needed in limits.may_leave else f"nothing leaves, limits.may-leave lacks {needed.value}"
    return f"asks {' and '.join(asked)}; {given}" if asked else ""


def _first_task(run: RunConfig, handshake: Handshake) -> RoundTask:
    model = build_model(run)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    groups, frozen = (
        {
            name: flat
            for name, flat in manifest.pack_all(tensors).items()
            if has_group(handshake.group_hashes, name, handshake.streams)
        }
        for manifest in (trained_manifest(model, run.sharing), frozen_manifest(model, run.sharing))
    )
    return RoundTask("dry-run", 1, dump_toml(run), groups, frozen=frozen)
