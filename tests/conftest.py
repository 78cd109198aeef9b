"""Fixtures shared by all tests."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from hypothesis import settings

# Machines are shared and noisy: no deadlines. CI draws the same examples every time.
settings.register_profile("fedmaestro", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedmaestro")

LOST = "lost"

Spoil = Callable[[Message], Message | str | None]


class PolledGrid:
    """Flower's grid without a network: hosts are called in this process, replies come back in reverse order.

    Attributes:
        sent: every message that was pushed.
        replies: every reply, in the order of `sent`.
        spoil: called with each message before a host; a reply it returns is taken instead, `LOST` means none comes.
    """

    def __init__(self, nodes: int, spoil: Spoil | None = None) -> None:
        self.nodes = list(range(101, 101 + nodes))
        self.spoil = spoil
        self.sent: list[Message] = []
        self.replies: list[Message] = []
        self._waiting: dict[str, Message] = {}
        from fedmaestro.flower.identity import SERVER_NODE, take_identity

        take_identity(SERVER_NODE)

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        from fedmaestro.flower.identity import identify

        ids = []
        for message in messages:
            identify(message)
            self.sent.append(message)
            if (reply := self._answer(message)) is not None:
                self.replies.append(reply)
                self._waiting[message.metadata.message_id] = reply
            ids.append(message.metadata.message_id)
        return ids

    def _answer(self, message: Message) -> Message | None:
        from fedmaestro.flower.client_app import app
        from fedmaestro.flower.direct_grid import HostCall

        if self.spoil is not None and (spoilt := self.spoil(message)) is not None:
            return spoilt if isinstance(spoilt, Message) else None
        return HostCall(app, message.metadata.dst_node_id - 101, len(self.nodes))(message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._waiting.pop(i) for i in reversed(list(message_ids)) if i in self._waiting]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's key and cache out of the tests; one cache serves all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMAESTRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        patch.delenv("FEDMAESTRO_DATA_DIR", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(autouse=True)
def _rows_of_a_test_go_with_it() -> Iterator[None]:
    """Take what a test registered out of the tables: one process runs many files, in any order."""
    yield
    if (extend := sys.modules.get("fedmaestro.extend")) is None:
        return
    from fedmaestro.runs.code import NO_CODE, activate

    activate(NO_CODE)
    for kind, name in list(extend._session):
        extend.KINDS[kind].rows.pop(name, None)
    extend._session.clear()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no local MNIST in {folder}")
    return folder


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., Any]:
    """Run a small federation on `PolledGrid`: `federate(overrides, nodes=2, spoil=…, folder=…)`; `folder` may hold one.

    Returns (content of summary.json, run folder, grid). Without observers: nothing is drawn.
    """
    from fedmaestro.config.experiment import load_config
    from fedmaestro.flower.federation import Federation
    from fedmaestro.rounds.environment import open_environment
    from fedmaestro.runs.folder import RunFolder
    from fedmaestro.runs.start import code_of

    count = iter(range(1000))

    def run(
        overrides: dict[str, Any] | None = None,
        *,
        nodes: int = 2,
        spoil: Spoil | None = None,
        folder: Path | None = None,
        stop: threading.Event | None = None,
        observers: Sequence[Any] = (),
    ) -> tuple[dict[str, Any], RunFolder, PolledGrid]:
        small = {"train.rounds": 2, "train.evaluate-every": 2}
        config = load_config(None, small | (overrides or {}))
        env = open_environment(config, code=code_of(config, folder))
        run_folder = RunFolder(folder or tmp_path / f"run{next(count)}")
        grid = PolledGrid(nodes, spoil)
        federation = Federation(
            grid,  # type: ignore[arg-type]
            env,
            run_folder,
            stop or threading.Event(),
            observers,
            resume=folder is not None,
        )
        return federation.run().to_dict(), run_folder, grid

    return run
