"""A site's answers to questions for sums over its patients: what leaves, under which limits, and only once."""

from dataclasses import replace

import numpy as np
import pytest
import tomli_w

from panfm.cli.site_lines import message_line
from panfm.config import dump_toml
from panfm.data.cache import open_store
from panfm.errors import LimitError, ProtocolError
from panfm.evaluate.embed import embed_store
from panfm.evaluate.label_sums import LabelSums, RidgePath
from panfm.models import build_model
from panfm.sharing.frames import Frame, Kind, encode
from panfm.sharing.sums_messages import Purpose, SumsReply, SumsTask
from panfm.site import Site, answer
from panfm.site.audit_log import AuditLog
from panfm.site.state import read_asked
from panfm.site.worker import _largest
from tests.unit.site.test_site import parse_run, task

TASKS = '[probe]\ntasks = { old = ["old"], pair = ["old", "tall"], other = ["other"] }\n'
GATED = TASKS + "[gate]\n"
OLD = [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]
ALLOWED = ["updates", "counts", "loss", "label-sums"]


@pytest.fixture
def labelled(tmp_path, write_site):
    """Makes a site of 12 patients, 11 of them for training; one does not know whether it is tall."""

    def make(**limits):
        folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"), subjects=12)
        rows = [
            f"alpha-{number},{old},{'' if number == 3 else number % 3 // 2},{number if number < 2 else ''}"
            for number, old in enumerate(OLD)
        ]
        (folder / "labels.csv").write_text("\n".join(["subject,old,tall,rare", *rows[::-1]]) + "\n")
        table = {"may-leave": ALLOWED, "smallest-batch": 1, "smallest-steps": 1} | limits
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "labels": "labels.csv", "limits": table}))
        return Site(folder)

    return make


LAST = 7
"""Before this round, which a run of six does not have, probes are asked for."""


def question(number=LAST, extra=TASKS, purpose=Purpose.PROBE, run_id="run-1", paths=None):
    return SumsTask(task(number, run_id=run_id, extra=extra), purpose, paths or {})


def ask(site, asked):
    return SumsReply.from_records(site.give_sums(asked.to_records()))


def test_sums_are_those_of_the_models_features_and_the_table(labelled):
    site = labelled()
    reply = ask(site, question())
    run = parse_run(task(extra=TASKS).run_toml)
    store = open_store(site.folder, run.streams)
    features = embed_store(build_model(run), store, np.arange(11), batch_size=3)
    expected = LabelSums.of(features, np.array(OLD[:11], float)[:, None])
    sums = LabelSums.from_arrays(reply.sums["old"], features=features.shape[1], labels=1)
    np.testing.assert_allclose(sums.xx, expected.xx, rtol=1e-5)
    np.testing.assert_allclose(sums.xy, expected.xy, rtol=1e-4)
    assert (float(sums.count), float(sums.y[0])) == (11.0, float(sum(OLD[:11])))
    assert reply.sums.keys() == {"old", "pair"}
    assert float(reply.sums["pair"]["count"][0]) == 10.0
    assert (reply.loss, reply.loss_subjects, reply.errors) == (None, None, {})


def test_errors_are_given_for_the_paths_that_came(labelled):
    site = labelled()
    size = build_model(parse_run(task(extra=TASKS).run_toml)).embedding_size
    axes = np.eye(size)[:, :2]
    path = RidgePath(
        np.array(11.0), np.zeros(size), np.ones(size), axes, np.full(2, 1e4), np.zeros((2, 1)), np.array([0.5])
    )
    reply = ask(site, question(purpose=Purpose.ERRORS, paths={"old": path.to_arrays()}))
    assert (list(reply.errors), reply.sums) == (["old"], {})
    assert reply.errors["old"].size == 13
    assert (reply.errors["old"] > 11 * 0.25).all()
    with pytest.raises(ProtocolError, match="ridge path of 'height', which the run does not name"):
        ask(Site(site.folder), question(purpose=Purpose.ERRORS, paths={"height": path.to_arrays()}))
    wrong = replace(path, centre=np.zeros(size - 1))
    with pytest.raises(ProtocolError, match="message: centre is float64"):
        ask(site, question(purpose=Purpose.ERRORS, paths={"old": wrong.to_arrays()}))


