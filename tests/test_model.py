"""The network and its distribution, checked against independent computations in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import grpo_dt_continuous as grpo
from pretrain_dt import (
    ACTION_LIMIT,
    Block,
    DecisionTransformer,
    Linear,
    SquashedGaussian,
    rollout_copy,
)

S, A, K = 5, 3, 4
KINDS = pytest.mark.parametrize("kind", ["dt", "reinformer"])


def sharp_model(kind="dt", **sizes):
    """A float64 network in eval mode. Weights of order 1: at the usual 0.02, attention is too flat to show mistakes."""
    torch.manual_seed(0)
    model = DecisionTransformer(S, A, **(dict(embed_dim=16, n_layers=3, n_heads=2, kind=kind) | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    model.obs_mean.normal_()
    model.obs_std.uniform_(0.5, 2.0)
    model.return_scale.fill_(0.125)  # exact in every precision
    return model.double().use_precision(torch.float64).eval()


def draw_inputs(batch=2, context=K, seed=1):
    """Raw observations (B, K, S), raw returns (B, K), actions (B, K - 1, A), all float64."""
    torch.manual_seed(seed)
    observations, returns = torch.randn(batch, context, S).double(), 20 * torch.randn(batch, context).double()
    return observations, returns, torch.rand(batch, context - 1, A).double() * 2 - 1


def outputs(model, observations, returns, actions, real=None):
    """What the network predicts, per step: mean and log_std (B, K, A), returns (B, K, 1) (zeros for dt)."""
    with torch.no_grad():
        dist, predicted = model(observations, returns, actions, real)
    predicted = torch.zeros_like(returns) if predicted is None else predicted
    return dist.mean, dist.log_std, predicted[..., None]


def input_of(module, run):
    """The arguments that `module` receives while `run()` is under way."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    run()
    hook.remove()
    return seen[0]


# Tokens


@KINDS
def test_tokens_are_interleaved_step_by_step_in_the_order_of_the_kind(kind):
    model, (observations, returns, actions) = sharp_model(kind), draw_inputs()
    tokens, _ = input_of(model.blocks[0], lambda: model(observations, returns, actions))

    def single(layer, value):
        embedded = value @ layer.weight.T + layer.bias
        centred = embedded - embedded.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * model.norm_in.weight + model.norm_in.bias

    expected = []
    for k in range(K):
        g = single(model.embed_return, 0.125 * returns[:, k, None])
        s = single(model.embed_observation, (observations[:, k] - model.obs_mean) / model.obs_std)
        expected += [g, s] if kind == "dt" else [s, g]
        if k < K - 1:
            expected.append(single(model.embed_action, actions[:, k]))
    torch.testing.assert_close(tokens, torch.stack(expected, dim=1), rtol=1e-10, atol=1e-10)


@KINDS
def test_a_window_of_one_step_is_two_tokens_and_leaves_the_action_embedding_without_gradient(kind):
    model, (observations, returns, actions) = sharp_model(kind), draw_inputs(context=1)
    assert actions.shape == (2, 0, A)
    tokens, mask = input_of(model.blocks[0], lambda: model(observations, returns, actions))
    assert tokens.shape == (2, 2, 16) and mask.shape[-2:] == (2, 2)
    dist, predicted = model(observations, returns, actions, torch.ones(2, 1, dtype=torch.bool))
    (dist.mean.sum() + (0.0 if predicted is None else predicted.sum())).backward()
    assert model.embed_action.weight.grad is None and model.embed_action.bias.grad is None
    assert model.embed_return.weight.grad.abs().sum() > 0 and model.embed_observation.weight.grad.abs().sum() > 0


# Who sees what


def dependence(kind, which):
    """(K, J) tables: does the action of step k, and the predicted return of step k, change with input j of `which`?"""
    model, inputs = sharp_model(kind), draw_inputs()
    before, index = outputs(model, *inputs), ("observations", "returns", "actions").index(which)
    actions, returns = [], []
    for j in range(inputs[index].shape[1]):
        changed = [value.clone() for value in inputs]
        changed[index][:, j] += 1.0
        mean, log_std, predicted = (
            (new - old).abs().amax(dim=(0, 2)) for new, old in zip(outputs(model, *changed), before, strict=True)
        )
        assert torch.equal(mean > 1e-12, log_std > 1e-12)
        actions.append(mean > 1e-12)
        returns.append(predicted > 1e-12)
    return torch.stack(actions, dim=1).int().tolist(), torch.stack(returns, dim=1).int().tolist()


