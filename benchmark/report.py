"""The report: our numbers beside the paper's, from the metrics.csv of any number of run folders.

    python benchmark/report.py runs [FOLDER ...] [--out runs/report]

takes run folders, and folders that hold run folders, and writes report.md, report.csv and curves (PNG) into --out.
It needs no network and no account, works on runs that are not finished, and says what is missing.

A run's method, task, kind of data, variant and seed are read from its args.json and from its folder's name
(SCRIPT__TASK-KIND__VARIANT__SEED, or the scripts' own ENV__SCRIPT__KIND__SEED__TIME); without args.json its settings
count as unknown. Runs whose settings differ from the paper's in different ways are never averaged.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAPER = Path(__file__).resolve().parent / "paper"
LAST = 5  # evaluations whose mean is the score of a run
SEEDS = 3  # of the paper
RESAMPLES = 10_000

BASELINES = {"iql": "IQL", "odt": "ODT", "odt_td3": "ODT+TD3"}  # of benchmark/baselines.sh
METHODS = {"pretrain_dt": "DT", "ppo_dt": "PPO-DT", "grpo_dt": "GRPO-DT", "q_guided_grpo_dt": "Q-guided GRPO-DT"}
METHODS |= BASELINES
COLUMNS = {"pretrain_dt": "dt", **{name: name for name in BASELINES}, "ppo_dt": "ppo_dt", "grpo_dt": "grpo_dt"}

# The paper's abbreviations, and the names of tasks and kinds in environment ids and folders.
TASKS = {"Ho": "Hopper", "Wa": "Walker2d", "An": "Ant", "D": "Door", "P": "Pen", "H": "Hammer"}
KINDS = {"R": "random", "MR": "medium-replay", "M": "medium", "C": "cloned", "H": "human"}
MAZES = {"U": ("AntMaze", "umaze"), "UD": ("AntMaze", "diverse")}
OTHER_KINDS = ["expert", "umaze", "diverse"]

# What a figure compares: (task, kind) and the variants beside the method of Table 1. Names as in benchmark/*.sh.
FIGURES = {
    "1": [("Hopper", "medium", ["hindsight"]), ("Door", "human", ["hindsight"])],
    "2a": [("Ant", "medium", ["full-trajectories"])],
    "2b": [("Hopper", "medium", ["mixed-groups"])],
    "2c": [("Hopper", "medium", ["token-ratio"])],
    "2d": [("Hopper", "medium", ["random-points"])],
    "2e": [("Hopper", "medium", ["geometric-mean"])],
    "4a": [("Hopper", "medium", ["reinformer"])],
    "4b": [("Ant", "medium-replay", [])],  # and Q-guided GRPO-DT
    "4c": [("Hopper", "medium", ["l-traj-1", "l-traj-5", "l-traj-50", "l-traj-100"])],
    "4d": [("Hopper", "medium", ["l-eval-0", "l-eval-30", "l-eval-100", "l-eval-200"])],
}

# Names in the paper's tables -> names in args.json, Table 5, and ODT's rate of the entropy dual.
SETTINGS = {"lr_policy": "lr", "k_ppo": "n_trajectories"}
COMMON = dict(embed_dim=512, n_layers=4, n_heads=4, beta=1e-3, weight_decay=1e-4, max_grad_norm=0.5, kappa_lr=1e-4)
# Appendix B.1, and flags of the ablations, which the method of Table 1 has not. Two of them are values of GRPO-DT's
# --ratio; runs before it have them as flags of their own.
GROUPS = dict(replay_size=32, n_sources=16, n_points=4, group_size=8, buffer_size=2048, n_minibatches=8)
ABLATIONS = ("hindsight", "full_trajectories", "mixed_groups", "token_ratio", "random_points", "geometric_mean")
RATIOS = {"token": "token_ratio", "geometric": "geometric_mean"}

INTRODUCTION = f"""# Our numbers beside the paper's

Normalised scores: 0 = random, 100 = expert.