def test_sums_leave_only_where_the_operator_names_them(labelled):
    site = labelled(**{"may-leave": ["updates", "counts", "loss"]})
    with pytest.raises(LimitError, match=r"this site's limits\.may-leave lacks label-sums") as caught:
        ask(site, question())
    assert caught.value.public == str(caught.value)
    assert read_asked(site.state_dir / "runs" / "run-1") is None
    assert site.train_round(task(extra=TASKS)).updates


@pytest.mark.parametrize(
    "extra",
    [
        "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 11\nnoise-multiplier = 1.0\nsample-rate = 0.5\n"
        "acknowledge-broken-guarantee = true\n",
        "[site-dp]\nepsilon = 8.0\ndelta = 0.01\nnum-sites = 2\nnoise-multiplier = 2.0\n",
    ],
)
def test_a_private_run_gets_no_sums(labelled, extra):
    with pytest.raises(ProtocolError, match=r"sums are not covered by the run's claim|probe\.tasks: labels are summed"):
        ask(labelled(), question(extra=extra + TASKS))


def test_few_patients_give_nothing(labelled):
    site = labelled(**{"smallest-batch": 3})
    with pytest.raises(LimitError, match=r"^probe\.tasks: too few patients of this site know the labels of any$"):
        ask(site, question(extra='[probe]\ntasks = { rare = ["rare"] }\n'))


def test_a_question_has_one_answer(labelled):
    site, purpose = labelled(), Purpose.GATE
    first, asked = question(1, extra=GATED, purpose=purpose), question(2, extra=GATED, purpose=purpose)
    sums = ask(site, first).sums["old"]["x"]
    assert ask(Site(site.folder), first).sums["old"]["x"].tobytes() == sums.tobytes()
    ask(site, asked)
    moved = {group: flat + np.float32(1e-3) for group, flat in asked.model.groups.items()}
    again = replace(asked, model=replace(asked.model, groups=moved))
    with pytest.raises(ProtocolError, match=f"^{purpose} before round 2: asked before with other parameters$"):
        ask(Site(site.folder), again)
    with pytest.raises(ProtocolError, match=r"^round 1: \w+ is not what the run's seed gives"):
        ask(site, replace(first, model=replace(first.model, groups=moved)))
    ask(site, question(4, extra=GATED, purpose=purpose))
    with pytest.raises(ProtocolError, match=r"^gate before round 3: asked after a question before round 4$"):
        ask(site, question(3, extra=GATED, purpose=purpose))
    assert len(read_asked(site.state_dir / "runs" / "run-1").sums) == 3


def test_probes_are_asked_for_after_the_last_round_only(labelled):
    with pytest.raises(ProtocolError, match=r"^probe: asked before round 3, expected after the last$"):
        ask(labelled(), question(3))


@pytest.mark.parametrize("run_id", ["run-1", "run-2"])
def test_other_tasks_patients_or_labels_are_not_summed(labelled, run_id):
    """Sums of two sets that differ in one patient would show that patient."""
    site = labelled(**{"runs-at-once": 2})
    ask(site, question())
    other = '[probe]\ntasks = { tall = ["tall"] }\n'
    with pytest.raises(LimitError, match="this site has summed other tasks, patients or labels before") as caught:
        ask(Site(site.folder), question(run_id="run-2", extra=other))
    assert caught.value.public == str(caught.value)
    table = site.folder / "labels.csv"
    table.write_text(table.read_text().replace("alpha-3,1,,", "alpha-3,1,1,"))
    with pytest.raises(LimitError, match="this site has summed other tasks, patients or labels before"):
        ask(Site(site.folder), question(run_id=run_id))


def test_subjects_are_matched_by_one_rule_and_other_columns_are_not_read(labelled):
    site = labelled()
    expected = ask(site, question()).sums["old"]["xy"]
    table = site.folder / "labels.csv"
    table.write_text(table.read_text().replace("rare", "sex").replace("alpha-10,1,0,", "ALPHA-010,1,0,F"))
    assert ask(Site(site.folder), question()).sums["old"]["xy"].tobytes() == expected.tobytes()


def test_a_run_that_asks_for_sums_is_at_work(labelled):
    site = labelled()
    ask(site, question())
    with pytest.raises(LimitError, match=r"limits\.runs-at-once"):
        ask(site, question(run_id="run-2"))
    with pytest.raises(LimitError, match=r"limits\.runs-at-once"):
        site.train_round(task(run_id="run-2", extra=TASKS))


