"""The reference against known answers, the formulas written a second time as loops, and finite differences."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import (FLAT, IMPORTANCE, LOAD, PRIMARY, SWITCH, THRESHOLD, Config, Z, cv_squared, experts, moe,
                       noise, philox)

torch.set_num_threads(1)
T, H, I, E, K = 6, 4, 3, 6, 2
GATED = ("swiglu", "geglu", "geglu_tanh", "swiglu_clamped")
UNGATED = ("relu", "gelu", "gelu_tanh", "silu", "relu2")

# every gate, each with the settings that change its formulas
KINDS = {
    "noisy": dict(gate="noisy_topk"),
    "noisy_epsilon_0": dict(gate="noisy_topk", noise_epsilon=0.0),
    "noisy_k_1": dict(gate="noisy_topk", top_k=1),
    "noisy_k_all": dict(gate="noisy_topk", top_k=E),
    "softmax": dict(gate="softmax", top_k=E),
    "hierarchical": dict(gate="hierarchical", num_groups=3, top_k_groups=2, top_k=2),
    "hierarchical_2_of_2": dict(gate="hierarchical", num_groups=2, top_k_groups=2, top_k=4),
    "balanced": dict(gate="balanced"),
    "softmax_topk": dict(gate="softmax_topk"),
    "softmax_topk_raw": dict(gate="softmax_topk", renormalize=False),
    "sigmoid_topk": dict(gate="sigmoid_topk"),
    "sigmoid_topk_raw": dict(gate="sigmoid_topk", renormalize=False),
    "external": dict(gate="external"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_config(kind="noisy", **fields):
    return Config(**{**dict(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K), **KINDS[kind], **fields})


def make_weights(config, bias=False, seed=1):
    """Every array the layer has, normal, with gradients wanted."""
    g = torch.Generator().manual_seed(seed)
    e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
    separate, gated = config.glu == "separate", config.activation in GATED
    up = i if separate or not gated else 2 * i
    shapes = {"w_down": (e, h, h if config.activation == "identity" else i)}
    if config.gate != "external":
        shapes["w_gate"] = (e, h)
    if config.gate in ("noisy_topk", "hierarchical"):
        shapes["w_noise"] = (e, h)
    if config.gate == "hierarchical":
        shapes["w_gate_primary"] = shapes["w_noise_primary"] = (config.num_groups, h)
    if config.gate == "balanced":
        shapes["thresholds"] = (e,)
    if config.gate == "sigmoid_topk":
        shapes["gate_bias"] = (e,)
    if config.activation != "identity":
        shapes["w_up"] = (e, up, h)
    if gated and separate:
        shapes["w_glu"] = (e, i, h)
    if bias:
        shapes["b_down"] = (e, h)
        shapes |= {"b" + name[1:]: shapes[name][:2] for name in ("w_up", "w_glu") if name in shapes}
    weights = {name: torch.randn(shape, dtype=torch.float64, generator=g) for name, shape in shapes.items()}
    if "thresholds" in weights:  # among the gate values, not on one of them
        weights["thresholds"] = 0.1 + 0.1 * weights["thresholds"].sigmoid()
    return {name: w.requires_grad_() for name, w in weights.items()}


def make_x(tokens=T, seed=2):
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def external(config, tokens=T):
    """Choices of EXTERNAL: experts that come twice, and rows that go nowhere."""
    if config.gate != "external":
        return {}
    g = torch.Generator().manual_seed(3)
    index = torch.randint(-1, E + 1, (tokens, config.top_k), generator=g)
    index[:1] = 2
    return dict(index=index, index_weight=torch.randn(tokens, config.top_k, dtype=torch.float64, generator=g))


# The noise.


def test_philox_known_answers():
    """Random123, kat_vectors."""
    def words(counter, key):
        return [w.item() for w in philox([np.uint64([c]) for c in counter], key)]

    assert words([0] * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([2**32 - 1] * 4, (2**32 - 1,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_noise_known_answers():
    """Printed by a C program around philox.h."""
    names = [(0, 0, 0, 0, FLAT), (12345678901234567, 3, 2**63 + 5, 2**41 + 99, PRIMARY),
             (2**64 - 1, 2**32 - 1, 2**64 - 1, 2**42 - 1, FLAT)]
    expected = [[0.991137564, -0.92466259, -0.617608964, -0.482068598, -0.153638184, 0.180825815],
                [0.837393343, 0.043514017, 0.511866987, -0.224252209, -1.10508347, -0.846937776],
                [-0.155935243, -0.349848896, -0.135183066, -0.739277244, -0.606459439, -0.35768038]]
    for (seed, stream, offset, token, level), normals in zip(names, expected):
        eps = noise(seed, stream, offset, torch.tensor([token]), level, 6)
        torch.testing.assert_close(eps[0], torch.tensor(normals, dtype=torch.float64), rtol=0, atol=1e-6)


def test_noise_is_standard_normal():
    eps = noise(1, 0, 0, torch.arange(4000), FLAT, 50)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / math.sqrt(n)
    assert abs(eps.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((eps**4).mean() - 3) < 4 * math.sqrt(96 / n)
    correlation = torch.corrcoef(eps.T) - torch.eye(50)  # between experts
    assert correlation.abs().max() < 5.5 / math.sqrt(4000)
    inside = (eps.abs() < 1).double().mean()
    assert abs(inside - math.erf(math.sqrt(0.5))) < 4 * math.sqrt(0.22 / n)


def test_noise_hangs_on_its_name_alone():
    whole = noise(5, 6, 7, torch.arange(100, 120), FLAT, 11)
    assert torch.equal(noise(5, 6, 7, torch.tensor([113, 101]), FLAT, 11), whole[[13, 1]])
    assert torch.equal(noise(5, 6, 7, torch.arange(100, 120), FLAT, 5), whole[:, :5])
    assert noise(5, 6, 7, torch.arange(0), FLAT, 11).shape == (0, 11)
    name = [5, 6, 7, torch.arange(100, 120), FLAT]
    for i, other in enumerate([4, 5, 8, torch.arange(2**40, 2**40 + 20), PRIMARY]):
        assert not (noise(*name[:i], other, *name[i + 1 :], 11) == whole).any()
    assert not (noise(5 + 2**33, 6, 7, name[3], FLAT, 11) == whole).any()  # the high words count
    assert not (noise(5, 6, 7 + 2**33, name[3], FLAT, 11) == whole).any()


# Gradients against finite differences: everything but what headers and paper call a constant.


def check_gradients(config, bias=False, training=True):
    weights, more = make_weights(config, bias), external(config)
    weights.pop("gate_bias", None)  # selects, no more
    thresholds = weights.pop("thresholds", None)
    names = list(weights)
    inputs = [make_x().requires_grad_(), *weights.values()]
    if more:
        names.append("index_weight")
        inputs.append(more["index_weight"].requires_grad_())

    def outputs(x, *values):
        given = dict(zip(names, values))
        if more:
            more["index_weight"] = given.pop("index_weight")
        if thresholds is not None:
            given["thresholds"] = thresholds.detach()
        r = moe(x, given, config, training, seed=9, offset=1, **more)
        return r.y, r.losses[:THRESHOLD], r.importance, r.load

    assert torch.autograd.gradcheck(outputs, inputs)


@kinds
def test_gradients(kind):
    check_gradients(make_config(kind, activation="gelu", intermediate_size=1))


@pytest.mark.parametrize("kind", ["noisy", "hierarchical", "balanced"])
def test_gradients_when_not_training(kind):
    check_gradients(make_config(kind, activation="gelu", intermediate_size=1), training=False)


def test_every_loss_has_a_gradient_where_the_paper_has_one():
    """Which array each loss trains."""
    trains = {
        ("noisy", IMPORTANCE): {"w_gate", "w_noise"}, ("noisy", LOAD): {"w_gate", "w_noise"},
        ("noisy_k_1", IMPORTANCE): set(), ("noisy_k_1", LOAD): {"w_gate", "w_noise"},
        ("noisy_k_all", LOAD): set(), ("softmax", IMPORTANCE): {"w_gate"}, ("softmax", LOAD): set(),
        ("hierarchical", IMPORTANCE): {"w_gate_primary", "w_noise_primary"},  # one expert of each group
        ("hierarchical", LOAD): {"w_gate", "w_noise", "w_gate_primary", "w_noise_primary"},
        ("hierarchical_2_of_2", IMPORTANCE): {"w_gate", "w_noise", "w_gate_primary", "w_noise_primary"},
        ("hierarchical_2_of_2", LOAD): {"w_gate", "w_noise"},  # every group is chosen anyway
        ("balanced", IMPORTANCE): {"w_gate"}, ("balanced", THRESHOLD): {"thresholds"},
        ("softmax_topk", SWITCH): {"w_gate"}, ("sigmoid_topk", SWITCH): {"w_gate"},
        ("softmax_topk", Z): {"w_gate"}, ("sigmoid_topk", Z): {"w_gate"}, ("external", IMPORTANCE): set(),
    }
    for (kind, loss), names in trains.items():
        config = make_config(kind)
        weights, x = make_weights(config), make_x().requires_grad_()
        value = moe(x, weights, config, **external(config)).losses[loss]
        inputs = {**weights, "x": x}
        gradients = [None] * len(inputs)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
        got = {name for name, g in zip(inputs, gradients) if g is not None and g.abs().max() > 1e-12}
        assert got - {"x"} == names, (kind, loss)
        assert ("x" in got) == bool(names - {"thresholds"}), (kind, loss)


def test_threshold_loss():
    """App. F: not negative, 0 where both masks agree, dL/dT_i = m - #{g > T_i}."""
    config = make_config("balanced")
    weights, x = make_weights(config), make_x()
    r = moe(x, weights, config)
    g = torch.softmax(x @ weights["w_gate"].T, 1)
    (gradient,) = torch.autograd.grad(r.losses[THRESHOLD], weights["thresholds"])
    assert r.losses[THRESHOLD] > 0
    assert torch.equal(gradient, 2.0 - (g > weights["thresholds"]).sum(0))
    torch.testing.assert_close(r.batch_threshold, g.sort(0).values[-2].detach())
    weights["thresholds"] = r.batch_threshold - 1e-9
    assert moe(x, weights, config).losses[THRESHOLD] == 0
    assert moe(x, weights, config, training=False).losses[THRESHOLD] == 0