- **last**: mean ± standard deviation over seeds (n - 1, so none for one seed) of a run's score, the mean of its last
  {LAST} evaluations after updates, or of fewer where that is said; pretraining has one. In an average: the mean over
  its datasets.
- **best**: the largest single evaluation of all seeds. Evaluations are noisy, so it says little.
- **IQM**: interquartile mean over seeds, in an average over all seeds of its datasets: the mean without the lowest and
  the highest quarter of the scores (rounded down, so with 3 seeds the plain mean); 95 % interval by {RESAMPLES:,}
  bootstrap samples of the seeds of each dataset.
- **s / iteration**: wall time of an iteration, with its evaluation where it has one, of DT of an update, on whatever
  machine the run had: the median over iterations and seeds.
- **differs in**: settings of a run that are not those of the paper's Tables 5 to 7 and Appendix B.1, ours (paper's),
  ODT's rate of the entropy dual, and the context of its pretraining; unknown: the run folder has no args.json. The
  number of iterations is not in the paper.
"""
TABLE_1 = f"""Ours / the paper's.
\\*: fewer than {SEEDS} seeds, not finished, or settings that differ from the paper's or are unknown."""


# The paper


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def dataset_keys(name: str) -> list[tuple[str, str]]:
    """(task, kind) of the paper's "Ho-M/MR-v2", "D-C-v1", "UD-v2"; empty for "Average"."""
    task, *kinds = name.split("-")[:2]
    if task in MAZES:
        return [MAZES[task]]
    return [(TASKS[task], KINDS[kind]) for kind in kinds[0].split("/")] if task in TASKS else []


def paper_settings(method: str, task: str, kind: str) -> dict[str, float]:
    """What Tables 5, 6 and 7 and Appendix B.1 say of a method on a dataset, under the names in args.json; the critic of
    Q-guided GRPO-DT: TD3's and ODT+TD3's settings, which it follows."""
    if method in BASELINES:  # "as Yan et al.": docs/baselines.md has the rows
        return {} if method == "iql" else {"embed_dim": 512}
    name = {"ppo_dt": "table7.csv"}.get(method, "table6.csv")
    row = next((row for row in read_csv(PAPER / name) if (task, kind) in dataset_keys(row["environments"])), {})
    values = {SETTINGS.get(key, key): float(value) for key, value in row.items() if key != "environments"}
    if method == "pretrain_dt":  # g_online and all after it belong to finetuning
        values = {key: values[key] for key in ("c_offline", "c_online") if key in values}
    if method == "ppo_dt":  # the caption of Table 7
        values |= dict(epsilon=0.2, gamma=0.99, gae_lambda=0.95)
    if method == "q_guided_grpo_dt":  # Appendix B.1; it is not said to drop members
        values = {key: value for key, value in values.items() if key != "delta_r"}
        values |= dict(lr=1e-5, kappa_initial=1e-2, gamma=0.998 if task == "AntMaze" else 0.99, tau=0.005)
    if method in ("grpo_dt", "q_guided_grpo_dt"):
        values |= GROUPS
    return COMMON | values | dict.fromkeys(ABLATIONS, False)


# Runs


class Point(NamedTuple):
    """An evaluation."""

    iteration: int
    env_steps: float
    score: float  # D4RL's, 0 = random, 100 = expert


@dataclass
class Run:
    """What a run folder says."""

    folder: Path
    method: str
    task: str
    kind: str
    variant: str
    seed: str
    points: list[Point]  # in the order of iterations
    goal: int | None  # iterations asked for
    iteration: int  # iterations made
    seconds: float  # wall time of an iteration (pretraining: an update), median over rows; NaN if not written
    differs: str  # settings unlike the paper's, "" if there are none, "unknown" without args.json

    @property
    def scores(self) -> list[float]:
        """Of the evaluations after updates: the first of a finetuning run is the pretrained policy's."""
        return [point.score for point in self.points if point.iteration > 0]

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores[-LAST:])

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.method, self.task, self.kind, self.variant, self.differs


