"""Between states and Flower's records.

Tensors travel as Flower Arrays under their own names: their bytes are what the closed form of ``cost`` predicts, and
each Array adds the 128 bytes of NumPy's header.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmaestro.flower.host import CohortResult, DeviceReport
from fedmaestro.strategies.base import Block, Partial, signature
from fedmaestro.submodel import State

SUBMODEL, JOB, PARTIAL, METRICS, FAILURES = "submodel", "job", "partial", "metrics", "failures"


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the record of a state; each tensor is copied once."""
    return ArrayRecord({name: Array(tensor.detach().contiguous().numpy()) for name, tensor in state.items()})


def to_state(arrays: ArrayRecord) -> State:
    """Return the state of a record."""
    return {name: torch.from_numpy(_writable(array.numpy())) for name, array in arrays.items()}


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()


def cohort_reply(result: CohortResult) -> RecordDict:
    """Pack a cohort's result: the weighted *mean* in float32, and the weight.

    A mean (instead of the float64 sum) makes an upload exactly as large as the prefix, and for one device it is that
    device's submodel bit for bit.
    """
    block = result.block
    mean = {} if block is None else {n: (s / block.weight).to(torch.float32) for n, s in block.sums.items()}
    return RecordDict(
        {
            PARTIAL: to_arrays(mean),
            METRICS: MetricRecord(
                {
                    "weight": 0.0 if block is None else block.weight,
                    "device": [report.device for report in result.reports],
                    "examples": [report.examples for report in result.reports],
                    "loss": [report.loss for report in result.reports],
                }
            ),
            FAILURES: ConfigRecord({"device": list(result.failures), "reason": list(result.failures.values())}),
        }
    )


def read_cohort_reply(content: RecordDict) -> CohortResult:
    """Unpack what ``cohort_reply`` packed."""
    metrics: dict[str, Any] = dict(content.metric_records[METRICS])
    failures: dict[str, Any] = dict(content.config_records[FAILURES])
    weight: float = metrics["weight"]
    mean = to_state(content.array_records[PARTIAL])
    rows = zip(metrics["device"], metrics["examples"], metrics["loss"], strict=True)
    return CohortResult(
        block=Block({n: m.double() * weight for n, m in mean.items()}, weight) if mean else None,
        reports=tuple(DeviceReport(device=d, examples=n, loss=x) for d, n, x in rows),
        failures=dict(zip(failures["device"], failures["reason"], strict=True)),
    )


def as_partial(block: Block) -> Partial:
    """Return the partial result of one cohort."""
    return {signature(block.sums): block}
