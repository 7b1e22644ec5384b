"""A run with `[task]` at a site: the operator names the column first, and the server hears why a site takes no part."""

from dataclasses import replace

import numpy as np
import pytest
import tomli_w

from panfm.config import dump_toml, parse_run
from panfm.errors import LimitError
from panfm.models import build_model
from panfm.models.packing import frozen_manifest, trained_manifest
from panfm.sharing.frames import Frame, Kind
from panfm.sharing.messages import Invitation, RoundTask
from panfm.site import Site, answer
from panfm.site.dry_run import dry_run
from tests.conftest import NO_FLOORS
from tests.unit.site.test_site import RUN, same

TASK = '[task]\nlabel = "old"\nkind = "yes-no"\n'
PRIVATE = (
    "[patient-dp]\nepsilon = 50.0\ndelta = 1e-3\npublic-subjects = 50\nnoise-multiplier = 1.0\nsample-rate = 0.5\n"
)


@pytest.fixture
def site(tmp_path, write_site):
    """Makes a site of six patients, one without the label and one for validation, with limits that differ."""

    def make(cells=("1", "0", "", "1", "0", "1"), column="old", **limits):
        folder = tmp_path / "alpha"
        if not folder.exists():
            write_site(folder, "alpha", ("brain", "heart"))
        rows = [f"alpha-{number},{cell}" for number, cell in enumerate(cells)]
        (folder / "labels.csv").write_text("\n".join([f"subject,{column}", *rows]) + "\n")
        table = NO_FLOORS | {"training-labels": ["old"], "runs-at-once": 2} | limits
        (folder / "site.toml").write_text(tomli_w.dumps({"name": "alpha", "labels": "labels.csv", "limits": table}))
        return Site(folder)

    return make


def first_round(extra=TASK) -> RoundTask:
    run = parse_run(RUN + extra)
    model = build_model(run, ["brain-mr", "heart-mr"])
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    groups, frozen = (make(model, run.sharing).pack_all(tensors) for make in (trained_manifest, frozen_manifest))
    return RoundTask("run-1", 1, dump_toml(run), groups, frozen=frozen)


def refusal(site, extra=TASK) -> str:
    """Return the error text that the server is told."""
    toml = dump_toml(parse_run(RUN + extra))
    with pytest.raises(LimitError) as caught:
        site.handshake(Invitation(toml))
    error = answer(site, Frame(Kind.HANDSHAKE, Invitation(toml).to_records())).records.config["reason"]
    assert caught.value.public in error
    return error


def test_only_labelled_patients_count_and_a_round_repeats_to_the_bit(site):
    shaken = site().handshake(Invitation(first_round().run_toml))
    assert (shaken.subjects, shaken.streams) == (4, {"brain-mr": 4, "heart-mr": 4})
    reply = site().train_round(first_round())
    assert reply.weights["head"] == (8.0,)
    assert reply.updates["head"].any()
    assert same(site().train_round(first_round()), reply)
    assert not same(site(("0", "1", "", "0", "1", "1")).train_round(replace(first_round(), run_id="run-2")), reply)


@pytest.mark.parametrize("named", [[], ["young"], ["Old"]])
def test_a_label_that_the_operator_has_not_named_is_not_trained_on(site, named):
    line = "task.label: this site's limits.training-labels lacks 'old', its operator may add it"
    assert refusal(site(**{"training-labels": named})).endswith(f"site alpha: LimitError: {line}")


def test_all_allows_any_column(site):
    assert site(**{"training-labels": "all"}).handshake(Invitation(first_round().run_toml)).subjects == 4


def test_a_site_without_the_label_or_with_other_values_says_so_without_a_value(site):
    assert refusal(site(column="young")).endswith("task.label: old: no column of this site's label table")
    told = refusal(site(("1", "secret", "0", "0", "0", "0")))
    assert told.endswith("task.label: old: this site has other values than the run's")
    assert "secret" not in told


def test_a_private_run_is_not_told_of_one_patients_other_value(site):
    cells = ("1", "secret", "0", "0", "0", "0")
    shaken = site(cells).handshake(Invitation(dump_toml(parse_run(RUN + TASK + PRIVATE))))
    assert shaken.subjects == 50


def test_a_private_round_moves_head_and_encoder_and_tells_no_loss(site):
    reply = site().train_round(first_round(TASK + PRIVATE))
    assert reply.updates["head"].any()
    assert np.isfinite(reply.updates["backbone"]).all()
    assert (reply.loss, reply.validation_loss, reply.num_skipped) == (None, None, None)


def test_a_dry_run_names_the_column(site):
    assert dry_run(site().folder, parse_run(RUN + TASK)).trains_on == "old"
