"""A server that wants one patient's gradient out of a site that keeps the limits that `panfm site init` writes."""

from dataclasses import replace

import numpy as np
import pytest
import tomli_w
import torch

from panfm.config import RunConfig, dump_toml, parse_run
from panfm.data.cache import open_store
from panfm.errors import LimitError, PanfmError
from panfm.models import build_model
from panfm.sharing.coding import decode
from panfm.sharing.groups import GroupManifest, is_shared
from panfm.sharing.messages import Invitation, RoundTask
from panfm.site import Site
from panfm.training.trainer import Trainer
from tests.cases import quick

RUN = """
name = "reader"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [4, 4, 8] }
"""
ONE_PATIENT = "[train]\nrounds = 6\nvalidate-every = 1\nlocal-steps = 1\nbatch-size = 1\n"
FEWEST = "[train]\nrounds = 6\nvalidate-every = 1\nlocal-steps = 5\nbatch-size = 8\n"


@pytest.fixture
def hospital(tmp_path, write_site):
    """A site with the default limits; some of its patients hold a heart as well, and the others only a brain."""

    def make(subjects=20, hearts=20, **limits) -> Site:
        folder = write_site(
            tmp_path / f"alpha-{subjects}-{hearts}-{len(limits)}", "alpha", ("brain", "heart"), subjects
        )
        rows = (folder / "manifest.csv").read_text().splitlines()
        kept = [row for row in rows if "heart-mr" not in row or int(row.split("-")[1].split(",")[0]) < hearts]
        (folder / "manifest.csv").write_text("\n".join(kept) + "\n")
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "limits": limits}))
        return Site(folder)

    return make


def task(train: str, number=1, *, text=RUN, streams=("brain-mr", "heart-mr"), run_id="run-1") -> RoundTask:
    run = parse_run(text + train)
    model = build_model(run)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    groups = GroupManifest.of(model.parameter_groups(), tensors).pack_all(tensors)
    kept = {group for group in groups if not group.startswith("stream:")} | {f"stream:{name}" for name in streams}
    kept -= {group for group in groups if not is_shared(run.sharing, group)}
    return RoundTask(run_id, number, dump_toml(run), {group: groups[group] for group in groups if group in kept})


def as_one_adam_step(site: Site, run: RunConfig) -> np.ndarray:
    """The backbone's first AdamW step, by the gradient of the patient whom a site draws first."""
    trainer = Trainer(run)
    store = open_store(site.folder, run.streams)
    words = {"first_step": 0, "num_steps": 1, "site": "alpha", "round_number": 1}
    trainer.train(store, store.indices("train"), **words)
    parameters = sorted((name, each) for name, each in trainer.model.named_parameters() if name.startswith("backbone."))
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for _, each in parameters]
    gradient = torch.cat([each.reshape(-1) for each in gradients])
    return (-gradient / (gradient.abs() + 1e-8)).numpy()


def test_a_batch_of_one_patient_and_one_step_reads_a_gradient_where_a_site_sets_no_floor(hospital):
    """The control: what the floors are for."""
    site, asked = hospital(**{"smallest-batch": 1, "smallest-steps": 1}), task(ONE_PATIENT)
    update = site.train_round(asked).updates["backbone"]
    expected = as_one_adam_step(site, parse_run(asked.run_toml))
    assert np.corrcoef(update, expected)[0, 1] > 0.999


@pytest.mark.parametrize(
    ("train", "why"),
    [
        (ONE_PATIENT, r"train\.batch-size is 1, expected at least limits\.smallest-batch \(8\)"),
        (FEWEST.replace("= 8", "= 7"), r"train\.batch-size is 7, expected at least limits\.smallest-batch \(8\)"),
        (FEWEST.replace("= 5", "= 4"), r"train\.local-steps is 4, expected at least limits\.smallest-steps \(5\)"),
    ],
)
def test_server_asks_for_too_small_a_batch_or_too_few_steps_and_is_refused(hospital, train, why):
    site = hospital()
    with pytest.raises(LimitError, match=why):
        site.handshake(Invitation(task(train).run_toml))
    with pytest.raises(LimitError, match=why):
        site.train_round(task(train))
    assert site.train_round(task(FEWEST)).updates


