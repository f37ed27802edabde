"""benchmark/report.py: statistics against hand-computed ones, the paper's tables against the paper, and what a page
says of runs that are missing, short or unlike the paper's."""

import csv
import importlib.util
import json
import math
import random
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
HOPPER |= dict(
    g_eval=3600.0, lr=5e-5, kappa_initial=0.2, embed_dim=512, beta=1e-3, weight_decay=1e-4, max_grad_norm=0.5
)


def make_run(folder, name, scores, args=None, steps=100, command=None, script="grpo_dt_continuous.py"):
    """A run folder; scores: one per iteration from 0 on, None for an iteration without an evaluation; its return is
    twice the score, that of sampled actions 1,000 times the iteration. command: as the script's args.json has it."""
    path = folder / name
    path.mkdir(parents=True)
    with open(path / "metrics.csv", "w", newline="") as file:
        table = csv.writer(file)
        names = ["charts/env_steps", "charts/gradient_updates", "rollout/return", "time/iteration"]
        table.writerow(["iteration", *names, "eval/return_mean", "eval/normalized_score"])
        for iteration, score in enumerate(scores):
            others = [iteration * steps, 8 * iteration, 1000 * iteration, iteration**2] if iteration else [""] * 4
            table.writerow([iteration, *others, *(["", ""] if score is None else [2 * score, score])])
    if args is not None:
        facts = {} if command is None else {"script": script, "command": command}
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
    assert ours.sampled == 3000.0  # of iterations 1 to 5
    cells = ["35.00 ± 31.09", "81.00", "3,000", f"25.00 [{low:.2f}, {high:.2f}]", "4", "5", "9.00"]  # 1, 4, ... 25 s
    row, average = rows_under(page, "GRPO-DT")
    assert row == ["MuJoCo (random)", "Ho-R-v2", *cells, "99.20 ± 3.80", "-64.20", "-"]
    assert average == ["MuJoCo (random)", "average of 1", "35.00", "-", "-", *cells[3:6], "-", "99.20", "-64.20", "-"]


def test_the_sampled_return_is_of_the_iterations_since_the_evaluation_before_the_last_five(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 1.0, None, 2.0, 3.0, None, 4.0, 5.0, 6.0], hopper())
    _, (ours, _) = page_of(tmp_path)
    assert ours.sampled == np.mean([2000, 3000, 4000, 5000, 6000, 7000, 8000])  # after that of iteration 1


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


@pytest.mark.parametrize(
    "script, env_id, identity",
    [
        ("grpo_dt_continuous.py", "Hopper-v5", ("grpo_dt", "Hopper", "random", "", "3")),
        ("q_guided_grpo_dt.py", "Pendulum-v1", ("q_guided_grpo_dt", "Pendulum-v1", "random", "", "3")),
        ("pretrain_dt.py", "my_tasks:Mine-v0", ("pretrain_dt", "my_tasks:Mine-v0", "random", "", "3")),
        ("ranks.py", "AdroitHandDoor-v1", ("ranks", "Door", "random", "", "3")),
    ],
)
def test_any_folder_name_will_do_with_an_args_json(script, env_id, identity):
    assert report.identify("plain", dict(env_id=env_id, dataset_kind="random", seed=3), script) == identity


def test_what_a_copied_script_was_made_from_tells_its_settings(tmp_path):
    assert report.settings_that_differ("ranks", "Hopper", "random", hopper(group_size=4)) == "group_size 4 (8)"
    ppo = dict(value_dim=512, n_trajectories=8, lr=5e-5, kappa_initial=0.04)  # Table 7's, where Table 6 has other ones
    assert report.settings_that_differ("mine", "Hopper", "random", ppo) == ""
    make_run(tmp_path, "ranks", [0.0, 7.0], hopper(), command=["ranks.py"], script="ranks.py")
    ((method, *_, differs),) = report.group_runs(report.read_runs([tmp_path])[0])
    assert (method, differs) == ("ranks", "")
    assert rows_under(page_of(tmp_path)[0], "Other runs")[0][:4] == ["ranks", "Hopper-random", "-", "7.00 (of 1)"]


