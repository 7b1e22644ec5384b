"""`[task]`: what it may say, and which other settings do not go with it."""

import pytest

from panfm.config import dump_toml, parse_run
from panfm.config.task import TaskConfig
from panfm.errors import ConfigError
from panfm.privacy.guarantees import broken_guarantees
from tests.conftest import SMALL_RUN

OLD = '[task]\nlabel = "old"\nkind = "yes-no"\n'
PRIVATE = (
    "[patient-dp]\nepsilon = 8.0\ndelta = 1e-3\npublic-subjects = 50\nnoise-multiplier = 1.0\nsample-rate = 0.25\n"
)


def test_a_task_chooses_objective_and_masking_and_is_read_back():
    run = parse_run(SMALL_RUN + OLD)
    assert (run.objective.name, run.masking.policy, run.task.cells) == ("supervised", "random", ("0", "1"))
    assert parse_run(dump_toml(run)) == run
    assert parse_run(SMALL_RUN).task is None


def test_outputs_are_the_label_or_one_for_each_class():
    assert TaskConfig(label="old", kind="yes-no").outputs == ("old",)
    grade = TaskConfig(label="grade", kind="classes", classes=("low", "high", "none"))
    assert grade.outputs == ("grade=low", "grade=high", "grade=none")


def test_a_private_run_may_have_a_task():
    assert list(broken_guarantees(parse_run(SMALL_RUN + OLD + PRIVATE))) == []


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ('kind = "yesno"', r"task\.kind: .*expected one of yes-no, classes, number"),
        ('kind = "yes-no"\nclasses = ["a"]', "classes: found 1, expected two, the no and the yes"),
        ('kind = "classes"', "classes: found 0, expected 2 to 64"),
        ('kind = "classes"\nclasses = ["a", "B", "A"]', "'A' stands twice"),
        ('kind = "classes"\nclasses = ["1", "1.0"]', r"'1\.0' stands twice"),
        ('kind = "classes"\nclasses = ["a", "a\\u200b"]', "stands twice"),
        ('kind = "classes"\nclasses = ["nan", "NaN"]', "'NaN' stands twice"),
        ('kind = "number"\ncentre = 1.0', "scale: missing, a number needs centre and scale"),
        ('kind = "number"\ncentre = 1.0\nscale = 0.0', r"task\.scale"),
        ('kind = "number"\ncentre = nan\nscale = 1.0', r"task\.centre"),
        ('kind = "yes-no"\ncentre = 1.0', 'only for kind = "number"'),
    ],
)
def test_a_task_that_does_not_hold_is_one_line(keys, why):
    with pytest.raises(ConfigError, match=why) as caught:
        parse_run(f'{SMALL_RUN}[task]\nlabel = "x"\n{keys}\n')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (OLD + '[objective]\nname = "mae"\n', r"objective\.name: a run with \[task\] learns labels"),
        (OLD + '[masking]\npolicy = "sgm"\n', r"masking\.policy: nothing is hidden"),
        (OLD + '[sharing]\nhead = "private"\n', r"sharing\.head"),
        (OLD + '[sharing]\nrule = "plain"\n', r"sharing\.rule"),
        (OLD + "[features]\nwhitening = true\n", r"features\.whitening"),
        (OLD + '[features]\npooling = "per-stream"\n', r'features\.pooling: "per-stream" has other sizes'),
        ('[objective]\nname = "supervised"\n', r"expected a table \[task\]"),
        ('parts = "head"\n', r'train\.parts: "head" trains no encoder'),
    ],
)
def test_settings_that_do_not_go_with_a_task_are_refused(more, why):
    with pytest.raises(ConfigError, match=why):
        parse_run(SMALL_RUN + more)
