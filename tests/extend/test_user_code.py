"""Code of a user's: what it adds, where it goes with the run, and what is said when it is wrong."""

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, entry_point
from torch import Tensor, nn

import fedmaestro
from fedmaestro import extend
from fedmaestro.clients.optimizers import Decay
from fedmaestro.config.experiment import load_config
from fedmaestro.errors import UserError
from fedmaestro.models import MODELS
from fedmaestro.runs.code import NO_CODE, Code, activate, gather, read_code
from fedmaestro.runs.start import code_of
from fedmaestro.runs.starter import write_starter

Federate = Callable[..., Any]


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    """The file that `fedmaestro new` writes, with its experiment beside it."""
    file = tmp_path / "paper" / "my_paper.py"
    write_starter(file)
    return file


def settings_of(starter: Path) -> dict[str, Any]:
    flat = load_config(starter.with_suffix(".toml")).flat()
    return {key: value for key, value in flat.items() if value != "default"}


def python(code: str, *arguments: str | Path, fails: bool = False) -> str:
    """Run code in a fresh process, far from the user's files; return what it prints, or why it fails."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def test_the_starter_runs_learns_and_its_folder_needs_nothing_else(federate: Federate, starter: Path) -> None:
    settings = {**settings_of(starter), "train.rounds": 15}
    summary, folder, _ = federate(settings)
    assert summary["failed"] == 0
    assert summary["strategy"] == "mine"
    assert all(tier["final_accuracy"] > 0.6 for tier in summary["tiers"].values()), "chance is 0.25"
    last = folder.read_rounds()[-1]
    assert list(last.tiers["minimal"]) == ["accuracy", "worst-class", "loss"]
    assert sum(tier["devices"] for tier in last.device_test.values()) == 12
    assert (folder.path / "code" / "my_paper.py").read_text() == starter.read_text()

    starter.unlink()  # the run folder has all that is needed, in another process too
    code = """
        import sys, fedmaestro
        model = fedmaestro.load_model(sys.argv[1], "low")
        print(type(model).__module__, sum(p.numel() for p in model.parameters()))
        from fedmaestro.deploy.extract import Target
        print(fedmaestro.extract(sys.argv[1], Target(tier="mid")).card["test_accuracy"])
        print(fedmaestro.load_model(sys.argv[1] + "/extracted/tier-mid").training)
    """
    module, accuracy, training = python(code, folder.path).splitlines()
    assert module.split() == ["my_paper", str(summary["tiers"]["low"]["params"])]
    assert float(accuracy) == pytest.approx(summary["tiers"]["mid"]["final_accuracy"])
    assert training == "False"
    again, _, _ = federate(settings, folder=folder.path)
    assert again["model_sha256"] == summary["model_sha256"], "finished runs resume without the original too"


def test_resuming_with_other_code_is_refused_and_names_the_file(federate: Federate, starter: Path) -> None:
    helper = starter.with_name("helper.py")
    helper.write_text("FACTOR = 0.5\n")
    starter.write_text(
        "from helper import FACTOR\n" + starter.read_text().replace("new[name], 0.5", "new[name], FACTOR")
    )
    settings = {**settings_of(starter), "train.rounds": 2}
    whole, _, _ = federate(settings)
    _, folder, _ = federate({**settings, "train.rounds": 2})
    assert sorted(read_code(folder.path).digests) == ["helper.py", "my_paper.py"]
    helper.write_text("FACTOR = 0.6\n")
    with pytest.raises(UserError, match=r"run with other code: helper\.py has changed"):
        code_of(load_config(None, settings), folder.path)
    other, _, _ = federate(settings)
    assert other["model_sha256"] != whole["model_sha256"], "the change is seen at once, in the same process"
    helper.write_text("FACTOR = 0.5\n")
    same, _, _ = federate(settings)
    assert same["model_sha256"] == whole["model_sha256"]
    assert code_of(load_config(None, settings), folder.path) == read_code(folder.path)


ERRORS = {
    "syntax": ("def f(:\n", r"mine\.py, line 1: "),
    "import": ("import numpy\n\nx = numpy.nothing_of_that_name\n", r"mine\.py, line 3: AttributeError"),
    "built-in": (
        'from fedmaestro import extend\nextend.model("mlp")(lambda shape, classes: None)\n',
        r"mine\.py, line 2: extend\.model\('mlp'\): this is a built-in model",
    ),
    "kind": (
        'from fedmaestro import extend\n@extend.metric("m")\ndef m(outputs, targets): ...\n',
        r"mine\.py, line \d: .*",
    ),
    "dataset": (
        'from fedmaestro import extend\nextend.task("t")(5)\n',
        r"mine\.py, line 2: extend\.task\('t'\) got int: expected a class with loss\(outputs, targets\)",
    ),
    "name": (
        'from fedmaestro import extend\nextend.fleet("a b")({})\n',
        r"mine\.py, line 2: extend\.fleet\('a b'\): a name is a word",
    ),
    "fleet": (
        'from fedmaestro import extend\nextend.fleet("lab")({"big": {"share": 0.5}})\n',
        r"mine\.py, line 2: fleet 'lab': the shares of the tiers sum to 0\.5",
    ),
    "strategy": (
        'from fedmaestro import extend\nextend.strategy("s", {"train.objectiv": "x"})\n',
        r"unknown setting of strategy 's' 'train\.objectiv': did you mean 'train\.objective'\?",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_and_line(case: str, tmp_path: Path) -> None:
    text, said = ERRORS[case]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        activate(gather(str(tmp_path / "mine.py")))
    assert "\n" not in str(caught.value)
    activate(NO_CODE)
    assert isinstance(MODELS["mlp"].initialize, Callable)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing.py", r"nothing\.py does not exist"),
        ("my-code.py", r"'my-code'.*rename it"),
        ("json.py", r"installed module 'json'"),
        ("no.such.module", r"no Python module 'no\.such\.module'"),
    ],
)
def test_what_cannot_be_used(name: str, said: str, tmp_path: Path) -> None:
    if name in ("my-code.py", "json.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=said):
        gather(str(tmp_path / name) if name.endswith(".py") else name)


MODEL = """
from torch import nn
from fedmaestro import extend

