"""What each site is sent in a round: the last step to those that hold where it starts, all parameters to the others."""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from panfm.sharing.coding import Arrays
from panfm.sharing.downlink import digests
from panfm.sharing.groups import Flat
from panfm.sharing.messages import Handshake, digest_words, teacher_name
from strategies.memory import Memory
from strategies.records import make_array, view_array


class Downlink:
    """Contents of one round's messages; every array is packed once, and shared by all messages that hold it."""

    def __init__(self, groups: ArrayRecord, memory: Memory, *, teacher: Mapping[str, Flat]) -> None:
        """Make ready.

        Args:
            groups: Global parameters.
            memory: Whom a step takes to them.
            teacher: Group -> where teachers start; empty if they do not start at the server's.
        """
        self.bytes: dict[str, int] = {}
        """Group -> bytes sent so far, over all sites."""
        self._holders = frozenset(memory.holders)
        self._whole = {group: (array, view_array(array).nbytes) for group, array in groups.items()}
        self._step = _packed(memory.step)
        self._teacher = _packed({teacher_name(group): flat for group, flat in teacher.items()})
        self._digests = digests({group: view_array(array) for group, array in groups.items()}) if memory.holders else {}

    def content(self, handshake: Handshake, config: ConfigRecord) -> RecordDict:
        """What one site is sent."""
        is_holder = handshake.site in self._holders
        arrays = (self._step if is_holder else self._whole) | self._teacher
        sent = {name: each for name, each in arrays.items() if name.partition("/")[0] in handshake.group_hashes}
        for name, (_, size) in sent.items():
            group = name.partition("/")[0]
            self.bytes[group] = self.bytes.get(group, 0) + size
        if is_holder:
            words = digest_words({group: self._digests[group] for group in handshake.group_hashes})
            config = ConfigRecord({**config, **words})
        return RecordDict({"arrays": ArrayRecord({name: array for name, (array, _) in sent.items()}), "config": config})


def _packed(arrays: Arrays) -> dict[str, tuple[Array, int]]:
    """Name -> packed array, and its bytes."""
    return {name: (make_array(array), array.nbytes) for name, array in arrays.items()}
