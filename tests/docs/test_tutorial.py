"""The notebook of the documentation, executed by a real kernel."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's libraries
def test_the_tutorial_runs_and_every_tier_learns(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    summary = json.loads((tmp_path / "runs" / "tutorial" / "summary.json").read_text())
    assert summary["failed"] == 0
    assert all(tier["final_accuracy"] > 0.5 for tier in summary["tiers"].values()), "chance is 0.25"
    results = json.loads((tmp_path / "runs" / "tutorial-compare" / "results.json").read_text())
    assert [row["name"] for row in results["strategies"]] == ["nested", "mine"]
    assert all(row["failed"] == 0 for row in results["strategies"])


def test_the_tutorial_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
