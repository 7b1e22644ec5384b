"""Who is sent the last step, and who all parameters."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord

from panfm.sharing.coding import digests
from panfm.sharing.messages import Handshake
from strategies import Memory
from strategies.round_messages import Downlink, make_array

GROUPS = {"backbone": np.arange(8, dtype=np.float32), "stream:a-mr": np.ones(4, np.float32)}
STEP = {
    "backbone": np.ones(8, np.int8),
    "backbone/scale": np.ones(1, np.float32),
    "stream:a-mr": np.ones(4, np.int8),
    "stream:a-mr/scale": np.ones(1, np.float32),
}


def shaken(site: str, *groups: str) -> Handshake:
    return Handshake(site, 1, {}, {}, "", dict.fromkeys(groups, ""))


@pytest.fixture
def arrays() -> ArrayRecord:
    return ArrayRecord({group: make_array(flat) for group, flat in GROUPS.items()})


def sent(downlink: Downlink, handshake: Handshake) -> tuple[dict[str, str], dict]:
    content = downlink.content(handshake, ConfigRecord({"round": 3}))
    types = {name: array.dtype for name, array in content.array_records["arrays"].items()}
    return types, dict(content.config_records["config"])


def test_holders_get_the_step_and_where_it_leads_others_get_everything(arrays):
    downlink = Downlink(arrays, Memory(step=STEP, holders=("a", "b")), teacher={})
    types, config = sent(downlink, shaken("a", "backbone"))
    assert types == {"backbone": "int8", "backbone/scale": "float32"}
    assert config == {"round": 3, "digests-names": ["backbone"], "digests-values": [digests(GROUPS)["backbone"]]}
    types, config = sent(downlink, shaken("c", "backbone", "stream:a-mr"))
    assert types == {"backbone": "float32", "stream:a-mr": "float32"}
    assert config == {"round": 3}
    assert downlink.bytes == {"backbone": 8 + 4 + 32, "stream:a-mr": 16}
    assert downlink.site_bytes == {"a": 8 + 4, "c": 32 + 16}


def test_the_teacher_goes_to_all_and_is_counted(arrays):
    downlink = Downlink(arrays, Memory(step=STEP, holders=("a",)), teacher=GROUPS)
    assert sent(downlink, shaken("a", "backbone"))[0].keys() == {"backbone", "backbone/scale", "backbone/teacher"}
    assert sent(downlink, shaken("b", "backbone"))[0].keys() == {"backbone", "backbone/teacher"}
    assert downlink.bytes == {"backbone": 8 + 4 + 32 + 32 + 32}


def test_what_is_frozen_goes_once_to_sites_that_have_its_group(arrays):
    """Also a group of which nothing is trained, such as the directors of a run that trains norms."""
    frozen = GROUPS | {"director": np.ones(3, np.float32)}
    downlink = Downlink(arrays, Memory(frozen_holders=("a",)), teacher={}, frozen=frozen)
    assert sent(downlink, shaken("a", "backbone"))[0].keys() == {"backbone"}
    assert downlink.bytes == {"backbone": 32}
    assert sent(downlink, shaken("b", "backbone"))[0].keys() == {"backbone", "backbone/frozen", "director/frozen"}
    assert downlink.bytes == {"backbone": 3 * 32, "director": 12}


def test_messages_share_their_arrays(arrays):
    downlink = Downlink(arrays, Memory(), teacher={})
    one, other = (downlink.content(shaken(site, "backbone"), ConfigRecord()) for site in "ab")
    assert one.array_records["arrays"]["backbone"].data is other.array_records["arrays"]["backbone"].data