PRESENT = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]  # input j of steps j <= k
PAST = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]  # input j of steps j < k
NONE = [[0, 0, 0, 0]] * K


def test_dt_action_sees_returns_and_observations_up_to_its_step_and_earlier_actions_only():
    assert dependence("dt", "returns") == (PRESENT, NONE)
    assert dependence("dt", "observations") == (PRESENT, NONE)
    assert dependence("dt", "actions")[0] == [row[:-1] for row in PAST]


def test_reinformer_return_does_not_see_its_own_return_but_its_action_does():
    assert dependence("reinformer", "returns") == (PRESENT, PAST)
    assert dependence("reinformer", "observations") == (PRESENT, PRESENT)
    earlier_actions = [row[:-1] for row in PAST]
    assert dependence("reinformer", "actions") == (earlier_actions, earlier_actions)


def test_mask_lets_real_tokens_see_real_ones_up_to_themselves_and_padding_only_itself():
    real = torch.tensor([[True, True], [False, True]])
    mask = sharp_model().attention_mask(real, 5, real.device)
    assert mask[0, 0].int().tolist() == torch.ones(5, 5).tril().int().tolist()
    padded = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == padded


@KINDS
def test_left_padding_is_invisible_whatever_it_holds(kind):
    model, longest = sharp_model(kind), 7
    padded = [1e3 * torch.randn_like(value) for value in draw_inputs(batch=K, context=longest, seed=2)]
    real = torch.zeros(K, longest, dtype=torch.bool)
    windows = [draw_inputs(batch=1, context=length, seed=length) for length in range(1, K + 1)]
    for row, window in enumerate(windows):
        real[row, longest - row - 1 :] = True
        for value, short in zip(padded, window, strict=True):
            value[row, value.shape[1] - short.shape[1] :] = short[0]
    together = outputs(model, *padded, real)
    for row, window in enumerate(windows):
        for value, alone in zip(together, outputs(model, *window), strict=True):
            torch.testing.assert_close(value[row, -row - 1 :], alone[0], rtol=1e-10, atol=1e-10)
    assert all(value.isfinite().all() for value in together)


@KINDS
def test_first_step_of_a_window_is_the_window_of_one_step(kind):
    model, (observations, returns, actions) = sharp_model(kind), draw_inputs()
    whole = outputs(model, observations, returns, actions)
    alone = outputs(model, observations[:, :1], returns[:, :1], actions[:, :0])
    for value, single in zip(whole, alone, strict=True):
        torch.testing.assert_close(value[:, :1], single, rtol=1e-10, atol=1e-10)


def test_act_of_dt_is_the_last_step_under_the_given_return():
    model, inputs = sharp_model("dt"), draw_inputs()
    dist, g = model.act(*inputs)
    mean, log_std, _ = outputs(model, *inputs)
    assert torch.equal(dist.mean, mean[:, -1]) and torch.equal(dist.log_std, log_std[:, -1])
    assert torch.equal(g, inputs[1][:, -1])


def test_act_of_reinformer_puts_the_predicted_return_in_and_acts_on_it():
    model, (observations, returns, actions) = sharp_model("reinformer"), draw_inputs()
    dist, g = model.act(observations, returns, actions)
    torch.testing.assert_close(g, outputs(model, observations, returns, actions)[2][:, -1, 0])
    filled = torch.cat([returns[:, :-1], g[:, None]], dim=1)
    torch.testing.assert_close(dist.mean, outputs(model, observations, filled, actions)[0][:, -1])
    other, _ = model.act(observations, returns + torch.tensor([0.0] * (K - 1) + [99.0]), actions)
    torch.testing.assert_close(other.mean, dist.mean)  # what stood in the last slot is not read


# The block


def test_block_equals_softmax_attention_and_mlp_written_out():
    torch.manual_seed(0)
    embed_dim, heads, length = 8, 2, 5
    block = Block(embed_dim, heads, dropout=0.5).double().eval()
    for layer in block.modules():
        if isinstance(layer, Linear):
            layer.compute_dtype = torch.float64
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


