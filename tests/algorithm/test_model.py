"""The network and its distribution, checked against independent computations in float64. Every script has the same text
of them; put a script of your own, copied and changed, into the list."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import grpo_dt_continuous
import ppo_dt_continuous
import pretrain_dt
import q_guided_grpo_dt

SCRIPTS = [grpo_dt_continuous, ppo_dt_continuous, q_guided_grpo_dt, pretrain_dt]
S, A, K = 5, 3, 4


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def double_stays_double(monkeypatch):
    """Scripts bring bf16 back to single precision by .float(), which must not step down from double precision here."""
    as_float = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else as_float(t))


def sharp_model(script, **sizes):
    """A float64 network in eval mode. Weights of order 1: at the usual 0.02, attention is too flat to show mistakes."""
    torch.manual_seed(0)
    model = script.DecisionTransformer(S, A, **(dict(embed_dim=16, n_layers=3, n_heads=2) | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.obs_mean.normal_()
    model.obs_std.uniform_(0.5, 2.0)
    model.return_scale.fill_(0.125)  # exact in every precision
    return model.double().eval()


def draw_inputs(batch=2, context=K, seed=1):
    """Raw observations (B, K, S), raw returns (B, K), actions (B, K, A), real (B, K), all in float64 and all real."""
    torch.manual_seed(seed)
    observations, returns = torch.randn(batch, context, S).double(), 20 * torch.randn(batch, context).double()
    actions = torch.rand(batch, context, A).double() * 2 - 1
    return observations, returns, actions, torch.ones(batch, context, dtype=torch.bool)


def padded_inputs(context):
    """draw_inputs in single precision, with padding before every length of window."""
    inputs = [value.to(torch.float32) for value in draw_inputs(2 * context, context)[:3]]
    return *inputs, torch.arange(context) >= torch.arange(2 * context)[:, None] % context


@torch.no_grad()
def outputs(model, observations, returns, actions, real):
    """Mean and log of the standard deviation, per step: (2, B, K, A)."""
    dist = model(observations, returns, actions, real, every_step=True)
    return torch.stack([dist.mean, dist.stddev.log()])


def input_of(module, run):
    """The arguments that `module` receives while `run()` is under way."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    run()
    hook.remove()
    return seen[0]


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# ---- Tokens, and who sees what --------------------------------------------------------------------------------------


def test_tokens_are_return_observation_action_step_by_step(script):
    model, (observations, returns, actions, real) = sharp_model(script), draw_inputs()
    tokens, _ = input_of(model.blocks[0], lambda: model(observations, returns, actions, real))

    def single(layer, value):
        embedded = value @ layer.weight.T + layer.bias
        centred = embedded - embedded.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * model.norm_in.weight + model.norm_in.bias

    expected = []
    for k in range(K):
        expected.append(single(model.embed_return, 0.125 * returns[:, k, None]))
        expected.append(single(model.embed_observation, (observations[:, k] - model.obs_mean) / model.obs_std))
        if k < K - 1:
            expected.append(single(model.embed_action, actions[:, k]))
    close(tokens, torch.stack(expected, dim=1))


def test_a_window_of_one_step_is_two_tokens_and_leaves_the_action_embedding_without_gradient(script):
    model, inputs = sharp_model(script), draw_inputs(context=1)
    tokens, mask = input_of(model.blocks[0], lambda: model(*inputs))[:2]
    assert tokens.shape == (2, 2, 16) and mask.shape[-2:] == (2, 2)
    model(*inputs).mean.sum().backward()
    assert model.embed_action.weight.grad is None and model.embed_action.bias.grad is None
    assert model.embed_return.weight.grad.abs().sum() > 0 and model.embed_observation.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("which, back", [("observations", 0), ("returns", 0), ("actions", 1)])
def test_an_action_sees_returns_and_observations_up_to_its_step_and_earlier_actions_only(script, which, back):
    model, inputs = sharp_model(script), draw_inputs()
    before, index = outputs(model, *inputs), ("observations", "returns", "actions").index(which)
    for j in range(K):
        changed = [value.clone() for value in inputs]
        changed[index][:, j] += 1.0
        moved = (outputs(model, *changed) - before).abs().amax(dim=(1, 3)) > 1e-12  # (2, K)
        assert moved.tolist() == [[k >= j + back for k in range(K)]] * 2


def test_real_tokens_see_real_ones_up_to_themselves_and_padding_only_itself(script):
    mask = sharp_model(script).attention_mask(torch.tensor([[True, True], [False, True]]), 5)
    assert mask[0, 0].int().tolist() == torch.ones(5, 5).tril().int().tolist()
    padded = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == padded


