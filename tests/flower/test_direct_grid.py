"""The grid whose only host is this process, and what all grids of our own share."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedmaestro
from fedmaestro.flower.client_app import JOB, app
from fedmaestro.flower.direct_grid import LocalGrid, reason_of
from fedmaestro.interrupt import InterruptedRunError
from fedmaestro.rounds.observer import Observer
from fedmaestro.runs.records import RoundRecord

SMALL = {"train.rounds": 3, "train.evaluate-every": 1}


def echo() -> ClientApp:
    """Replies the number that it is sent; refuses negative ones."""
    client_app = ClientApp()

    @client_app.query("number")
    def number(message: Message, _context: Context) -> Message:
        given = int(message.content.metric_records["x"]["x"])  # type: ignore[arg-type]
        torch.manual_seed(given)
        torch.set_num_threads(1)
        if given < 0:
            raise ValueError(f"{given} is\nnegative")
        return Message(RecordDict({"x": MetricRecord({"x": given})}), reply_to=message)

    return client_app


def messages(grid: LocalGrid, *numbers: int) -> list[Message]:
    return [
        grid.create_message(RecordDict({"x": MetricRecord({"x": x})}), "query.number", node, "1")
        for x in numbers
        for node in grid.get_node_ids()
    ]


def test_flowers_calls_work_on_it() -> None:
    grid = LocalGrid(echo())
    replies = grid.send_and_receive(messages(grid, 3, 4))
    assert [reply.content.metric_records["x"]["x"] for reply in replies] == [3, 4]
    ids = list(grid.push_messages(messages(grid, 5)))
    (reply,) = grid.pull_messages(ids)
    assert reply.metadata.reply_to_message_id == ids[0]
    assert list(grid.pull_messages(ids)) == []


def test_this_process_never_waits_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LocalGrid(echo())

    def wait(*_: object) -> bool:
        raise AssertionError("nobody else works meanwhile")

    monkeypatch.setattr(grid._arrived, "wait", wait)
    replies = grid.send_and_receive(messages(grid, *range(20)))
    assert [reply.content.metric_records["x"]["x"] for reply in replies] == list(range(20))


def test_what_an_app_raises_is_an_error_reply_of_one_line() -> None:
    grid = LocalGrid(echo())
    (reply,) = grid.send_and_receive(messages(grid, -1))
    assert reply.has_error()
    assert "-1 is negative" in reason_of(reply)


@pytest.mark.parametrize("kind", ["nothing", "text", "a message to somebody"])
def test_what_is_no_reply_is_an_error_reply(kind: str) -> None:
    """Somebody waits for one: a run must not hang, or end in a traceback, for what an app returns."""

    class Odd(ClientApp):
        def __call__(self, _message: Message, _context: Context) -> Message:
            new = Message(RecordDict(), dst_node_id=1, message_type="train")
            returned: Any = {"nothing": None, "text": "x", "a message to somebody": new}[kind]
            return returned  # type: ignore[no-any-return]

    grid = LocalGrid(Odd())
    (reply,) = grid.send_and_receive(messages(grid, 1))
    assert "the app returned" in reason_of(reply)


def test_the_users_random_numbers_and_threads_stay_as_they_are() -> None:
    grid, threads = LocalGrid(echo()), torch.get_num_threads()
    before = torch.get_rng_state()
    list(grid.send_and_receive(messages(grid, 7)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_a_stop_ends_the_wait_and_forgets_what_was_sent() -> None:
    grid, stop = LocalGrid(echo()), threading.Event()
    replies = grid.stream(messages(grid, 1, 2, 3), stop=stop)
    next(replies)
    stop.set()
    with pytest.raises(InterruptedRunError):
        next(replies)
    (reply,) = grid.send_and_receive(messages(grid, 9))
    assert reply.content.metric_records["x"]["x"] == 9


def test_a_run_without_actors_is_the_same_run_and_loads_no_ray(federate: Callable[..., Any], tmp_path: Path) -> None:
    run = fedmaestro.run(overrides=SMALL, out=tmp_path / "run", actors=0)
    summary, folder, _ = federate(SMALL)
    assert run.summary["model_sha256"] == summary["model_sha256"]
    assert [record.tiers for record in run.rounds] == [record.tiers for record in folder.read_rounds()]


def test_user_code_is_called_in_this_thread(tmp_path: Path) -> None:
    """So that a debugger stops there."""
    threads = set()

    def watching(message: Message, context: Context) -> Message:
        threads.add(threading.current_thread())
        return app(message, context)

    fedmaestro.run(overrides=SMALL, out=tmp_path / "run", actors=0, client_app=watching)  # type: ignore[arg-type]
    assert threads == {threading.current_thread()}


def test_a_host_that_fails_once_is_asked_again(tmp_path: Path) -> None:
    """A failure of the host itself, not of a device."""
    failed: list[Any] = []

    def failing(message: Message, context: Context) -> Message:
        job = message.content.config_records[JOB]
        if message.metadata.message_type == "train" and not failed:
            failed.append(job["devices"])
            raise MemoryError("no room")
        return app(message, context)

    class Records(Observer):
        def __init__(self) -> None:
            self.failed: list[int] = []

        def on_round(self, record: RoundRecord) -> None:
            self.failed.append(record.failed)

    told = Records()
    fedmaestro.run(overrides=SMALL, out=tmp_path / "a", actors=0, client_app=failing, observers=[told])  # type: ignore[arg-type]
    assert failed
    assert told.failed == [0, 0, 0, 0]
