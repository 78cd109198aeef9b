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

from fedmaestro.rounds.device import CohortResult, DeviceReport
from fedmaestro.submodel import State

SUBMODEL, JOB, PARTIAL, PROBES = "submodel", "job", "partial", "probes"
METRICS, FAILURES = "metrics", "failures"


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the record of a state; each tensor is copied once."""
    return ArrayRecord({name: Array(tensor.detach().contiguous().numpy()) for name, tensor in state.items()})


def to_state(arrays: ArrayRecord) -> State:
    """Return the state of a record."""
    return {name: torch.from_numpy(_writable(array.numpy())) for name, array in arrays.items()}


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()


def cohort_reply(result: CohortResult) -> RecordDict:
    """Pack a cohort's result.

    An upload is exactly as large as the prefix, and for one device it is that device's submodel bit for bit. Probes of
    the factor bias are instruments of the simulation, no part of an upload.
    """
    return RecordDict(
        {
            PARTIAL: to_arrays(result.mean),
            PROBES: to_arrays(result.probes),
            METRICS: MetricRecord(
                {
                    "weight": result.weight,
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
    rows = zip(metrics["device"], metrics["examples"], metrics["loss"], strict=True)
    return CohortResult(
        mean=to_state(content.array_records[PARTIAL]),
        weight=metrics["weight"],
        probes=to_state(content.array_records[PROBES]),
        reports=tuple(DeviceReport(device=d, examples=n, loss=x) for d, n, x in rows),
        failures=dict(zip(failures["device"], failures["reason"], strict=True)),
    )
