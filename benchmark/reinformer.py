"""Reinformer (Zhuang et al. 2024, Fig. 4a), which predicts the return that it acts on: pretraining and GRPO-DT.

    python benchmark/reinformer.py pretrain --env-id Hopper-v5 --dataset mujoco/hopper/medium-v0 --run-dir runs/NAME
    python benchmark/reinformer.py finetune --env-id Hopper-v5 --pretrained runs/NAME

The flags are those of pretrain_dt.py and of grpo_dt_continuous.py, --resume and --eval-only among them.

This doubles as the example of how to change the model without touching the scripts. A model of your own is a subclass
of their DecisionTransformer with another `kind`, which its checkpoints name, so that neither takes the other's. The two
scripts have the same text of it, so a subclass of one serves both. `forward` is all that updates call, but for a loss
of your own in place of pretrain_loss; the rollout calls `conditioned_on` first, and keeps what that returns: so the new
and the old log-probability see the return that the action was sampled at, and their ratio begins at 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo_dt_continuous as grpo  # before torch, for which it sets how threads wait

# isort: split
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

import pretrain_dt as pretrain

EXPECTILE = 0.99  # tau of the regression of the return: near 1 its minimiser is the largest return to be had


class Reinformer(grpo.DecisionTransformer):
    """Tokens (s_1, g_1, a_1, ..., s_K, g_K): a step's return is predicted from its state token, which does not see it;
    the action is read from the return token."""

    kind = "reinformer"

    def __init__(self, obs_dim, act_dim, embed_dim=512, **sizes):
        super().__init__(obs_dim, act_dim, embed_dim, **sizes)
        self.return_head = nn.Linear(embed_dim, 1)  # finetuning leaves it as it is: no loss reads it

    def tokens(self, observations, returns, actions, real, read: slice) -> torch.Tensor:
        """What the blocks make of the tokens in `read`: (B, L', E). Takes what `forward` takes."""
        n_tokens = 3 * returns.shape[1] - 1  # none for the last action, which is yet to be chosen
        dropout = self.dropout if self.training else 0.0
        s = self.embed_observation((observations - self.obs_mean) / self.obs_std)  # (B, K, E)
        g = self.embed_return((returns * self.return_scale)[..., None])  # (B, K, E)
        a = self.embed_action(actions)  # (B, K, E)
        slots = [s, g, a][:n_tokens]  # without a at context 1, where LAMB would move its weights for no gradient
        x = torch.stack(slots, dim=2).flatten(1, 2)[:, :n_tokens]  # (B, L, E)
        x = F.dropout(self.norm_in(x), dropout)
        mask = self.attention_mask(real, n_tokens)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks[:-1]:
                x = block(x, mask)
            x = self.blocks[-1](x, mask, read)
        return self.norm_out(x.float())

    def law(self, x: torch.Tensor) -> Normal:
        """Of u, from return tokens (..., E): (..., A)."""
        spread = torch.tanh(self.log_std_head(x))
        log_std = grpo.LOG_STD_MIN + 0.5 * (grpo.LOG_STD_MAX - grpo.LOG_STD_MIN) * (spread + 1.0)
        return Normal(self.mean_head(x), log_std.exp(), validate_args=False)

    def forward(self, observations, returns, actions, real, every_step: bool = False) -> Normal:
        """As in the base class, but read from the return tokens."""
        read = slice(1, None, 3) if every_step else slice(-1, None)
        x = self.tokens(observations, returns, actions, real, read)
        return self.law(x if every_step else x[:, 0])

    def law_and_returns(self, observations, returns, actions, real) -> tuple[Normal, torch.Tensor]:
        """Of every step: the law (B, K, A), and the return-to-go (B, K) that is predicted, in raw units."""
        x = self.tokens(observations, returns, actions, real, slice(None))  # (B, 3 K - 1, E)
        predicted = self.return_head(x[:, 0::3])[..., 0] / self.return_scale
        return self.law(x[:, 1::3]), predicted

    def conditioned_on(self, observations, returns, actions, real) -> torch.Tensor:
        """The returns-to-go (B, K) with the last step's predicted, in raw units, in place of the one asked for."""
        x = self.tokens(observations, returns, actions, real, slice(-2, -1))  # the last state token: (B, 1, E)
        predicted = self.return_head(x)[..., 0] / self.return_scale  # (B, 1)
        return torch.cat([returns[:, :-1], predicted], dim=1)


def expectile_loss(error: torch.Tensor, tau: float) -> torch.Tensor:
    """|tau - 1(error < 0)| error^2, elementwise."""
    return torch.where(error < 0, 1.0 - tau, tau) * error**2


def reinformer_loss(model: Reinformer, windows: pretrain.Windows, kappa: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """pretrain_loss plus the expectile regression of the return; and the values to log."""
    real = windows.real
    dist, predicted = model.law_and_returns(*windows)
    nll = -pretrain.masked_mean(pretrain.log_prob(dist, torch.atanh(windows.actions)), real)
    entropy = pretrain.masked_mean(-pretrain.log_prob(dist, dist.rsample()), real)
    unit = pretrain.masked_mean(windows.returns.abs(), real).clamp(min=1e-6)  # so that the rewards' scale is no matter
    return_loss = pretrain.masked_mean(expectile_loss((windows.returns - predicted) / unit, EXPECTILE), real)
    loss = nll - kappa * entropy + return_loss
    mse = pretrain.masked_mean((pretrain.squash(dist.mean) - windows.actions).square().mean(-1), real)
    return loss, {"nll": nll, "entropy": entropy, "action_mse": mse, "return": return_loss}


def command_line(arguments: list[str]) -> None:
    """That of the script which the first word names, with this model in place of its own."""
    pretrain.DecisionTransformer = Reinformer
    pretrain.pretrain_loss = reinformer_loss
    grpo.DecisionTransformer = Reinformer
    command, *flags = arguments or [""]
    if command == "pretrain":
        args = pretrain.parse_args(flags)
        pretrain.eval_only(args, pretrain.Environments) if args.eval_only else pretrain.main(args)
    elif command == "finetune":
        args = grpo.parse_args(flags)
        if not (args.pretrained or args.resume or args.eval_only):
            grpo.die("--pretrained is missing: give the run folder of benchmark/reinformer.py pretrain.")
        grpo.eval_only(args, grpo.Simulators) if args.eval_only else grpo.main(args)
    else:
        grpo.die(f'the first word is "{command}": give pretrain or finetune, and then the flags of that script.')


if __name__ == "__main__":
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        command_line(sys.argv[1:])
    except SystemExit as stop:
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: a run that has a checkpoint goes on with --resume RUN_DIR") from None
    except OSError as error:
        grpo.die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
