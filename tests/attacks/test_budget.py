"""The server chooses numbers that make what a site books smaller than what it spends."""

import math
import resource
import time

import pytest

from panfm.config import load_site, parse_run, parse_site
from panfm.errors import BudgetError, ConfigError, LedgerError, PanfmError, ProtocolError
from panfm.privacy import ledger as ledger_module
from panfm.privacy import mechanisms as mechanisms_module
from panfm.privacy.ledger import Ledger, Limits, mechanisms_of
from panfm.privacy.mechanisms import Mechanism, epsilon
from panfm.site import Site
from tests.cases import quick
from tests.unit.site.test_private_site import GUIDED, PRIVACY, RANDOM, RUN, spent, task

LIMITS = "[limits]\nepsilon = 4.0\ndelta = 1e-3\npublic-subjects = 40\n"


def private_run(**changes):
    """A private run with numbers that no description was asked about."""
    run = parse_run(RUN + RANDOM + PRIVACY)
    return run.model_copy(update={"patient_dp": run.patient_dp.model_copy(update=changes)})


def asked(privacy: str, round_number: int = 1):
    return task(round_number, privacy=privacy)


@pytest.mark.parametrize(
    ("limits", "missing"),
    [
        ("epsilon = 1.0", "delta and public-subjects"),
        ("epsilon = 1.0\ndelta = 1e-3", "public-subjects"),
        ("epsilon = 1.0\npublic-subjects = 40", "delta"),
    ],
)
def test_a_site_cannot_leave_to_the_server_what_its_epsilon_means(limits, missing):
    """With epsilon alone, public-subjects = 1 and delta = 0.1 of the server's booked an epsilon of -0.0952."""
    with pytest.raises(ConfigError) as caught:
        parse_site(f'name = "alpha"\n[limits]\n{limits}\n')
    [line] = str(caught.value).splitlines()
    assert line == (
        f"site description: limits: epsilon: limits nothing while the server chooses {missing}; add {missing}"
    )


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ("delta = 0.5", "limits.delta"),
        ("delta = 0.0", "limits.delta"),
        ("delta = 1e-300", "limits.delta"),
        ("epsilon = inf\ndelta = 1e-3\npublic-subjects = 40", "limits.epsilon"),
        ("epsilon = nan\ndelta = 1e-3\npublic-subjects = 40", "limits.epsilon"),
        ("epsilon = 1.0\ndelta = 0.01\npublic-subjects = 40", r"delta: 0.01 is above 1 / \(10 public-subjects\)"),
    ],
)
def test_a_site_cannot_set_limits_that_promise_nothing(limits, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_site(f'name = "alpha"\n[limits]\n{limits}\n')


@pytest.mark.parametrize("noise", [1.5, 1e4])
@pytest.mark.parametrize("delta", [1e-3, 0.1, 0.999])
def test_no_mechanism_costs_less_than_nothing(noise, delta):
    assert epsilon([Mechanism("gradients", (), 1.0, noise, 0.01, 2)], delta) >= 0.0


def test_server_sets_one_patient_and_a_large_delta_and_nothing_below_zero_is_booked(tmp_path, write_site):
    """A site without limits is at the server's mercy, but its ledger holds no nonsense."""
    site = Site(write_site(tmp_path / "alpha", "alpha", ("brain", "heart")))
    weak = PRIVACY.replace("1e-3", "0.01").replace("= 40", "= 1").replace("sample-rate = 0.5", "sample-rate = 0.001")
    site.train_round(asked(weak))
    assert spent(site)[-1]["epsilon"] >= 0.0


SERVERS = [
    PRIVACY,
    PRIVACY.replace("1e-3", "1e-9"),
    PRIVACY.replace("= 40", "= 1"),
    PRIVACY.replace("= 40", "= 1").replace("1e-3", "0.1"),
    PRIVACY.replace("= 40", "= 1000000").replace("1e-3", "1e-8"),
    PRIVACY.replace("epsilon = 9.0", "epsilon = 1e300"),
]


@pytest.mark.parametrize("limits", quick([LIMITS, "[limits]\ndelta = 1e-3\n", "[limits]\npublic-subjects = 100\n"], 1))
def test_server_chooses_delta_and_patients_and_the_site_books_under_its_own(tmp_path, write_site, limits):
    """Whatever the server says, an entry's epsilon is the accountant's at a delta that is no larger than the site's."""
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"), extra=limits)
    found = load_site(folder).limits
    largest = found.delta or 0.1 / found.public_subjects
    for privacy in SERVERS:
        try:
            Site(folder).train_round(asked(privacy))
        except PanfmError:
            continue
    entries = spent(Site(folder))[1:]
    assert entries
    mechanisms = []
    for entry in entries:
        mechanisms += mechanisms_of(entry)
        assert entry["delta"] <= largest
        assert entry["limit"] <= (found.epsilon or math.inf)
        assert entry["epsilon"] <= entry["limit"]
        assert entry["epsilon"] >= epsilon(mechanisms, entry["delta"]) - 1e-9


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"noise_multiplier": 0.29}, "gradients have noise 0.29, expected a number of at least 0.3"),
        ({"noise_multiplier": 1e-30}, "gradients have noise"),
        ({"noise_multiplier": math.nan}, "gradients have noise nan"),
        ({"noise_multiplier": math.inf}, "gradients have noise inf"),
        ({"noise_multiplier": -1.0}, "gradients have noise -1"),
        ({"sample_rate": 0.0}, "gradients have rate 0, expected above 0, at most 1"),
        ({"sample_rate": 1.5}, "gradients have rate 1.5"),
        ({"sample_rate": math.nan}, "gradients have rate nan"),
        ({"clip_norm": math.inf}, "gradients have sensitivity inf"),
        ({"statistics_noise": 0.1}, "saliency have noise 0.1"),
    ],
)
def test_server_asks_for_mechanisms_that_nobody_can_account_for(tmp_path, changes, complaint):
    run = private_run(**changes)
    if "statistics_noise" in changes:
        run = run.model_copy(update={"masking": parse_run(RUN + GUIDED).masking})
    ledger = Ledger(tmp_path, "alpha")
    with pytest.raises(ProtocolError, match=complaint):
        ledger.spend(run, "run-1", 1, limits=Limits(1e9, 1e-3), dataset="d")
    assert ledger.entries() == []


