import json

import pytest

from panfm.report.run_events import EventKind, read_events
from panfm.sharing.messages import RoundReply
from server.events import EventLog
from server.monitor_faults import FAULTS, faults, note_monitors, site_monitors

GOOD = {"effective-rank": 17.0, "feature-deviation": 0.4, "teacher-entropy": 0.6}


def reply(saliency=None, **monitors):
    told = {name.replace("_", "-"): value for name, value in monitors.items()}
    return RoundReply("r", 1, 0, {}, {}, saliency=saliency or {}, monitors=told)


def test_entropy_of_the_saliency_by_hand():
    assert site_monitors(reply({"a": 1.0, "b": 1.0})) == {"saliency-entropy": pytest.approx(1.0)}
    assert site_monitors(reply({"a": 2.0, "b": 0.0}, effective_rank=3.0)) == {
        "effective-rank": 3.0,
        "saliency-entropy": 0.0,
    }
    assert site_monitors(reply({"a": 1.0})) == site_monitors(reply({"a": 0.0, "b": 0.0})) == {}


def test_the_words_of_the_issue(make_run):
    [words] = faults(
        make_run(), 4, {"heart-centre": reply(effective_rank=1.3), "b": reply(effective_rank=17.0)}
    ).values()
    assert words == {
        "effective-rank": "features collapse at heart-centre: effective rank 1.3 of 48 in round 4",
    }


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"feature_deviation": 0.001}, {"feature_deviation": 0.02}),
        ({"teacher_entropy": 0.9999}, {"teacher_entropy": 0.9}),
        ({"saliency": {"a": 2.0, "b": 0.01}}, {"saliency": {"a": 1.5, "b": 0.5}}),
        ({"experts_used": 1.0}, {"experts_used": 2.0}),
    ],
)
def test_each_monitor_has_a_word(make_run, wrong, right):
    run = make_run()
    [(name, words)] = faults(run, 2, {"a": reply(**wrong)})["a"].items()
    assert words.startswith(f"{FAULTS[name]} at a: ")
    assert faults(run, 2, {"a": reply(**right)}) == {}


def test_one_expert_of_one_is_no_fault(make_run):
    run = make_run("[model.experts]\ncount = 1\nactive = 1\n")
    assert faults(run, 1, {"a": reply(experts_used=1.0)}) == {}


def test_a_fault_is_one_event_however_long_it_lasts_and_its_end_another(make_run, tmp_path):
    run, log = make_run(), EventLog(tmp_path)
    for number, rank in enumerate([17.0, 1.3, 1.2, 9.0, 9.0, 1.1], start=1):
        told = reply(effective_rank=rank)
        line = {"sites": {"a": {"monitors": site_monitors(told)}}, "faults": faults(run, number, {"a": told})}
        note_monitors(json.loads(json.dumps(line)), log)
    events = read_events(tmp_path)
    assert {(event.kind, event.site) for event in events} == {(EventKind.MONITOR, "a")}
    assert [event.words for event in events] == [
        "features collapse at a: effective rank 1.3 of 48 in round 2",
        "recovered at a: effective rank 9",
        "features collapse at a: effective rank 1.1 of 48 in round 6",
    ]
