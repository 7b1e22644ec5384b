"""`[tracking]`: loggers by name, from outside, that fail, MLflow and Weights & Biases, and images."""

import io
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from panfm.config import experiment_hash
from panfm.errors import ConfigError
from server.run_folder import RunFolder
from server.tracking import Tracking, log_images, scalars, update_norms
from server.tracking_config import LOGGERS, tracking_of
from tests.unit.report.test_status import line
from tests.unit.server.test_tracking import events, told


def with_norms(number):
    sites = {
        name: {"seconds": 1.0, "loss": 0.5, "validation_loss": None, "norms": {"backbone": norm}}
        for name, norm in (("a", 1.0), ("b", 3.0))
    }
    return line(number, sites=sites)


@pytest.fixture
def folder_with(tmp_path, make_run, monkeypatch):
    """A run folder with loggers; those whose libraries are absent count as installed."""
    monkeypatch.setattr("server.tracking_config.find_spec", lambda name: object())

    def make(*loggers):
        names = ", ".join(f'"{name}"' for name in loggers)
        return RunFolder.create(tmp_path / "run", make_run(f'[tracking]\nloggers = [{names}]\nproject = "mine"\n'))

    return make


def png(width=2, height=3):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (64, 112, 168)).save(buffer, "PNG")
    return buffer.getvalue()


def test_norms_of_updates_are_a_mean_and_a_histogram(folder_with):
    assert update_norms(with_norms(1)) == {"backbone": [1.0, 3.0]}
    assert dict(scalars(with_norms(1)))["update-norm/backbone"] == 2.0
    folder = folder_with("tensorboard")
    with Tracking(folder) as tracking:
        tracking.round(with_norms(1))
    assert ("update-norms/backbone", 1) in told(folder.path)


