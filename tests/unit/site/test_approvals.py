"""The register of an operator's decisions, and what it lets a site answer."""

from datetime import date, timedelta

import pytest

from panfm.cli.request_lines import full_hash
from panfm.config import load_site
from panfm.errors import DataError, LimitError, PendingApprovalError
from panfm.site.approvals import Decision, check_approved
from panfm.site.decisions import WritableApprovals

ONE, OTHER = "1a" * 32, "1b" * 32
TODAY = date.today()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "site.toml").write_text('name = "alpha"\n')
    return tmp_path / "alpha"


def register(folder) -> WritableApprovals:
    return WritableApprovals(folder, load_site(folder))


def test_nothing_is_decided_before_the_first_decision(folder):
    assert register(folder).decisions() == {}
    assert not (folder / ".panfm").exists()


def test_the_newest_decision_on_an_experiment_counts(folder):
    register(folder).approve(ONE, by="Ada", until=date(2999, 1, 2), max_rounds=3)
    register(folder).approve(OTHER, by="Ada")
    register(folder).reject(ONE, by="Bo")
    decisions = register(folder).decisions()
    assert [(name, decision.is_approved, decision.by) for name, decision in decisions.items()] == [
        (OTHER, True, "Ada"),
        (ONE, False, "Bo"),
    ]
    again = register(folder).approve(ONE, by="Cy", max_rounds=2)
    assert register(folder).decisions()[ONE] == again
    assert (again.until, again.max_rounds) == (None, 2)
    assert len(register(folder).path.read_text().splitlines()) == 5  # the opening, and every decision


def test_decisions_in_words(folder):
    decision = register(folder).approve(ONE, by="Ada", until=date(2999, 1, 2), max_rounds=3)
    assert str(decision) == f"approved by Ada on {TODAY}, until 2999-01-02, for 3 rounds in all"
    assert str(register(folder).reject(ONE, by="Ada")) == f"rejected by Ada on {TODAY}"


@pytest.mark.parametrize("name", ["", "  ", "Ada\nBo", "x" * 81, "\x1b[31m"])
def test_who_decides_has_a_plain_name(folder, name):
    with pytest.raises(DataError, match=r"^--name "):
        register(folder).reject(ONE, by=name)
    assert register(folder).decisions() == {}


def test_an_end_that_has_passed_is_no_approval(folder):
    with pytest.raises(DataError, match=r"^--until .*has passed"):
        register(folder).approve(ONE, by="Ada", until=TODAY - timedelta(days=1))
    assert register(folder).decisions() == {}


def decision(**words) -> Decision:
    return Decision(**{"experiment": ONE, "is_approved": True, "by": "Ada", "time": "2026-01-01T00:00:00"} | words)


def test_what_is_not_decided_waits():
    with pytest.raises(PendingApprovalError, match=f"^experiment {ONE} waits for this site's approval") as caught:
        check_approved(ONE, None)
    assert caught.value.public == str(caught.value)


def test_what_is_rejected_does_not_wait():
    with pytest.raises(LimitError, match=r"is rejected by this site's operator$") as caught:
        check_approved(ONE, decision(is_approved=False))
    assert not isinstance(caught.value, PendingApprovalError)


def test_the_last_day_counts_and_the_next_does_not():
    check_approved(ONE, decision(until=TODAY), today=TODAY)
    with pytest.raises(PendingApprovalError, match=f"ended on {TODAY}$"):
        check_approved(ONE, decision(until=TODAY), today=TODAY + timedelta(days=1))


def test_rounds_are_counted_over_runs_and_one_that_is_asked_again_is_one():
    answered = {("run-1", 1), ("run-1", 2), ("run-2", 1)}

    def check(asked, most):
        check_approved(ONE, decision(max_rounds=most), asked=asked, answered=lambda: answered)

    check(("run-2", 2), 4)
    check(("run-2", 1), 3)
    check(None, 3)  # a handshake
    for asked in (("run-2", 2), ("run-3", 1)):
        with pytest.raises(PendingApprovalError, match=r"covers 3 rounds$"):
            check(asked, 3)


def test_rounds_are_not_read_where_they_are_not_counted():
    check_approved(ONE, decision(), asked=("run-1", 1), answered=lambda: pytest.fail("read"))


def decided(folder):
    register(folder).approve(ONE, by="Ada")
    register(folder).reject(ONE, by="Ada")
    return register(folder)


def test_a_register_that_was_changed_is_found(folder):
    path = decided(folder).path
    path.write_text(path.read_text().replace("rejected", "approved"))
    for call in (lambda: register(folder).decisions(), lambda: register(folder).approve(OTHER, by="Ada")):
        with pytest.raises(DataError, match="line 3 was changed"):
            call()


def test_a_register_that_was_cut_off_or_deleted_is_found(folder):
    path = decided(folder).path
    lines = path.read_text().splitlines(keepends=True)
    for kept in (lines[:2], lines[:1], []):
        path.write_text("".join(kept))
        with pytest.raises(DataError, match="cut off"):
            register(folder).decisions()
    path.unlink()
    with pytest.raises(DataError, match="missing, foreign or cut off"):
        register(folder).approve(ONE, by="Ada")


def test_a_register_whose_anchor_is_lost_is_refused(folder):
    decided(folder)
    (folder / ".panfm" / "state" / "approvals.anchor").unlink()
    with pytest.raises(DataError, match=r"anchor .* is missing"):
        register(folder).decisions()


def test_without_register_and_anchor_everything_waits(folder):
    path = decided(folder).path
    path.unlink()
    (folder / ".panfm" / "state" / "approvals.anchor").unlink()
    assert register(folder).decisions() == {}


def test_the_register_of_another_site_is_refused(folder):
    decided(folder)
    (folder / "site.toml").write_text('name = "beta"\n')
    with pytest.raises(DataError, match="is not the register of site beta"):
        register(folder).decisions()


def test_a_line_that_a_crash_cut_short_is_no_decision(folder):
    path = decided(folder).path
    with path.open("a") as file:
        file.write('{"kind": "approved"')
    assert not register(folder).decisions()[ONE].is_approved
    assert register(folder).approve(ONE, by="Ada").is_approved
    assert register(folder).decisions()[ONE].is_approved


def test_a_crash_before_the_first_anchor_is_overcome(folder):
    path, anchor = decided(folder).path, folder / ".panfm" / "state" / "approvals.anchor"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    anchor.unlink()
    assert register(folder).decisions() == {}
    assert register(folder).approve(ONE, by="Ada").is_approved


def test_hashes_are_completed():
    assert full_hash(ONE[:8], [ONE, OTHER]) == ONE
    assert full_hash(f" {ONE[:9].upper()} ", [ONE, ONE]) == ONE
    assert full_hash(ONE, []) == ONE  # nobody has asked for it yet
    for prefix, reason in (
        ("1a1a1a1", "expected 8 to 64 characters"),
        ("run.toml", "expected 8 to 64 characters"),
        (ONE + "0", "expected 8 to 64 characters"),
        ("0" * 8, "begins no experiment"),
    ):
        with pytest.raises(DataError, match=reason):
            full_hash(prefix, [ONE, OTHER])
    with pytest.raises(DataError, match="begins 2 experiments"):
        full_hash("1a1a1a1a", ["1a1a1a1a" + "0" * 56, ONE])
