"""benchmark/report.py: statistics against hand-computed ones, the paper's tables against the paper, and what a page
says of runs that are missing, short or unlike the paper's."""

import csv
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "benchmark" / "report.py"
spec = importlib.util.spec_from_file_location("benchmark_report", PATH)
report = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = report
spec.loader.exec_module(report)

# The settings of the paper for GRPO-DT on Hopper, as args.json has them.
HOPPER = dict(n_batch=256, c_online=1, g_online=7200.0, l_traj=15, l_eval=400, gamma=0.995, epsilon=0.2, delta_r=2.0)
HOPPER |= dict(lr=5e-5, kappa_initial=0.2, embed_dim=512, beta=1e-3, weight_decay=1e-4, max_grad_norm=0.5)


def make_run(folder, name, scores, args=None, steps=100, command=None):
    """A run folder; scores: one per iteration from 0 on, None for an iteration without an evaluation. command: as
    GRPO-DT's args.json has it."""
    path = folder / name
    path.mkdir(parents=True)
    with open(path / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["iteration", "charts/env_steps", "eval/return_mean", "eval/normalized_score", "time/iteration"])
        for iteration, score in enumerate(scores):
            env_steps = iteration * steps if iteration else ""
            evaluation = ["", ""] if score is None else [1.0, score]
            table.writerow([iteration, env_steps, *evaluation, iteration**2 if iteration else ""])
    if args is not None:
        facts = {} if command is None else {"script": "grpo_dt_continuous.py", "command": command}
        (path / "args.json").write_text(json.dumps(facts | {"args": args, "versions": {}, "commit": ""}))


def hopper(kind="random", **changes):
    return HOPPER | dict(env_id="Hopper-v5", dataset_kind=kind, iterations=6) | changes


def page_of(folder):
    return report.report(*report.read_runs([folder]))


def rows_under(page, title):
    """The cells of the table under a heading, without the heading of the table."""
    lines = page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|")][2:]


# Statistics


def test_the_score_of_a_run_is_the_mean_of_its_last_five_evaluations_after_updates(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [90.0, 80.0, None, 1.0, 2.0, 3.0, None, 4.0, 10.0])
    run = report.read_run(tmp_path / "grpo_dt__Hopper-random__1")
    assert run.score == 4.0 and run.iteration == 8  # (1 + 2 + 3 + 4 + 10) / 5
    (group,) = report.group_runs([run]).values()
    assert report.summarise(group).best == 80.0  # 90 is the pretrained policy's
    make_run(tmp_path, "grpo_dt__Hopper-random__2", [90.0, 5.0, 7.0])
    assert report.read_run(tmp_path / "grpo_dt__Hopper-random__2").score == 6.0


@pytest.mark.parametrize(
    "scores, mean",
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 9.0], 4.0),  # a quarter of 3, rounded down, is none
        ([80.0, 10.0, 30.0, 20.0], 25.0),  # (20 + 30) / 2
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0], 3.5),  # (2 + 3 + 4 + 5) / 4
        ([-50.0, 1.0, 2.0, 6.0, 99.0], 3.0),  # (1 + 2 + 6) / 3
    ],
)
def test_the_interquartile_mean(scores, mean):
    assert report.interquartile_mean(np.array(scores)) == mean


@pytest.mark.parametrize(
    "scores, low, high",
    [
        ([[5.0, 5.0, 5.0]], 5.0, 5.0),
        ([[0.0, 100.0]], 0.0, 100.0),  # all draws of one of them: a quarter of the samples
        ([[0.0, 30.0, 60.0]], 0.0, 60.0),  # 1 of 27 samples is three times the lowest: 3.7 %
        ([[0.0, 100.0], [50.0]], 50 / 3, 250 / 3),  # within each dataset: 50 is always there
    ],
)
def test_the_bootstrap_interval(scores, low, high):
    assert report.bootstrap(scores) == pytest.approx((low, high))


def test_the_interval_is_narrower_than_the_range_and_always_the_same():
    scores = [list(np.random.default_rng(1).normal(size=40))]
    low, high = report.bootstrap(scores)
    iqm, spread = report.interquartile_mean(np.array(scores[0])), statistics.stdev(scores[0]) / math.sqrt(40)
    assert iqm - 4 * spread < low < iqm < high < iqm + 4 * spread
    assert (low, high) == report.bootstrap(scores)
    assert np.isnan(report.bootstrap([[1.0], [2.0]])).all()