@pytest.mark.slow
def test_training_goes_on_with_the_same_bits_after_a_question(labelled, tmp_path):
    site = labelled()
    undisturbed = Site(site.folder, tmp_path / "undisturbed")
    loss = '[gate]\nmeasure = "validation-loss"\n'
    for extra in (GATED, TASKS + loss):
        run_id = f"run-{len(extra)}"
        for number in (1, 2, 3):
            asked = task(number, run_id=run_id, extra=extra)
            ask(site, SumsTask(asked, Purpose.GATE))
            one, other = site.train_round(asked), undisturbed.train_round(asked)
            assert all(one.updates[group].tobytes() == other.updates[group].tobytes() for group in one.updates)
            assert one.validation_loss == other.validation_loss
        for folder in (site.state_dir, undisturbed.state_dir):
            (folder / "runs" / run_id / "ended").touch()


def test_the_loss_of_the_val_split(labelled):
    site = labelled()
    reply = ask(site, question(1, extra='[gate]\nmeasure = "validation-loss"\n', purpose=Purpose.GATE))
    assert (reply.loss_subjects, reply.sums) == (1, {})
    assert np.isfinite(reply.loss)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"extra": "", "purpose": Purpose.GATE}, "gate: this run has no [gate]"),
        ({"extra": ""}, "probe.tasks: this run has no tasks"),
        ({"number": 8}, "round 8: expected 1 to 7"),
    ],
)
def test_what_the_run_does_not_ask_for_is_refused(labelled, asked, reason):
    found = answer(labelled(), Frame(Kind.SUMS, question(**asked).to_records()))
    assert found.kind is Kind.ERROR
    assert reason in found.records.config["reason"]


def test_a_site_without_a_table_gives_nothing(tmp_path, write_site):
    folder = write_site(tmp_path / "beta", "beta", ("brain",), extra=tomli_w.dumps({"limits": {"may-leave": ALLOWED}}))
    asked = question()
    groups = {name: flat for name, flat in asked.model.groups.items() if name != "stream:heart-mr"}
    with pytest.raises(LimitError, match="too few patients of this site know"):
        ask(Site(folder), replace(asked, model=replace(asked.model, groups=groups)))


def test_sums_are_named_in_the_audit_log(labelled, tmp_path):
    found = answer(labelled(), Frame(Kind.SUMS, question().to_records()))
    audit_log = AuditLog(tmp_path / "log")
    audit_log.append(found, encode(found))
    [line] = audit_log.lines()
    assert (line["round"], line["numbers"], line["words"]) == (LAST, [], ["round", "run-id"])
    assert {(name.split("/")[1], kind) for name, kind, _ in line["arrays"]} == {("old", "float64"), ("pair", "float64")}


def test_the_audit_log_tells_what_sums_are_of(labelled, tmp_path):
    site, audit_log = labelled(), AuditLog(tmp_path / "log")
    for purpose in (Purpose.PROBE, Purpose.ERRORS):
        found = answer(site, Frame(Kind.SUMS, question(purpose=purpose).to_records()))
        audit_log.append(found, encode(found), summed=site.summed)
    answer(site, Frame(Kind.SUMS, question(extra="").to_records()))
    assert site.summed is None
    first, last = audit_log.lines()
    assert first["summed"] == {"purpose": "probe", "labels": {"old": ["old"], "pair": ["old", "tall"]}}
    assert last["summed"] == {"purpose": "errors", "labels": {}}
    assert f"answer of round {LAST} of run-1, sums for probe; old: old; pair: old, tall: " in message_line(first)


def test_a_finished_run_is_probed_while_another_trains(labelled):
    """Its sums were refused: limits.runs-at-once counts runs that go on."""
    site = labelled()
    site.train_round(task(LAST - 1, extra=TASKS))
    site.train_round(task(run_id="run-2"))
    assert set(ask(site, question()).sums) == {"old", "pair"}
    with pytest.raises(LimitError, match=r"limits\.runs-at-once"):
        site.train_round(task(run_id="run-3"))
    (site.state_dir / "runs" / "run-1" / "ended").touch()
    with pytest.raises(LimitError, match="the operator of this site has ended it"):
        ask(site, question())


def test_a_question_holds_no_more_than_parameters_and_paths():
    run = parse_run(task(extra=TASKS).run_toml)
    size = build_model(run).embedding_size
    paths = sum(8 * (1 + 2 * labels + size * (size + labels + 3)) for labels in (1, 2, 1))
    config = {"run": dump_toml(run)}
    assert _largest(Kind.SUMS, config) - _largest(Kind.ROUND, config) == paths