def split_kind(text: str) -> tuple[str, str]:
    """The kind that a text begins with, and the rest: "medium-replay-a" -> ("medium-replay", "a")."""
    for kind in [*KINDS.values(), *OTHER_KINDS]:
        if text == kind or text.startswith(kind + "-"):
            return kind, text[len(kind) + 1 :]
    return text, ""


def task_name(text: str) -> str:
    """As in TASKS, or AntMaze: "hopper" and "Hopper-v5" -> "Hopper", "AdroitHandDoor-v1" -> "Door"; others stay."""
    short = text.split("/")[-1].removeprefix("AdroitHand").lower()
    known = [*TASKS.values(), "AntMaze"]
    return next((name for name in known if short.replace("_", "-").split("-")[0] == name.lower()), text)


def identify(name: str, args: dict) -> tuple[str, str, str, str, str] | None:
    """(method, task, kind, variant, seed) of a run folder's name and its arguments; None if they do not tell."""
    parts = name.split("__")
    if len(parts) >= 3 and parts[0] in METHODS:
        method, (task, _, rest), *variant, seed = parts[0], parts[1].partition("-"), *parts[2:]
        kind, more = split_kind(rest)
        variant = "__".join(part for part in [more, *variant] if part)
    elif len(parts) == 5 and parts[1].removesuffix("_continuous") in METHODS:
        task, method, kind, seed = parts[0], parts[1].removesuffix("_continuous"), parts[2], parts[3]
        variant = ""
    else:
        return None
    task, kind, seed = args.get("env_id", task), args.get("dataset_kind") or kind, str(args.get("seed", seed))
    return method, task_name(task), kind, "" if variant == "paper" else variant, seed


def settings_that_differ(method: str, task: str, kind: str, args: dict) -> str:
    """The arguments that are not as in the paper, "embed_dim 128 (512), lr 0.0001 (5e-05)"; "unknown" without any."""
    if not args:
        return "unknown"
    if args.get("ratio") in RATIOS:
        args = args | {RATIOS[args["ratio"]]: True}
    values = ((name, args.get(name), value) for name, value in paper_settings(method, task, kind).items())
    return ", ".join(
        name if name in ABLATIONS else f"{name} {ours:g} ({paper:g})"
        for name, ours, paper in values
        if isinstance(ours, int | float) and not math.isclose(ours, paper)
    )


def pretraining_that_differs(folder: Path, method: str, task: str, kind: str, args: dict) -> str:
    """The same of the checkpoint that a run began with: what its args.json says, which is looked for where the run has
    it and beside the run's folder."""
    if "pretrained" not in args or method == "iql":  # which takes no more than the data
        return ""
    if args["pretrained"] is None:
        return "pretrained by the script itself"
    start = Path(args["pretrained"])
    start = start.parent if start.suffix == ".pt" else start
    paper = (paper_settings(method, task, kind) | paper_settings("pretrain_dt", task, kind)).get("c_offline")
    for place in (start, folder.parent / start.name):
        try:
            ours = json.loads((place / "args.json").read_text())["args"].get("c_offline")
        except (OSError, ValueError, KeyError):
            continue
        return "" if ours is None or paper in (None, ours) else f"pretrained at c_offline {ours} ({paper:g})"
    return "pretraining unknown"