def test_runs_of_a_workshop_stand_side_by_side_under_any_name(tmp_path):
    """Those that differ in a setting are groups by that; those of one seed and the same settings go by their names."""
    command = ["grpo_dt_continuous.py"]
    for name, score, changes in (
        ("plain", 10.0, {}),
        ("plain-2", 20.0, dict(seed=2)),
        ("ranks_seed1", 40.0, {}),
        ("hindsight", 5.0, dict(hindsight=True)),
    ):
        make_run(tmp_path, name, [0.0, score], hopper(**dict(seed=1) | changes), command=command)
    runs, notes = report.read_runs([tmp_path])
    assert notes == []
    groups = report.group_runs(runs)
    found = {(key[3], key[4]): [run.score for run in each] for key, each in groups.items()}
    assert found == {("plain", ""): [10.0, 20.0], ("ranks", ""): [40.0], ("", "hindsight"): [5.0]}
    curves = report.curves_of(groups, "Hopper", "random")[1]
    assert report.labels(curves) == ["GRPO-DT (1 seed)", "GRPO-DT plain (2 seeds)", "GRPO-DT ranks (1 seed)"]
    same = [curve._replace(variant="") for curve in curves]
    assert report.labels(same)[0] == "GRPO-DT, hindsight (1 seed)"


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
    assert differs("grpo_dt", "Hopper", "random", one_scale=60, anneal_lr=True) == "one_scale 60, anneal_lr"
    assert differs("grpo_dt", "Hopper", "random", one_scale=True) == "one_scale"  # args.json of when it was a switch
    assert differs("grpo_dt", "Hopper", "random", one_scale=0, anneal_lr=False) == ""
    for old, new in (({"token_ratio": True}, "token"), ({"geometric_mean": True}, "geometric"), ({}, "sequence")):
        said = differs("grpo_dt", "Hopper", "random", **hopper(lr=1e-4, ratio=new))
        assert said == differs("grpo_dt", "Hopper", "random", **hopper(lr=1e-4, **old))
        assert said == ", ".join(["lr 0.0001 (5e-05)", *old])
    assert differs("grpo_dt", "Hopper", "random", group_size=8, buffer_size=64) == "buffer_size 64 (2048)"
    assert differs("q_guided_grpo_dt", "Ant", "medium-replay", lr=5e-5) == "lr 5e-05 (1e-05)"
    for args in (dict(g_online=7200.0), dict(g_online=7200.0, g_eval=7200.0)):
        assert differs("ppo_dt", "Hopper", "random", **args) == "evaluated at g_online"
    assert differs("ppo_dt", "Door", "human", g_online=3000.0, g_eval=3000.0) == ""  # the paper's is pretraining's
    assert report.settings_that_differ("grpo_dt", "Hopper", "random", {}) == "unknown"
    changed = hopper(env_kwargs='{"healthy_reward": 2, "x": 1}', delta_r=None)
    assert differs("grpo_dt", "Hopper", "random", **changed) == 'env_kwargs {"healthy_reward": 2,"x": 1}'


def test_runs_of_different_settings_are_not_averaged_and_the_papers_stand_in_the_table(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0], hopper())
    for seed in (2, 3):
        make_run(tmp_path, f"grpo_dt__Hopper-random__{seed}", [0.0, 90.0], hopper(lr=1e-4))
    page, _ = page_of(tmp_path)
    assert rows_under(page, "GRPO-DT")[0][2:4] == ["10.00 (of 1)", "10.00"]
    (other,) = rows_under(page, "Other runs")
    assert other[3] == "90.00 ± 0.00 (of 1)" and other[-1] == "lr 0.0001 (5e-05)"


def test_an_ablation_does_not_stand_in_the_table_where_the_method_has_a_run(tmp_path):
    for name, score, changes in (("a", 5.0, dict(hindsight=True)), ("b", 10.0, {})):
        args = hopper(lr=1e-4, seed=1) | changes
        make_run(tmp_path, name, [0.0, score], args, command=["grpo_dt_continuous.py"])
    assert rows_under(page_of(tmp_path)[0], "Table 1")[0][-1].startswith("10.00\\*")


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
    outside = dict(pretrained=starts[0])  # a task that is not in the paper's tables is held against Hopper's row
    said = report.pretraining_that_differs(tmp_path / "run", "grpo_dt", "HalfCheetah", "medium", outside)
    assert said == "pretrained at c_offline 1 (20)"
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
    assert row[-1].startswith("embed_dim 128 (512), evaluated at g_online, pretrained by")
    (tmp_path / "empty").mkdir()
    done = command("empty", "--no-curves", "--out", "nothing")
    assert done.returncode == 0 and "no run (17 of 17)" in (tmp_path / "nothing/report.md").read_text()
    done = command("absent")
    assert (done.returncode, done.stderr) == (1, "error: no such folder: absent.\n")


