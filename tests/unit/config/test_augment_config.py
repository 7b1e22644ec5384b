"""`[augment]`, objectives of views, constants of inputs: defaults by modality, and what is refused in one line."""

import pytest

from panfm.config import dump_toml, parse_run
from panfm.errors import ConfigError
from panfm.privacy.guarantees import checked_run, privacy_label

STREAMS = """
name = "small"
[streams]
brain-mr = { spacing-mm = [2.0, 2.0, 2.0], shape = [8, 8, 4], patch = [4, 4, 4] }
skin-photo = { shape = [8, 8], patch = [4, 4], channels = 3 }
"""
PRIVACY = """
[masking]
policy = "random"
[patient-dp]
epsilon = 8.0
delta = 1e-3
public-subjects = 100
noise-multiplier = 1.5
sample-rate = 0.1
"""


def fault(extra, streams=STREAMS):
    with pytest.raises(ConfigError) as caught:
        checked_run(parse_run(streams + extra))
    [line] = str(caught.value).splitlines()
    return line.partition(": ")[2]


def test_a_run_without_the_table_is_described_as_before():
    assert parse_run(STREAMS).augment is None
    assert "augment" not in dump_toml(parse_run(STREAMS))
    assert "input" not in dump_toml(parse_run(STREAMS))


def test_strengths_are_mild_and_follow_the_modality():
    augment = parse_run(STREAMS + "[augment]\n").augment
    brain, skin = augment.of_stream("brain-mr"), augment.of_stream("skin-photo")
    assert brain.crop == skin.crop == (0.25, 1.0)
    assert (brain.rotation, brain.brightness, brain.contrast) == (0.35, 0.1, 0.1)
    assert (brain.flips, brain.bias_field) == ((), 0.1)
    assert (skin.flips, skin.bias_field) == (("height", "width"), 0.0)


def test_a_stream_has_its_own_strengths_and_the_rest_from_the_table():
    run = parse_run(STREAMS + '[augment]\nblur = 0.25\n[augment.streams.brain-mr]\nflips = ["R"]\nrotation = 0.0\n')
    own, other = run.augment.of_stream("brain-mr"), run.augment.of_stream("skin-photo")
    assert (own.flips, own.rotation, own.blur) == (("R",), 0.0, 0.25)
    assert (other.rotation, other.blur) == (0.35, 0.25)
    assert parse_run(dump_toml(run)) == run


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("[augment]\ncrop = [0.9, 0.5]\n", "augment: crop: least share 0.9 is above the greatest, 0.5"),
        (
            "[augment.streams.skin-photo]\ncrop = [0.9, 0.5]\n",
            "augment: streams.skin-photo.crop: least share 0.9 is above the greatest, 0.5",
        ),
        ("[augment.streams.eye-oct]\n", "augment.streams: found 'eye-oct', expected some of brain-mr, skin-photo"),
        (
            '[augment.streams.brain-mr]\nflips = ["width"]\n',
            "augment.streams.brain-mr.flips: found 'width', expected some of R, A, S",
        ),
        ('[objective]\nname = "views"\n', 'objective.name: "views" compares views, expected a table [augment]'),
    ],
)
def test_what_does_not_fit_is_refused(extra, line):
    assert fault(extra) == line


def test_views_couple_patients_and_their_sibling_does_not():
    refused = fault('[objective]\nname = "views"\n[augment]\n' + PRIVACY)
    assert (
        refused == 'objective.name: "views" compares the patients of a batch, set "view-regression", "latent" or "mae"'
    )
    run = parse_run(STREAMS + '[objective]\nname = "view-regression"\n[augment]\n' + PRIVACY)
    assert privacy_label(checked_run(run)).startswith("(8, 0.001)-DP")


def test_the_automatic_momentum_of_the_teacher_follows_the_length_of_the_run():
    def momenta(rounds, value='"auto"'):
        text = f"[train]\nrounds = {rounds}\nlocal-steps = 20\nteacher-momentum = {value}\n"
        return parse_run(STREAMS + text).train.teacher_momenta

    assert momenta(50) == (0.99, 0.999)
    assert momenta(10) == (0.95, 0.995)
    assert momenta(10, "[0.5, 1.0]") == (0.5, 1.0)
    short = parse_run(STREAMS + '[train]\nrounds = 1\nlocal-steps = 1\nteacher-momentum = "auto"\n').train
    assert short.teacher_momenta == (0.0, 0.0)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            "input-centre = [0.1], input-scale = [1.0, 1.0, 1.0]",
            'streams.brain-mr.input-centre: 1 numbers, the tokenizer "statistics" has 3 inputs',
        ),
        ("input-centre = [0.1, 0.2, 0.3]", "streams.brain-mr: input-centre and input-scale: expected both or neither"),
    ],
)
def test_constants_of_inputs_are_as_many_as_the_inputs(own, line):
    assert fault("", STREAMS.replace("patch = [4, 4, 4]", f"patch = [4, 4, 4], {own}")) == line
