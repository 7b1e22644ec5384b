import numpy as np

from panfm.data.store import ImageStore
from panfm.site.state import fingerprint


def test_every_session_of_a_patient_counts():
    images, rows = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32), np.array([0, 0, 1])

    def digest(images):
        return fingerprint(ImageStore(("a", "b"), ("train",) * 2, {"eye-oct": images}, {"eye-oct": rows}))

    changed = [digest(np.where(np.arange(3)[:, None, None, None] == at, images + 1, images)) for at in range(3)]
    assert len({digest(images), *changed}) == 4
