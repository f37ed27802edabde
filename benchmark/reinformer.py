"""GRPO-DT from a Reinformer (Fig. 4a), which predicts the return that it acts on: the flags of grpo_dt_continuous.py.

    python pretrain_dt.py --env-id Hopper-v5 --model reinformer --run-dir runs/reinformer
    python benchmark/reinformer.py --env-id Hopper-v5 --pretrained runs/reinformer
    python benchmark/reinformer.py --resume runs/NAME

This doubles as the example of how to change the model without touching the script. A model of your own is a subclass of
its DecisionTransformer with another `kind`, which its checkpoints name, so that neither takes the other's. `forward` is
all that the update calls; the rollout calls `conditioned_on` first, and keeps what that returns: so the new and the old
log-probability see the return that the action was sampled at, and their ratio begins at 1.
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
from torch.distributions import Normal


class Reinformer(grpo.DecisionTransformer):
    """Tokens (s_1, g_1, a_1, ..., s_K, g_K): a step's return is predicted from its state token, which does not see it;
    the action is read from the return token. Weights as in pretrain_dt.py --model reinformer."""

    kind = "reinformer"

    def __init__(self, obs_dim, act_dim, embed_dim=512, **sizes):
        super().__init__(obs_dim, act_dim, embed_dim, **sizes)
        self.return_head = nn.Linear(embed_dim, 1)  # finetuning leaves it as it is: no loss reads it

    def tokens(self, observations, returns, actions, real, read: slice) -> torch.Tensor:
        """What the blocks make of the tokens in `read`: (B, L', E). Takes what `forward` takes."""
        n_tokens = 3 * returns.shape[1] - 1  # none for the last action, which is yet to be chosen
        s = self.embed_observation((observations - self.obs_mean) / self.obs_std)  # (B, K, E)
        g = self.embed_return((returns * self.return_scale)[..., None])  # (B, K, E)
        a = self.embed_action(actions)  # (B, K, E)
        slots = [s, g, a][:n_tokens]  # without a at context 1, where LAMB would move its weights for no gradient
        x = self.norm_in(torch.stack(slots, dim=2).flatten(1, 2)[:, :n_tokens])  # (B, L, E)
        mask = self.attention_mask(real, n_tokens)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks[:-1]:
                x = block(x, mask)
            x = self.blocks[-1](x, mask, read)
        return self.norm_out(x.float())

    def forward(self, observations, returns, actions, real, every_step: bool = False) -> Normal:
        """As in the base class, but read from the return tokens."""
        read = slice(1, None, 3) if every_step else slice(-1, None)
        x = self.tokens(observations, returns, actions, real, read)
        x = x if every_step else x[:, 0]
        spread = torch.tanh(self.log_std_head(x))
        log_std = grpo.LOG_STD_MIN + 0.5 * (grpo.LOG_STD_MAX - grpo.LOG_STD_MIN) * (spread + 1.0)
        return Normal(self.mean_head(x), log_std.exp(), validate_args=False)

    def conditioned_on(self, observations, returns, actions, real) -> torch.Tensor:
        """The returns-to-go (B, K) with the last step's predicted, in raw units, in place of the one asked for."""
        x = self.tokens(observations, returns, actions, real, slice(-2, -1))  # the last state token: (B, 1, E)
        predicted = self.return_head(x)[..., 0] / self.return_scale  # (B, 1)
        return torch.cat([returns[:, :-1], predicted], dim=1)


def command_line(arguments: list[str] | None = None) -> None:
    """That of the script, with this model in place of its own."""
    grpo.DecisionTransformer = Reinformer
    args = grpo.parse_args(arguments)
    if not (args.pretrained or args.resume or args.eval_only):
        grpo.die("--pretrained is missing: give the run folder of pretrain_dt.py --model reinformer.")
    grpo.eval_only(args) if args.eval_only else grpo.main(args)


if __name__ == "__main__":  # as in the script
    if any(word.replace("_", "-") == "--capture-video" for word in sys.argv) and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        command_line()
    except SystemExit as stop:
        raise SystemExit(1 if stop.code == 2 else stop.code) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: a run goes on from its last checkpoint with --resume RUN_DIR") from None
    except OSError as error:
        grpo.die(f"{error}: what was written before is kept; once that is mended, go on with --resume RUN_DIR.")
