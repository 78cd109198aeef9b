"""The ClientApp of plain Flower: a node is a device."""

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.contenders import _flower_client

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the device of this node from what was sent."""
    config: dict[str, Any] = dict(message.content.config_records["config"])
    env, models = _flower_client(config["settings"], config["data-dir"])
    if "model" not in models:
        model = env.plan.architecture.materialize(env.plan.full.size)
        if len(env.plan.architecture.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        models["model"] = model
    model, batch = models["model"].train(), env.task.plain(env.parts[int(context.node_config["partition-id"])])
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=env.config.train.lr)
    for indices in torch.split(torch.randperm(len(batch)), env.config.train.batch_size):
        some = batch.take(indices)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(*some.inputs), some.targets).backward()
        optimizer.step()
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(batch)})}
    )
    return Message(content, reply_to=message)