def test_server_hides_one_patient_behind_a_privacy_table_of_its_own_epsilon_and_is_refused(hospital):
    private = """
    [objective]
    standardise = false
    [masking]
    policy = "random"
    [patient-dp]
    epsilon = 1000.0
    delta = 1e-3
    public-subjects = 40
    noise-multiplier = 0.5
    sample-rate = 0.05
    """
    with pytest.raises(LimitError, match=r"under the site's own bound only"):
        hospital().handshake(Invitation(task(FEWEST + private).run_toml))


def test_server_adds_next_to_no_noise_to_a_sample_of_one_patient_and_is_refused(hospital):
    """Sample rate and public number are the server's: 1,000 patients a step as it says, one or none in fact."""
    private = """
    [objective]
    standardise = false
    [masking]
    policy = "random"
    [patient-dp]
    epsilon = 1000.0
    delta = 1e-8
    public-subjects = 1000000
    noise-multiplier = 1e-12
    sample-rate = 0.001
    acknowledge-broken-guarantee = true
    """
    run_toml = task(FEWEST + private).run_toml
    with pytest.raises(LimitError, match="noise but makes no claim"):
        hospital().handshake(Invitation(run_toml))


def test_server_says_that_a_site_has_a_billion_patients_and_is_refused(hospital):
    """Its claim is whole, and its samples hold one of the twenty patients or none."""
    private = """
    [objective]
    standardise = false
    [masking]
    policy = "random"
    [patient-dp]
    epsilon = 1000.0
    delta = 1e-11
    public-subjects = 1000000000
    noise-multiplier = 0.3
    sample-rate = 0.01
    """
    for limits in ({}, {"public-subjects": 20, "delta": 1e-4}):
        with pytest.raises(PanfmError, match=r"under the site's own bound only|limits\.public-subjects"):
            hospital(**limits).handshake(Invitation(task(FEWEST + private).run_toml))


def test_server_names_a_batch_that_the_site_cannot_fill_and_is_refused(hospital):
    site = hospital(subjects=8)  # one is for validation
    for ask in (lambda: site.handshake(Invitation(task(FEWEST).run_toml)), lambda: site.train_round(task(FEWEST))):
        with pytest.raises(LimitError, match=r"^7 training subjects, expected at least limits\.smallest-batch \(8\)$"):
            ask()


def test_server_asks_for_a_stream_that_one_patient_holds_and_never_hears_of_it(hospital):
    site, asked = hospital(hearts=1), task(FEWEST, streams=("brain-mr",))
    assert site.handshake(Invitation(asked.run_toml)).streams == {"brain-mr": 19}
    assert set(site.train_round(asked).weights) == {"backbone", "head", "stream:brain-mr"}


def test_server_asks_for_nothing_but_a_stream_that_few_patients_hold_and_is_refused(hospital):
    run = parse_run(RUN + FEWEST)
    alone = run.model_copy(update={"streams": {"heart-mr": run.streams["heart-mr"]}})
    with pytest.raises(LimitError, match=r"3 training subjects"):
        hospital(hearts=3).handshake(Invitation(dump_toml(alone)))


def test_server_waits_for_a_round_whose_batches_hold_a_stream_of_few_patients_and_gets_no_update_of_it(hospital):
    """Eight of 119 patients hold a heart, and a round draws forty: far fewer than eight hearts."""
    reply = hospital(subjects=120, hearts=8).train_round(task(FEWEST))
    assert not reply.updates["stream:heart-mr"].any()
    assert reply.weights["stream:heart-mr"] == (0.0,)
    assert "heart-mr" not in reply.saliency
    assert reply.updates["stream:brain-mr"].any()
    assert reply.updates["backbone"].any()


