"""A site's answer to a question for sums of its tokenizers' inputs: what leaves, under which limits, of whom."""

import json

import numpy as np
import pytest

from panfm.cli.site_lines import message_line
from panfm.config import description_hash, dump_toml, experiment_hash, parse_run
from panfm.data.cache import open_store
from panfm.errors import LimitError, PendingApprovalError, ProtocolError
from panfm.evaluate.input_sums import InputSums, measured_constants, with_constants
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.messages import Invitation, RoundTask
from panfm.sharing.release import NEEDED
from panfm.sharing.sums_messages import Purpose, SumsReply, SumsTask
from panfm.site import Site, answer
from panfm.site.audit_log import AuditLog
from panfm.site.decisions import WritableApprovals
from panfm.site.dry_run import _input_sums
from tests.unit.site.test_site import RUN, task

SUMMED = RUN.replace("patch = [4, 4, 8] }", 'patch = [4, 4, 8], input-constants = "summed" }')
LEAVE = ["updates", "counts", "input-sums"]


@pytest.fixture
def make_site(tmp_path, write_site):
    """Makes a site of five training patients with brain and heart."""

    def make(**limits):
        limits = {"may-leave": LEAVE} | limits
        table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in limits.items())
        return Site(write_site(tmp_path / "alpha", "alpha", ("brain", "heart"), extra=f"[limits]\n{table}\n"))

    return make


def question(text=SUMMED, run_id="run-1", number=1):
    return SumsTask(RoundTask(run_id, number, dump_toml(parse_run(text)), {}), Purpose.INPUTS)


def ask(site, asked):
    return SumsReply.from_records(site.give_sums(asked.to_records()))


def test_sums_are_those_of_the_training_images(make_site):
    site, run = make_site(), parse_run(SUMMED)
    reply = ask(site, question())
    assert reply.inputs.keys() == {"brain-mr", "heart-mr"}
    assert (reply.sums, reply.errors, reply.loss) == ({}, {}, None)
    store = open_store(site.folder, run.streams)
    for name, parts in reply.inputs.items():
        sums = InputSums.from_arrays(parts, run.streams[name], "statistics", subjects=5)
        expected = InputSums.of(store, name, run.streams[name], "statistics", np.arange(5))
        np.testing.assert_array_equal(sums.total, expected.total)
    assert site.summed == {"purpose": "inputs", "labels": {}, "streams": ["brain-mr", "heart-mr"]}


def test_sums_leave_only_where_the_operator_names_them(make_site):
    site = make_site(**{"may-leave": list(NEEDED)})
    with pytest.raises(LimitError, match=r"this site's limits\.may-leave lacks input-sums$") as caught:
        ask(site, question())
    assert caught.value.public == str(caught.value)
    assert not (site.state_dir / "input-sums.digest").exists()
    run, held = parse_run(SUMMED), {"brain-mr": 5}
    line = "no sums of inputs, limits.may-leave lacks input-sums: brain-mr"
    assert _input_sums(run, held, site.config.limits) == line
    allowed = site.config.limits.model_copy(update={"may_leave": tuple(LEAVE)})
    assert _input_sums(run, held, allowed) == "sums of what the tokenizers read, and of its squares: brain-mr"
    assert _input_sums(parse_run(RUN), held, allowed) == ""


def test_no_round_is_trained_without_constants(make_site):
    site, run = make_site(), parse_run(SUMMED)
    site.handshake(Invitation(dump_toml(run)))
    lacking = task()
    with pytest.raises(ProtocolError, match=r"^input-centre of brain-mr: missing, computed before round 1$"):
        site.train_round(RoundTask("run-1", 1, dump_toml(run), lacking.groups))
    ask(site, question())
    constants = measured_constants(run, [open_store(site.folder, run.streams)])
    whole = with_constants(run, {**constants, "liver-mr": constants["brain-mr"]})
    assert site.train_round(RoundTask("run-1", 1, dump_toml(whole), lacking.groups)).updates
    with pytest.raises(ProtocolError, match="expected before round 1 of a run that lacks constants"):
        ask(site, question(dump_toml(whole)))


