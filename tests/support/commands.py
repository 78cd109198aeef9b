"""The command line called in this process, and what a refused command may leave behind: nothing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedmaestro.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]
Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Everything below ``folder``; None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``call(*arguments)`` of the entry point in a new working directory below ``folder``."""
    work = folder / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedmaestro", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


def check_refused(result: Result, said: list[str], before: Tree) -> None:
    """Check that a command ended with one line on standard error and left the disk as it was."""
    assert (result.code, result.out.strip()) == (2, "")
    assert result.err.startswith("fedmaestro: ")
    assert result.err.count("\n") == 1, result.err
    assert [part for part in said if part not in result.err] == [], result.err
    assert tree(Path.cwd().parent) == before


def counted_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """MACs of one example, from PyTorch's counter: a MAC is two FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, *input_shape))
    return counter.get_total_flops() // 2