def test_a_group_of_seeds_by_hand(tmp_path):
    for seed, score in enumerate([10.0, 20.0, 30.0, 80.0], 1):
        scores = [0.0, score - 1, score + 1, score, score, score]
        make_run(tmp_path, f"grpo_dt__Hopper-random__{seed}", scores, hopper(iterations=5))
    page, (ours, _) = page_of(tmp_path)
    assert (ours.mean, ours.iqm, ours.best, ours.seeds, ours.iterations) == (35.0, 25.0, 81.0, 4, "5")
    assert ours.std == pytest.approx(math.sqrt((25**2 + 15**2 + 5**2 + 45**2) / 3))
    low, high = report.bootstrap([[10.0, 20.0, 30.0, 80.0]])
    cells = ["35.00 ± 31.09", "81.00", f"25.00 [{low:.2f}, {high:.2f}]", "4", "5", "9.00"]  # of 1, 4, 9, 16, 25 s
    row, average = rows_under(page, "GRPO-DT")
    assert row == ["MuJoCo (random)", "Ho-R-v2", *cells, "99.20 ± 3.80", "-64.20", "-"]
    assert average == ["MuJoCo (random)", "average of 1", "35.00", "-", *cells[2:5], "-", "99.20", "-64.20", "-"]


def test_the_average_of_a_block_is_over_its_datasets_and_beside_the_papers_for_the_same(tmp_path):
    for name, task, scores in (("Hopper", "Hopper-v5", [10.0, 20.0, 30.0]), ("Ant", "Ant-v4", [60.0])):
        for seed, score in enumerate(scores):
            make_run(tmp_path, f"grpo_dt__{name}-random__{seed}", [0.0, score], hopper() | {"env_id": task})
    page, summaries = page_of(tmp_path)
    (block,) = (each for each in summaries if "average" in each.data)
    assert block.mean == 40.0 and block.seeds == 4  # (20 + 60) / 2, not the mean of the four seeds
    assert block.iqm == 25.0  # 10 and 60 of the four seeds are left out
    assert block.paper == pytest.approx((99.20 + 120.69) / 2)
    assert block.mean - block.paper == pytest.approx(-69.945)
    assert rows_under(page, "Table 1")[3][-1] == "- / 106.71"  # Walker2d is missing: no average beside the paper's


# The paper's tables


def paper(name):
    return report.read_csv(report.PAPER / f"{name}.csv")


def test_the_averages_of_table_1_are_those_of_its_rows():
    rows, block = paper("table1"), []
    columns = [name for name in rows[0] if name not in ("block", "dataset") and not name.endswith("_std")]
    assert columns == ["dt", "iql", "odt", "odt_td3", "ppo_dt", "grpo_dt"]
    sizes = []
    for row in rows:
        if row["dataset"] != "Average":
            block.append(row)
            continue
        sizes.append(len(block))
        for column in columns:
            mean = statistics.fmean(float(each[column]) for each in block)
            assert mean == pytest.approx(float(row[column]), abs=0.011), (row["block"], column)
        block = []
    assert sizes == [3, 6, 6, 2]


@pytest.mark.parametrize(
    "table, key, column, value",
    [
        ("table1", "Wa-M-v2", "grpo_dt", "158.34"),
        ("table1", "Wa-M-v2", "grpo_dt_std", "3.75"),
        ("table1", "Ho-MR-v2", "grpo_dt_std", "20.75"),
        ("table1", "D-C-v1", "ppo_dt", "0.19"),
        ("table1", "UD-v2", "dt", "65.00"),
        ("table1", "H-H-v1", "odt_td3", "120.93"),
        ("table1", "P-C-v1", "iql_std", "13.25"),
        ("table1", "An-R-v2", "odt", "19.08"),
        ("table2", "Hopper-medium-replay-v2", "steps", "402000"),
        ("table2", "Ant-medium-v2", "score_std", "35.82"),
        ("table3", "Door-human-v1", "steps", "6504"),
        ("table3", "Pen-human-v1", "score", "202.69"),
        ("table4", "Antmaze-umaze-diverse-v2", "score", "3.48"),
        ("table6", "Ho-M/MR-v2", "l_eval", "400"),
        ("table6", "H-H-v1", "delta_r", "0.8"),
        ("table6", "UD-v2", "c_offline", "1"),
        ("table6", "D-C-v1", "kappa_initial", "0.10"),
        ("table7", "Wa-R-v2", "kappa_initial", "0.20"),
        ("table7", "D-H-v1", "k_ppo", "16"),
        ("table7", "P-C-v1", "lr_value", "2e-4"),
    ],
)
def test_spot_values_of_the_papers_tables(table, key, column, value):
    (row,) = (row for row in paper(table) if key in (row.get("dataset"), row.get("environments")))
    assert row[column] == value