# Damaged runs


NAME = "grpo_dt__Hopper-random__d__1"


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("args.json", b"[]", 'it has no "args"'),
        ("args.json", b'{"args": 5}', 'it has no "args"'),
        ("args.json", b"{", "Expecting property name"),
        ("args.json", b"", "Expecting value"),
        ("args.json", b"[" * 100_000, "recursion"),
        ("args.json", b'{"args": {"env_id": 5}}', "'int' object"),
        ("args.json", b'{"args": {"iterations": "many"}}', "the number of iterations is 'many'"),
        ("args.json", b'{"args": {"dataset_kind": ["x"]}}', "expected str instance"),
        ("metrics.csv", b"iteration,eval/normalized_score\n1,\x00\x00\n", "could not convert"),
        ("metrics.csv", b"\xff\xfe\n", "can't decode byte 0xff"),
        ("metrics.csv", b"iteration,eval/normalized_score\nnan,1\n", "line 2 has values that are not finite"),
        ("metrics.csv", b"iteration,eval/normalized_score\n1,inf\n", "line 2 has values that are not finite"),
        ("metrics.csv", b"iteration,eval/normalized_score\n1,1e300\n", "line 2 has values that are not"),
        ("metrics.csv", b"iteration,eval/normalized_score\n1.5,1\n", "its iterations do not count up"),
        ("metrics.csv", b"iteration,eval/normalized_score\n1,1\n2,2,2\n", "line 3 has 3 cells, not 2"),
        ("metrics.csv", b"iteration,eval/normalized_score\n2,1\n1,2\n", "its iterations do not count up"),
        ("metrics.csv", b"eval/normalized_score\n1\n", "its iterations do not count up"),
        ("metrics.csv", b"", "no evaluation after an update yet"),
        ("metrics.csv", b"iteration,eval/return_mean\n1,1\n", "no evaluation after an update yet"),
    ],
)
def test_a_damaged_run_is_a_line_under_left_out_and_the_others_stay(tmp_path, file, content, reason):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0], hopper())
    make_run(tmp_path, NAME, [0.0, 10.0], hopper())
    (tmp_path / NAME / file).write_bytes(content)
    page, _ = page_of(tmp_path)
    (line,) = page.split("## Left out\n\n")[1].splitlines()
    assert line.startswith(f"- {NAME}: ") and reason in line and ("damaged" not in line or file in line)
    assert rows_under(page, "GRPO-DT")[0][2] == "10.00 (of 1)"


def test_a_last_line_that_breaks_off_does_not_count(tmp_path):
    make_run(tmp_path, NAME, [0.0, 10.0, 20.0, 30.0], hopper())
    path = tmp_path / NAME / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])
    run = report.read_run(tmp_path / NAME)
    assert run.iteration == 2 and run.scores == [10.0, 20.0]


def damage(files, rng):
    """One of the two files' text in bytes, spoilt: bytes flipped, cut off, lines gone or twice, other types in JSON."""
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    how = rng.choice(["flip", "cut", "lines", "types"])
    if how == "flip":
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        content = content[: rng.randrange(len(content))]
    elif how == "lines":
        lines = bytes(content).splitlines(keepends=True)
        content = b"".join(line for line in lines for _ in range(rng.choice([0, 1, 1, 1, 2])))
    else:
        name, facts = "args.json", json.loads(files["args.json"])
        place = rng.choice([facts, facts["args"], facts["args"]])
        odd = [None, [], {}, "x", "", -1, 10**400, math.inf, math.nan, True, "\ud800", ["x"], "\n|", 0]
        place[rng.choice(sorted(place))] = rng.choice(odd)
        content = json.dumps(facts).encode()
    return name, bytes(content)


