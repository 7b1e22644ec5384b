"""A site's answers to questions for an evaluation: which columns, of whom, how often, and what leaves."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tomli_w
import torch

from client.relay import ask as ask_worker
from panfm.cli.site_lines import message_line
from panfm.config import Releasable
from panfm.config.site_description import LimitsConfig
from panfm.data.cache import open_store
from panfm.errors import ConfigError, LimitError, PendingApprovalError, ProtocolError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.site_score import cross_validated, probed, scored
from panfm.models import build_model
from panfm.models.packing import trained_manifest
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.sums_messages import Purpose, SumsReply, SumsTask
from panfm.site import Site, answer
from panfm.site.audit_log import AuditLog
from panfm.site.worker import Worker, listen
from tests.cases import approve
from tests.unit.site.test_site import parse_run, task
from tests.unit.site.test_task_site import TASK, first_round

LAST = 7
"""A run of six rounds is evaluated before this one."""
OLD = [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]
ALLOWED = ["updates", "counts", "evaluation"]


@pytest.fixture
def labelled(tmp_path, write_site):
    """Makes a site of 12 patients, the last of whom are held out: `old`, `grade` of three classes, and `age`."""

    def make(held_out=0, needs_approval=False, **limits):
        folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"), subjects=12)
        manifest = (folder / "manifest.csv").read_text().replace(",val", ",train")
        lines = [
            line.replace(",train", ",test") if int(line.partition(",")[0].rpartition("-")[2]) >= 12 - held_out else line
            for line in manifest.splitlines()[1:]
        ]
        (folder / "manifest.csv").write_text("\n".join([manifest.splitlines()[0], *lines]) + "\n")
        rows = [f"alpha-{n},{old},{'abc'[n % 3]},{40.5 + n * 7 % 12},{n < 2:d},same" for n, old in enumerate(OLD)]
        (folder / "labels.csv").write_text("\n".join(["subject,old,grade,age,rare,same", *rows[::-1]]) + "\n")
        table = {"may-leave": ALLOWED, "smallest-batch": 1, "smallest-steps": 1, "evaluation-labels": "all"} | limits
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "labels": "labels.csv", "limits": table}))
        return Site(folder, needs_approval=needs_approval)

    return make


def question(column="old", number=LAST, extra="", run_id="run-1"):
    return SumsTask(task(number, run_id=run_id, extra=extra), Purpose.EVALUATION, column=column)


def ask(site, asked):
    return SumsReply.from_records(site.give_sums(asked.to_records()))


def moved(asked, by):
    groups = {group: flat + np.float32(by) for group, flat in asked.model.groups.items()}
    return replace(asked, model=replace(asked.model, groups=groups))


def features_of(site, extra=""):
    run = parse_run(task(extra=extra).run_toml)
    store = open_store(site.folder, run.streams)
    return embed_store(build_model(run), store, np.arange(12), batch_size=3)


def test_without_held_out_patients_a_probe_is_cross_validated(labelled):
    site, truth = labelled(), np.array(OLD, float)[:, None]
    reply = ask(site, question())
    expected = scored(cross_validated(features_of(site), truth), truth, is_number=False, is_held_out=False)
    assert reply.score["auc"].tolist() == [expected.value, expected.low, expected.high, 0.0]
    assert reply.scored == 12
    assert (reply.sums, reply.errors, reply.loss, reply.inputs) == ({}, {}, None, {})


def test_held_out_patients_are_scored_by_a_probe_of_the_others(labelled):
    site, truth = labelled(held_out=4), np.array(OLD, float)[:, None]
    predicted = probed(features_of(site), truth, np.arange(8))[8:]
    expected = scored(predicted, truth[8:], is_number=False, is_held_out=True)
    reply = ask(site, question())
    assert reply.score["auc"].tolist() == [expected.value, expected.low, expected.high, 1.0]
    assert reply.scored == 4


def test_classes_are_scored_by_auc_and_numbers_by_r2(labelled):
    site = labelled()
    assert list(ask(site, question("grade")).score) == ["auc"]
    assert list(ask(site, question("age")).score) == ["r2"]


def test_a_task_is_scored_by_its_head_on_held_out_patients_only(labelled):
    site = labelled(held_out=4, **{"training-labels": ["old"]})
    first = first_round(TASK)
    drawn = np.random.default_rng(0).normal(size=first.groups["head"].shape).astype(np.float32)
    asked = SumsTask(
        replace(first, round_number=LAST, groups={**first.groups, "head": drawn}), Purpose.EVALUATION, column="old"
    )
    run = parse_run(first.run_toml)
    model = build_model(run, ["brain-mr", "heart-mr"])
    trained = trained_manifest(model, run.sharing).unpack_all(asked.model.groups)
    model.load_state_dict({name: torch.tensor(array) for name, array in trained.items()}, strict=False)
    store = open_store(site.folder, run.streams)
    outputs = model.heads.task(model.embed(store.batch(np.arange(8, 12)))).detach().double().numpy()
    expected = scored(outputs, np.array(OLD[8:], float)[:, None], is_number=False, is_held_out=True)
    assert ask(site, asked).score["auc"].tolist() == [expected.value, expected.low, expected.high, 1.0]
    assert ask(site, question(run_id="run-2")).scored == 4  # a probe of another run, beside the head


def test_a_task_without_held_out_patients_is_not_scored(labelled):
    """Its head has learned from all the others."""
    first = first_round(TASK)
    asked = SumsTask(replace(first, round_number=LAST), Purpose.EVALUATION, column="old")
    with pytest.raises(LimitError, match="too few patients"):
        ask(labelled(**{"training-labels": ["old"]}), asked)


@pytest.mark.parametrize("named", [[], ["grade"]])
def test_a_column_that_the_operator_has_not_named_is_not_evaluated(labelled, named):
    site = labelled(**{"evaluation-labels": named})
    with pytest.raises(LimitError, match=r"^this site's limits\.evaluation-labels lacks 'old', ") as caught:
        ask(site, question())
    assert caught.value.public == str(caught.value)
    assert not (site.state_dir / "evaluations.json").exists()


def test_columns_without_the_word_in_may_leave_are_a_fault_of_the_description(labelled):
    with pytest.raises(ConfigError, match=r'limits: evaluation-labels: nothing leaves, expected "evaluation" in may-l'):
        labelled(**{"may-leave": ["updates", "counts"]})


def test_by_default_nothing_is_evaluated():
    limits = LimitsConfig()
    assert limits.evaluation_labels == ()
    assert Releasable.EVALUATION not in limits.may_leave


@pytest.mark.parametrize(
    "extra",
    [
        "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 11\nnoise-multiplier = 1.0\nsample-rate = 0.5\n"
        "acknowledge-broken-guarantee = true\n",
        "[site-dp]\nepsilon = 8.0\ndelta = 0.01\nnum-sites = 2\nnoise-multiplier = 2.0\n",
    ],
)
def test_a_private_run_is_not_evaluated(labelled, extra):
    with pytest.raises(ProtocolError, match=r"^an evaluation is not covered by the run's claim"):
        ask(labelled(), question(extra=extra))


def test_whatever_the_data_decide_is_refused_in_the_same_words(labelled):
    """No such column, a class of two patients under a floor of three, and a column with one value."""
    site = labelled(**{"smallest-batch": 3})
    for column in ("absent", "rare", "same"):
        with pytest.raises(LimitError) as caught:
            ask(site, question(column))
        words = f"evaluation: '{column}': too few patients of this site have such a label, or it is none"
        assert caught.value.public == words
    assert ask(site, question()).scored == 12


def test_rounds_to_come_are_not_evaluated(labelled):
    with pytest.raises(ProtocolError, match=r"^evaluation: asked before round 3, expected after the last$"):
        ask(labelled(), question(number=3))


def test_a_server_that_asks_again_and_again_gets_as_many_models_as_the_limit_says(labelled):
    """Under other parameters and other run ids; what was asked is answered again with the same bits."""
    site = labelled(evaluations=2)
    first = question()
    bits = ask(site, first).score["auc"].tobytes()
    ask(site, moved(question(run_id="run-2"), 1e-3))
    for run_id in ("run-1", "run-2", "run-3"):
        with pytest.raises(LimitError, match=r"^this site's limits\.evaluations is 2$"):
            ask(Site(site.folder), moved(question(run_id=run_id), 2e-3))
    assert ask(Site(site.folder), first).score["auc"].tobytes() == bits
    assert ask(site, question("grade")).scored == 12


@pytest.mark.parametrize("run_id", ["run-1", "run-2"])
def test_a_server_that_chooses_other_patients_gets_no_second_answer(labelled, run_id):
    """Two scores whose patients differ by one would tell of that patient; so would one label that has changed."""
    site = labelled()
    ask(site, question())
    table = (site.folder / "labels.csv").read_text()
    (site.folder / "labels.csv").write_text(table.replace("alpha-4,1", "alpha-4,"))
    with pytest.raises(LimitError, match=r"^evaluation: 'old': this site has told of other patients$"):
        ask(Site(site.folder), question(run_id=run_id))
    assert ask(Site(site.folder), question("grade", run_id=run_id)).scored == 12


def test_an_experiment_that_nobody_has_approved_is_not_evaluated(labelled):
    with pytest.raises(PendingApprovalError, match="waits for this site's approval"):
        ask(labelled(needs_approval=True), question())


def test_the_audit_log_tells_the_column_and_a_refusal_tells_no_number(labelled):
    site = labelled()
    reply = answer(site, Frame(Kind.SUMS, question().to_records()))
    assert reply.kind is Kind.ANSWER
    assert site.summed == {"purpose": "evaluation", "labels": {"old": ["auc"]}}
    line = {"kind": "answer", "run": "run-1", "round": 7, "arrays": [], "numbers": ["scored"], "bytes": 9}
    told = message_line(line | {"time": "now", "sha256": "0" * 64, "summed": site.summed})
    assert "answer of round 7 of run-1, evaluation; old: auc: 9 bytes" in told
    refused = answer(site, Frame(Kind.SUMS, question("same").to_records()))
    assert refused.records.config["reason"].startswith("site alpha: LimitError: evaluation: 'same': too few patients")


def test_a_worker_at_its_socket_is_asked_and_its_audit_log_has_the_column(labelled):
    """The real frames, and an operator who has approved the experiment."""
    site, asked = labelled(needs_approval=True), question()
    approve(site.folder, parse_run(asked.model.run_toml))
    with listen(site.folder, site.config) as listener:
        worker = Worker(site.folder, listener)
        with ThreadPoolExecutor(1) as threads:
            replied = threads.submit(
                ask_worker, str(site.folder / ".panfm/run/worker.sock"), Frame(Kind.SUMS, asked.to_records())
            )
            worker.serve_one()
            reply = SumsReply.from_records(replied.result(timeout=60).records)
    assert (list(reply.score), reply.scored) == (["auc"], 12)
    [line] = AuditLog(site.state_dir).lines()
    assert line["summed"] == {"purpose": "evaluation", "labels": {"old": ["auc"]}}


def test_a_question_without_a_column_is_none(labelled):
    with pytest.raises(ProtocolError, match=r"^message: column is NoneType, expected str$"):
        ask(labelled(), question(""))