def test_cv_squared():
    v = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64, requires_grad=True)
    n, s, q = 4, v.sum(), (v**2).sum()
    torch.testing.assert_close(cv_squared(v), n * q / s**2 - 1)
    (gradient,) = torch.autograd.grad(cv_squared(v), v)
    torch.testing.assert_close(gradient, 2 * n / s**2 * (v - q / s))
    assert cv_squared(torch.zeros(3)) == 0


# The experts.


@pytest.mark.parametrize("activation", UNGATED + GATED + ("identity",))
def test_gradients_of_activations(activation):
    # limits among the values, so that both sides of the clamps are met
    config = make_config("softmax_topk", num_experts=3, activation=activation, swiglu_limit=0.8)
    check_gradients(config, bias=True)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("bias", [False, True])
def test_placements_of_glu(activation, bias):
    config = make_config(activation=activation)
    w = make_weights(config, bias)
    expected = experts(make_x(), w, activation)
    for glu in ("first", "last", "interleaved"):
        packed = dict(w_down=w["w_down"], b_down=w.get("b_down"))
        for letter in "wb" if bias else "w":
            g, u = w[letter + "_glu"], w[letter + "_up"]
            if glu == "interleaved":
                packed[letter + "_up"] = torch.stack([g, u], 2).flatten(1, 2)
            else:
                packed[letter + "_up"] = torch.cat([g, u] if glu == "first" else [u, g], 1)
        torch.testing.assert_close(experts(make_x(), packed, activation, glu), expected, rtol=0, atol=1e-14)