@pytest.mark.parametrize("coding", quick(["int8", "bf16"], 1))
def test_a_stream_that_was_withheld_keeps_what_its_coding_owes(hospital, coding):
    site = hospital(subjects=120, hearts=8)
    asked = task(f'{FEWEST}[sharing]\ncoding = "{coding}"\n')
    assert not site.train_round(asked).updates["stream:heart-mr"].any()
    assert site.train_round(replace(asked, round_number=2)).state_round == 1


@pytest.mark.parametrize("counting", [1, 4])
def test_server_lets_all_steps_but_a_few_be_left_out_and_gets_no_answer(hospital, monkeypatch, counting):
    """As with parameters under which the loss of the other batches is not finite."""
    from panfm.training.objectives.latent.objective import LatentObjective

    real, calls = LatentObjective.loss, []

    def often_nan(self, *views):
        calls.append(0)
        return real(self, *views) * (1.0 if len(calls) <= counting else float("nan"))

    monkeypatch.setattr(LatentObjective, "loss", often_nan)
    with pytest.raises(LimitError, match=rf"{counting} steps counted, expected at least limits\.smallest-steps \(5\)"):
        hospital().train_round(task(FEWEST))


def rate_at(run: RunConfig, step: int) -> float:
    from panfm.training.schedules import warmup_cosine

    position = (step + 0.5) / run.train.total_steps
    return run.train.learning_rate * warmup_cosine(position, warmup=run.train.warmup)


@pytest.mark.parametrize(("key", "step"), [("weight-decay", 4), ("proximal-mu", 3)])
def test_server_erases_all_steps_but_the_last_and_gets_no_answer(hospital, key, step):
    """A decay, or a pull back to the global parameters, of one over the learning rate of a step."""
    rising = FEWEST + "learning-rate = 0.1\nwarmup = 0.17\n"
    factor = 1.0 / rate_at(parse_run(RUN + rising), step)
    with pytest.raises(PanfmError, match=r"one step makes most of the update|proximal-mu|weight-decay"):
        hospital().train_round(task(f"{rising}{key} = {factor!r}\n"))


def test_server_reads_no_loss_of_a_single_validation_patient(hospital):
    reply = hospital().train_round(task(FEWEST))
    assert reply.validation_loss is None
    assert reply.loss is not None


ONE_TOKEN = """
name = "reader"
seed = 3
[streams]
brain-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [8, 8, 8] }
heart-mr = { spacing-mm = [8.0, 8.0, 8.0], shape = [8, 8, 8], patch = [8, 8, 8] }
[model]
tokenizer = "patch"
[objective]
name = "mae"
[masking]
policy = "random"
"""
"""Of a patient who holds one stream nothing can be hidden, so that patient has no loss."""


def test_server_makes_a_token_of_every_image_so_that_one_patient_has_a_loss_and_gets_no_answer(hospital):
    site = hospital(hearts=1, **{"smallest-batch": 1})
    asked = task(FEWEST.replace("= 8", "= 64"), text=ONE_TOKEN)
    update = site.train_round(asked).updates["backbone"]
    assert update.any()  # the control: one patient's gradient
    rows = (site.folder / "manifest.csv").read_text().splitlines()
    hearts = [row.replace("brain", "heart") for row in rows[10:] if "brain-mr" in row]
    kept = [row for index, row in enumerate(rows) if index < 10 or "brain-mr" not in row]
    (site.folder / "manifest.csv").write_text("\n".join(kept + hearts) + "\n")
    with pytest.raises(LimitError, match=r"^1 subjects of a step have anything to guess, expected at least"):
        with_floors(site).train_round(asked)


def with_floors(site: Site) -> Site:
    """The same folder under the limits that `panfm site init` writes, and another state."""
    (site.folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "state-dir": "other"}))
    return Site(site.folder)


