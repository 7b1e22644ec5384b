"""Answers of sites as they reach the server, whatever they hold."""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity


def answer_of(
    node: int,
    config: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    arrays: ArrayRecord | None = None,
) -> Message:
    """The answer of a node to a question."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    question = Message(RecordDict(), dst_node_id=node, message_type="train")
    question.metadata.__dict__["_message_id"] = f"ask-{node}"
    content = RecordDict({"config": ConfigRecord(config)})
    if metrics is not None:
        content["metrics"] = MetricRecord(metrics)
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, reply_to=question)