def test_activations_by_formula():
    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    def gelu(z):
        return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def gelu_tanh(z):
        return z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    alpha, limit, offset = 1.5, 0.9, 0.7
    formulas = {
        "relu": lambda u, g: max(u, 0), "relu2": lambda u, g: max(u, 0) ** 2, "gelu": lambda u, g: gelu(u),
        "gelu_tanh": lambda u, g: gelu_tanh(u),
        "silu": lambda u, g: u * sigmoid(u), "swiglu": lambda u, g: g * sigmoid(g) * u,
        "geglu": lambda u, g: gelu(g) * u, "geglu_tanh": lambda u, g: gelu_tanh(g) * u,
        "swiglu_clamped": lambda u, g: (min(g, limit) * sigmoid(alpha * min(g, limit))
                                        * (min(max(u, -limit), limit) + offset)),
    }
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for (name, formula), u, g in itertools.product(formulas.items(), (-3.0, -0.4, 1.3), (-2.0, 0.3, 2.5)):
        w = dict(w_up=one * u, w_glu=one * g, w_down=2 * one, b_down=one[0] * 5)
        y = experts(one[0], w, name, swiglu_limit=limit, swiglu_alpha=alpha, swiglu_offset=offset)
        assert y.item() == pytest.approx(2 * formula(u, g) + 5, abs=1e-14), name


