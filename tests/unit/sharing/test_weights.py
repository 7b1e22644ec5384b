from panfm.sharing.weights import group_weight


def test_grouped_and_plain(small_run):
    words = {"subjects": 10, "subjects_per_stream": {"brain-mr": 4}, "num_steps": 3}
    assert group_weight(small_run, "backbone", **words) == 30
    assert group_weight(small_run, "head", **words) == 30
    assert group_weight(small_run, "stream:brain-mr", **words) == 4
    assert group_weight(small_run, "stream:heart-mr", **words) == 0
    assert group_weight(small_run, "backbone", **words | {"num_steps": 0}) == 0
    assert group_weight(small_run, "stream:brain-mr", **words | {"num_steps": 0}) == 0
    plain = small_run.model_copy(update={"sharing": small_run.sharing.model_copy(update={"rule": "plain"})})
    assert {group_weight(plain, group, **words) for group in ("backbone", "head", "stream:brain-mr")} == {30}
