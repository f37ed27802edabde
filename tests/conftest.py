"""What must be set before any test module imports torch, and what many tests need."""

import contextlib
import functools
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the scripts set it: idle threads must not spin

import pytest
import torch


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """One thread, and a folder of its own for what a test drops into the current one."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def refused():
    """refused(*named): a block that ends with `error: ...` on one line which names these, that is with exit code 1."""

    @contextlib.contextmanager
    def ends(*named):
        with pytest.raises(SystemExit) as stop:
            yield
        line = str(stop.value)
        assert line.startswith("error: ") and "\n" not in line and all(name in line for name in named), line

    return ends


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """pretrained(env_id): a checkpoint as pretrain_dt.py leaves it, of a small network's first weights; made once."""
    from grpo_dt_continuous import DecisionTransformer, make_env
    from pretrain_dt import UMAZE

    @functools.cache
    def make(env_id="Hopper-v5"):
        kwargs = {"maze_map": UMAZE} if env_id.startswith("AntMaze") else {}
        env = make_env(env_id, kwargs)
        sizes = dict(obs_dim=env.observation_space.shape[0], act_dim=env.action_space.shape[0])
        sizes |= dict(embed_dim=16, n_layers=2, n_heads=2)
        torch.manual_seed(1)
        model = DecisionTransformer(**sizes)
        model.mean_head.weight.data *= 0.3  # so that Hopper stands for a while
        model.return_scale.fill_(0.05)
        content = dict(script="pretrain_dt", iteration=4, sizes=sizes | {"kind": "dt"}, weights=model.state_dict())
        content |= dict(args={"c_offline": 5}, env_id=env_id, env_kwargs=kwargs, dataset="random")
        content |= dict(dataset_kind="random", dataset_best_return=30.0, g_eval=20.0, c_online=1)
        path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
        torch.save(content, path)
        return str(path)

    return make
