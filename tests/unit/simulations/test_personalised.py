"""The personalised model of a site: the federated model, after more steps on the site's own labels."""

from types import SimpleNamespace

from panfm.config import dump_toml, parse_run
from panfm.evaluate.input_sums import with_constants
from simulations import finish
from tests.conftest import SMALL_RUN

SUMMED = SMALL_RUN.replace("channels = 3 }", 'channels = 3, input-constants = "summed" }')
TASK = '[task]\nlabel = "old"\nkind = "yes-no"\npersonal-steps = 3\n'


def test_it_reads_inputs_with_the_constants_of_the_federation(monkeypatch, tmp_path):
    """The sites' own constants would show the federated weights other inputs than they have learned."""
    asked = parse_run(SUMMED + TASK)
    constants = {"eye-fundus": ([0.1, 0.2, 0.3], [2.0, 3.0, 4.0])}
    trained = with_constants(asked, constants)
    given = {}
    monkeypatch.setattr(finish, "load_model", lambda _: (SimpleNamespace(state_dict=dict), trained))
    monkeypatch.setattr(finish, "load_site", lambda _: SimpleNamespace(name="alpha"))
    monkeypatch.setattr(finish, "open_training_store", lambda *_: None)
    monkeypatch.setattr(finish, "train_alone", lambda run, *_, **__: given.update(run=run))
    finish.personalise(finish.AloneJob(dump_toml(asked), tmp_path, tmp_path))
    stream = given["run"].streams["eye-fundus"]
    assert ([*stream.input_centre], [*stream.input_scale]) == constants["eye-fundus"]
    assert given["run"].summed_streams == ()
    assert stream.input_constants is None  # so that `train_alone` measures none of its own
    assert (given["run"].train.rounds, given["run"].train.local_steps) == (1, 3)