def test_a_hundred_damaged_runs_end_neither_the_report_nor_the_figures(tmp_path, monkeypatch):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [0.0, 10.0, 30.0, 20.0], hopper(seed=1), command=["x.py"])
    good = tmp_path / "grpo_dt__Hopper-random__1"
    files = {name: (good / name).read_bytes() for name in ("metrics.csv", "args.json")}
    for seed in range(100):
        folder = tmp_path / f"grpo_dt__Hopper-random__damaged-{seed}__1"
        folder.mkdir()
        name, content = damage(files, random.Random(seed))
        for each in files:
            (folder / each).write_bytes(content if each == name else files[each])
    runs, notes = report.read_runs([tmp_path])
    assert len(runs) + len(notes) == 101 and 20 < len(notes) < 80
    assert all("\n" not in note and note.startswith("grpo_dt__Hopper-random__damaged-") for note in notes)
    page, summaries = report.report(runs, notes)
    page.encode(errors="replace")
    row = rows_under(page, "GRPO-DT")[0]
    assert row[1:4] == ["Ho-R-v2", "20.00 (of 3)", "30.00"] and row[-1] == "-"
    assert all(math.isfinite(s.mean) and math.isfinite(s.best) for s in summaries if "average" not in s.data)
    report.write_csv(tmp_path / "report.csv", summaries)
    assert len(report.read_csv(tmp_path / "report.csv")) == len(summaries)
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(report, "save", lambda figure, path: saved.append(path.name))
    report.write_curves(report.group_runs(runs), tmp_path)
    assert "Ho-R-v2" in saved


def test_a_task_outside_the_table_has_a_row_of_returns_and_a_curve(tmp_path, monkeypatch):
    for seed, score in ((1, 10.0), (2, 30.0)):
        args = hopper(env_id="HalfCheetah-v5", seed=seed)
        make_run(tmp_path, f"mine-{seed}", [0.0, score], args, command=["grpo_dt_continuous.py"])
    args = hopper(env_id="Pendulum-v1", g_online=-300.0, seed=1)
    make_run(tmp_path, "pendulum", [-9.0, -4.0], args, command=["grpo_dt_continuous.py"])
    path = tmp_path / "pendulum" / "metrics.csv"  # no reference returns, no score
    path.write_text(path.read_text().replace(",-4.0\n", ",\n").replace(",-9.0\n", ",\n"))
    page, summaries = page_of(tmp_path)
    cheetah, pendulum = rows_under(page, "Other tasks")
    assert cheetah[:4] == ["GRPO-DT", "HalfCheetah-v5-random", "-", "40.00 ± 28.28 (of 1)"]  # of 20 and 60
    assert cheetah[-2:] == ["20.00", "-"]  # the score; no difference from Hopper's row
    assert pendulum[1:5] == ["Pendulum-v1-random", "-", "-8.00 (of 1)", "-8.00"] and pendulum[-2:] == ["-", "-"]
    assert "## Other runs" not in page and "Left out" not in page
    report.write_csv(tmp_path / "report.csv", summaries)
    assert [row["unit"] for row in report.read_csv(tmp_path / "report.csv")] == ["return", "return"]
    pytest.importorskip("matplotlib")
    saved = {}
    monkeypatch.setattr(report, "save", lambda figure, path: saved.update({path.name: figure.get_axes()}))
    report.write_curves(report.group_runs(report.read_runs([tmp_path])[0]), tmp_path)
    endings = ("", "_minutes", "_steps", "_updates")
    assert sorted(saved) == ["HalfCheetah-v5-random", "Pendulum-v1-random", *(f"overview{end}" for end in endings)]
    axes = saved["Pendulum-v1-random"]
    assert [each.get_xlabel() for each in axes] == [*report.AXES.values()]
    assert {each.get_ylabel() for each in axes} == {"return"}
    assert list(axes[0].get_lines()[0].get_ydata()) == [-18.0, -8.0]


# Curves