@KINDS
@pytest.mark.parametrize("context", [1, K])
def test_last_block_on_the_tokens_that_are_read_equals_the_whole_block_then_cut(kind, context):
    model, (observations, returns, actions) = sharp_model(kind), draw_inputs(context=context)
    real = torch.ones(2, context, dtype=torch.bool)
    real[0, : context - 1] = False
    block = model.blocks[-1]
    x, mask = input_of(block, lambda: model(observations, returns, actions, real))[:2]
    whole = model.norm_out(block(x, mask))
    mean, log_std, predicted = outputs(model, observations, returns, actions, real)
    torch.testing.assert_close(mean, model.mean_head(whole[:, 1::3]), rtol=1e-10, atol=1e-10)
    raw = model.log_std_head(whole[:, 1::3])
    torch.testing.assert_close(log_std, -5 + 3.5 * (raw.tanh() + 1), rtol=1e-10, atol=1e-10)
    if kind == "reinformer":
        torch.testing.assert_close(predicted, model.return_head(whole[:, 0::3]) / 0.125, rtol=1e-10, atol=1e-10)


@KINDS
def test_dropout_acts_on_embeddings_and_in_blocks_while_training_only(kind):
    model, inputs = sharp_model(kind, dropout=0.3), draw_inputs(batch=64)
    tokens, mask = input_of(model.blocks[0], lambda: model(*inputs))
    assert torch.equal(outputs(model, *inputs)[0], outputs(sharp_model(kind), *inputs)[0])
    model.train()
    dropped = input_of(model.blocks[0], lambda: model(*inputs))[0]
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(dropped[kept], tokens[kept] / 0.7)
    block = model.blocks[0]
    for layer in (block.project, block.down):  # the embeddings aside, and once per branch
        torch.nn.init.zeros_(block.project.weight), torch.nn.init.zeros_(block.down.weight)
        torch.nn.init.zeros_(block.project.bias), torch.nn.init.zeros_(block.down.bias)
        torch.nn.init.ones_(layer.bias)
        added = block(tokens, mask) - tokens  # 1 / 0.7 where kept
        assert (added > 0.5).float().mean().item() == pytest.approx(0.7, abs=0.02)
        assert added.max().item() == pytest.approx(1 / 0.7)


def test_dropout_acts_on_attention_weights_while_training_only():
    model = sharp_model(dropout=0.3)
    block, x = model.blocks[0], torch.randn(64, 1, 16).double()
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    mixed = input_of(block.project, lambda: block(x, mask))[0]
    block.train()
    dropped = input_of(block.project, lambda: block(x, mask))[0].unflatten(-1, (2, 8))
    kept = dropped.any(-1)  # the only weight of a head is 1 or dropped
    assert 0.5 < kept.float().mean().item() < 0.9
    torch.testing.assert_close(dropped[kept], mixed.unflatten(-1, (2, 8))[kept] / 0.7)


# The distribution


def draw_gaussian():
    torch.manual_seed(3)
    return torch.randn(6, A).double(), torch.empty(6, A).double().uniform_(-3.0, 1.0)


def reference(mean, log_std):
    return TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])


def test_log_prob_equals_that_of_torch_distributions_summed_over_dimensions():
    mean, log_std = draw_gaussian()
    u = mean + log_std.exp() * torch.randn_like(mean)
    expected = reference(mean, log_std).log_prob(torch.tanh(u)).sum(-1)
    ours = SquashedGaussian(mean, log_std).log_prob(u)
    assert ours.shape == (6,)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("u", [-60.0, -20.0, 20.0, 60.0])
def test_log_prob_is_exact_far_out_where_tanh_is_one(u):
    dist = SquashedGaussian(torch.tensor([math.copysign(18.0, u)]), torch.tensor([1.0]))
    normal = -0.5 * ((abs(u) - 18.0) / math.e) ** 2 - 1.0 - 0.5 * math.log(2 * math.pi)
    slope = 2 * math.log(2) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))  # 1 - tanh^2 = 4 / (e^u + e^-u)^2
    assert dist.log_prob(torch.tensor([u])).item() == pytest.approx(normal - slope, abs=1e-4)


def test_entropy_is_in_expectation_that_of_the_squashed_law():
    mean, log_std = draw_gaussian()
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)  # the expectation over standard normal noise
    noise, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    ours = sum(
        w * SquashedGaussian(mean, log_std).entropy(torch.full_like(mean, n)) for n, w in zip(noise, weights) if w > 0
    )
    # -integral of p(a) log p(a) da on a fine grid of a = tanh(u); at |u| > 12 nothing is left of p
    u = torch.linspace(-12.0, 12.0, 200_001, dtype=torch.float64)[:, None, None]
    log_p = reference(mean, log_std).log_prob(torch.tanh(u).clamp(-1 + 1e-15, 1 - 1e-15))
    da = 1 / torch.cosh(u) ** 2 * (24.0 / 200_000)
    torch.testing.assert_close(ours, -(log_p.exp() * log_p * da).sum(0).sum(-1), rtol=0, atol=1e-4)


