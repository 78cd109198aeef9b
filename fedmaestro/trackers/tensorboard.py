"""TensorBoard's event files."""

from typing import Any

from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import Summary
from fedmaestro.trackers.base import Tracker


class TensorBoard(Tracker):
    """Writes event files to ``RUN/tensorboard``; of a resumed run, the rounds that are told again replace the first."""

    name = package = "tensorboard"
    _writer: Any

    def open(self, env: Environment, folder: RunFolder, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step drops what an earlier process wrote of these rounds.
        purge = {"purge_step": 0} if resumed else {}
        self._writer = SummaryWriter(str(self.place(folder, "tensorboard")), **purge)
        settings = "".join(f"    {key} = {value!r}\n" for key, value in env.config.flat().items())
        self._writer.add_text("settings", settings, 0)

    def write(self, number: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self, folder: RunFolder, summary: Summary | None) -> None:  # noqa: ARG002
        self._writer.close()