# The gates.


def test_layer_by_loops():
    """Eq. 1 and 3-11 for one token and one expert at a time; kth_excluding by leaving the expert out."""
    config = make_config()
    w, x = {k: v.detach() for k, v in make_weights(config).items()}, make_x()
    r = moe(x, w, config, seed=4, offset=2, first_token=10)
    eps = noise(4, 0, 2, torch.arange(10, 10 + T), FLAT, E)
    importance, load = [0.0] * E, [0.0] * E
    for t in range(T):
        clean = [float(w["w_gate"][e] @ x[t]) for e in range(E)]
        std = [math.log1p(math.exp(w["w_noise"][e] @ x[t])) + float(np.float32(0.01)) for e in range(E)]
        noisy = [clean[e] + float(eps[t, e]) * std[e] for e in range(E)]
        best = sorted(range(E), key=lambda e: -noisy[e])[:K]
        total = sum(math.exp(noisy[e]) for e in best)
        y = torch.zeros(H, dtype=torch.float64)
        for e in range(E):
            gate = math.exp(noisy[e]) / total if e in best else 0
            assert r.weight[t, e].item() == pytest.approx(gate, abs=1e-12)
            y += gate * (w["w_down"][e] @ (w["w_up"][e] @ x[t]).clamp(min=0))
            importance[e] += gate
            threshold = sorted(noisy[:e] + noisy[e + 1 :])[-K]
            load[e] += 0.5 * (1 + math.erf((clean[e] - threshold) / std[e] / math.sqrt(2)))
        torch.testing.assert_close(r.y[t], y)
    torch.testing.assert_close(r.importance, torch.tensor(importance, dtype=torch.float64))
    torch.testing.assert_close(r.load, torch.tensor(load, dtype=torch.float64))
    assert r.losses[LOAD].item() == pytest.approx(np.var(load) / np.mean(load) ** 2)
    assert r.losses[IMPORTANCE].item() == pytest.approx(np.var(importance) / np.mean(importance) ** 2)


@kinds
def test_rows_and_weights(kind):
    """How many experts a token has, what their weights sum to, and which statistics follow."""
    config = make_config(kind)
    w, x = make_weights(config), make_x()
    for training in (True, False):
        r = moe(x, w, config, training, **external(config))
        assert torch.equal(r.expert_count.double(), r.load) or (training and config.gate in ("noisy_topk",
                                                                                            "hierarchical"))
        assert not r.lost.any() and r.y.isfinite().all() and not r.weight[~r.chosen].any()
        assert (r.losses[5:] == 0).all()
        if config.gate == "external":
            assert not r.importance.any() and not r.losses[0].any() and not r.losses[2:].any()
            continue
        torch.testing.assert_close(r.importance, r.weight.sum(0))
        assert torch.equal(r.chosen.sum(0), r.expert_count)
        if config.gate != "balanced":
            assert (r.chosen.sum(1) == config.top_k).all()
        if config.renormalize:
            taken = r.chosen.any(1).double()
            torch.testing.assert_close(r.weight.sum(1), taken, rtol=0, atol=1e-14)


def test_probability_is_the_frequency_with_eps_i_drawn_again():
    config = make_config(num_experts=5)
    w, x = make_weights(config), make_x(1)
    clean, std = x @ w["w_gate"].T, torch.nn.functional.softplus(x @ w["w_noise"].T) + 0.01
    eps = noise(0, 0, 0, torch.arange(1), FLAT, 5)
    load = moe(x, w, config).load
    fresh = noise(1, 0, 0, torch.arange(20000), FLAT, 5)
    for i in range(5):
        h = (clean + eps * std).repeat(len(fresh), 1)
        h[:, i] = clean[0, i] + fresh[:, i] * std[0, i]
        frequency = (h.topk(K, 1).indices == i).any(1).double().mean()
        assert abs(frequency - load[i]) < 4 * math.sqrt(0.25 / len(fresh))