def read_run(folder: Path) -> Run | str:
    """The run in a folder, or a line that says why there is none."""
    try:
        content = json.loads((folder / "args.json").read_text())
        args, program = content["args"], Path(content.get("command", [""])[0]).stem
    except (OSError, ValueError, KeyError):
        args, program = {}, ""
    identity = identify(folder.name, args)
    if identity is None:
        return f"{folder.name}: its name does not tell the method"
    if args.get("td3") and identity[0] == "odt":
        identity = ("odt_td3", *identity[1:])
    if program in ("reinformer", "odt") and identity[0] not in BASELINES and not identity[3]:  # their names do not tell
        identity = (*identity[:3], program, identity[4])
    rows = [row for row in read_csv(folder / "metrics.csv") if row.get("iteration")]
    points = [
        Point(int(row["iteration"]), float(row.get("charts/env_steps") or 0), float(row["eval/normalized_score"]))
        for row in rows
        if row.get("eval/normalized_score")
    ]
    differs = (settings_that_differ(*identity[:3], args), pretraining_that_differs(folder, *identity[:3], args))
    differs, goal = ", ".join(filter(None, differs)), args.get("iterations") or args.get("updates")
    times = [float(row["time/iteration"]) for row in rows if row.get("time/iteration")]
    made, seconds = max((int(row["iteration"]) for row in rows), default=0), statistics.median(times or [math.nan])
    run = Run(folder, *identity, points, goal, made, seconds, differs)
    return run if run.scores else f"{folder.name}: no evaluation after an update yet, or a task without scores"


