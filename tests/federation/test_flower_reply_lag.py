"""A SuperNode of Flower 1.41 or 1.42 that could not confirm one message sends each later reply one message late.

docs/upstream-report.md tells the cause. Flower's own loop and state run here; SuperLink and ClientApp are played. A
version of Flower in which this fails has mended it: then report and ping can go.
"""

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message, _pull_and_store_message, _push_messages

RUN, NODE = 7, 11


class SuperNode:
    """Flower's loop over one SuperNode's state, a turn at a time; `sent` are the replies that left, by their round."""

    def __init__(self) -> None:
        stores = ObjectStoreFactory()
        self.state, self.store = NodeStateFactory(stores).state(), stores.store()
        self.state.set_node_id(NODE)
        self.state.store_run(Run.create_empty(RUN))
        self.sent: list[str] = []

    def turn(self, group: str, *, while_confirmed=lambda message: None) -> None:
        """What `start_client_internal` does in one turn of its loop, for the message of a round."""
        message = Message(RecordDict(), dst_node_id=NODE, message_type="train", group_id=group)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            tree, objects = get_object_tree(message), get_all_nested_objects(message)
        pulled = _pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, tree),
            get_run=lambda run_id: pytest.fail("the run is known"),
            get_fab=lambda digest, run_id: pytest.fail("the run is known"),
            pull_object=lambda run_id, object_id: objects[object_id].deflate(),
            confirm_message_received=lambda run_id, message_id: while_confirmed(message),
            trusted_entities=None,
        )
        if pulled is not None:
            _push_messages(
                state=self.state,
                object_store=self.store,
                send=self.send,
                push_object=lambda *_: pytest.fail("no object"),
            )

    def send(self, message, tree, seconds):
        self.sent.append(message.metadata.group_id)
        return set(), ""

    def answer(self, message) -> None:
        """What a ClientApp does: take the message, and hand its reply in."""
        [taken] = self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        assert taken.metadata.message_id == message.metadata.message_id
        _insert_message(Message(RecordDict(), reply_to=taken), self.state, self.store)


@pytest.fixture
def node() -> SuperNode:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, NODE
    return SuperNode()


def test_each_reply_leaves_in_its_turn_as_long_as_messages_can_be_confirmed(node):
    for group in "123":
        node.turn(group, while_confirmed=node.answer)
    assert node.sent == ["1", "2", "3"]


@pytest.mark.parametrize("error", [RuntimeError("500 Internal Server Error"), RunNotRunningException()])
def test_after_one_message_that_could_not_be_confirmed_each_reply_leaves_a_message_late(node, error):
    """The ClientApp answers while the SuperLink is away; then the confirmation fails for good."""

    def answer_and_fail(message):
        node.answer(message)
        raise error

    node.turn("1", while_confirmed=answer_and_fail)
    assert node.sent == []
    for group, sent in (("2", ["1"]), ("3", ["1", "2"]), ("4", ["1", "2", "3"])):
        # A ClientApp answers after seconds: when the loop looks, it finds the reply to the message before.
        held = []
        node.turn(group, while_confirmed=held.append)
        assert node.sent == sent
        node.answer(held[0])