def test_the_papers_tables_are_whole():
    assert [len(paper(f"table{n}")) for n in range(1, 8)] == [21, 9, 6, 2, 14, 14, 14]
    assert all(None not in row and None not in row.values() for n in range(1, 8) for row in paper(f"table{n}"))
    assert {row["hyperparameter"]: row["value"] for row in paper("table5")}["KL coefficient beta"] == "1e-3"
    keys = [key for row in paper("table1") for key in report.dataset_keys(row["dataset"])]
    assert len(set(keys)) == 17
    for table in ("table6", "table7"):
        assert sorted(keys) == sorted(key for row in paper(table) for key in report.dataset_keys(row["environments"]))


# What a folder is


@pytest.mark.parametrize(
    "name, args, identity",
    [
        ("grpo_dt__hopper-medium__paper__1", {}, ("grpo_dt", "Hopper", "medium", "", "1")),
        ("pretrain_dt__hopper-medium-context1__2", {}, ("pretrain_dt", "Hopper", "medium", "context1", "2")),
        ("ppo_dt__Walker2d-medium-replay__3", {}, ("ppo_dt", "Walker2d", "medium-replay", "", "3")),
        ("q_guided_grpo_dt__Ant-medium-replay__1", {}, ("q_guided_grpo_dt", "Ant", "medium-replay", "", "1")),
        ("grpo_dt__AntMaze-diverse__l-eval-0__1", {}, ("grpo_dt", "AntMaze", "diverse", "l-eval-0", "1")),
        ("AdroitHandDoor-v1__grpo_dt_continuous__human__4__17", {}, ("grpo_dt", "Door", "human", "", "4")),
        (
            "grpo_dt__Ant-medium__x__1",
            {"env_id": "AntMaze_UMaze-v4", "dataset_kind": "umaze", "seed": 9},
            ("grpo_dt", "AntMaze", "umaze", "x", "9"),
        ),
        ("some-folder", {}, None),
    ],
)
def test_a_run_is_known_by_its_name_and_its_arguments(name, args, identity):
    assert report.identify(name, args) == identity


def test_settings_are_held_against_the_papers_tables():
    def differs(method, task, kind, **args):
        return report.settings_that_differ(method, task, kind, args)

    assert differs("grpo_dt", "Hopper", "random", **hopper()) == ""
    assert differs("grpo_dt", "Hopper", "random", **hopper(lr=1e-4, embed_dim=128)) == (
        "embed_dim 128 (512), lr 0.0001 (5e-05)"
    )
    assert differs("grpo_dt", "Walker2d", "medium-replay", epsilon=0.2, kappa_initial=0.04) == "epsilon 0.2 (0.3)"
    assert differs("ppo_dt", "Door", "human", n_trajectories=8, lr_value=2e-4) == "n_trajectories 8 (16)"
    assert differs("pretrain_dt", "AntMaze", "diverse", c_offline=1, c_online=5, lr=1e-4) == ""
    assert differs("q_guided_grpo_dt", "Ant", "medium-replay", lr=1e-5, kappa_initial=0.01, gamma=0.99) == ""
    assert (
        differs("q_guided_grpo_dt", "AntMaze", "umaze", gamma=0.99, tau=0.05) == "gamma 0.99 (0.998), tau 0.05 (0.005)"
    )
    assert differs("ppo_dt", "Hopper", "random", hindsight=True, token_ratio=False) == "hindsight"
    for old, new in (({"token_ratio": True}, "token"), ({"geometric_mean": True}, "geometric"), ({}, "sequence")):
        said = differs("grpo_dt", "Hopper", "random", **hopper(lr=1e-4, ratio=new))
        assert said == differs("grpo_dt", "Hopper", "random", **hopper(lr=1e-4, **old))
        assert said == ", ".join(["lr 0.0001 (5e-05)", *old])
    assert differs("grpo_dt", "Hopper", "random", group_size=8, buffer_size=64) == "buffer_size 64 (2048)"
    assert differs("q_guided_grpo_dt", "Ant", "medium-replay", lr=5e-5) == "lr 5e-05 (1e-05)"
    assert report.settings_that_differ("grpo_dt", "Hopper", "random", {}) == "unknown"