def test_left_padding_is_invisible_whatever_it_holds(script):
    model, longest = sharp_model(script), 7
    padded = [1e3 * torch.randn_like(value) for value in draw_inputs(K, longest, seed=2)[:3]]
    real = torch.zeros(K, longest, dtype=torch.bool)
    short = [draw_inputs(1, length, seed=length) for length in range(1, K + 1)]
    for row, window in enumerate(short):
        real[row, longest - row - 1 :] = True
        for value, own in zip(padded, window):
            value[row, longest - row - 1 :] = own[0]
    together = outputs(model, *padded, real)
    assert together.isfinite().all()
    for row, window in enumerate(short):
        close(together[:, row, -row - 1 :], outputs(model, *window)[:, 0])


@pytest.mark.parametrize("context", [1, 2, 5])
def test_the_law_of_the_last_step_is_that_of_every_step_cut(script, context):
    model = sharp_model(script).to(torch.float32)
    inputs = padded_inputs(context)
    every, last = outputs(model, *inputs), model(*inputs)
    torch.testing.assert_close(last.mean, every[0, :, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.stddev.log(), every[1, :, -1], rtol=1e-4, atol=1e-5)
    unread = inputs[2].clone()
    unread[:, -1] = torch.nan  # the last action is yet to be chosen
    assert torch.equal(model(*inputs[:2], unread, inputs[3]).mean, last.mean)
    assert torch.equal(model.conditioned_on(*inputs), inputs[1])


# ---- The block ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 5])  # few tokens go by plain products
def test_block_equals_softmax_attention_and_mlp_written_out(script, length):
    torch.manual_seed(0)
    embed_dim, heads = 8, 2
    block = script.Block(embed_dim, heads, dropout=0.5).double().eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x = torch.randn(1, length, embed_dim).double()
    w = {name: p.detach().numpy() for name, p in block.named_parameters()}

    def norm(v, name):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(v, name):
        return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    expected = x[0].numpy().copy()
    h = norm(expected, "norm1")
    q, k, v = linear(h, "query"), *np.split(linear(h, "key_value"), 2, axis=1)
    mixed, size = np.zeros_like(h), embed_dim // heads
    for part in (slice(i * size, (i + 1) * size) for i in range(heads)):
        for i in range(length):
            weights = np.array([math.exp(q[i, part] @ k[j, part] / math.sqrt(size)) for j in range(i + 1)])
            mixed[i, part] = weights / weights.sum() @ v[: i + 1, part]
    expected += linear(mixed, "project")
    up = linear(norm(expected, "norm2"), "up")
    expected += linear(up / (1 + np.exp(-up)), "down")
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    np.testing.assert_allclose(block(x, causal)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [1, K])
def test_the_last_block_on_the_tokens_that_are_read_equals_the_whole_block_then_cut(script, context):
    model, inputs = sharp_model(script), draw_inputs(context=context)
    inputs[3][0, : context - 1] = False
    x, mask = input_of(model.blocks[-1], lambda: model(*inputs))[:2]
    whole = model.norm_out(model.blocks[-1](x, mask))[:, 1::3]
    log_std = -5 + 3.5 * (model.log_std_head(whole).tanh() + 1)
    torch.testing.assert_close(outputs(model, *inputs), torch.stack([model.mean_head(whole), log_std]))


def test_dropout_acts_on_embeddings_and_in_both_branches_while_training_only(script):
    model, inputs = sharp_model(script, dropout=0.3), draw_inputs(batch=64)
    tokens, mask = input_of(model.blocks[0], lambda: model(*inputs))[:2]
    assert torch.equal(outputs(model, *inputs), outputs(sharp_model(script), *inputs))
    model.train()
    dropped = input_of(model.blocks[0], lambda: model(*inputs))[0]
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(dropped[kept], tokens[kept] / 0.7)
    block = model.blocks[0]
    for layer in (block.project, block.down):  # one branch adds 1 / 0.7 where kept, the other nothing
        for other in (block.project, block.down):
            torch.nn.init.zeros_(other.weight), torch.nn.init.zeros_(other.bias)
        torch.nn.init.ones_(layer.bias)
        added = block(tokens, mask) - tokens
        assert (added > 0.5).float().mean().item() == pytest.approx(0.7, abs=0.02)
        assert added.max().item() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("length", [1, 4])  # a context of one goes by plain products
def test_dropout_acts_on_attention_weights(script, length):
    torch.manual_seed(0)
    q, k = torch.zeros(2, 64, 2, length, 8)
    v = torch.ones(64, 2, length, 8)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    assert torch.allclose(script.attention(q, k, v, mask, 0.0), v)
    weights = script.attention(q, k, v, mask, 0.3)[..., 0] * length * 0.7  # how many of the weights are kept
    assert torch.allclose(weights, weights.round(), atol=1e-5)
    assert weights.mean().item() == pytest.approx(0.7 * length, rel=0.1)


# ---- The distribution -----------------------------------------------------------------------------------------------


def draw_gaussian():
    torch.manual_seed(3)
    return Normal(torch.randn(6, A).double(), torch.empty(6, A).double().uniform_(-3.0, 1.0).exp())


def test_log_prob_is_the_density_of_the_squashed_action_summed_over_dimensions(script):
    dist = draw_gaussian()
    u = dist.sample()
    expected = TransformedDistribution(dist, [TanhTransform(cache_size=1)]).log_prob(torch.tanh(u)).sum(-1)
    assert expected.shape == (6,)
    close(script.log_prob(dist, u), expected)


@pytest.mark.parametrize("u", [-60.0, -20.0, 20.0, 60.0])
def test_log_prob_is_exact_far_out_where_tanh_is_one(script, u):
    dist = Normal(torch.tensor([math.copysign(18.0, u)]), torch.tensor([math.e]))
    normal = -0.5 * ((abs(u) - 18.0) / math.e) ** 2 - 1.0 - 0.5 * math.log(2 * math.pi)
    slope = 2 * math.log(2) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))  # 1 - tanh^2 = 4 / (e^u + e^-u)^2
    assert script.log_prob(dist, torch.tensor([u])).item() == pytest.approx(normal - slope, abs=1e-4)


