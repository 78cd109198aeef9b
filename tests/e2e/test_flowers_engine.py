"""Where Flower lacks what our own Grids need, its own engine runs the hosts."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from torch import nn

import fedmaestro
from fedmaestro.flower import simulation

simulation.supported = lambda: "as if this Flower could not"


class Own(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.fc, self.head = nn.Linear(64, 16), nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.fc(x.flatten(1)).relu())


if __name__ == "__main__":
    settings = {"train.rounds": 2, "train.strategy": "nested", "data.devices": 8, "train.devices-per-round": 4}
    hashes = []
    for actors in (1, 0):
        if not actors:
            simulation.supported = lambda: ""
        run = fedmaestro.run(overrides=settings, model=Own, out=f"{sys.argv[1]}/{actors}", actors=actors)
        assert run.summary["failed"] == 0
        hashes.append(run.summary["model_sha256"])
    print(len(set(hashes)))
"""


@pytest.mark.slow
def test_an_object_of_a_script_runs_there_too_with_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