def test_entropy_has_the_gradient_of_its_reparameterised_sample():
    log_std = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    dist = SquashedGaussian(torch.tensor([0.3], dtype=torch.float64), log_std)
    dist.entropy(torch.tensor([0.7], dtype=torch.float64)).backward()
    # entropy = 0.5 z^2 + log std + log(2 pi) / 2 + log(1 - tanh(u)^2) at u = mean + std z
    assert log_std.grad.item() == pytest.approx(1.0 - 2.0 * math.tanh(0.3 + 0.7) * 0.7)


def test_mode_is_tanh_of_the_mean_and_stays_where_atanh_is_finite():
    mean = torch.tensor([[-1e3, -0.5, 0.0, 2.0, 1e3]])
    mode = SquashedGaussian(mean, torch.zeros_like(mean)).mode()
    torch.testing.assert_close(mode[0, 1:4], torch.tanh(mean[0, 1:4]))
    assert mode[0, 0].item() == pytest.approx(-ACTION_LIMIT) and mode[0, 4].item() == pytest.approx(ACTION_LIMIT)
    assert torch.atanh(mode).isfinite().all()


def test_log_std_lies_in_its_range_and_reaches_both_ends():
    model, inputs = sharp_model(), draw_inputs()
    torch.nn.init.zeros_(model.log_std_head.weight)
    for bias, expected in ((-1e3, -5.0), (0.0, -1.5), (0.5, -1.5 + 3.5 * math.tanh(0.5)), (1e3, 2.0)):
        torch.nn.init.constant_(model.log_std_head.bias, bias)
        log_std = outputs(model, *inputs)[1]
        torch.testing.assert_close(log_std, torch.full_like(log_std, expected))


# Initial weights, buffers, precision


@KINDS
def test_initial_weights_have_the_statistics_of_the_reference(kind):
    torch.manual_seed(0)
    model = DecisionTransformer(11, A, embed_dim=128, n_layers=2, n_heads=4, kind=kind)
    linears = [layer for layer in model.blocks.modules() if isinstance(layer, Linear)]
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
    assert (model.return_head is not None) == (kind == "reinformer")


@KINDS
def test_observation_and_return_buffers_scale_inputs_and_outputs(kind):
    model, (observations, returns, actions) = sharp_model(kind), draw_inputs()
    plain = sharp_model(kind)
    plain.obs_mean.zero_(), plain.obs_std.fill_(1.0), plain.return_scale.fill_(1.0)
    mean, log_std, predicted = outputs(model, observations, returns, actions)
    scaled = (observations - model.obs_mean) / model.obs_std
    expected = outputs(plain, scaled, 0.125 * returns, actions)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(log_std, expected[1])
    torch.testing.assert_close(predicted, 8.0 * expected[2])
    assert not torch.allclose(mean, outputs(plain, observations, returns, actions)[0])