def test_server_reads_no_loss_of_many_validation_patients_of_whom_one_has_a_loss(hospital):
    """Eleven patients train, with two tokens each; of nine that validate only one has two."""
    site = hospital(hearts=12)
    header, *rows = (site.folder / "manifest.csv").read_text().splitlines()
    patients = [int(row.split("-")[1].split(",")[0]) for row in rows]
    split = [f"{row.rsplit(',', 1)[0]},{'val' if n >= 11 else 'train'}" for n, row in zip(patients, rows, strict=True)]
    (site.folder / "manifest.csv").write_text("\n".join([header, *split]) + "\n")
    reply = Site(site.folder).train_round(task(FEWEST, text=ONE_TOKEN))
    assert reply.loss is not None
    assert reply.validation_loss is None


EXPERTS = (
    RUN
    + """
[model]
backbone = "director-experts"
hidden-multiple = 1
experts = { count = 32, active = 1, noise = [100.0, 100.0] }
[sharing]
experts = "%s"
coding = "%s"
[masking]
policy = "random"
"""
)


@pytest.mark.parametrize("coding", ["float32", "int8"])
@pytest.mark.parametrize("sharing", ["pooled", "naive"])
def test_server_has_so_many_experts_that_one_serves_a_patient_and_gets_none_of_it(
    hospital, monkeypatch, sharing, coding
):
    """Their numbers, their routers' rows, the director that is made of them, and their weights."""
    from panfm.training.experts import ExpertTraining

    used, real = {}, ExpertTraining.regularise

    def spy(self, loss, encoded, progress):
        for layer, routed in zip(self.layers, encoded.routed, strict=True):
            used.setdefault(layer, []).extend(routed.chosen[:, 0].tolist())
        return real(self, loss, encoded, progress)

    monkeypatch.setattr(ExpertTraining, "regularise", spy)
    asked = task(FEWEST, text=EXPERTS % (sharing, coding))
    site = hospital()
    reply = site.train_round(asked)
    model = build_model(parse_run(asked.run_toml))
    manifest = GroupManifest.of(model.parameter_groups(), model.state_dict())
    few = [(layer, expert) for layer, chosen in used.items() for expert in range(32) if chosen.count(expert) < 8]
    assert any(used[layer].count(expert) == 1 for layer, expert in few)
    for group in ("experts", "router"):
        arrived = decode(coding, manifest, reply.updates)[group]
        for name, rows in manifest.unpack(group, arrived).items():
            assert not any(rows[expert].any() for layer, expert in few if name.startswith(layer + "."))
        if sharing == "pooled":
            weights = dict(zip(manifest.experts(group), reply.weights[group], strict=True))
            for layer in used:
                kept = [expert for expert in range(32) if (layer, expert) not in few]
                assert not kept or not any(weights[layer, expert] for owner, expert in few if owner == layer)
                assert sum(weights[layer, expert] for expert in range(32)) == pytest.approx(40.0)
    assert not reply.updates["director"].any()
    assert reply.updates["backbone"].any()


def test_experts_that_enough_patients_share_leave_with_their_weight(hospital):
    text = EXPERTS.replace("count = 32", "count = 2") % ("pooled", "float32")
    reply = hospital().train_round(task(FEWEST, text=text))
    assert reply.updates["experts"].any()
    assert reply.updates["director"].any()
    assert all(weight > 0.0 for weight in reply.weights["experts"])


def test_what_is_withheld_of_an_expert_never_follows_as_a_debt_of_its_coding(hospital, monkeypatch):
    from panfm.site.floors import Floors

    real, masks = Floors.withheld, []
    monkeypatch.setattr(Floors, "withheld", lambda *words: masks.append(real(*words)) or masks[-1])
    site, asked = hospital(), task(FEWEST, text=EXPERTS % ("pooled", "int8"))
    site.train_round(asked)
    session, withheld = site._session(asked.run_toml), masks[0]["experts"]
    owed = session._lost["experts"]
    assert owed[~withheld].any() or withheld.all()
    assert not owed[withheld].any()
    before = session._lost["backbone"].copy()
    arrived = session._updates({"backbone": np.ones(len(before), dtype=bool)})
    assert not arrived["backbone"].any()
    assert before.any()
    assert np.array_equal(session._lost["backbone"], before)