def test_runs_of_different_settings_are_not_averaged_and_the_papers_stand_in_the_table(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0], hopper())
    for seed in (2, 3):
        make_run(tmp_path, f"grpo_dt__Hopper-random__{seed}", [0.0, 90.0], hopper(lr=1e-4))
    page, _ = page_of(tmp_path)
    assert rows_under(page, "GRPO-DT")[0][2:4] == ["10.00 (of 1)", "10.00"]
    (other,) = rows_under(page, "Other runs")
    assert other[3] == "90.00 ± 0.00 (of 1)" and other[-1] == "lr 0.0001 (5e-05)"


def test_ablations_under_the_scripts_own_names_are_no_seeds_of_the_method(tmp_path):
    changed = [{}, {"token_ratio": True}, {"hindsight": True, "group_size": 2}, {"ratio": "token"}]
    for seed, changes in enumerate(changed, start=1):
        name = f"Hopper-v5__grpo_dt_continuous__random__{seed}__17"
        make_run(tmp_path, name, [0.0, 10.0 * seed], hopper(**changes), command=["grpo_dt_continuous.py"])
    name = "Hopper-v5__grpo_dt_continuous__random__5__17"
    make_run(tmp_path, name, [0.0, 50.0], hopper(), command=["benchmark/reinformer.py", "--pretrained", "runs/x"])
    page, _ = page_of(tmp_path)
    assert rows_under(page, "Table 1")[0][-1].startswith("10.00\\*")
    others = {(row[2], row[3].split(" (")[0], row[-1]) for row in rows_under(page, "Other runs")}
    assert others == {
        ("-", "30.00 ± 14.14", "token_ratio"),  # seeds 2 and 4, of before and after --ratio
        ("-", "30.00", "group_size 2 (8), hindsight"),
        ("reinformer", "50.00", "-"),
    }


def test_the_pretraining_of_a_run_is_held_against_the_paper(tmp_path):
    for name, context in (("short", 1), ("long", 20)):
        make_run(tmp_path, f"pretrain_dt__Hopper-random__{name}__1", [None, 1.0], dict(c_offline=context))
    starts = ("pretrain_dt__Hopper-random__short__1", "pretrain_dt__Hopper-random__long__1/checkpoint.pt", "gone", None)
    for seed, start in enumerate(starts):
        changes = {"pretrained": start and f"runs/{start}"}
        make_run(tmp_path, f"grpo_dt__Hopper-random__{seed}", [0.0, 1.0], hopper(**changes))
    runs = {run.seed: run.differs for run in report.read_runs([tmp_path])[0] if run.method == "grpo_dt"}
    said = ["pretrained at c_offline 1 (20)", "", "pretraining unknown", "pretrained by the script itself"]
    assert runs == dict(zip("0123", said))
    outside = report.pretraining_that_differs(tmp_path, "grpo_dt", "HalfCheetah", "medium", dict(pretrained=starts[0]))
    assert outside == "pretraining unknown"
    outside = dict(pretrained=starts[0])  # a task that is not in the paper's tables has nothing to differ from
    assert report.pretraining_that_differs(tmp_path / "run", "grpo_dt", "HalfCheetah", "medium", outside) == ""
    (tmp_path / starts[0] / "args.json").write_text("{")
    assert report.pretraining_that_differs(tmp_path / "run", "grpo_dt", "Hopper", "random", outside).endswith("unknown")


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    make_run(tmp_path / "old", "grpo_dt__Hopper-random__1", [0.0, 10.0, 20.0], hopper())
    make_run(tmp_path / "new", "grpo_dt__Hopper-random__1", [0.0, 10.0], hopper())
    for folders in (["old", "new"], ["new", "old"]):
        runs, notes = report.read_runs([tmp_path / name for name in folders])
        assert [run.iteration for run in runs] == [2] and len(notes) == 1 and "old" in notes[0].split(":")[1]


def test_a_folder_of_toy_runs_in_a_folder_of_runs_is_not_read(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0])
    make_run(tmp_path / "quick", "grpo_dt__Hopper-random__2", [0.0, 90.0])
    assert [run.seed for run in report.read_runs([tmp_path])[0]] == ["1"]
    assert [run.seed for run in report.read_runs([tmp_path / "grpo_dt__Hopper-random__1"])[0]] == ["1"]


