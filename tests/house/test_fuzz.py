"""Every field of every script's Args with values that nobody should give: the command ends in one line with exit code
1, or the run starts. Minutes for each script."""

import contextlib
import dataclasses
import io
import resource
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo_dt_continuous as grpo
import ppo_dt_continuous as ppo
import pretrain_dt
import q_guided_grpo_dt as q_guided

WORDS = "--eval-episodes 1 --no-cuda --threads 1 "
FINETUNE = "--iterations 1 --n-batch 4 --n-minibatches 1 --n-trajectories 1 "
GROUPS = "--n-sources 1 --n-points 2 --group-size 2 --delta-r 0 "
TOY = {
    pretrain_dt: "--dataset-steps 60 --embed-dim 16 --n-layers 1 --n-heads 1 --batch-size 8 --updates 1 --c-offline 2 ",
    grpo: FINETUNE + GROUPS + "--l-traj 3 --l-eval 3 --workers 0 ",
    ppo: FINETUNE + "--value-dim 8 --value-warmup 1 ",
    q_guided: FINETUNE + GROUPS + "--critic-warmup 1 --critic-updates 1 --critic-batch 8 --critic-dim 8 ",
}
WRONG = ["", "x", "-1", "0", "0.5", "nan", "-inf", "1000000000", "1e300", "10000000000000", "None", "../x", "±"]
SECONDS = 5  # after which a run counts as started
GIGABYTES = 3  # beyond what the process has, so that the machine lives


class Started(BaseException):
    """No Exception, which scripts may catch."""


def command(script, words):
    """What it says, and where it ends: None after a run that ended well, or that went on for SECONDS."""

    def started(*_):
        raise Started

    argv, printed = sys.argv, io.StringIO()
    sys.argv = [script.__file__, *words]
    handler = signal.signal(signal.SIGALRM, started)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(Started):
            runpy.run_path(script.__file__, run_name="__main__")
        return printed.getvalue(), None
    except SystemExit as stop:
        return printed.getvalue(), stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = argv
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pretrained toy, with its data, on short episodes of Hopper."""
    folder = tmp_path_factory.mktemp("made") / "run"
    kwargs = ["--env-kwargs", '{"max_episode_steps": 20}']
    words = [*(WORDS + TOY[pretrain_dt]).split(), *kwargs, "--save-data", "--run-dir", str(folder)]
    pretrain_dt.main(pretrain_dt.parse_args(words))
    return folder


@pytest.fixture
def limited():
    """An address space that ends before the machine's memory does."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


CASES = [(script, field.name) for script in TOY for field in dataclasses.fields(script.Args)]


@pytest.mark.slow
@pytest.mark.parametrize("script, name", CASES, ids=lambda each: getattr(each, "__name__", each))
def test_a_value_that_nobody_should_give_is_one_line_or_a_run(script, name, made, limited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = f"--{name.replace('_', '-')}"
    own = [] if script is pretrain_dt else ["--pretrained", str(made)]
    kwargs = ["--env-kwargs", '{"max_episode_steps": 20}'] if script is pretrain_dt else []
    switch = isinstance(script.Args.__dataclass_fields__[name].default, bool)
    for i, value in enumerate([None] if switch else WRONG):
        words = [*(WORDS + TOY[script]).split(), *own, *kwargs, "--run-dir", f"run{i}", flag]
        words += [] if value is None else [value]
        with np.errstate(all="ignore"):
            said, code = command(script, words)
        named = f"{script.__name__} {flag} {value}: {code} {said}"
        assert "Traceback" not in said, named
        if isinstance(code, str):
            assert code.startswith("error: ") and "\n" not in code, named
        else:
            assert code in (None, 1), named
            assert code is None or flag in said, named  # tyro's lines