def test_actions_are_tanh_and_stay_where_atanh_is_finite(script):
    actions = script.squash(torch.tensor([-1e3, -0.5, 0.0, 2.0, 1e3]))
    assert actions.tolist() == pytest.approx([1e-6 - 1, math.tanh(-0.5), 0.0, math.tanh(2.0), 1 - 1e-6])
    assert torch.atanh(actions).isfinite().all() and actions.abs().max() < 1


def test_log_std_lies_in_its_range_and_reaches_both_ends(script):
    model, inputs = sharp_model(script), draw_inputs()
    torch.nn.init.zeros_(model.log_std_head.weight)
    for bias, expected in ((-1e3, -5.0), (0.0, -1.5), (0.5, -1.5 + 3.5 * math.tanh(0.5)), (1e3, 2.0)):
        torch.nn.init.constant_(model.log_std_head.bias, bias)
        log_std = outputs(model, *inputs)[1]
        close(log_std, torch.full_like(log_std, expected))


# ---- Initial weights, buffers, precision ----------------------------------------------------------------------------


def test_initial_weights_have_the_statistics_of_the_reference(script):
    torch.manual_seed(0)
    model = script.DecisionTransformer(11, A, embed_dim=128, n_layers=2, n_heads=4)
    linears = [layer for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 2 * 5
    for layer in linears:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(layer.weight.mean().item()) < 1e-3
        assert layer.weight.abs().max() > 3 * 0.02  # normal, not uniform
        assert not layer.bias.any()
    for head in (model.mean_head, model.log_std_head):
        torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(A), rtol=0, atol=1e-5)
        assert not head.bias.any()
    bound = 1 / math.sqrt(11)  # PyTorch's own for a layer of 11 inputs
    assert 0.95 * bound < model.embed_observation.weight.abs().max() <= bound


def test_observations_and_returns_are_scaled_by_buffers_that_are_saved(script):
    model, (observations, returns, *rest) = sharp_model(script), draw_inputs()
    plain = sharp_model(script)
    plain.obs_mean.zero_(), plain.obs_std.fill_(1.0), plain.return_scale.fill_(1.0)
    ours = outputs(model, observations, returns, *rest)
    close(ours, outputs(plain, (observations - model.obs_mean) / model.obs_std, 0.125 * returns, *rest))
    assert not torch.allclose(ours, outputs(plain, observations, returns, *rest))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(ours, outputs(plain, observations, returns, *rest))


@pytest.mark.parametrize("context", [1, 2, 5])
def test_bf16_stays_close_to_fp32_with_gradients_in_fp32(script, context):
    torch.manual_seed(0)
    model, inputs = script.DecisionTransformer(S, A, embed_dim=64, n_layers=2, n_heads=2).eval(), padded_inputs(context)
    exact = model(*inputs)
    model.bf16 = True
    rough = model(*inputs)
    for value, expected in ((rough.mean, exact.mean), (rough.stddev, exact.stddev)):
        assert value.dtype == torch.float32 and 0 < (value - expected).abs().max() < 0.02
    (rough.mean + rough.stddev).square().sum().backward()
    for name, p in model.named_parameters():
        if context > 1 or "embed_action" not in name:  # at context 1 no action is read
            assert p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_law_is_the_same_to_the_last_bit_with_and_without_gradients(script, bf16):
    # 64 wide: whether a product of a strided slice takes the same way with and without gradients shows from there on
    model = sharp_model(script, embed_dim=64).to(torch.float32)
    model.bf16 = bf16
    for context in (1, 2, 5):
        inputs = padded_inputs(context)
        with torch.no_grad():
            expected = model(*inputs)
        dist = model(*inputs)
        assert torch.equal(dist.mean, expected.mean) and torch.equal(dist.stddev, expected.stddev)
