"""Runs and comparisons that never ran, made by the code that makes real ones; and readers of pictures and pages."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fedmaestro.config.experiment import load_config
from fedmaestro.runs.folder import RunFolder, write_atomically, write_record, write_records
from fedmaestro.runs.records import AS_IT_IS, Analysis, Results, RoundRecord, StrategyResults, Summary, TierFigures
from fedmaestro.runs.results import FinishedCell, strategy_results
from fedmaestro.runs.summary import summarize

TIERS = ("flagship", "high", "mid", "low", "minimal")
FINALS = (0.978, 0.976, 0.974, 0.971, 0.944)
NAMES = ("nested", "zero-pad", "heterofl")
EVALUATED = (0, 5, 10, 15, 20)


def make_rounds(
    tiers: Sequence[str] = TIERS,
    finals: Sequence[float] = FINALS,
    last: int = 60,
    every: int = 5,
    virtual_seconds: float = 432.0,
) -> list[RoundRecord]:
    """Curves that rise from 10 % and settle at ``finals``, evaluated every few rounds."""
    return [
        RoundRecord(
            round=number,
            tiers={
                tier: {"accuracy": 0.1 + (final - 0.1) * (1 - math.exp(-number / 4)), "loss": 0.5}
                for tier, final in zip(tiers, finals, strict=True)
            }
            if number % every == 0
            else {},
            train_loss=1 / number if number else None,
            devices=10,
            failed=int(number == 7),
            download_bytes=1_000_000 if number else 0,
            upload_bytes=500_000 if number else 0,
            virtual_seconds=virtual_seconds if number else 0.0,
            wall_seconds=1.2,
        )
        for number in range(last + 1)
    ]


def figures(index: int, form: str = "lod") -> TierFigures:
    return TierFigures(
        devices=20,
        ranks={"conv1": 6, "fc1": 120 >> index} if form == "lod" else {"width": 0.5**index},
        params=61706 >> index,
        macs_per_example=281640 >> index,
        train_macs_per_example=844920 >> index,
        train_memory_bytes=1_900_000 >> index,
        download_bytes=246824 >> index,
        upload_bytes=123412 >> index,
        round_seconds=0.5 / (1 + index),
    )


def make_summary(rounds: Sequence[RoundRecord], form: str = "lod", **facts: Any) -> Summary:
    tiers = dict.fromkeys(name for row in rounds for name in row.tiers)
    of_tiers = {name: figures(index, form) for index, name in enumerate(tiers)}
    known = {"strategy": "nested", "objective": "own-prefix", "seed": 0, "dataset": "mnist", "model": "lenet"}
    return summarize(rounds, of_tiers, "ab" * 32, **(known | facts))


def write_run(
    folder: Path, rounds: Sequence[RoundRecord] | None = None, *, finished: bool = True, **facts: Any
) -> Path:
    """Write what a run leaves behind."""
    rounds = make_rounds() if rounds is None else rounds
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    write_records(run.rounds, rounds)
    settings = {"seed": facts.get("seed", 0), "data.name": "mnist", "model.name": "lenet", "train.lr": 0.05}
    settings |= {"train.strategy": facts.get("strategy", "nested"), "train.objective": "own-prefix"}
    write_atomically(run.config, load_config(None, settings).to_toml())
    if finished:
        write_record(run.summary, make_summary(rounds, **facts))
    return folder


def make_row(
    name: str,
    rank: float,
    *,
    form: str = "lod",
    seeds: Sequence[int] = (0, 1, 2),
    tiers: Sequence[str] = ("flagship", "mid", "minimal"),
    cost: float = 1.0,
    analysis: Analysis = AS_IT_IS,
    noise: float = 0.0,
) -> StrategyResults:
    """A strategy whose tiers end at 97 % - ``rank`` % - 1 % per tier + 0.2 % per seed; the round before is 0.1 % above.

    With ``noise``, so much is added for even seeds and taken for odd ones: rows differ by more than a constant then.
    A round costs ``cost`` MB down and half of that up, and six minutes of virtual time times ``cost``.
    """
    cells = []
    for seed in seeds:
        finals = [0.97 - 0.01 * (rank + index) + 0.002 * seed + noise * (-1) ** seed for index in range(len(tiers))]
        records = []
        for number in range(EVALUATED[-1] + 1):
            rise = (1 - math.exp(-number / 4)) / (1 - math.exp(-5))
            scores = [0.1 + (final - 0.1) * rise if number != 15 else final + 0.001 for final in finals]
            records.append(
                RoundRecord(
                    round=number,
                    tiers={tier: {"accuracy": a, "loss": 0.5} for tier, a in zip(tiers, scores, strict=True)}
                    if number in EVALUATED
                    else {},
                    download_bytes=int(cost * 1e6) if number else 0,
                    upload_bytes=int(cost * 5e5) if number else 0,
                    virtual_seconds=cost * 360.0 if number else 0.0,
                    tail_energy=0.6 * 0.9**number if form == "lod" else None,
                    factor_bias=0.1 + 0.01 * seed if form == "lod" and number else None,
                )
            )
        cells.append(FinishedCell(seed=seed, summary=make_summary(records, form), records=records))
    return strategy_results(
        cells,
        analysis,
        name=name,
        summary=f"what {name} does",
        source=f"paper of {name}",
        form=form,
        submodel="rank, own" if form == "lod" else "width, own",
        objective="own-prefix",
        aggregation="coverage-mean",
        server="none",
    )


def make_results(
    rows: Sequence[StrategyResults] | int = 3, *, seeds: Sequence[int] = (0, 1, 2), analysis: Analysis = AS_IT_IS
) -> Results:
    """A comparison of ``rows``, or of so many strategies, the third of them dense."""
    if isinstance(rows, int):
        names = [*NAMES, *(f"method-{index}" for index in range(3, rows))][:rows]
        forms = ["dense" if index == 2 else "lod" for index in range(rows)]
        rows = [make_row(x, i, form=forms[i], seeds=seeds, analysis=analysis) for i, x in enumerate(names)]
    return Results(
        experiment="mnist",
        complete=all(row.seeds == list(seeds) for row in rows),
        seeds=list(seeds),
        tiers=next((list(row.tiers) for row in rows if row.tiers), ["flagship", "mid", "minimal"]),
        matched_macs=True,
        protocol={"data.name": "mnist", "train.rounds": 20, "data.alpha": 0.5, "fleet.file": ""},
        analysis=analysis,
        strategies=list(rows),
    )


def edited(results: Results, change: Callable[[dict[str, Any]], object]) -> Results:
    """Return results whose JSON was changed."""
    content = results.to_dict()
    change(content)
    return Results.model_validate(content)


def svg_texts(svg: str | Path) -> list[str]:
    """The texts of a picture, in the order of the file."""
    root = ElementTree.fromstring(svg.read_text(encoding="utf-8") if isinstance(svg, Path) else svg)
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


class Page(HTMLParser):
    """Collects attributes, text and table rows, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "img", "br", "hr", "link", "input"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    def check_self_contained(self) -> None:
        """Nothing is loaded, ids are unique, and what refers to one finds it."""
        links = [link for name in ("src", "href", "xlink:href") for link in self.values(name)]
        assert all(link.startswith(("#", "data:")) for link in links)
        assert re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", self.source) == []
        ids = self.values("id")
        assert len(ids) == len(set(ids)) > 20
        references = re.findall(r"url\(#([^)]+)\)", self.source) + [link[1:] for link in links if link[0] == "#"]
        assert references
        assert set(references) <= set(ids)