# Pages


def test_table_1_shows_ours_beside_the_papers_and_marks_what_is_not_comparable(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, f"grpo_dt__Hopper-random__{seed}", [0.0, 10.0 * seed], hopper(iterations=1))
        make_run(tmp_path, f"grpo_dt__Hopper-medium__{seed}", [0.0, 50.0], hopper("medium", iterations=2))
    for seed in (1, 2):
        make_run(tmp_path, f"grpo_dt__Hopper-medium-replay__{seed}", [0.0, 7.0], hopper("medium-replay", iterations=1))
    make_run(tmp_path, "pretrain_dt__Door-human__1", [None, 2.0])
    page, _ = page_of(tmp_path)
    assert "\n\\*: fewer than 3 seeds, not finished, or settings that differ" in page
    table = {row[1]: row for row in rows_under(page, "Table 1") if row[1] != "Average"}
    assert [row[1] for row in rows_under(page, "Table 1")] == [row["dataset"] for row in paper("table1")]
    assert table["Ho-R-v2"][2:] == [
        *["- / 2.13", "- / 41.02 ± 13.35", "- / 30.43 ± 0.01", "- / 83.32 ± 8.46"],
        *["- / 106.97 ± 0.96", "20.00 ± 10.00 / 99.20 ± 3.80"],
    ]
    assert table["Ho-M-v2"][-1] == "50.00 ± 0.00\\* / 108.81 ± 0.85"  # one iteration of two
    assert table["Ho-MR-v2"][-1] == "7.00 ± 0.00\\* / 83.61 ± 20.75"  # two seeds
    assert table["D-H-v1"][2] == "2.00\\* / 3.28"  # one seed, settings unknown


def test_what_is_missing_is_said(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-medium__1", [0.0, 10.0, 20.0], hopper("medium", iterations=10))
    make_run(tmp_path, "grpo_dt__Hopper-medium__hindsight__1", [0.0, 10.0], hopper("medium", iterations=1))
    make_run(tmp_path, "grpo_dt__Hopper-medium__2", [0.0], hopper("medium"))
    make_run(tmp_path, "some-folder", [0.0, 1.0])
    page, _ = page_of(tmp_path)
    missing = page.split("## Missing\n")[1]
    assert "- GRPO-DT, no run (16 of 17): Ho-R-v2, Wa-R-v2, An-R-v2, Ho-MR-v2, " in missing
    assert "- PPO-DT, no run (17 of 17): " in missing
    assert "- Fig. 1, no run: GRPO-DT Door-human, GRPO-DT Door-human hindsight\n" in missing
    assert "- Fig. 2c, no run: GRPO-DT Hopper-medium token-ratio\n" in missing
    assert (
        "- fewer than the paper's 3 seeds: GRPO-DT Hopper-medium (1), GRPO-DT Hopper-medium hindsight (1)\n" in missing
    )
    assert "- not finished: grpo_dt__Hopper-medium__1 (2 of 10)\n" in missing
    assert "- grpo_dt__Hopper-medium__2: no evaluation after an update yet" in missing
    assert "- some-folder: its name does not tell the method" in missing
    (base, hindsight) = rows_under(page, "Fig. 1")
    assert base[2:4] == ["-", "15.00 (of 2)"] and hindsight[2:4] == ["hindsight", "10.00 (of 1)"]
    assert "## Fig. 2c" not in page  # only Table 1's curve is there


def test_the_csv_file_has_the_numbers_of_the_page(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0], hopper())
    make_run(tmp_path, "grpo_dt__Hopper-random__2", [0.0, 20.0], hopper())
    _, summaries = page_of(tmp_path)
    report.write_csv(tmp_path / "report.csv", summaries)
    row = report.read_csv(tmp_path / "report.csv")[0]
    assert (row["method"], row["data"], row["seeds"], row["iterations"]) == ("grpo_dt", "Ho-R-v2", "2", "1")
    numbers = {name: float(row[name]) for name in ("mean", "std", "best", "iqm", "iqm_low", "paper", "difference")}
    assert numbers == pytest.approx(
        dict(mean=15.0, std=7.0711, best=20.0, iqm=15.0, iqm_low=10.0, paper=99.2, difference=-84.2)
    )


