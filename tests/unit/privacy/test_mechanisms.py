"""Accounting: the table of checked values, heterogeneous events, and the way back from epsilon to noise."""

import math

import pytest

from panfm.privacy.mechanisms import Mechanism, epsilon, planned
from panfm.privacy.statement import noise_for
from tests.cases import quick


def gaussian(noise, rate, count):
    return Mechanism("gradients", (), 1.0, noise, rate, count)


TABLE = [(0.7, 36.79), (1.0, 16.50), (1.5, 8.242), (2.0, 5.482), (4.0, 2.331)]
STATISTICS = gaussian(20.0, 1.0, 40)


@pytest.mark.parametrize(("noise", "expected"), quick(TABLE, [(1.5, 8.242)]))
def test_the_table_of_checked_values(noise, expected):
    assert epsilon([gaussian(noise, 0.05, 2000)], 1e-5) == pytest.approx(expected, abs=0.02)


def test_mixed_events_in_any_order_and_number_of_pieces():
    pieces = [gaussian(1.5, 0.05, 50), gaussian(20.0, 1.0, 1)] * 40
    whole = epsilon([STATISTICS, gaussian(1.5, 0.05, 2000)], 1e-5)
    assert whole == pytest.approx(8.407, abs=0.02)
    assert epsilon(pieces, 1e-5) == whole


def test_nothing_costs_nothing_and_too_little_noise_costs_everything():
    assert epsilon([], 1e-5) == 0.0
    assert math.isinf(epsilon([gaussian(0.01, 1.0, 100)], 1e-5))


@pytest.mark.slow
def test_noise_for_is_the_way_back():
    noise = noise_for(2.0, 1e-4, rate=0.1, count=10)
    assert epsilon([gaussian(noise, 0.1, 10)], 1e-4) <= 2.0
    assert epsilon([gaussian(0.99 * noise, 0.1, 10)], 1e-4) > 2.0
    with pytest.raises(ValueError, match=r"epsilon 0\.01"):
        noise_for(0.01, 1e-4, rate=0.1, count=1, others=(gaussian(1.0, 1.0, 10),))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "expected"), [(1.0, 8.516), (8.0, 1.531)])
def test_checked_noise(target, expected):
    assert noise_for(target, 1e-5, rate=0.05, count=2000) == pytest.approx(expected, rel=0.005)


def second_opinion(mechanisms, delta):
    """Epsilon by dp-accounting's privacy loss distributions."""
    import dp_accounting  # two CPU-seconds

    accountant = dp_accounting.pld.PLDAccountant()
    for each in mechanisms:
        event = dp_accounting.PoissonSampledDpEvent(each.rate, dp_accounting.GaussianDpEvent(each.noise))
        accountant.compose(event, each.count)
    return accountant.get_epsilon(delta)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [noise for noise, _ in TABLE])
def test_a_second_accountant_agrees(noise):
    """PRV lies 0.01 above, and never below."""
    mechanisms = [gaussian(noise, 0.05, 2000)]
    other = second_opinion(mechanisms, 1e-5)
    assert other - 1e-3 <= epsilon(mechanisms, 1e-5) <= other + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "rate", "count", "delta"),
    [
        (0.4, 1e-4, 1000, 1e-5),
        (0.2, 1e-6, 1000, 1e-4),
        (0.25, 1e-3, 10, 1e-4),
        (0.5, 0.5, 1, 1e-3),
        (50.0, 1.0, 1, 1e-3),
    ],
)
def test_a_second_accountant_agrees_at_the_ends(noise, rate, count, delta):
    """A server chooses noise and rate, and would like them to seem cheap."""
    mechanisms = [gaussian(noise, rate, count)]
    other = second_opinion(mechanisms, delta)
    assert other - 1e-3 <= epsilon(mechanisms, delta) <= other + 0.02


@pytest.mark.slow
def test_a_second_accountant_agrees_on_a_mixed_history():
    mechanisms = [gaussian(1.5, 0.05, 2000), STATISTICS, gaussian(5.0, 1.0, 10)]
    other = second_opinion(mechanisms, 1e-5)
    assert other - 1e-3 <= epsilon(mechanisms, 1e-5) <= other + 0.02


def test_what_a_round_is_planned_to_release(make_private):
    run = make_private(clip=0.5)
    assert planned(run) == (Mechanism("gradients", ("updates",), 0.5, 1.0, 0.25, 4),)


def test_saliency_is_booked_over_all_patients_with_the_sensitivity_of_two_unit_vectors(make_private):
    """Shares and equal split of one patient have a norm of 1 at most, each."""
    run = make_private()
    statistics = Mechanism("saliency", ("saliency",), 2.0**0.5, run.patient_dp.statistics_noise, 1.0, 1)
    for scope in ("site", "federation"):
        masking = run.masking.model_copy(update={"policy": "sgm", "scope": scope})
        assert planned(run.model_copy(update={"masking": masking}))[1:] == (statistics,)
    masking = run.masking.model_copy(update={"policy": "sgm", "scope": "subject"})
    assert len(planned(run.model_copy(update={"masking": masking}))) == 1
