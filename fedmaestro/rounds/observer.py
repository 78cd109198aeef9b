"""What wants to know how a run goes: displays, reports, trackers."""

from pathlib import Path

from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.folder import RunFolder
from fedmaestro.runs.records import DeviceRecord, RoundRecord, Summary, Trial


class Observer:
    """Is told about a run, from the server's thread; the methods do nothing until a subclass says what."""

    def on_data(self, done: int, total: int) -> None:
        """``done`` of ``total`` examples are decoded, which happens once."""

    def on_start(self, env: Environment, folder: RunFolder, first_round: int) -> None:
        """The hosts are there; ``first_round`` is 0, or the one after the checkpoint."""

    def on_progress(self, server_round: int, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` messages of this phase (train, evaluate) are back."""

    def on_devices(self, record: DeviceRecord) -> None:
        """What single devices reached in a round, just before ``on_round``: training losses, and their own tests."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is complete and written; of a resumed run, those before it are told first."""

    def on_finish(self, folder: RunFolder, summary: Summary) -> None:
        """The run has ended, or was interrupted; its files are written."""


class ComparisonObserver(Observer):
    """Is told about a comparison, or a tuning, and the run of each of its cells."""

    def on_cells(self, path: Path, done: int, total: int) -> None:
        """``done`` of ``total`` cells are finished; results go to ``path``."""

    def on_cell(self, label: str, seed: int) -> None:
        """A cell starts or goes on."""

    def on_trial(self, row: str, trial: Trial) -> None:
        """A tuning has tried these settings for a row with all its seeds; of a resumed one, all so far are told."""