def test_no_site_is_told_of_the_loggers(make_run):
    plain, tracked = make_run(), make_run('[tracking]\nloggers = ["mlflow"]\n')
    assert experiment_hash(plain) == experiment_hash(tracked)
    assert tracking_of(plain).loggers == ("tensorboard",)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            'loggers = ["mlfow"]',
            r"tracking\.loggers.*found 'mlfow', expected one of tensorboard, mlflow, wandb, did you",
        ),
        ('logers = ["mlflow"]', r"tracking\.logers: unknown"),
        ('project = "two words"', r"tracking\.project"),
    ],
)
def test_a_mistake_is_told_before_there_is_a_run_folder(tmp_path, make_run, table, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RunFolder.create(tmp_path / "run", make_run(f"[tracking]\n{table}\n"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("library", ["mlflow", "wandb"])
def test_a_library_that_is_not_there_is_told_before_there_is_a_run_folder(tmp_path, make_run, library, monkeypatch):
    monkeypatch.setattr("server.tracking_config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{library} is not installed, expected: pip install 'panfm\[{library}\]'$"):
        RunFolder.create(tmp_path / "run", make_run(f'[tracking]\nloggers = ["{library}"]\n'))


def test_a_logger_of_ones_own(folder_with, monkeypatch):
    monkeypatch.setattr(LOGGERS, "_targets", dict(LOGGERS._targets))
    heard = []

    class ListLogger:
        def __init__(self, folder, run_id):
            heard.append(run_id)

        def add(self, line):
            heard.append(line["round"])

        def close(self):
            heard.append("closed")

    LOGGERS.register("list", ListLogger)
    with Tracking(folder_with("list"), "run-1") as tracking:
        tracking.round(line(1))
    assert heard == ["run-1", 1, "closed"]


@pytest.mark.parametrize("fails_in", ["__init__", "add", "close"])
def test_a_logger_that_fails_is_a_line_in_the_log(folder_with, monkeypatch, caplog, fails_in):
    monkeypatch.setattr(LOGGERS, "_targets", dict(LOGGERS._targets))

    def fail(*_):
        raise KeyError("no such\nserver")

    methods = dict.fromkeys(("__init__", "add", "close"), lambda *_: None) | {fails_in: fail}
    LOGGERS.register("failing", type("Failing", (), methods))
    folder = folder_with("failing", "tensorboard")
    with Tracking(folder) as tracking:
        tracking.round(line(1))
    [record] = [record for record in caplog.records if "failing" in record.message]
    assert "KeyError" in record.message
    assert len(record.message.splitlines()) == 1
    assert ("loss/federation", 1) in told(folder.path)


def test_images_of_a_finished_run_come_after_its_rounds(folder_with, monkeypatch):
    """A logger that takes no images is not begun again."""
    monkeypatch.setattr(LOGGERS, "_targets", dict(LOGGERS._targets))
    begun = []
    plain = {"__init__": lambda *words: begun.append(words), "add": lambda *_: None, "close": lambda *_: None}
    LOGGERS.register("numbers", type("Numbers", (), plain))
    folder = folder_with("numbers", "tensorboard")
    with Tracking(folder) as tracking:
        for number in (1, 2):
            folder.append_round(with_norms(number))
            tracking.round(with_norms(number))
    rounds = told(folder.path)
    log_images(folder, "small-1", {"slices/brain-mr/masked": png()})
    assert len(begun) == 1
    assert told(folder.path).keys() == rounds.keys() | {("slices/brain-mr/masked", 2)}
    [image] = [value.image for event in events(folder.path) for value in event.summary.value if value.HasField("image")]
    assert (image.width, image.height, image.encoded_image_string) == (2, 3, png())


def test_nothing_but_a_simulation_logs_images():
    """Sites and servers of real runs have no line of code that gives a logger an image."""
    root = Path(__file__).parents[3]
    rooms = ("client", "panfm", "server", "simulations", "strategies")
    users = {path.relative_to(root).as_posix() for room in rooms for path in (root / room).rglob("*.py")
             if "log_images(" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert users == {"server/tracking.py", "simulations/finish.py"}


class FakeMlflow:
    """What the logger uses of `mlflow`, in memory."""

    def __init__(self):
        self.entities = SimpleNamespace(Metric=lambda name, value, time, step: (name, value, step))
        self.runs, self.metrics, self.images, self.ended, self.uri = {}, [], [], [], None

    def MlflowClient(self, tracking_uri):
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, files):
        assert files.endswith("/run/mlflow")
        return f"experiment {name}"

    def search_runs(self, experiments, query):
        return [run for run_id, run in self.runs.items() if query == f"tags.`panfm.run-id` = '{run_id}'"]

    def create_run(self, experiment, run_name, tags):
        assert experiment == "experiment mine"
        run = SimpleNamespace(info=SimpleNamespace(run_id=f"mlflow-{len(self.runs)}"))
        self.runs[tags["panfm.run-id"]] = run
        return run

    def log_text(self, run_id, text, name):
        assert name == "run.toml"
        assert "tracking" not in text

    def log_batch(self, run_id, metrics):
        self.metrics += [(run_id, *metric) for metric in metrics]

    def log_image(self, run_id, image, artifact_file):
        self.images.append((run_id, image.size, artifact_file))

    def set_terminated(self, run_id):
        self.ended.append(run_id)


def test_mlflow_goes_on_with_the_run_that_it_began(folder_with, monkeypatch):
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = folder_with("mlflow")
    for number in (1, 2):
        with Tracking(folder, "small-1") as tracking:
            tracking.round(with_norms(number))
    folder.append_round(with_norms(2))
    log_images(folder, "small-1", {"slices/brain-mr/input": png()})
    assert list(mlflow.runs) == ["small-1"]
    assert mlflow.ended == ["mlflow-0"] * 3
    assert mlflow.images == [("mlflow-0", (2, 3), "slices/brain-mr/input-round-2.png")]
    assert mlflow.uri == f"sqlite:///{folder.path.resolve()}/mlflow.db"
    expected = [("mlflow-0", name, value, number) for number in (1, 2) for name, value in scalars(with_norms(number))]
    assert mlflow.metrics == expected


def test_wandb_is_offline_unless_the_coordinator_says_otherwise(folder_with, monkeypatch):
    calls, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("end"))
    fake = SimpleNamespace(
        init=lambda **words: calls.append(words) or run,
        Settings=lambda **words: words,
        Histogram=tuple,
        Image=lambda image: image.size,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = folder_with("wandb")
    with Tracking(folder, "small-1") as tracking:
        tracking.round(with_norms(1))
    [words] = calls
    assert (words["mode"], words["id"], words["resume"], words["project"]) == ("offline", "small-1", "allow", "mine")
    assert words["settings"]["disable_code"]
    [(values, step), end] = logged
    assert (step, end) == (1, "end")
    assert values == dict(scalars(with_norms(1))) | {"update-norms/backbone": (1.0, 3.0)}
    folder.append_round(with_norms(1))
    log_images(folder, "small-1", {"slices/brain-mr/input": png()})
    assert [words["id"] for words in calls] == ["small-1"] * 2
    assert logged[-2:] == [({"slices/brain-mr/input": (2, 3)}, 1), "end"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["mlflow", "wandb"])
def test_the_library_itself_offline(folder_with, library, tmp_path, monkeypatch, caplog):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'panfm[{library}]'")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = folder_with(library)
    for number in (1, 2):
        with Tracking(folder, "small-1") as tracking:
            tracking.round(with_norms(number))
    folder.append_round(with_norms(2))
    log_images(folder, "small-1", {"slices/brain-mr/input": png()})
    assert not [record.message for record in caplog.records if library in record.message]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if library == "wandb":
        assert list((folder.path / "wandb").rglob("*.wandb"))
        assert list((folder.path / "wandb").rglob("*.png"))
        return
    client = import_module("mlflow").MlflowClient(tracking_uri=f"sqlite:///{folder.path.resolve()}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    history = client.get_metric_history(run.info.run_id, "update-norm/backbone")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 2.0)]
    [image] = client.list_artifacts(run.info.run_id, "slices/brain-mr")
    assert image.path == "slices/brain-mr/input-round-2.png"
    assert sorted(path.name for path in (folder.path / "mlflow").rglob("*.*")) == ["input-round-2.png", "run.toml"]
