"""All that the Grids of our own need of Flower beyond its public names; a Flower without it runs by its own engine.

A message takes the sender's identity from the process that makes it, and gets its own where Flower's SuperLink stores
it. There is no SuperLink between a Grid of ours and its hosts, so both are given here.
"""

from uuid import uuid4

from flwr.app import Message

SERVER_NODE = 1
"""The ServerApp's node; hosts are those after it."""


def supported() -> str:
    """Return why this version of Flower cannot be used so; empty where it can."""
    try:
        take_identity(SERVER_NODE)
        from flwr.app import RecordDict

        message = Message(RecordDict(), dst_node_id=2, message_type="query")
        identify(message)
        reply = Message(RecordDict(), reply_to=message)
    except Exception as error:  # whatever a version that we do not know makes of it
        return f"{type(error).__name__}: {error}"
    same = reply.metadata.reply_to_message_id == message.metadata.message_id != ""
    return "" if same else "messages have no identity of their own"


def take_identity(node: int) -> None:
    """Make messages of this process those of a node; one that a runtime of Flower has given stays."""
    from flwr.supercore.task_identity import TaskIdentity

    try:
        _ = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, node


def identify(message: Message) -> None:
    """Give a message its identity, by which its reply names it; one that it has stays."""
    if not message.metadata.message_id:
        message.metadata.__dict__["_message_id"] = str(uuid4())
