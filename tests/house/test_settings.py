"""--small, and what args.json records: settings and source of a run, in the scripts and in the baselines."""

import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GRPO = dict(embed_dim=128, n_sources=4, n_batch=128, buffer_size=512, lr=1e-4, kappa_initial=0.01, eval_every=10)
PRESETS = {
    "pretrain_dt": dict(embed_dim=128, c_offline=1, updates=4000, lr=1e-3),
    "grpo_dt_continuous": GRPO,
    "ppo_dt_continuous": dict(embed_dim=128, gamma=0.995, n_batch=64),
    "q_guided_grpo_dt": dict(embed_dim=128, gamma=0.995, lr=5e-5, tau=0.05),
}

# What the paper, or ODT where it is silent, says once for all tasks.
LAMB = dict(weight_decay=1e-4, max_grad_norm=0.5, kappa_lr=1e-4)
UPDATE = LAMB | dict(n_minibatches=8, beta=1e-3, reference_every=4, eval_episodes=10)
GROUPS = dict(replay_size=32, n_sources=16, n_points=4, group_size=8, buffer_size=2048)
CRITIC = dict(critic_warmup=10_000, critic_updates=300, critic_batch=256, tau=0.005)
CRITIC |= dict(target_noise=0.2, target_noise_clip=0.5)
CONSTANTS = {
    "pretrain_dt": LAMB | dict(batch_size=256, dropout=0.1, kappa_initial=0.1, dataset_steps=100_000, n_layers=4),
    "grpo_dt_continuous": UPDATE | GROUPS | dict(eval_every=1),
    "ppo_dt_continuous": UPDATE | dict(replay_iterations=4, value_warmup=200, eval_every=10),
    "q_guided_grpo_dt": UPDATE | GROUPS | CRITIC | dict(eval_every=10),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_settings_that_are_the_same_in_all_tasks(name):
    args = vars(importlib.import_module(name).Args())
    assert {key: args[key] for key in CONSTANTS[name]} == CONSTANTS[name] and args["embed_dim"] == 512


@pytest.mark.parametrize("name", PRESETS)
def test_the_preset_gives_way_to_flags_wherever_they_stand(name, capsys):
    script = importlib.import_module(name)
    plain, preset = vars(script.Args()), PRESETS[name]
    args = vars(script.parse_args(["--small"]))
    assert {key: args[key] for key in args if args[key] != plain[key]} == preset | {"small": True}
    said = capsys.readouterr().out.strip().removeprefix("--small: ").split(", ")
    assert {word.split()[0]: float(word.split()[1]) for word in said} == preset
    for flags in (["--lr", "7e-5", "--small"], ["--small", "--lr", "7e-5", "--embed-dim", "64"]):
        args = vars(script.parse_args(flags))
        given = {"lr": 7e-5} | ({"embed_dim": 64} if "64" in flags else {})
        assert {key: args[key] for key in args if args[key] != plain[key]} == preset | {"small": True} | given
    assert vars(script.parse_args(["--no-small"])) == plain


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "pretrain_dt"])
def test_what_is_printed_is_what_is_in_use(name, capsys):
    """A checkpoint keeps its width; None asks for the paper's value of the row."""
    script = importlib.import_module(name)
    args = script.parse_args(["--small", "--pretrained", "RUN", "--lr", "None"])
    said = capsys.readouterr().out
    assert "embed_dim" not in said and args.lr is None
    script.fill_from_table(args, "medium", 0.0)
    assert args.lr == (1e-5 if name == "q_guided_grpo_dt" else 5e-5)


def test_a_run_keeps_its_preset(tmp_path, capsys):
    """args.json, the checkpoint and a resumed run hold the values; the preset can't be changed on the way."""
    import pretrain_dt as script

    flags = "--env-id Pendulum-v1 --small --updates 1 --embed-dim 8 --n-layers 1 --dataset-steps 400 --batch-size 4"
    run_dir = tmp_path / "run"
    script.main(script.parse_args([*flags.split(), "--eval-episodes", "1", "--run-dir", str(run_dir)]))
    facts = json.loads((run_dir / "args.json").read_text())["args"]
    expected = dict(small=True, updates=1, embed_dim=8, c_offline=1, lr=1e-3)
    assert expected.items() <= facts.items()
    resumed = vars(script.parse_args(["--resume", str(run_dir), "--updates", "2"]))
    assert (expected | {"updates": 2}).items() <= resumed.items()
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--resume", str(run_dir), "--no-small"])
    assert "--small True, not False" in str(stop.value)


def test_a_small_finetuning_pretrains_a_small_network(tmp_path, monkeypatch):
    """Without --pretrained the network that is made has the preset's width, and the row fills what it leaves open."""
    import grpo_dt_continuous as script

    monkeypatch.chdir(tmp_path)
    args, seen = script.parse_args(["--small"]), []

    def run(command, **more):
        seen.extend(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    folder = script.pretrained_on_random(args)
    assert "Hopper-v5__128__c1" in folder.name
    given = dict(itertools.pairwise(seen))
    assert (given["--embed-dim"], given["--run-dir"]) == ("128", str(folder))
    script.fill_from_table(args, "medium", 0.0)
    assert (args.l_traj, args.l_eval, args.gamma, args.lr) == (15, 400, 0.995, 1e-4)


@pytest.mark.parametrize("name, said", [("odt", "c_online 1"), ("iql", "offline_updates 4000")])
def test_the_baselines_have_theirs(name, said, tmp_path):
    words = [sys.executable, ROOT / f"benchmark/baselines/{name}.py", "--small", "--pretrained", tmp_path / "none"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (f"--small: {said}\n", 1)
    assert done.stderr.startswith("error: checkpoint ")


@pytest.mark.parametrize("name", PRESETS)
def test_args_json_has_what_a_script_differs_in_from_its_commit(name, tmp_path, monkeypatch):
    """The diff rebuilds the script that ran from that of the commit; outside a repository both are empty."""
    spec = importlib.util.spec_from_file_location(f"copied_{name}", tmp_path / f"sub/{name}.py")
    script, source = importlib.util.module_from_spec(spec), (ROOT / f"{name}.py").read_text()
    Path(spec.origin).parent.mkdir()
    Path(spec.origin).write_text(source)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(importlib.metadata, "distributions", tuple)  # takes long
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)

    def facts(run):
        with script.Log(tmp_path / run, script.Args(), 1, []):
            return json.loads((tmp_path / run / "args.json").read_text())

    assert [facts("none")[key] for key in ("commit", "diff")] == ["", ""]
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    for key, value in (("color.ui", "always"), ("diff.noprefix", "true")):
        subprocess.run([*git, "config", key, value], check=True)
    assert [facts("untracked")[key] for key in ("commit", "diff")] == ["", ""]
    subprocess.run([*git, "add", "sub"], check=True)
    assert [facts("unborn")[key] for key in ("commit", "diff")] == ["", ""]
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    clean = facts("clean")
    assert len(clean["commit"]) == 40 and clean["diff"] == ""
    lines = source.split("\n")
    places = [i for i in range(len(lines) - 3) if lines[i] and not lines[i + 3]]  # the diff ends with an empty line
    lines[places[-1]] += "  # ±"
    Path(spec.origin).write_text("\n".join(lines))
    (tmp_path / "patch").write_text(facts("changed")["diff"] + "\n")
    Path(spec.origin).write_text(source)
    subprocess.run([*git, "-c", "diff.noprefix=false", "apply", tmp_path / "patch"], check=True)
    assert Path(spec.origin).read_text() == "\n".join(lines) != source