HOSTILE = {
    "many steps of little noise": [(0.3, 0.01, 10_000)],
    "a million steps": [(0.3, 1.0, 1_000_000)],
    "hardly any sampling": [(1e4, 1e-4, 1_000_000)],
    "the largest grid": [(2.0, 0.01, 48_000)],
    "two large grids": [(1.5, 0.05, 4000), (20.0, 1.0, 4000)],
    "eight kinds of rounds": [(60.0 + kind, 0.1, 100) for kind in range(8)],
    "a hundred kinds of rounds": [(60.0 + kind, 0.1, 100) for kind in range(100)],
}


@pytest.mark.parametrize("history", quick(HOSTILE.values(), 2), ids=HOSTILE)
def test_server_chooses_numbers_that_take_an_accountant_a_minute_and_gets_seconds(history):
    """0.3, 0.01, 10,000 steps and a delta of 1e-12 took 48 s and 2.6 GiB, before the budget was looked at."""
    mechanisms = [Mechanism("gradients", (), 1.0, *numbers) for numbers in history]
    epsilon(mechanisms[:1], 1e-3 / 7)  # loads the library
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    spent = epsilon(mechanisms, 1e-12)
    assert time.process_time() - start < 2.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200
    assert spent > 0.0


def test_a_round_that_no_budget_covers_is_refused_at_once_and_nothing_is_written(tmp_path):
    run = private_run(noise_multiplier=0.3, sample_rate=0.01)
    run = run.model_copy(update={"train": run.train.model_copy(update={"local_steps": 10_000})})
    ledger, start = Ledger(tmp_path, "alpha"), time.process_time()
    with pytest.raises(BudgetError, match="privacy budget exhausted"):
        ledger.spend(run, "run-1", 1, limits=Limits(1.0, 1e-12), dataset="d")
    assert time.process_time() - start < 5.0
    assert ledger.entries() == []


