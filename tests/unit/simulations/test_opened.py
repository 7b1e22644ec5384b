"""Stores of several sites as one."""

import numpy as np

from panfm.data.store import ImageStore
from simulations.cohorts.opened import join_stores


def test_join_is_the_stores_one_after_the_other(make_store, make_run):
    run = make_run()
    stores = [make_store(run, 4), make_store(run, 3)]
    joined = join_stores(stores)
    assert joined.subjects == stores[0].subjects + stores[1].subjects
    assert joined.splits == stores[0].splits + stores[1].splits
    for index in range(7):
        one, two = stores[index >= 4].batch([index % 4]), joined.batch([index])
        assert {name: image.tolist() for name, image in one.images.items()} == {
            name: image.tolist() for name, image in two.images.items()
        }


def test_a_stream_that_one_store_lacks():
    one = ImageStore(("a",), ("train",), {}, {})
    other = ImageStore(
        ("b",), ("val",), {"brain-mr": np.full((1, 1, 1, 1, 1), 5, np.float32)}, {"brain-mr": np.array([0])}
    )
    joined = join_stores([one, other])
    assert joined.rows["brain-mr"].tolist() == [1]
    assert joined.batch([1]).images["brain-mr"].item() == 5