def test_the_command_reports_on_the_committed_results_and_on_nothing(tmp_path):
    def command(*words):
        return subprocess.run([sys.executable, str(PATH), *words], capture_output=True, text=True, cwd=tmp_path)

    done = command(str(ROOT / "benchmark" / "results"), "--no-curves")
    count = len(list((ROOT / "benchmark" / "results").glob("*/metrics.csv")))
    assert done.returncode == 0 and done.stdout.startswith(f"{count} runs, 0 left out"), done.stdout + done.stderr
    (row,) = (
        row for row in rows_under((tmp_path / "runs/report/report.md").read_text(), "GRPO-DT") if "Ho-R" in row[1]
    )
    scores = []
    for path in (ROOT / "benchmark/results").glob("grpo_dt__hopper-random__[0-9]/metrics.csv"):
        every = [float(each["eval/normalized_score"] or "nan") for each in report.read_csv(path)]
        scores.append(statistics.fmean([score for score in every if not math.isnan(score)][-5:]))
    assert row[2] == f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"
    assert row[-1].startswith("embed_dim 128 (512), pretrained by")
    (tmp_path / "empty").mkdir()
    done = command("empty", "--no-curves", "--out", "nothing")
    assert done.returncode == 0 and "no run (17 of 17)" in (tmp_path / "nothing/report.md").read_text()
    done = command("absent")
    assert (done.returncode, done.stderr) == (1, "error: no such folder: absent.\n")


# Curves


def test_curves_show_each_seed_their_mean_and_the_papers_final_value(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [1.0, None, 3.0, 5.0], hopper(), steps=100)
    make_run(tmp_path, "grpo_dt__Hopper-random__2", [3.0, 4.0, 5.0], hopper(), steps=300)
    ((_, runs),) = report.group_runs(report.read_runs([tmp_path])[0]).items()
    assert report.mean_curve(runs) == ([0, 2], [0.0, 400.0], [2.0, 4.0])
    for by_steps, axes in zip((False, True), figure.subplots(1, 2)):
        report.draw_panel(axes, "Ho-R-v2", [report.Curve("Hopper", "random", "grpo_dt", "", runs)], by_steps)
        one, two, mean, final = axes.get_lines()
        assert list(one.get_ydata()) == [1.0, 3.0, 5.0] and list(two.get_ydata()) == [3.0, 4.0, 5.0]
        assert list(mean.get_xdata()) == ([0.0, 400.0] if by_steps else [0, 2])
        assert set(final.get_ydata()) == {99.20}
        assert axes.get_xlabel() == ("environment steps" if by_steps else "iterations")


def test_a_picture_for_each_dataset_and_each_figure_that_has_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    saved = {}
    monkeypatch.setattr(report, "save", lambda figure, path: saved.update({path.name: figure.get_axes()}))
    for name in ("grpo_dt__Hopper-medium__1", "ppo_dt__Hopper-medium__1", "grpo_dt__Hopper-medium__token-ratio__1"):
        make_run(tmp_path, name, [0.0, 10.0])
    report.write_curves(report.group_runs(report.read_runs([tmp_path])[0]), tmp_path)
    assert sorted(saved) == ["Ho-M-v2.png", "figure_2c.png", "figure_3.png", "figure_3_steps.png", "overview.png"]
    (axes,) = saved["overview.png"]
    names = [label for label in axes.get_legend_handles_labels()[1] if "paper" not in label]
    assert names == ["GRPO-DT, 1 seed", "GRPO-DT token-ratio, 1 seed", "PPO-DT, 1 seed"]
    assert [set(line.get_ydata()) for line in axes.get_lines() if line.get_linestyle() == "--"] == [{108.81}, {105.65}]
    titles = [axes.get_title() for axes in saved["figure_3.png"] if axes.get_title()]
    assert [title.split(":")[0] for title in titles] == [
        row["dataset"] for row in paper("table1") if row["dataset"] != "Average"
    ]
    assert [title for title in titles if "no run" not in title] == ["Ho-M-v2"]
    labels = saved["figure_2c.png"][0].get_legend_handles_labels()[1]
    assert labels == ["GRPO-DT, 1 seed", "GRPO-DT, the paper's final value", "token-ratio, 1 seed"]


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    figure, axes = report.new_panels(1, 2)
    axes[0, 0].plot([0, 1], [0, 1])
    report.save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
