"""Every script from end to end at toy size, for a task of each family."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain_dt

TOY = dict(embed_dim=16, n_layers=2, n_heads=2, batch_size=8, updates=6, log_every=3, eval_episodes=2, threads=1)
LOSSES = ("nll", "entropy", "action_mse", "grad_norm", "kappa")
SCRIPTS = Path(__file__).resolve().parents[2]


def rows_of(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "env_id, dataset_steps, context",
    [
        ("Hopper-v5", 400, (20, 1)),
        ("Ant-v4", 1200, (20, 1)),
        ("AdroitHandHammer-v1", 400, (5, 5)),  # the one Adroit task that acts on a context above 1
        ("AntMaze_UMaze-v4", 1400, (5, 1)),
        ("Pendulum-v1", 400, (20, 1)),  # no MuJoCo, bounds of 2, no row in the table, no reference returns
    ],
)
def test_pretraining_runs_on_a_task_of_each_family(env_id, dataset_steps, context, tmp_path, capsys):
    args = pretrain_dt.Args(env_id=env_id, dataset_steps=dataset_steps, run_dir=str(tmp_path), **TOY)
    pretrain_dt.main(args)
    rows = rows_of(tmp_path)
    assert list(rows[0])[: len(LOSSES) + 1] == ["iteration", *(f"losses/{name}" for name in LOSSES)]
    assert [row["iteration"] for row in rows] == ["3", "6", "6"]  # two rows of losses, the closing evaluation
    assert all(float(row["losses/nll"]) == float(row["losses/nll"]) for row in rows[:2])
    assert rows[2]["eval/return_mean"]
    assert ("eval/normalized_score" in rows[2]) == (env_id != "Pendulum-v1")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (checkpoint["args"]["c_offline"], checkpoint["c_online"]) == context
    printed = capsys.readouterr().out
    assert "episodes" in printed and f"checkpoint: {tmp_path}" in printed


def test_the_command_line_pretrains_resumes_and_evaluates(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(SCRIPTS / "pretrain_dt.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    flags = [word for name, value in TOY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    printed = run("--env-id", "Hopper-v5", "--dataset-steps", "400", *flags)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("Hopper-v5__pretrain_dt__random__1__")
    assert {"metrics.csv", "args.json", "checkpoint.pt"} <= {path.name for path in run_dir.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    evaluation = run("--eval-only", str(run_dir / "checkpoint.pt"))
    score = float(rows_of(run_dir)[-1]["eval/return_mean"])
    assert evaluation.startswith(f"evaluation: return_mean {score:,.1f}, ")  # what it scored in memory
    assert f" {score:,.0f} " in printed
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    run("--resume", str(run_dir), "--updates", "9")
    assert [row["iteration"] for row in rows_of(run_dir)] == ["3", "6", "9", "9"]
