import numpy as np

from strategies.server_step import follow_average


def test_by_hand():
    found = follow_average({"head": np.array([1, 2], np.float32)}, {"head": np.array([3, 2], np.float32)}, 0.75)
    assert found["head"].tolist() == [1.5, 2.0]
    assert found["head"].dtype == np.float32


def test_what_does_not_move_stays_to_the_bit():
    still = np.random.default_rng(0).normal(size=100).astype(np.float32)
    average = {"head": still}
    for _ in range(20):
        average = follow_average(average, {"head": still}, 0.9)
    assert average["head"].tobytes() == still.tobytes()


def test_momentum_0_is_where_the_model_is():
    new = np.array([0.5, -4.0], np.float32)
    assert follow_average({"head": np.zeros(2, np.float32)}, {"head": new}, 0.0)["head"].tolist() == new.tolist()
