"""Work done ahead by threads: its order, how far ahead it goes, and how it ends."""

import threading

import pytest

from panfm.data.ahead import done_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_keep_the_order_of_the_jobs(threads):
    assert list(done_ahead(lambda job: job * job, range(20), threads)) == [job * job for job in range(20)]
    assert list(done_ahead(abs, [], threads)) == []


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_no_more_than_two_jobs_a_thread_are_begun_ahead(threads):
    begun = []
    results = done_ahead(begun.append, iter(range(100)), threads)
    for number, _ in enumerate(results, start=1):
        assert len(begun) <= number + 2 * threads
        if number == 10:
            results.close()
    assert len(begun) <= 10 + 2 * threads


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_comes_in_its_place_and_ends_the_threads(threads):
    def work(job):
        if job == 5:
            raise OSError("the disk is gone")
        return job

    before, done = threading.active_count(), []
    with pytest.raises(OSError, match="the disk is gone"):
        done.extend(done_ahead(work, range(1000), threads))
    assert threading.active_count() == before
