"""Whole runs of the baselines under benchmark/baselines at toy size, by their command lines, and what they refuse."""

import ast
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain_dt
import q_guided_grpo_dt as q_guided

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "baselines.md").read_text()
COMMON = "--eval-episodes 1 --no-cuda --no-bf16 --threads 1"
PRETRAIN = f"--dataset-steps 300 --embed-dim 16 --n-layers 2 --n-heads 2 --batch-size 8 --updates 4 --warmup 8 {COMMON}"
PRETRAIN += " --c-offline 3 --lr 1e-2 --save-data"
TOY = {"odt": "--n-minibatches 3 --batch-size 8 --lr 1e-2 --replay-size 5 --min-steps 0 --eval-every 1"}
TOY["odt_td3"] = f"--td3 {TOY['odt']} --critic-warmup 3 --critic-dim 8"
TOY["iql"] = "--min-steps 0 --offline-updates 4 --batch-size 8 --hidden-dim 8 --lr 1e-2 --eval-every 1"
COLUMNS = {
    "odt": "losses/nll losses/entropy losses/action_mse losses/grad_norm losses/kappa charts/learning_rate",
    "odt_td3": "losses/critic_loss losses/q_mean losses/target_mean losses/q_gap losses/action_mse losses/policy_q "
    "losses/grad_norm charts/learning_rate",
    "iql": "losses/v_loss losses/critic_loss losses/actor_loss losses/nll losses/q_mean losses/v_mean "
    "losses/weight_mean",
}
SHARED = "iteration eval/return_mean eval/return_std eval/length_mean eval/normalized_score rollout/return "
SHARED += "rollout/length rollout/terminated charts/env_steps charts/gradient_updates time/iteration time/simulate "
SHARED += "time/infer time/update time/eval"
each_baseline = pytest.mark.parametrize("name", TOY)


def load(name):
    """A file of benchmark/ as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"runs_of_{Path(name).name}", ROOT / f"benchmark/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SCRIPTS = {name: load(f"baselines/{name}") for name in ("odt", "iql")}
report, launcher = load("report"), load("run")


def common(name):
    """IQL has no bf16."""
    return COMMON.replace(" --no-bf16", "") if name == "iql" else COMMON


def script_of(name):
    """The script and the flags of one of TOY."""
    return SCRIPTS[name.removesuffix("_td3")], TOY[name].split()


def run(name, *words):
    """The command line of a baseline; the modules that it changes are as before afterwards."""
    script, flags = script_of(name)
    words = [word for each in words for word in str(each).split()]
    if "TOY" in words:
        words.remove("TOY")
        words = [*flags, *common(name).split(), *words]  # those given hold
    with pytest.MonkeyPatch.context() as patch:
        for module in (q_guided, pretrain_dt):
            for key, value in vars(module).copy().items():
                if not key.startswith("__") or key == "__file__":
                    patch.setattr(module, key, value)
        patch.setattr(importlib.metadata, "distributions", tuple)  # for args.json, which takes long
        script.command_line(words)


def parsed(name, words):
    """The arguments of a command line, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (q_guided, pretrain_dt):
            for key in [key for key in vars(module) if not key.startswith("__") or key == "__file__"]:
                patch.setattr(module, key, getattr(module, key))
        seen = []
        patch.setattr(pretrain_dt, "main", seen.append)
        patch.setattr(SCRIPTS[name], "main", seen.append)
        SCRIPTS[name].command_line(words)
    return seen[0]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """{kind: folder of a toy run of pretraining}: "dt" of pretrain_dt.py, "odt" with ReLU."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.set_num_threads(1)
    pretrain_dt.main(pretrain_dt.parse_args([*PRETRAIN.split(), "--run-dir", str(folder / "dt")]))
    run("odt", f"pretrain {PRETRAIN} --g-eval 7 --run-dir {folder / 'odt'}")
    return {kind: folder / kind for kind in ("dt", "odt")}


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """The folder of a toy run of pretraining, of an actor alone, on Pendulum-v1."""
    folder = tmp_path_factory.mktemp("pendulum") / "start"
    run("odt", f"pretrain --td3 {PRETRAIN} --env-id Pendulum-v1 --dataset-steps 450 --log-every 4 --run-dir {folder}")
    return folder


@pytest.fixture(scope="module")
def whole(pretrained, tmp_path_factory):
    """whole(name): the folder of a run of 3 iterations in one go; not to be changed."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / f"Hopper-v5__{name.removesuffix('_td3')}__random__1__17"
            run(name, f"--pretrained {pretrained['odt']} --iterations 3 --run-dir {made[name]} TOY")
        return made[name]

    return make