def test_no_noise_when_not_training():
    config = make_config()
    w, x = make_weights(config), make_x()
    r, same = moe(x, w, config, False), moe(x, w, config, False, seed=1, offset=2, first_token=3)
    assert torch.equal(r.y, same.y)
    assert torch.equal(r.chosen.nonzero()[:, 1].view(T, K), (x @ w["w_gate"].T).topk(K).indices.sort(1).values)
    assert not torch.equal(moe(x, w, config).y, moe(x, w, config, seed=1).y)
    assert not torch.equal(moe(x, w, config).y, moe(x, w, make_config(noise_stream=1)).y)


def test_all_experts_make_the_load_constant():
    r = moe(make_x(), make_weights(make_config("noisy_k_all")), make_config("noisy_k_all"))
    assert (r.load == T).all() and r.losses[LOAD] == 0


def test_hierarchical_is_the_product_of_two_softmaxes():
    config = make_config("hierarchical", top_k_groups=3, top_k=6)  # all of both levels, no noise
    w, x = make_weights(config), make_x()
    outer = torch.softmax(x @ w["w_gate_primary"].T, 1)
    inner = torch.softmax((x @ w["w_gate"].T).view(T, 3, 2), 2)
    torch.testing.assert_close(moe(x, w, config, False).weight, (outer[:, :, None] * inner).flatten(1))


def test_hierarchical_load():
    """Eq. 14 from flat gates, one on X and one on each X^(i); a group that nobody chose has load 0."""
    config = make_config("hierarchical_2_of_2", num_experts=8, num_groups=4)
    w, x = {k: v.detach() for k, v in make_weights(config).items()}, make_x()
    x[:, 0] = x[:, 0].abs()
    w["w_gate_primary"][3] = torch.tensor([-1e3, 0, 0, 0])
    r = moe(x, w, config, seed=8)

    def flat(x, eps, suffix, own, k):
        clean, std = x @ w["w_gate" + suffix][own].T, (x @ w["w_noise" + suffix][own].T).exp().log1p() + 0.01
        noisy, p = clean + eps * std, torch.ones_like(clean)
        for t, e in itertools.product(range(len(x)), range(clean.shape[1] if k < clean.shape[1] else 0)):
            rest = torch.cat([noisy[t, :e], noisy[t, e + 1 :]])
            p[t, e] = torch.special.ndtr((clean[t, e] - rest.topk(k).values[-1]) / std[t, e])
        return p.sum(0), noisy.topk(k).indices

    eps = noise(8, 0, 0, torch.arange(T), FLAT, 8)
    primary, groups = flat(x, noise(8, 0, 0, torch.arange(T), PRIMARY, 4), "_primary", slice(None), 2)
    for i in range(4):
        member = (groups == i).any(1)
        own = slice(2 * i, 2 * i + 2)
        inner, _ = flat(x[member], eps[member][:, own], "", own, 2)
        expected = primary[i] * inner / max(int(member.sum()), 1)
        torch.testing.assert_close(r.load[own], expected, rtol=1e-6, atol=1e-12)
    assert not r.load[6:].any() and not r.expert_count[6:].any()


@pytest.mark.parametrize("tokens, top_k, m", [(6, 2, 2), (7, 2, 2), (8, 3, 4), (2, 1, 1), (1, 1, 1)])
def test_balanced_takes_m_per_expert(tokens, top_k, m):
    config = make_config("balanced", top_k=top_k)
    w, x = make_weights(config), make_x(tokens)
    r = moe(x, w, config)
    assert (r.expert_count == m).all()
    g = torch.softmax(x @ w["w_gate"].T, 1)
    for e in range(E):
        assert set(g[:, e].topk(m).indices.tolist()) == set(r.chosen[:, e].nonzero().flatten().tolist())
    taken = g * r.chosen
    torch.testing.assert_close(r.weight, taken / taken.sum(1, keepdim=True).clamp(min=1e-300))


def test_balanced_at_inference():
    config = make_config("balanced", max_rows=T * E)
    w, x = make_weights(config), make_x()
    g = torch.softmax(x @ w["w_gate"].T, 1)
    r = moe(x, w, config, False)
    assert torch.equal(r.chosen, g > w["thresholds"]) and r.batch_threshold is None
    w["thresholds"] = torch.full((E,), g.max().item(), dtype=torch.float64)  # above: the largest itself is not
    r = moe(x, w, config, False)
    assert not r.chosen.any() and not r.y.any() and not r.losses.any()
    w["thresholds"] = torch.zeros(E, dtype=torch.float64)
    for max_rows in (0, 5, 20):  # 0 = T * K
        r = moe(x, w, make_config("balanced", max_rows=max_rows), False)
        assert torch.equal(r.chosen, g > g.flatten().sort(descending=True).values[max_rows or T * K])


