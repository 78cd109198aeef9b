"""One flat JSON object per round: for whatever reads lines."""

import json
from pathlib import Path

from fedmaestro.rounds.environment import Environment
from fedmaestro.runs.folder import RunFolder
from fedmaestro.trackers.base import Tracker


class JsonLines(Tracker):
    """Writes ``metrics.jsonl``: ``{"round": 3, "tier/low/accuracy": 0.91, …}``; a resumed run writes it anew."""

    name = "jsonl"
    _file: Path

    def open(self, env: Environment, folder: RunFolder, resumed: bool) -> None:  # noqa: ARG002
        self._file = self.place(folder, "") / "metrics.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # All rounds are told again, those before a resume too.
        self._file.write_text("", encoding="utf-8")

    def write(self, number: int, figures: dict[str, float]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": number, **figures}) + "\n")