def test_the_mean_over_seeds_ends_where_the_shortest_seed_ends(tmp_path):
    make_run(tmp_path, "grpo_dt__Hopper-random__1", [1.0, None, 3.0, 5.0], hopper(), steps=100)
    make_run(tmp_path, "grpo_dt__Hopper-random__2", [3.0, 4.0, 5.0], hopper(), steps=300)
    ((_, runs),) = report.group_runs(report.read_runs([tmp_path])[0]).items()
    x, mean, std = report.mean_curve(runs, "iteration")
    assert list(x) == [0, 1, 2] and list(mean) == [2.0, 3.0, 4.0]  # the first seed is at 2 in iteration 1
    assert list(std) == pytest.approx([math.sqrt(2)] * 3)  # n - 1, of two that are 2 apart
    x, mean, _ = report.mean_curve(runs, "env_steps")
    assert list(x) == [0, 200, 300] and list(mean) == pytest.approx([2.0, (3 + 3 + 2 / 3) / 2, 4.5])
    x, _, std = report.mean_curve(runs[:1], "minutes")
    assert list(x) == pytest.approx([0, 5 / 60, 14 / 60]) and not std.any()  # 1, 4 and 9 seconds


def test_an_iteration_in_which_the_machine_slept_counts_as_ten_medians():
    rows = [{"iteration": 0.0, "score": 1.0}]
    rows += [{"iteration": i + 1.0, "time/iteration": s, "score": 1.0} for i, s in enumerate([6.0, 6.0, 7200.0, 12.0])]
    minutes = [point.minutes for point in report.points_of(rows, "score")]
    assert minutes == pytest.approx([0.0, 0.1, 0.2, 0.2 + 10 * 9 / 60, 0.2 + 10 * 9 / 60 + 0.2])  # the median is 9