@kinds
def test_ties_go_to_the_lowest_index(kind):
    config = make_config(kind, num_experts=12 if kind == "balanced" else E)
    w = {name: torch.zeros_like(v) if "gate" in name else v for name, v in make_weights(config).items()}
    r = moe(make_x(), w, config, training=kind == "balanced", **external(config))
    if config.gate == "balanced":  # m = 1: the first token has them all
        assert r.chosen[0].all() and not r.chosen[1:].any()
    elif config.gate == "hierarchical":
        assert (r.chosen == torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]][config.top_k == 4])).all()
    elif config.gate != "external":
        assert (r.chosen == (torch.arange(E) < config.top_k)).all()


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_topk"])
def test_token_choice_by_formula(kind):
    """Weights, Switch loss and z-loss; an expert whose logits are -Inf takes part in no sum."""
    config, raw = make_config(kind), make_config(kind, renormalize=False)
    for masked in (False, True):
        w, x = {name: v.detach() for name, v in make_weights(config).items()}, make_x().abs()
        if masked:
            w["w_gate"][0] = -math.inf
        c = x @ w["w_gate"].T
        s = torch.softmax(c, 1) if kind == "softmax_topk" else c.sigmoid()
        r = moe(x, w, config)
        best = (s + w.get("gate_bias", 0)).masked_fill(c == -math.inf, -math.inf).topk(K).indices
        weight = torch.zeros(T, E, dtype=torch.float64).scatter(1, best, s.gather(1, best))
        torch.testing.assert_close(moe(x, w, raw).weight, weight)
        torch.testing.assert_close(r.weight, weight / weight.sum(1, keepdim=True))
        p = s / s.sum(1, keepdim=True)
        torch.testing.assert_close(r.losses[SWITCH], E * (r.expert_count / T * p.mean(0)).sum())
        torch.testing.assert_close(r.losses[Z], (c.exp().sum(1).log() ** 2).mean())
    w["w_gate"] = torch.zeros_like(w["w_gate"])
    assert moe(x, w, config).losses[SWITCH].item() == pytest.approx(K)


def test_sigmoid_bias_selects_and_no_more():
    config = make_config("sigmoid_topk", renormalize=False)
    w, x = make_weights(config), make_x()
    w["gate_bias"] = torch.tensor([0.0, 5, 0, 0, 5, 0], dtype=torch.float64, requires_grad=True)
    r = moe(x, w, config)
    assert (r.chosen == torch.tensor([0, 1, 0, 0, 1, 0])).all()
    torch.testing.assert_close(r.weight[:, [1, 4]], (x @ w["w_gate"].T).sigmoid()[:, [1, 4]])
    assert torch.autograd.grad(r.y.sum(), w["gate_bias"], allow_unused=True) == (None,)


def test_external():
    config = make_config("external", activation="gelu")
    w, x = make_weights(config), make_x()
    index = torch.tensor([[2, 2], [0, 5], [-1, 3], [6, -7], [1, 100], [4, 4]], dtype=torch.int32)
    weight = torch.arange(1.0, 13).view(T, K).requires_grad_()
    r = moe(x, w, config, index=index, index_weight=weight)
    y = experts(x, w, "gelu")
    expected = [3 * y[0, 2], 3 * y[1, 0] + 4 * y[1, 5], 6 * y[2, 3], 0 * x[3], 9 * y[4, 1], 23 * y[5, 4]]
    torch.testing.assert_close(r.y, torch.stack(expected))
    assert r.expert_count.tolist() == [1, 1, 2, 1, 2, 1]
    (gradient,) = torch.autograd.grad(r.y.sum(), weight)
    assert torch.equal(gradient == 0, (index < 0) | (index >= E))


# What belongs to a call: padding, global token ids, no tokens, numbers that are none.