def table(run_dir):
    with open(Path(run_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def learning_columns(run_dir):
    return [{name: value for name, value in row.items() if "time/" not in name} for row in table(run_dir)]


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def same_tensors(one, other):
    """Whether two nests of dictionaries and lists hold the same tensors, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tensors(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tensors, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else True


# ---- Runs -----------------------------------------------------------------------------------------------------------


@each_baseline
def test_a_run_writes_the_columns_of_the_scripts_and_learns(name, whole, pretrained):
    rows = table(whole(name))
    assert sorted(rows[0]) == sorted([*SHARED.split(), *COLUMNS[name].split()])
    assert [row["iteration"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["eval/return_mean"] != "" and rows[0]["rollout/return"] == ""
    assert all(value != "" and math.isfinite(float(value)) for row in rows[1:] for value in row.values())
    steps = 0.0
    for row in rows[1:]:
        steps += float(row["rollout/length"])
        assert float(row["charts/env_steps"]) == pytest.approx(steps)
    facts = json.loads((whole(name) / "args.json").read_text())
    content = checkpoint(whole(name))
    assert facts["script"] == f"{content['script']}.py" and content["script"] == name.removesuffix("_td3")
    assert content["iteration"] == 3 and content["rows"] == [
        {key: type(old[key])(value) for key, value in row.items() if value} for row, old in zip(rows, content["rows"])
    ]


@each_baseline
def test_a_run_that_is_broken_off_goes_on_bit_for_bit(name, whole, pretrained, tmp_path):
    run(name, f"--pretrained {pretrained['odt']} --iterations 1 --run-dir {tmp_path / 'split'} TOY")
    run(name, f"--resume {tmp_path / 'split' / 'checkpoint.pt'} --iterations 3")
    assert learning_columns(tmp_path / "split") == learning_columns(whole(name))
    one, other = checkpoint(tmp_path / "split"), checkpoint(whole(name))
    for part in {"weights", "learner", "rolled"} & one.keys():
        assert same_tensors(one[part], other[part]), part


@each_baseline
def test_a_saved_policy_scores_what_it_scored_in_memory(name, whole, capsys):
    run(name, f"--eval-only {whole(name)}")
    score = float(table(whole(name))[-1]["eval/return_mean"])
    assert f"return_mean {score:,.1f}," in capsys.readouterr().out


def test_odt_begins_with_the_policy_and_the_moments_of_pretraining(pretrained, whole, tmp_path):
    before, after = checkpoint(pretrained["odt"]), checkpoint(whole("odt"))
    assert after["sizes"] == before["sizes"] and after["sizes"]["kind"] == "baselines/odt"
    moved = {key for key, value in before["weights"].items() if not torch.equal(value, after["weights"][key])}
    assert moved == set(before["weights"]) - {"obs_mean", "obs_std", "return_scale"}
    assert after["learner"]["updates"] == 4 + 3 * 3  # so the warm-up of 8 updates goes on
    for name in ("odt", "odt_td3"):
        rates = [float(row["charts/learning_rate"]) for row in table(whole(name))[1:]]
        assert rates == pytest.approx([1e-2 * 7 / 8, 1e-2, 1e-2])
    assert after["learner"]["optimizer"]["param_groups"][0]["step"] == 13
    assert [row["charts/gradient_updates"] for row in table(whole("odt"))[1:]] == ["3", "6", "9"]
    assert len(after["rolled"]) == 3 and after["args"]["g_online"] == 7200.0
    assert (before["g_eval"], after["g_eval"]) == (7.0, 3600.0)  # the row's


def test_odt_takes_a_policy_of_pretrain_dt_and_other_scripts_take_it_back(pretrained, tmp_path, capsys):
    run("odt", f"--pretrained {pretrained['dt']} --iterations 1 --c-offline 2 --run-dir {tmp_path / 'run'} TOY")
    assert checkpoint(tmp_path / "run")["sizes"]["kind"] == "dt"
    assert "c_offline 2, warmup 8" in capsys.readouterr().out
    q_guided.eval_only(q_guided.parse_args(["--eval-only", str(tmp_path / "run")]), q_guided.Environments)
    assert f"return_mean {float(table(tmp_path / 'run')[-1]['eval/return_mean']):,.1f}," in capsys.readouterr().out


def test_td3_begins_with_an_actor_of_its_own_pretraining_whose_loss_is_kept(pendulum, tmp_path):
    start = checkpoint(pendulum)
    assert {"losses/action_mse", "losses/grad_norm"} == {name for name in start["rows"][-1] if "losses/" in name}
    again = parsed("odt", ["pretrain", "--env-id", "Pendulum-v1", "--resume", str(pendulum)])
    assert again.td3 and again.max_grad_norm == 0.25
    words = f"--env-id Pendulum-v1 --pretrained {pendulum} --iterations 1 --run-dir {tmp_path / 'run'} TOY"
    odt, warmed_on, played = SCRIPTS["odt"], [], []
    warm_up, roll_out = odt.TD3Learner.warm_up, odt.roll_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(odt.TD3Learner, "warm_up", lambda *given: (warmed_on.append(given[1]), warm_up(*given)))
        patch.setattr(odt, "roll_out", lambda *given: (played.append(given[0]), roll_out(*given))[1])
        run("odt_td3", words)
    assert sorted(warmed_on[0].lengths) == sorted(np.load(pendulum / "data.npz")["lengths"])  # all of the data
    assert [(type(each), each.noise) for each in played] == [(odt.Explorer, 0.1)]
    after = checkpoint(tmp_path / "run")
    assert after["learner"]["updates"] == 7
    critic, target = (after["learner"][part] for part in ("critic", "target_critic"))
    assert not torch.equal(critic["networks.0.0.weight"], target["networks.0.0.weight"])
    spread = "log_std_head.weight"  # which nothing reads
    assert torch.equal(after["weights"][spread], start["weights"][spread])
    mean = "mean_head.weight"
    assert not torch.equal(after["weights"][mean], start["weights"][mean])
    row = table(tmp_path / "run")[-1]  # any task with bounded Boxes will do
    assert float(row["rollout/length"]) == 200.0 and float(row["rollout/terminated"]) == 0.0
    assert float(row["eval/return_mean"]) < 0.0 and "eval/normalized_score" not in row


def test_iql_trains_offline_first_and_then_once_for_every_step(pretrained, tmp_path, capsys):
    words = f"--pretrained {pretrained['dt']} --iterations 1 --updates-per-step 0.5 --run-dir {tmp_path / 'run'} TOY"
    run("iql", words)
    first, row = table(tmp_path / "run")
    assert float(row["charts/gradient_updates"]) == round(0.5 * float(row["rollout/length"]))
    content = checkpoint(tmp_path / "run")
    assert content["learner"]["updates"] == 4 + int(row["charts/gradient_updates"])
    assert content["learner"]["online"][-1].sum() == float(row["charts/env_steps"])  # all that it rolled out
    assert first["eval/return_mean"] != "" and first["rollout/return"] == ""
    start = checkpoint(pretrained["dt"])["weights"]
    assert all(torch.equal(content["weights"][name], start[name]) for name in ("obs_mean", "obs_std"))


def test_iql_and_the_transformers_refuse_each_others_checkpoints(pretrained, whole, refused):
    with refused("holds a dt"):
        run("iql", f"--eval-only {pretrained['dt']}")
    with refused("benchmark/baselines/iql.py"):
        q_guided.eval_only(q_guided.parse_args(["--eval-only", str(whole("iql"))]), q_guided.Environments)


def test_the_report_tells_the_baselines_apart(whole, pretrained, tmp_path):
    for name in TOY:
        found = report.read_run(whole(name))
        assert (found.method, found.task, found.kind, found.variant) == (name, "Hopper", "random", "")
        shutil.copytree(whole(name), tmp_path / f"{name}__Hopper-random__small__1")
        assert report.read_run(tmp_path / f"{name}__Hopper-random__small__1").method == name
    begun = json.loads((pretrained["odt"] / "args.json").read_text())
    begun["command"] = ["benchmark/baselines/odt.py", "pretrain"]
    shutil.copytree(pretrained["odt"], tmp_path / "Hopper-v5__pretrain_dt__random__1__17")
    (tmp_path / "Hopper-v5__pretrain_dt__random__1__17" / "args.json").write_text(json.dumps(begun))
    found = report.read_run(tmp_path / "Hopper-v5__pretrain_dt__random__1__17")
    assert (found.method, found.variant) == ("pretrain_dt", "odt")


def test_the_replay_of_a_run_holds_the_best_of_the_dataset_and_then_what_was_rolled_out(pretrained, tmp_path):
    seen, learner = [], SCRIPTS["odt"].pretrain.Learner

    class Spy(learner):
        def update(self, data, rng):
            assert self.model.training and self.model.dropout == 0.1  # in updates
            seen.append(data)
            super().update(data, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_dt, "Learner", Spy)
        run(
            "odt", f"--pretrained {pretrained['odt']} --iterations 7 --run-dir {tmp_path / 'run'} TOY --n-minibatches 1"
        )
    rolled = [float(row["rollout/return"]) for row in table(tmp_path / "run")[1:]]
    for i, replay in enumerate(seen, 1):
        firsts = replay.returns[replay.lengths.cumsum() - replay.lengths].tolist()
        assert len(firsts) == 5 and firsts[5 - min(i, 5) :] == pytest.approx(rolled[max(0, i - 5) : i], rel=1e-4)
        assert firsts[: 5 - min(i, 5)] == sorted(firsts[: 5 - min(i, 5)])
    assert len(checkpoint(tmp_path / "run")["rolled"]) == 5


LEARNS = {
    "odt_td3": "--td3 --n-minibatches 100 --batch-size 128 --min-steps 0 --critic-warmup 1000 --critic-dim 64 "
    "--gamma 0.95 --tau 0.02 --lr 3e-3 --iterations 30",
    "iql": "--offline-updates 2000 --min-steps 0 --hidden-dim 64 --gamma 0.95 --tau 0.02 --beta 1 --expectile 0.9 "
    "--lr 1e-3 --updates-per-step 2 --iterations 10",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_the_return_of_pendulum_rises(name, tmp_path):
    flags = "--env-id Pendulum-v1 --dataset-steps 6000 --embed-dim 32 --n-layers 2 --n-heads 2 --updates 100 --lr 3e-3 "
    flags += f"--batch-size 64 --c-offline 1 {COMMON} --save-data --run-dir {tmp_path / 'start'}"
    run("odt", f"pretrain --td3 {flags}")
    words = f"--env-id Pendulum-v1 --pretrained {tmp_path / 'start'} --eval-every 5 --eval-episodes 10 --threads 1"
    run(name, f"{words} --no-cuda --run-dir {tmp_path / 'run'} {LEARNS[name]}")
    returns = [float(row["eval/return_mean"]) for row in table(tmp_path / "run") if row["eval/return_mean"]]
    assert sum(returns[-2:]) / 2 > returns[0] + 500.0, returns


# ---- The lines of benchmark/baselines.sh -----------------------------------------------------------------------------


def shell(*words, **settings):
    """benchmark/baselines.sh: (exit code, output)."""
    environment = os.environ | {"PYTHON": sys.executable} | settings
    words = ["bash", str(ROOT / "benchmark/baselines.sh"), *words]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def test_a_line_for_every_cell_of_table_1_and_each_is_parsed_with_the_pretraining_that_it_needs(tmp_path):
    code, printed = shell("--dry-run", SEEDS="1")
    assert code == 0, printed
    runs = [launcher.parse(line.split(" ", 1)[1].split()) for line in printed.splitlines()]
    folders = {each.folder: each for each in runs}
    parsed_before = set()
    cells = [key for row in report.read_csv(report.PAPER / "table1.csv") for key in report.dataset_keys(row["dataset"])]
    for name in TOY:
        found = [report.identify(each.name, {}) for each in runs if each.name.startswith(f"{name}__")]
        assert [identity[1:3] for identity in found if not identity[3]] == cells
        small = [identity[1:3] for identity in found if identity[3].startswith("small")]
        assert {*small} == {("Hopper", "random"), ("Hopper", "medium")} and len(small) == len(found) - len(cells)
    for each in runs:
        if each.needs:
            before = folders[each.needs]
            flags = ("--env-id", "--dataset-kind")
            assert [each.flags[flag] for flag in flags] == [before.flags[flag] for flag in flags]
            assert "--save-data" in before.flags
            assert ("--td3" in each.flags) == ("--td3" in before.flags) or "small" in each.name
        script, words = Path(each.program[1]).stem, [*each.program[2:], *launcher.words_of(each.flags)]
        shape = (script, *each.flags)  # lines of the same flags are parsed once
        if script in SCRIPTS and shape not in parsed_before:
            parsed_before.add(shape)
            args = parsed(script, words)
            kind = args.dataset_kind or "random"
            assert report.identify(each.name, vars(args))[1:3] == (report.task_name(args.env_id), kind)
            widths = [args.embed_dim] if "embed_dim" in vars(args) else []
            assert widths in ([], [128] if "--small" in each.flags or script == "iql" else [512])


@pytest.mark.slow
def test_every_line_of_the_baselines_at_toy_size(tmp_path):
    shutil.copytree(ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    words = ["bash", str(tmp_path / "benchmark/baselines.sh"), "--quick"]
    settings = os.environ | {"PYTHON": sys.executable, "SEEDS": "1", "WORKERS": "2", "EXTRA": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- The command line ------------------------------------------------------------------------------------------------


def command(name, *words, cwd):
    """In a process of its own."""
    words = [sys.executable, str(ROOT / f"benchmark/baselines/{name}.py"), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@each_baseline
def test_one_command_makes_its_own_data_and_goes_on(name, tmp_path):
    script = name.removesuffix("_td3")
    words = [*TOY[name].split(), *common(name).split(), "--iterations", 1]
    words += ["--embed-dim", 16, *(["--c-online", 1] if script == "odt" else [])]
    done = command(script, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "pretrained")
    assert run_dir.name.startswith(f"Hopper-v5__{script}__random__1__")
    done = command(script, "--resume", run_dir, "--iterations", 2, cwd=tmp_path)
    assert done.returncode == 0 and len(table(run_dir)) == 3, done.stderr


# ---- Refusals -------------------------------------------------------------------------------------------------------


@each_baseline
def test_bad_values_end_in_one_line_and_leave_nothing(name, pretrained, refused, tmp_path):
    start = f"--pretrained {pretrained['dt']} --run-dir {tmp_path / 'run'} --iterations 1 TOY"
    for flags, named in (
        ("--eval-episodes 0", "--eval-episodes"),
        ("--seed -1", "--seed"),
        ("--env-id Ant-v5", "Ant-v5"),
        (f"--data {tmp_path}", "data.npz"),
        (f"--pretrained {tmp_path / 'nowhere'}", "nowhere"),
    ):
        with refused(named):
            run(name, start, flags)
        assert not (tmp_path / "run").exists()


def test_odt_refuses_what_its_own_flags_cannot_be(pretrained, refused, tmp_path):
    start = f"--pretrained {pretrained['dt']} --run-dir {tmp_path / 'run'} --iterations 1 TOY"
    for flags, named in (("--g-eval nan", "--g-eval"), ("--replay-size 0", "--replay-size"), ("--dropout 2", "--drop")):
        with refused(named):
            run("odt", start, flags)
    assert not (tmp_path / "run").exists()


@each_baseline
def test_resuming_with_another_state_is_refused(name, whole, pretrained, refused):
    for flags, named in (
        ("--iterations 2", "--iterations"),
        ("--env-id Ant-v5", "--env-id"),
        (f"--pretrained {pretrained['dt']}", "--pretrained"),
        (f"--data {pretrained['dt']} --iterations 4 --eval-only {whole(name)}", "--eval-only"),
    ):
        with refused(named):
            run(name, f"--resume {whole(name)}", flags)
    with refused("pretrain_dt.py"):
        run(name, f"--resume {pretrained['odt']}")


def test_scripts_name_odt_for_its_network(pretrained, refused):
    with refused("benchmark/baselines/odt.py"):
        q_guided.eval_only(q_guided.parse_args(["--eval-only", str(pretrained["odt"])]), q_guided.Environments)


@pytest.mark.slow
def test_the_command_prints_one_line_and_exits_with_1(tmp_path):
    done = command("odt", "--pretrained", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- The page -------------------------------------------------------------------------------------------------------


@each_baseline
def test_the_page_lists_every_metric(name):
    listed = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert set(COLUMNS[name].split()) <= set(listed) and len(listed) == len(set(listed))


@pytest.mark.parametrize("name", SCRIPTS)
def test_differences_in_the_docstring_are_those_of_the_page(name):
    docstring = ast.get_docstring(ast.parse((ROOT / f"benchmark/baselines/{name}.py").read_text()))
    numbers = [int(number) for number in re.findall(r"^\s*\((\d+)\) ", docstring, re.MULTILINE)]
    section = re.search(rf"^## What is not as in the reference code: {name}\.py\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert numbers == list(range(1, len(numbers) + 1))
    assert [int(number) for number in re.findall(r"^(\d+)\. ", section[1], re.MULTILINE)] == numbers