def read_runs(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs in folders and in the folders in them, one per seed and group; and lines about those left out."""
    paths = sorted({path.parent for folder in folders for at in ("", "*/") for path in folder.glob(f"{at}metrics.csv")})
    runs, notes = {}, []
    for path in paths:
        run = read_run(path)
        if isinstance(run, str):
            notes.append(run)
            continue
        other = runs.get((run.key, run.seed))
        if other:
            run, worse = (run, other) if run.iteration > other.iteration else (other, run)
            notes.append(f"{worse.folder}: the group and seed of {run.folder}, which has no fewer iterations")
        runs[run.key, run.seed] = run
    return list(runs.values()), notes


# Statistics


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """The mean along the last axis without the lowest and the highest floor(n / 4): (..., n) -> (...)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap(scores: list[list[float]]) -> tuple[float, float]:
    """95 % interval of the interquartile mean of the scores of one or several datasets: seeds are drawn anew within
    each dataset. NaN where no dataset has two seeds."""
    if max(len(each) for each in scores) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    drawn = [np.array(each)[rng.integers(len(each), size=(RESAMPLES, len(each)))] for each in scores]
    low, high = np.percentile(interquartile_mean(np.concatenate(drawn, axis=1)), [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Summary:
    """Scores over the seeds of a group, or over the datasets of a block."""

    method: str
    data: str
    variant: str
    mean: float
    std: float  # NaN for one seed and for a block
    best: float  # NaN for a block
    iqm: float
    interval: tuple[float, float]
    seeds: int
    iterations: str
    seconds: float
    differs: str
    evaluations: int  # of the seed or dataset that has fewest, at most LAST: what "last" is the mean of
    paper: float = math.nan
    paper_std: float = math.nan


def span(values: list[int]) -> str:
    """[3, 5, 4] -> "3-5"."""
    return "-".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def summarise(runs: list[Run], data: str = "") -> Summary:
    """Of the runs of one group; data: the name of the dataset, if not "task-kind"."""
    scores, (first, *_) = [run.score for run in runs], runs
    return Summary(
        first.method,
        data or f"{first.task}-{first.kind}",
        first.variant,
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else math.nan,
        max(max(run.scores) for run in runs),
        float(interquartile_mean(np.array(scores))),
        bootstrap([scores]),
        len(runs),
        span([run.iteration for run in runs]),
        statistics.median(run.seconds for run in runs),
        first.differs,
        min(len(run.scores[-LAST:]) for run in runs),
    )


def summarise_block(groups: list[list[Run]], cells: list[Summary], name: str) -> Summary:
    """Over the datasets of a block that have runs, with their summaries; the paper's average over the same ones."""
    scores = [[run.score for run in runs] for runs in groups]
    pooled = [score for each in scores for score in each]
    return Summary(
        cells[0].method,
        name,
        "",
        statistics.fmean(cell.mean for cell in cells),
        math.nan,
        math.nan,
        float(interquartile_mean(np.array(pooled))),
        bootstrap(scores),
        len(pooled),
        span([run.iteration for runs in groups for run in runs]),
        math.nan,
        "; ".join(sorted({cell.differs for cell in cells if cell.differs})),
        min(cell.evaluations for cell in cells),
        statistics.fmean(cell.paper for cell in cells),
    )


# Groups and tables


def group_runs(runs: list[Run]) -> dict[tuple, list[Run]]:
    """Runs by method, task, kind, variant and settings, each group in the order of seeds."""
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (len(run.seed), run.seed)):
        groups[run.key].append(run)
    return dict(groups)


def pick(groups: dict[tuple, list[Run]], method: str, task: str, kind: str, variant: str = "") -> list[Run]:
    """The group that stands for this cell: the paper's settings if there is one, else that with most seeds."""
    found = [runs for key, runs in groups.items() if key[:4] == (method, task, kind, variant)]
    return max(found, key=lambda runs: (runs[0].differs == "", len(runs), runs[0].iteration), default=[])


class Cell(NamedTuple):
    """One method on one dataset of Table 1, or a block's average."""

    block: str
    dataset: str
    paper: float
    paper_std: float  # NaN where the paper gives none
    ours: Summary | None
    runs: list[Run]


def table1(groups: dict[tuple, list[Run]], method: str) -> list[Cell]:
    """One column of Table 1, in its order, averages included."""
    column, cells, block = COLUMNS.get(method, method), [], []
    for row in read_csv(PAPER / "table1.csv"):
        paper, std = float(row[column]), float(row.get(f"{column}_std") or "nan")
        runs, ours = [], None
        if row["dataset"] == "Average" and block:
            name = f"{row['block']}: average of {len(block)}"
            ours = summarise_block([cell.runs for cell in block], [cell.ours for cell in block], name)
        elif row["dataset"] != "Average":
            ((task, kind),) = dataset_keys(row["dataset"])
            runs = pick(groups, method, task, kind)
            if runs:
                ours = replace(summarise(runs, row["dataset"]), paper=paper, paper_std=std)
        cells.append(Cell(row["block"], row["dataset"], paper, std, ours, runs))
        block = [] if row["dataset"] == "Average" else [*block, cells[-1]] if ours else block
    return cells


def number(value: float, sign: str = "") -> str:
    """Two decimals, with sign="+" also a plus; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:{sign}.2f}"


def plus_minus(mean: float, std: float) -> str:
    return number(mean) + ("" if math.isnan(std) else f" ± {number(std)}")


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)] + [""]


DETAILS = ["last", "best", "IQM [95 %]", "seeds", "iterations", "s / iteration"]


def details(ours: Summary) -> list[str]:
    """The cells under DETAILS."""
    low, high = ours.interval
    interval = "" if math.isnan(low) else f" [{number(low)}, {number(high)}]"
    few = f" (of {ours.evaluations})" if ours.method != "pretrain_dt" and ours.evaluations < LAST else ""
    cells = [plus_minus(ours.mean, ours.std) + few, number(ours.best), number(ours.iqm) + interval]
    return [*cells, str(ours.seeds), ours.iterations, number(ours.seconds)]


def as_in_the_paper(runs: list[Run]) -> bool:
    """Whether a group has the paper's seeds and settings, and made the iterations that were asked for."""
    return len(runs) >= SEEDS and not runs[0].differs and all(run.iteration >= (run.goal or math.inf) for run in runs)


def overview(tables: dict[str, list[Cell]]) -> list[str]:
    """Table 1's layout: ours / the paper's. An average of ours needs all."""
    rows = []
    for index, row in enumerate(read_csv(PAPER / "table1.csv")):
        cells = {}
        for method, table in tables.items():
            cell = table[index]
            block = [cell] if cell.runs else [each for each in table if each.block == cell.block]
            complete = cell.ours and all(each.ours for each in block)
            mark = "" if complete and all(as_in_the_paper(each.runs) for each in block if each.runs) else "\\*"
            ours = plus_minus(cell.ours.mean, cell.ours.std) + mark if complete else "-"
            cells[method] = f"{ours} / {plus_minus(cell.paper, cell.paper_std)}"
        rows.append([row["block"], row["dataset"], *cells.values()])
    return markdown_table(["", "dataset", *(METHODS[method] for method in tables)], rows)


def method_table(table: list[Cell]) -> list[str]:
    """What we have of one method, in Table 1's layout."""
    rows = []
    for cell in (cell for cell in table if cell.ours):
        ours = cell.ours
        name = cell.dataset if cell.runs else ours.data.split(": ")[1]
        paper = [plus_minus(ours.paper, ours.paper_std), number(ours.mean - ours.paper, "+")]
        rows.append([cell.block, name, *details(ours), *paper, ours.differs or "-"])
    return markdown_table(["", "dataset", *DETAILS, "paper", "difference", "differs in"], rows)


def labelled_table(summaries: list[Summary]) -> list[str]:
    rows = [[METHODS[s.method], s.data, s.variant or "-", *details(s), s.differs or "-"] for s in summaries]
    return markdown_table(["method", "data", "variant", *DETAILS, "differs in"], rows)


class Curve(NamedTuple):
    """A curve of a figure; `runs` is empty where there are none."""

    task: str
    kind: str
    method: str
    variant: str
    runs: list[Run]

    @property
    def name(self) -> str:
        return f"{METHODS[self.method]} {self.task}-{self.kind} {self.variant}".strip()


def figure_curves(groups: dict[tuple, list[Run]], figure: str) -> list[Curve]:
    """The curves of a figure: for each of its datasets the method of Table 1 and what it is compared with."""
    names = []
    for task, kind, variants in FIGURES[figure]:
        names += [(task, kind, "grpo_dt", variant) for variant in ["", *variants]]
        names += [(task, kind, "q_guided_grpo_dt", "")] if figure == "4b" else []
    return [
        Curve(task, kind, method, variant, pick(groups, method, task, kind, variant))
        for task, kind, method, variant in names
    ]


def begun(curves: list[Curve]) -> bool:
    """Whether a figure has more than the curves of Table 1."""
    return any(curve.runs and (curve.variant or curve.method == "q_guided_grpo_dt") for curve in curves)


def missing(groups: dict[tuple, list[Run]], tables: dict[str, list[Cell]], runs: list[Run]) -> list[str]:
    """Lines on datasets and curves without runs, groups of fewer seeds than the paper's, and unfinished runs."""
    lines = []
    for method, table in tables.items():
        absent = [cell.dataset for cell in table if cell.dataset != "Average" and not cell.runs]
        lines += [f"{METHODS[method]}, no run ({len(absent)} of 17): {', '.join(absent)}"] if absent else []
    for figure in FIGURES:
        absent = [curve.name for curve in figure_curves(groups, figure) if not curve.runs]
        lines += [f"Fig. {figure}, no run: {', '.join(absent)}"] if absent else []
    few = [
        f"{Curve(*key[1:3], key[0], key[3], each).name} ({len(each)})"
        for key, each in sorted(groups.items())
        if len(each) < SEEDS
    ]
    lines += [f"fewer than the paper's {SEEDS} seeds: {', '.join(few)}"] if few else []
    short = [
        f"{run.folder.name} ({run.iteration:,} of {run.goal:,})" for run in runs if run.iteration < (run.goal or 0)
    ]
    return lines + ([f"not finished: {', '.join(short)}"] if short else [])


def report(runs: list[Run], notes: list[str]) -> tuple[str, list[Summary]]:
    """The Markdown page, and every summary in it once."""
    groups = group_runs(runs)
    tables = {method: table1(groups, method) for method in COLUMNS}
    page = [INTRODUCTION, "## Table 1", "", TABLE_1, "", *overview(tables)]
    summaries, shown = [], set()
    for method, table in tables.items():
        found = [cell.ours for cell in table if cell.ours]
        page += [f"## {METHODS[method]}", "", *method_table(table)] if found else []
        summaries += found
        shown |= {cell.runs[0].key for cell in table if cell.runs}
    for figure in FIGURES:
        curves = [curve for curve in figure_curves(groups, figure) if curve.runs]
        if begun(curves):
            page += [f"## Fig. {figure}", "", *labelled_table([summarise(curve.runs) for curve in curves])]
        new = [curve.runs for curve in curves if curve.runs[0].key not in shown]
        summaries += [summarise(found) for found in new]
        shown |= {found[0].key for found in new}
    others = [summarise(found) for key, found in sorted(groups.items()) if key not in shown]
    page += ["## Other runs", "", *labelled_table(others)] if others else []
    page += ["## Missing", "", *(f"- {line}" for line in missing(groups, tables, runs) or ["nothing"]), ""]
    page += ["## Left out", "", *(f"- {note}" for note in notes), ""] if notes else []
    return "\n".join(page), summaries + others


def write_csv(path: Path, summaries: list[Summary]) -> None:
    """A row per summary; empty cells for what does not exist."""
    rows = []
    for s in summaries:
        row = dict(method=s.method, data=s.data, variant=s.variant, mean=s.mean, std=s.std, best=s.best, iqm=s.iqm)
        row |= dict(iqm_low=s.interval[0], iqm_high=s.interval[1], seeds=s.seeds, iterations=s.iterations)
        row |= dict(seconds_per_iteration=s.seconds, paper=s.paper, paper_std=s.paper_std, difference=s.mean - s.paper)
        cells = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
        rows.append({name: "" if value == "nan" else value for name, value in cells.items()} | {"differs": s.differs})
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0] if rows else ["method"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


# Curves


def mean_curve(runs: list[Run]) -> tuple[list[int], list[float], list[float]]:
    """Iterations at which all runs were evaluated, mean environment steps and mean score there."""
    tables = [{point.iteration: point for point in run.points} for run in runs]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    steps = [statistics.fmean(table[iteration].env_steps for table in tables) for iteration in common]
    return common, steps, [statistics.fmean(table[iteration].score for table in tables) for iteration in common]


def draw(axes, runs: list[Run], label: str, colour: str, by_steps: bool, paper: float) -> None:
    """A thin line per seed, a thick one for their mean, a dashed one at the paper's final value unless that is NaN."""
    for run in runs:
        x = [point.env_steps if by_steps else point.iteration for point in run.points]
        axes.plot(x, [point.score for point in run.points], color=colour, alpha=0.35, linewidth=0.8)
    iterations, steps, scores = mean_curve(runs)
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    axes.plot(steps if by_steps else iterations, scores, color=colour, linewidth=1.8, label=f"{label}, {seeds}")
    if not math.isnan(paper):
        final = f"{METHODS[runs[0].method]}, the paper's final value"
        axes.axhline(paper, color=colour, linestyle="--", linewidth=1.0, label=final)


def draw_panel(axes, title: str, curves: list[Curve], by_steps: bool, named: bool = False) -> None:
    """The curves of one dataset, each beside the paper's final value where Table 1 has one. `named`: all curves are
    labelled with their method, and a variant, which Table 1 does not have, also brings its method's value."""
    drawn = set()  # methods whose final value is there
    for index, curve in enumerate(curves):
        if curve.runs:
            new = curve.method not in drawn and (named or not curve.variant)
            paper = paper_value(curve.method, curve.task, curve.kind) if new else math.nan
            drawn |= {curve.method} if new else set()
            full = f"{METHODS[curve.method]} {curve.variant}".strip()
            draw(axes, curve.runs, full if named else curve.variant or full, f"C{index}", by_steps, paper)
    axes.set_title(title if any(curve.runs for curve in curves) else f"{title}: no run", fontsize=10)
    axes.set_xlabel("environment steps" if by_steps else "iterations", fontsize=9)
    axes.set_ylabel("normalised score", fontsize=9)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22))  # below: curves fill the panel