@kinds
def test_padding_changes_nothing_else(kind):
    """The other tokens' results are those of a call without it, with the noise of their own places."""
    config = make_config(kind)
    w, x, more = make_weights(config), make_x(), external(config)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.uint8)
    padded = x.masked_fill(mask[:, None] == 0, math.nan)
    r = moe(padded, w, config, token_mask=mask, **more)
    alone = moe(x[:4], w, config, **{name: v[:4] for name, v in more.items()})
    assert not r.y[4:].any() and not r.chosen[4:].any()
    torch.testing.assert_close(r.y[:4], alone.y)
    for name in ("losses", "importance", "load", "expert_count"):
        torch.testing.assert_close(getattr(r, name), getattr(alone, name))
    trained = [v for name, v in w.items() if name != "gate_bias"]
    for a, b in zip(*(torch.autograd.grad(v.y.sum() + v.losses.sum(), trained) for v in (r, alone))):
        torch.testing.assert_close(a, b)
    hole = moe(x, w, config, token_mask=1 - mask, **more)  # rows 4 and 5, not 0 and 1
    tail = moe(x[4:], w, config, first_token=4, **{name: v[4:] for name, v in more.items()})
    torch.testing.assert_close(hole.y[4:], tail.y)
    assert not hole.y[:4].any()


@kinds
def test_tokens_do_not_meet(kind):
    """A batch in two parts gives the same rows, but for the gate whose experts choose tokens."""
    config = make_config(kind)
    if config.gate == "balanced":
        return
    w, x, more = make_weights(config), make_x(), external(config)
    y = []
    for rows in (slice(0, 2), slice(2, T)):
        part = {name: v[rows] for name, v in more.items()}
        y.append(moe(x[rows], w, config, seed=3, first_token=20 + rows.start, **part).y)
    torch.testing.assert_close(torch.cat(y), moe(x, w, config, seed=3, first_token=20, **more).y)


@kinds
def test_no_tokens(kind):
    config = make_config(kind)
    w = make_weights(config)
    for tokens, training in itertools.product((0, T), (True, False)):
        mask = torch.zeros(tokens, dtype=torch.uint8)
        r = moe(make_x(tokens), w, config, training, token_mask=mask, **external(config, tokens))
        assert r.y.shape == (tokens, H) and not r.y.any()
        assert not r.losses.any() and not r.importance.any() and not r.load.any()


@kinds
def test_unusable_logits(kind):
    """NaN and infinities never win; a token with nothing else gives NaN, one with nothing but -Inf gives 0."""
    config = make_config(kind)
    if config.gate == "external":
        return
    for bad in (math.nan, math.inf, -math.inf):
        w, x = {name: v.detach() for name, v in make_weights(config).items()}, make_x().abs()
        w["w_gate"][2] = bad
        r = moe(x, w, config)
        assert not r.chosen[:, 2].any() and r.y.isfinite().all() and r.losses.isfinite().all() and r.load[2] == 0
        if config.gate == "noisy_topk" and config.top_k == E:
            assert (r.load == torch.tensor([T, T, 0, T, T, T])).all()
        w["w_gate"][:] = bad
        r = moe(x, w, config)
        assert not r.chosen.any() and r.losses.isfinite().all() and not r.importance.any()
        assert r.y.isnan().all() if bad != -math.inf else not r.y.any()
        lost_x = torch.where(torch.arange(T)[:, None] == 3, bad, x)  # one token alone
        w = {name: v.detach().abs() for name, v in make_weights(config).items()}
        r = moe(lost_x, w, config)
        assert torch.equal(r.y.isnan().any(1), (torch.arange(T) == 3) & (bad != -math.inf))


def test_unusable_group():
    """A token one of whose groups has no usable logit keeps the weight of the other; it is lost without both."""
    config = make_config("hierarchical", top_k_groups=3, top_k=3)
    w, x = {name: v.detach() for name, v in make_weights(config).items()}, make_x()
    whole = moe(x, w, config, seed=1).weight
    w["w_gate"][:2] = math.nan
    torch.testing.assert_close(moe(x, w, config, seed=1).weight[:, 2:], whole[:, 2:])
    assert moe(x, w, config, seed=1).y.isfinite().all()
    w["w_gate"][2:] = -math.inf
    assert moe(x, w, config, seed=1).y.isnan().all()


def test_any_floating_type_and_missing_arrays():
    config = make_config("sigmoid_topk")
    w = {name: v.detach().float() for name, v in make_weights(config).items()}
    x = make_x().float().requires_grad_()
    r = moe(x, {**w, "gate_bias": None, "b_down": None}, SimpleNamespace(**vars(config)))
    assert r.y.dtype == torch.float64
    r.y.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any()