def test_beside_a_curve_that_is_many_times_as_long_the_shortest_can_be_seen(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    make_run(tmp_path, "ppo_dt__Hopper-medium__1", [0.0, 10.0, 20.0], steps=50)
    make_run(tmp_path, "grpo_dt__Hopper-medium__1", [0.0, 10.0, 20.0], steps=10_000)
    iterations, steps, _, updates = drawn(tmp_path, monkeypatch)["Ho-M-v2"]
    assert steps.get_xscale() == "symlog" and iterations.get_xscale() == updates.get_xscale() == "linear"
    assert list(steps.get_xticks()) == [0.0, 100.0, 1000.0, 10_000.0]
    left, middle, right = steps.transData.transform([(0, 0), (100, 0), (20_000, 0)])[:, 0]
    assert (middle - left) / (right - left) > 0.15  # the end of the shorter one; on a linear axis 0.005
    make_run(tmp_path / "less", "ppo_dt__Hopper-medium__1", [0.0, 10.0, 20.0], steps=50)
    make_run(tmp_path / "less", "grpo_dt__Hopper-medium__1", [0.0, 10.0, 20.0], steps=1250)
    steps = drawn(tmp_path / "less", monkeypatch)["Ho-M-v2"][1]
    assert list(steps.get_xticks()) == [0.0, 100.0, 200.0, 500.0, 1000.0, 2000.0]


def drawn(folder, monkeypatch):
    """The axes of each picture of the runs in a folder, not written."""
    saved = {}
    monkeypatch.setattr(report, "save", lambda figure, path: saved.update({path.name: figure}))
    report.write_curves(report.group_runs(report.read_runs([folder])[0]), folder)
    return {name: [axes for axes in figure.get_axes() if axes.get_title()] for name, figure in saved.items()}


def test_pictures_have_a_line_and_a_band_a_group_and_the_papers_final_values(tmp_path, monkeypatch):
    colour = pytest.importorskip("matplotlib.colors").to_hex
    for seed in (1, 2):
        make_run(tmp_path, f"grpo_dt__Hopper-medium__{seed}", [0.0, 10.0 * seed])
    for name in ("ppo_dt__Hopper-medium__1", "grpo_dt__Hopper-medium__token-ratio__1", "ppo_dt__Ant-medium__1"):
        make_run(tmp_path, name, [0.0, 10.0])
    pictures = drawn(tmp_path, monkeypatch)
    several = [f"{name}{ending}" for name in ("figure_3", "overview") for ending in sorted(report.ENDINGS.values())]
    assert sorted(pictures) == ["An-M-v2", "Ho-M-v2", "figure_2c", *several]
    labels = [axes.get_xlabel() for axes in pictures["Ho-M-v2"]]
    assert labels == ["iterations", "environment steps", "minutes", "gradient updates"]
    first, steps, _, updates = pictures["Ho-M-v2"]
    drawn_at = [list(axes.get_lines()[0].get_xdata()) for axes in (first, steps, updates)]
    assert drawn_at == [[0, 1], [0.0, 100.0], [0.0, 8.0]]
    names = ["GRPO-DT (2 seeds)", "GRPO-DT token-ratio (1 seed)", "PPO-DT (1 seed)", "the paper's final value"]
    assert first.get_legend_handles_labels()[1] == names
    assert len(first.collections) == 1 and first.get_title() == "Hopper medium"  # a band where there are two seeds
    dashed = [line for line in first.get_lines() if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert [set(line.get_ydata()) for line in dashed] == [{108.81}, {105.65}]
    for axes in [axes for panels in pictures.values() for axes in panels]:
        lines = {line.get_label(): line.get_color() for line in axes.get_lines()}
        for label, line in lines.items():
            if label.startswith(("GRPO-DT (", "PPO-DT (")):  # in each picture the same
                assert colour(line) == report.COLOURS[label.startswith("PPO")].lower()
    assert [axes.get_title() for axes in pictures["figure_3"]] == ["Hopper medium", "Ant medium"]  # none is empty
    assert [axes.get_title() for axes in pictures["figure_2c"]] == ["Hopper medium"] * 4


def test_the_baselines_are_drawn_in_colours_of_their_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    methods = ["grpo_dt", "ppo_dt", "odt", "odt_td3", "iql"]
    for method in methods:
        make_run(tmp_path, f"{method}__Hopper-medium__1", [0.0, 10.0])
    lines = [line for line in drawn(tmp_path, monkeypatch)["Ho-M-v2"][0].get_lines() if len(line.get_ydata()) == 2]
    solid = {line.get_label(): line.get_color() for line in lines if line.get_linestyle() == "-"}
    assert {*solid} == {f"{report.METHODS[method]} (1 seed)" for method in methods}
    assert len({str(colour) for colour in solid.values()}) == len(methods)


def test_times_that_are_not_written_leave_out_their_panel(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    make_run(tmp_path, "grpo_dt__Hopper-medium__1", [0.0, 10.0])
    path = tmp_path / "grpo_dt__Hopper-medium__1" / "metrics.csv"
    path.write_text(path.read_text().replace("time/iteration", "time/other"))
    pictures = drawn(tmp_path, monkeypatch)
    labels = [axes.get_xlabel() for axes in pictures["Ho-M-v2"]]
    assert labels == ["iterations", "environment steps", "gradient updates"]
    names = [f"{name}{ending}" for name in ("figure_3", "overview") for ending in ("", "_steps", "_updates")]
    assert sorted(pictures) == ["Ho-M-v2", *names]


def test_of_many_groups_those_with_most_seeds_are_drawn(tmp_path):
    for index in range(10):
        for seed in range(1 + index % 2):
            make_run(tmp_path, f"grpo_dt__Hopper-medium__v{index}__{seed}", [0.0, 10.0])
    title, curves = report.curves_of(report.group_runs(report.read_runs([tmp_path])[0]), "Hopper", "medium")
    assert title == "Hopper medium (8 of 10 groups)"
    assert {"v1", "v3", "v5", "v7", "v9"} < {curve.variant for curve in curves} and len(curves) == 8


def test_a_picture_is_written_as_png_and_as_pdf(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    make_run(tmp_path, "grpo_dt__Hopper-random__a$b__1", [0.0, 10.0])  # "$" is no formula
    title, curves = report.curves_of(report.group_runs(report.read_runs([tmp_path])[0]), "Hopper", "random")
    report.write_picture(tmp_path / "a.b", [(title, curves, "iteration")], {"grpo_dt": "#0072B2"})
    height, width, _ = image.imread(tmp_path / "a.b.png").shape
    assert 500 < width < 700 and 450 < height < 700  # a panel of 3.2 by 2.7 inches at 200 dots
    assert (tmp_path / "a.b.pdf").read_bytes()[:5] == b"%PDF-"


def test_an_out_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, str(PATH), ".", "--no-curves", "--out", "file"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "file" in done.stderr