@extend.model("broken")
class Broken(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        {init}
    def forward(self, x):
        {forward}
"""


@pytest.mark.parametrize(
    ("init", "forward", "said"),
    [
        ("self.fc = nn.Linear('x', 2)", "return x", r"cannot be made: .*mine\.py, line 9: TypeError"),
        ("self.fc = nn.Linear(64, classes)", "return self.fc(x)", r"fails on an example: .*mine\.py, line 11: "),
        ("self.fc = nn.Linear(64, 7)", "return self.fc(x.flatten(1))", r"puts out \(2, 7\) for 2 examples.*\(2, 10\)"),
        ("self.fc = nn.Linear(64, classes)", "return 'logits'", r"the model returned str"),
        (
            "self.unused = nn.Linear(3, 3); self.fc = nn.Linear(64, classes)",
            "return self.unused.weight.sum() + self.fc(x.flatten(1))",
            r"line 11: AttributeError: 'LoDLinear' object has no attribute 'weight'",
        ),
        (
            "self.unused = nn.Linear(3, 3); self.fc = nn.Linear(64, classes)",
            "return self.fc(x.flatten(1))",
            r"layer 'unused' is never called.*model\.keep-dense",
        ),
    ],
)
def test_a_model_that_cannot_be_used(init: str, forward: str, said: str, tmp_path: Path, federate: Federate) -> None:
    (tmp_path / "mine.py").write_text(MODEL.format(init=init, forward=forward))
    with pytest.raises(UserError, match=said):
        federate({"use": str(tmp_path / "mine.py"), "model.name": "broken"})


def test_an_objective_that_fails_on_devices_is_named_with_its_line(federate: Federate, tmp_path: Path) -> None:
    lines = ["from fedmaestro import extend", "", "@extend.objective('bad')", "def bad(prefixes, x, y, rng):"]
    (tmp_path / "mine.py").write_text("\n".join([*lines, "    return x.missing", ""]))
    _, folder, _ = federate({"use": str(tmp_path / "mine.py"), "train.objective": "bad", "train.rounds": 1})
    assert "mine.py, line 5: AttributeError" in folder.log.read_text()


class Tiny(nn.Module):
    """A model of this module's."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(int(np.prod(input_shape)), 24)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.flatten(1)).relu())
        return out


def test_objects_of_a_script_go_with_the_run(federate: Federate) -> None:
    factor = 2.0

    def scaled(prefixes: Any, x: Tensor, y: Tensor, rng: np.random.Generator) -> Tensor:
        loss: Tensor = factor * prefixes.label_loss(prefixes(x), y)
        return loss

    chosen = extend.given({"model": Tiny, "objective": scaled, "partition": None})
    assert chosen == {"model.name": "Tiny", "train.objective": "scaled"}
    summary, folder, _ = federate({**chosen, "train.lr": 0.1, "train.rounds": 4})
    assert summary["failed"] == 0
    assert summary["model"] == "Tiny"
    named = read_code(folder.path).digests
    assert sorted(named) == ["model Tiny", "objective scaled"]
    # Objects are no file: whoever loads the model has to have them, in another process too.
    load = "import sys, fedmaestro; print(fedmaestro.load_model(sys.argv[1], 'high'))"
    assert "model Tiny, objective scaled was an object of a script" in python(load, folder.path, fails=True)
    # The same objects in another process have the same digests, others have not: a resume asks them.
    assert code_of(load_config(None, chosen), folder.path) == read_code(folder.path)
    factor = 3.0
    with pytest.raises(UserError, match="objective scaled has changed"):
        code_of(load_config(None, chosen), folder.path)


def test_a_pretrained_module_starts_every_run(federate: Federate) -> None:
    torch.manual_seed(1)
    net = Tiny((1, 8, 8), 10)
    weight = net.body.weight.detach().clone()
    chosen = extend.given({"model": net})
    assert chosen == {"model.name": "Tiny"}
    from fedmaestro.models.architecture import Architecture

    for seed in (0, 1):
        state = Architecture(name="Tiny", input_shape=(1, 8, 8), num_classes=10).initial_state(seed)
        torch.testing.assert_close(state["body.u"] @ state["body.v"], weight)
    summary, _, _ = federate(chosen)
    assert summary["failed"] == 0
    assert net.body.weight.equal(weight), "the caller's own module is not trained"


def test_rows_of_a_notebook_can_be_defined_again() -> None:
    for value in (1.0, 2.0):
        extend.schedule("mine")(lambda _round, _rounds, value=value: value)
        assert extend.KINDS["schedule"].rows["mine"].factor(1, 2, Decay()) == value
    with pytest.raises(UserError, match="built-in optimizer"):
        extend.optimizer("sgd")(torch.optim.SGD)
    assert extend.name_of("model", MODELS) == "model"


def test_large_objects_go_through_the_cache(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmaestro.runs import code as module

    monkeypatch.setattr(module, "SHIPPED_BYTES", 100)
    summary, _, grid = federate({**extend.given({"model": Tiny}), "train.rounds": 1})
    assert summary["failed"] == 0
    assert all("code-sha256" in message.content.config_records["job"] for message in grid.sent)
    monkeypatch.setattr(module, "cached", lambda fingerprint: Path("/nowhere") / fingerprint)
    with pytest.raises(UserError, match="this host lacks the experiment's objects"):
        module.received({"code-sha256": "0"})


def test_code_is_equal_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = gather(str(tmp_path / "a.py"))
    assert Code.from_bytes(first.to_bytes()) == first == gather(str(tmp_path / "a.py"))
    assert first != NO_CODE
    assert not NO_CODE
    (tmp_path / "a.py").write_text("x = 2\n")
    assert gather(str(tmp_path / "a.py")).difference(first) == "a.py has changed"


def test_packages_and_relative_imports_are_gathered(tmp_path: Path) -> None:
    package = tmp_path / "kit"
    package.mkdir()
    (package / "__init__.py").write_text("from .rows import VALUE\n")
    (package / "rows.py").write_text("from . import deep\nVALUE = deep.X\n")
    (package / "deep.py").write_text("X = 7\n")
    (package / "other.py").write_text("raise RuntimeError\n")
    (tmp_path / "mine.py").write_text(
        "import numpy, kit\nfrom fedmaestro import extend\nextend.schedule('seven')(lambda r, n: kit.VALUE)\n"
    )
    code = gather(str(tmp_path / "mine.py"))
    assert sorted(source.file for source in code.sources) == [
        "kit/__init__.py",
        "kit/deep.py",
        "kit/rows.py",
        "mine.py",
    ]
    activate(code)
    assert extend.KINDS["schedule"].rows["seven"].factor(1, 1, Decay()) == 7
    activate(NO_CODE)
    assert "seven" not in extend.KINDS["schedule"].rows
    assert "kit" not in sys.modules


@pytest.fixture
def fedmaestro_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return entry_point(tmp_path, monkeypatch, capsys)


def test_new_writes_what_can_be_listed(fedmaestro_command: Command) -> None:
    written = fedmaestro_command("new", "own.py")
    assert written.code == 0, written.err
    assert Path("own.toml").exists()
    for kind, name in [("models", "gru"), ("datasets", "waves"), ("strategies", "mine"), ("metrics", "worst-class")]:
        assert name in fedmaestro_command("list", kind, "--use", "own.py").out
    again = fedmaestro_command("new", "own.py")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "is there already" in again.err
    assert fedmaestro_command("new", "my-own.py").code == 2
    text = json.dumps(load_config("own.toml").flat())
    assert str(Path("own.py").absolute()) in text


def test_the_functions_take_strings_and_refuse_what_is_no_row() -> None:
    assert extend.given({"model": "lenet", "dataset": None}, use="a.py") == {"use": "a.py", "model.name": "lenet"}
    with pytest.raises(UserError, match=r"extend\.model\('int'\) got int: expected a torch\.nn\.Module"):
        extend.given({"model": 5})
    assert inspect.signature(fedmaestro.run).parameters["model"].default is None


SERVER = """
from fedmaestro import extend

@extend.aggregation("bad")
def bad(partial, old):
    {body}

@extend.selection("bad")
def pick(this, candidates, history, rng):
    return candidates.nothing

@extend.partition("bad")
def deal(examples, devices, rng):
    {deal}

@extend.dataset("bad")
def load():
    return open("/nowhere/at/all")
"""


@pytest.mark.parametrize(
    ("setting", "body", "said"),
    [
        ("train.aggregation", "return old['x']", r"aggregation 'bad' in round 1: .*mine\.py, line 6: KeyError"),
        ("train.aggregation", "return {}", r"bad must return every tensor of the model by its name, returned \[\]"),
        ("train.aggregation", "return {k: v[:1] for k, v in old.items()}", r"bad returned '.*' of shape .*, it was"),
        ("train.selection", "return old", r"selection 'bad' in round 1: .*mine\.py, line 10: AttributeError"),
        ("data.partition", "return examples.nothing", r"partition 'bad': .*mine\.py, line 14: AttributeError"),
        ("data.partition", "return [[0]] * devices", r"gives an example to more than one device"),
        ("data.partition", "return [[0.5]] * devices", r"must return an array of indices for each device"),
        ("data.partition", "return [[0]]", r"returned 1 parts for 20 devices"),
        ("data.partition", "return [[-1]] * devices", r"returned indices outside of 0"),
        ("data.name", "return old", r"dataset 'bad': .*mine\.py, line 18: FileNotFoundError"),
    ],
)
def test_errors_on_the_servers_side_are_one_line(
    setting: str, body: str, said: str, federate: Federate, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SERVER.format(body=body, deal=body))
    with pytest.raises(UserError, match=said) as caught:
        federate({"use": str(tmp_path / "mine.py"), setting: "bad"})
    assert "\n" not in str(caught.value)


def test_what_is_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name is given as an object \(Tiny\) and in the overrides"):
        extend.given({"model": Tiny}, None, {"model.name": "mlp"})