def paper_value(method: str, task: str, kind: str) -> float:
    """The paper's final score of a method in Table 1; NaN where it has none."""
    rows = (row for row in read_csv(PAPER / "table1.csv") if (task, kind) in dataset_keys(row["dataset"]))
    return next((float(row[method]) for row in rows if method in row), math.nan)


def new_panels(rows: int, columns: int, height: float = 3.6):
    """A figure with rows × columns of panels of this height [inches], and these as an array."""
    from matplotlib.figure import Figure  # drawn without pyplot, so without a display

    figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def write_curves(groups: dict[tuple, list[Run]], out: Path) -> None:
    """A PNG for each dataset and each figure that has runs, by iterations and by environment steps; and figure_3.png
    and figure_3_steps.png: all datasets, in Table 1's order, a row per block; and overview.png: the datasets that have
    runs, each with all its groups."""
    rows = [row for row in read_csv(PAPER / "table1.csv") if row["dataset"] != "Average"]
    blocks = {
        block: [row["dataset"] for row in rows if row["block"] == block] for block in (row["block"] for row in rows)
    }
    panels = {}  # dataset -> its curves
    for name in (row["dataset"] for row in rows):
        ((task, kind),) = dataset_keys(name)
        panels[name] = [Curve(task, kind, m, "", pick(groups, m, task, kind)) for m in ("grpo_dt", "ppo_dt")]
    drawn = {name: [(name, curves)] for name, curves in panels.items() if any(curve.runs for curve in curves)}
    for figure in FIGURES:
        curves = figure_curves(groups, figure)
        if begun(curves):
            tasks = [part[:2] for part in FIGURES[figure]]
            drawn[f"figure_{figure}"] = [(f"{'-'.join(t)}", [c for c in curves if c[:2] == t]) for t in tasks]
    for name, lines in drawn.items():
        figure, axes = new_panels(len(lines), 2)
        for line, (title, curves) in enumerate(lines):
            draw_panel(axes[line, 0], title, curves, by_steps=False)
            draw_panel(axes[line, 1], title, curves, by_steps=True)
        save(figure, out / f"{name}.png")
    for by_steps in (False, True) if drawn else ():
        figure, axes = new_panels(len(blocks), max(len(names) for names in blocks.values()))
        for line, names in enumerate(blocks.values()):
            for column, cell in enumerate(axes[line]):
                if column < len(names):
                    draw_panel(cell, names[column], panels[names[column]], by_steps)
                else:
                    cell.set_axis_off()
        save(figure, out / f"figure_3{'_steps' if by_steps else ''}.png")
    found = {}  # dataset -> its groups of finetuning runs
    for name, ((task, kind),) in ((row["dataset"], dataset_keys(row["dataset"])) for row in rows):
        mine = [runs for key, runs in sorted(groups.items()) if key[1:3] == (task, kind) and key[0] != "pretrain_dt"]
        found |= {name: [Curve(task, kind, runs[0].method, runs[0].variant, runs) for runs in mine]} if mine else {}
    if found:
        columns = math.ceil(math.sqrt(len(found)))
        height = 3 + 0.3 * max(len(curves) for curves in found.values())  # room for the legend
        figure, axes = new_panels(math.ceil(len(found) / columns), columns, height)
        for cell, (name, curves) in itertools.zip_longest(axes.flat, found.items(), fillvalue=(None, None)):
            draw_panel(cell, name, curves, by_steps=False, named=True) if name else cell.set_axis_off()
        save(figure, out / "overview.png")


def main() -> None:
    described = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**described)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="run folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="where report.md, .csv and .png go")
    parser.add_argument("--no-curves", action="store_true", help="tables only, needs no matplotlib")
    args = parser.parse_args()
    absent = [str(folder) for folder in args.folders if not folder.is_dir()]
    if absent:
        raise SystemExit(f"error: no such folder: {', '.join(absent)}.")
    runs, notes = read_runs(args.folders)
    page, summaries = report(runs, notes)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(page, encoding="utf-8")
    write_csv(args.out / "report.csv", summaries)
    if not args.no_curves:
        write_curves(group_runs(runs), args.out)
    print(f"{len(runs)} runs, {len(notes)} left out: {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