@KINDS
def test_state_dict_carries_the_buffers_so_that_a_loaded_network_is_the_same(kind):
    model, inputs = sharp_model(kind), draw_inputs()
    weights = model.state_dict()
    assert {"obs_mean", "obs_std", "return_scale"} <= set(weights)
    loaded = DecisionTransformer(**model.sizes).double().use_precision(torch.float64)
    loaded.load_state_dict(weights)
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, *inputs), outputs(model, *inputs), strict=True))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_copy_acts_exactly_like_the_model_in_evaluation(kind, dtype):
    # 64 wide: whether a product of a strided slice takes the same way with and without gradients shows from there on
    model = sharp_model(kind, embed_dim=64, dropout=0.2).float().use_precision(dtype).train()
    copy = rollout_copy(model)
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    for name, p in copy.named_parameters():
        in_product = "blocks" in name and "norm" not in name
        assert p.dtype == (dtype if in_product else torch.float32), name
    for batch, context in ((1, 1), (5, 1), (1, 2), (2, 2), (1, 5), (5, 5)):
        window = [value.float() for value in draw_inputs(batch, context)]
        real = torch.arange(context) >= torch.arange(batch)[:, None] % context
        ours, g = copy.act(*window, real)
        with torch.no_grad():
            expected, g_expected = model.eval().act(*window, real)
        for value, other in ((ours.mean, expected.mean), (ours.log_std, expected.log_std), (g, g_expected)):
            assert torch.equal(value, other), f"batch {batch}, context {context}: {(value - other).abs().max()} apart"
        assert torch.equal(ours.mode(), expected.mode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_copy_keeps_its_weights_while_the_model_learns(dtype):
    model = sharp_model().float().use_precision(dtype)
    inputs = [value.float() for value in draw_inputs()]
    copy = rollout_copy(model)
    before = outputs(copy, *inputs)[0]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(outputs(copy, *inputs)[0], before)
    assert not torch.equal(outputs(rollout_copy(model), *inputs)[0], before)


@KINDS
def test_bf16_products_stay_close_to_fp32_and_are_not_fp32(kind):
    torch.manual_seed(0)
    model = DecisionTransformer(S, A, embed_dim=64, n_layers=2, n_heads=2, kind=kind).eval()
    inputs = [value.float() for value in draw_inputs(batch=16)]
    exact = outputs(model, *inputs)
    rough = outputs(model.use_precision(torch.bfloat16), *inputs)
    for value, expected in zip(rough[:2], exact[:2], strict=True):
        assert value.dtype == torch.float32  # residual stream, norms and heads are not in bf16
        assert 0 < (value - expected).abs().max() < 0.02
    again = outputs(model.use_precision(torch.float32), *inputs)
    assert torch.equal(again[0], exact[0])


def test_gradients_in_bf16_arrive_in_fp32_at_every_weight_that_is_read():
    model = sharp_model().float().use_precision(torch.bfloat16)
    inputs = [value.float() for value in draw_inputs()]
    dist, _ = model(*inputs)
    F.mse_loss(dist.mean + dist.log_std, torch.zeros_like(dist.mean)).backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0, name


# GRPO-DT's network, which is written anew: the same function of the same weights


def twins(**sizes):
    """A network of pretraining and one of grpo_dt_continuous.py with its weights, in single precision."""
    ours = sharp_model(**sizes).float().use_precision(torch.float32)
    theirs = grpo.DecisionTransformer(**ours.sizes).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def padded_inputs(context):
    """draw_inputs in single precision, the actions with a last one that is not to be read, and padding."""
    observations, returns, actions = (value.float() for value in draw_inputs(batch=2 * context, context=context))
    real = torch.arange(context) >= torch.arange(2 * context)[:, None] % context
    return observations, returns, F.pad(actions, (0, 0, 0, 1), value=9.0), real


@pytest.mark.parametrize("context", [1, 2, 5])
def test_finetuning_has_the_network_of_pretraining(context):
    ours, theirs = twins()
    observations, returns, actions, real = windows = padded_inputs(context)
    expected, _ = ours(observations, returns, actions[:, :-1], real)
    every, last = theirs(*windows, every_step=True), theirs(*windows)
    torch.testing.assert_close(every.mean[real], expected.mean[real], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(every.stddev[real].log(), expected.log_std[real], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(last.mean, every.mean[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.stddev, every.stddev[:, -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.conditioned_on(*windows), returns)
    for value in (expected.mean[:, -1] + expected.log_std[:, -1], last.mean + last.stddev.log()):
        value.square().sum().backward()
    others = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if context > 1 or "embed_action" not in name:  # at context 1 no action is read
            size = p.grad.abs().max().item()
            torch.testing.assert_close(others[name].grad, p.grad, rtol=1e-2, atol=1e-3 * size)


def test_finetuning_has_the_initial_weights_of_pretraining():
    states = []
    for module in (grpo.DecisionTransformer, DecisionTransformer):
        torch.manual_seed(0)
        states.append(module(S, A, embed_dim=32, n_layers=2, n_heads=2).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("context", [1, 2, 5])
def test_finetuning_in_bf16_stays_close_to_fp32_with_gradients_in_fp32(context):
    torch.manual_seed(0)
    model, windows = grpo.DecisionTransformer(S, A, embed_dim=64, n_layers=2, n_heads=2).eval(), padded_inputs(context)
    exact = model(*windows)
    model.bf16 = True
    rough = model(*windows)
    for value, expected in ((rough.mean, exact.mean), (rough.stddev, exact.stddev)):
        assert value.dtype == torch.float32 and 0 < (value - expected).abs().max() < 0.02
    (rough.mean + rough.stddev).square().sum().backward()
    for name, p in model.named_parameters():
        read = p.grad is not None or (context == 1 and "embed_action" in name)
        assert read and (p.grad is None or p.grad.dtype == torch.float32), name


def test_finetunings_actions_stay_where_atanh_is_finite():
    u = torch.tensor([-1e3, -0.5, 0.0, 2.0, 1e3])
    torch.testing.assert_close(grpo.squash(u), SquashedGaussian(u, torch.zeros(5)).mode())
    assert torch.atanh(grpo.squash(u)).isfinite().all()