PRIVATE = "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 11\nnoise-multiplier = 1.0\nsample-rate = 0.5\n"
OF_SITES = "[site-dp]\nepsilon = 8.0\ndelta = 0.01\nnum-sites = 2\nnoise-multiplier = 2.0\n"


@pytest.mark.parametrize(
    "extra", [PRIVATE, PRIVATE + "acknowledge-broken-guarantee = true\n", OF_SITES + "[federation]\nmin-sites = 2\n"]
)
def test_a_private_run_gets_no_sums(make_site, extra):
    with pytest.raises(ProtocolError, match=r"input-constants: inputs are summed|sums are not covered by the run's"):
        ask(make_site(), question(SUMMED + extra))


def test_streams_that_few_patients_hold_are_not_summed(make_site):
    site = make_site(**{"smallest-batch": 3})
    text = (site.folder / "manifest.csv").read_text().splitlines()
    kept = [line for line in text if "heart" not in line or line.startswith(("alpha-0", "alpha-1"))]
    (site.folder / "manifest.csv").write_text("\n".join(kept) + "\n")
    assert ask(site, question()).inputs.keys() == {"brain-mr"}


def test_inputs_of_other_patients_are_not_summed(make_site):
    """Two sums could be subtracted. Another run over the same patients, with other streams, gets the same."""
    site = make_site(**{"runs-at-once": 2})
    first = ask(site, question())
    one = SUMMED.replace('patch = [4, 4, 8], input-constants = "summed" }\nliver', "patch = [4, 4, 8] }\nliver")
    again = ask(site, question(one, run_id="run-2"))
    np.testing.assert_array_equal(again.inputs["brain-mr"]["total"], first.inputs["brain-mr"]["total"])
    assert again.inputs.keys() == {"brain-mr"}
    text = (site.folder / "manifest.csv").read_text()
    (site.folder / "manifest.csv").write_text(text.replace("alpha-4,heart-mr,alpha-4-heart.nii.gz,train\n", ""))
    with pytest.raises(LimitError, match=r"^this site has summed other patients or images of heart-mr before$"):
        ask(Site(site.folder), question())


def test_a_question_has_one_answer(make_site):
    site = make_site()
    assert encode(Frame(Kind.ANSWER, ask(site, question()).to_records())) == encode(
        Frame(Kind.ANSWER, ask(site, question()).to_records())
    )
    with pytest.raises(ProtocolError, match=r"^inputs before round 1: asked before with other parameters$"):
        ask(site, question(SUMMED.replace("seed = 3", "seed = 4")))
    with pytest.raises(ProtocolError, match="expected before round 1"):
        ask(site, question(number=2))


def test_the_audit_log_tells_what_was_summed(make_site):
    site = make_site()
    log = AuditLog(site.state_dir)
    frame = answer(site, Frame(Kind.SUMS, question().to_records()))
    log.append(frame, encode(frame), summed=site.summed)
    line = message_line(next(log.lines()))
    assert "of round 1 of run-1, sums for inputs; brain-mr; heart-mr: " in line
    assert "inputs/brain-mr/total float64[3]" in line


def test_an_experiment_is_named_by_its_hash_before_the_constants_were_computed(make_site):
    run = parse_run(SUMMED)
    site = Site(make_site().folder, needs_approval=True)
    WritableApprovals(site.folder, site.config).approve(experiment_hash(run), by="operator")
    whole = with_constants(run, measured_constants(run, [open_store(site.folder, run.streams)]))
    assert experiment_hash(whole) == experiment_hash(run) != description_hash(whole)
    site.handshake(Invitation(dump_toml(whole)))
    with pytest.raises(PendingApprovalError, match="approve"):
        site.handshake(Invitation(dump_toml(parse_run(RUN))))
