"""The probe of all sites' labels goes on after a crash between its two messages."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.preprocessing import StandardScaler

from panfm.config import RunConfig, StreamConfig
from panfm.config.probe import ProbeConfig
from panfm.errors import DataError
from panfm.evaluate.label_sums import RidgePath, site_errors, site_sums
from panfm.sharing.sums_messages import Purpose, SumsReply
from server import label_probe
from server.exchange import Answers, SiteSums, keep_sums, read_sums
from server.label_probe import fit_probes

TASKS = {"old": ("old",), "pair": ("a", "b")}
RUN = RunConfig(
    name="toy", streams={"brain-mr": StreamConfig(shape=(8, 8), patch=(4, 4))}, probe=ProbeConfig(tasks=TASKS)
)
STATE = SimpleNamespace(run_id="run-1", round_number=4)


class Sites:
    """Sites that answer the second message under one ridge path, as real ones do; `down` kills the server."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.data = {
            site: (
                random.normal(size=(30, 4)),
                {task: random.integers(0, 2, (30, len(names))).astype(float) for task, names in TASKS.items()},
            )
            for site in ("alpha", "beta", "gamma")
        }
        self.roster = {n: SimpleNamespace(site=site, subjects=30) for n, site in enumerate(self.data)}
        self.asked: list[Purpose] = []
        self.paths: dict[str, bytes] = {}
        self.down = False

    def ask(self, grid, run, state, roster, purpose, *, frozen, paths=None, watch=None):
        if purpose is Purpose.ERRORS and self.down:
            raise KeyboardInterrupt
        self.asked.append(purpose)
        replies, failed = {}, {}
        for site in sorted(handshake.site for handshake in roster.values()):
            features, targets = self.data[site]
            if purpose is Purpose.PROBE:
                sums = site_sums(features, targets, floor=1).tasks
                replies[site] = SumsReply("run-1", 5, {task: one.to_arrays() for task, one in sums.items()})
                continue
            told = {t: RidgePath.from_arrays(p, features=4, labels=len(TASKS[t])) for t, p in paths.items()}
            digest = b"".join(array.tobytes() for path in told.values() for array in path.to_arrays().values())
            if self.paths.setdefault(site, digest) != digest:
                failed[site] = "asked before with other parameters"
            else:
                replies[site] = SumsReply("run-1", 5, errors=site_errors(features, targets, told, floor=1))
        return Answers(replies, failed, 0.0)


@pytest.fixture
def fit(tmp_path, monkeypatch):
    sites = Sites()
    monkeypatch.setattr(label_probe, "ask_sums", sites.ask)

    def fit(there=("alpha", "beta", "gamma"), name="kept", run=RUN):
        roster = {node: handshake for node, handshake in sites.roster.items() if handshake.site in there}
        return fit_probes(None, run, STATE, roster, frozen={}, embedding_size=4, kept=tmp_path / name)

    return fit, sites


def test_a_crash_between_the_messages_changes_nothing(fit):
    fit, sites = fit
    undisturbed = fit(name="other").summary()
    assert set(undisturbed["tasks"]) == set(TASKS)
    sites.asked.clear()
    sites.down = True
    with pytest.raises(KeyboardInterrupt):
        fit()
    sites.down = False
    assert fit().summary() == undisturbed
    assert sites.asked == [Purpose.PROBE, Purpose.ERRORS]


def test_a_crash_after_the_second_message_and_a_site_that_is_away_then(fit):
    """Asked again for first sums, the others would refuse another ridge path."""
    fit, _ = fit
    whole = fit()
    again = fit(there=("alpha", "gamma"))
    assert again.failed["errors of old"] == "none of beta: the penalty is chosen without"
    assert again.probes["old"].summary()["patients"] == whole.probes["old"].summary()["patients"]


def test_discriminants_are_fitted_where_the_run_asks_for_them(fit):
    fit, sites = fit
    assert all(probe.lda is None for probe in fit(name="ridge").probes.values())
    asked = RUN.model_copy(update={"probe": RUN.probe.model_copy(update={"lda_shrinkage": 0.1})})
    probes = fit(run=asked).probes
    features = np.concatenate([features for features, _ in sites.data.values()])
    truth = np.concatenate([targets["pair"] for _, targets in sites.data.values()])[:, 1]
    standard = StandardScaler().fit_transform(features)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(standard, truth)
    scores = probes["pair"].lda.score(features)[:, 1]
    np.testing.assert_allclose(scores, theirs.decision_function(standard), rtol=1e-6, atol=1e-6)


def test_sums_are_kept_as_they_were(fit, tmp_path):
    fit, _ = fit
    assert read_sums(tmp_path / "kept") is None
    fit()
    sums = read_sums(tmp_path / "kept")
    keep_sums(tmp_path / "again", SiteSums(sums.by_site, {"beta": "offline"}))
    again = read_sums(tmp_path / "again")
    assert (list(again.by_site), again.failed) == (["alpha", "beta", "gamma"], {"beta": "offline"})
    for site, tasks in sums.by_site.items():
        for task, one in tasks.items():
            for part, array in one.to_arrays().items():
                np.testing.assert_array_equal(again.by_site[site][task].to_arrays()[part], array)
    keep_sums(tmp_path / "none", SiteSums({}, {"alpha": "offline"}))
    assert read_sums(tmp_path / "none") == SiteSums({}, {"alpha": "offline"})
    content = bytearray((tmp_path / "again").read_bytes())
    content[-1] ^= 1
    (tmp_path / "again").write_bytes(content)
    with pytest.raises(DataError, match="again"):
        read_sums(tmp_path / "again")