def test_the_cheap_bound_is_never_below_the_tight_one(monkeypatch):
    """Where the accountant turns from one to the other, no round may seem to give something back."""
    for noise, rate, steps, delta in [(1.5, 0.05, 100, 1e-5), (0.3, 1e-4, 10, 1e-12), (100.0, 1.0, 5, 1e-3)]:
        history = ((noise, rate, steps),)
        bounds = []
        for most in (8, 0):
            monkeypatch.setattr(mechanisms_module, "_MOST_MECHANISMS", most)
            bounds.append(mechanisms_module._composed.__wrapped__(history, delta))
        tight, cheap = bounds
        assert math.inf > cheap >= tight - 0.02


@pytest.mark.parametrize("told", [-0.0952, math.nan, 0.5])
def test_what_the_accountant_cannot_mean_is_not_booked(tmp_path, monkeypatch, told):
    ledger, run = Ledger(tmp_path, "alpha"), private_run()
    monkeypatch.setattr(ledger_module, "epsilon", lambda mechanisms, delta: 1.0)
    ledger.spend(run, "run-1", 1, limits=Limits(9.0, 1e-3), dataset="d")
    monkeypatch.setattr(ledger_module, "epsilon", lambda mechanisms, delta: told)
    for delta in (1e-3, 1e-4):
        with pytest.raises(LedgerError, match=r"expected at least 1, which is booked already"):
            ledger.spend(run, "run-1", 2, limits=Limits(9.0, delta), dataset="d")
    assert len(ledger.entries()) == 2


def test_a_smaller_epsilon_at_a_larger_delta_is_no_fault(tmp_path):
    """The control: later runs may ask for other deltas, and an accountant's last digits may waver."""
    ledger, run = Ledger(tmp_path, "alpha"), private_run()
    for delta in (1e-6, 1e-3, 1e-2):
        ledger.spend(run, f"run-{delta:g}", 1, limits=Limits(99.0, delta), dataset="d")
    first, second, third = (entry["epsilon"] for entry in ledger.entries()[1:])
    assert third < first
    assert second > epsilon(mechanisms_of(ledger.entries()[1]), 1e-3)


def test_an_accountant_that_wavers_does_not_lower_what_is_booked(tmp_path, monkeypatch):
    ledger, run = Ledger(tmp_path, "alpha"), private_run()
    for told, booked in ((1.0, 1.0), (0.99, 1.0), (1.2, 1.2)):
        monkeypatch.setattr(ledger_module, "epsilon", lambda mechanisms, delta, told=told: told)
        ledger.spend(run, "run-1", 1, limits=Limits(9.0, 1e-3), dataset="d")
        assert ledger.entries()[-1]["epsilon"] == booked


@pytest.mark.parametrize(("epsilon_", "delta"), [(1.0, 0.0), (1.0, 1.0), (1.0, math.nan), (math.nan, 0.1), (0.0, 0.1)])
def test_limits_that_are_none_are_refused(epsilon_, delta):
    with pytest.raises(LedgerError, match="expected epsilon > 0 and delta in"):
        Limits(epsilon_, delta)


def test_server_turns_to_noise_of_its_own_where_the_site_asks_for_its_patients(tmp_path, write_site):
    """Site-level privacy at the server protects no patient from the server; both together cost what patients' costs."""
    folder = write_site(tmp_path / "alpha", "alpha", ("brain", "heart"), extra=LIMITS)
    server = "[federation]\nmin-sites = 2\n[site-dp]\nepsilon = 8.0\ndelta = 0.01\nnum-sites = 2\n"
    server += "noise-multiplier = 5.0\n"
    with pytest.raises(ProtocolError, match=r"limits\.epsilon"):
        Site(folder).train_round(task(extra=RANDOM + server, privacy=""))
    Site(folder).train_round(task(extra=RANDOM + server))
    [both] = spent(Site(folder))[1:]
    alone = Ledger(tmp_path, "alpha")
    alone.spend(private_run(), "run-1", 1, limits=Limits(4.0, 1e-3), dataset="d")
    assert both["epsilon"] == alone.entries()[-1]["epsilon"]
    assert (both["delta"], both["limit"]) == (1e-3, 4.0)
