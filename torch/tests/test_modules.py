"""The modules as PyTorch users handle them."""

import copy
import pathlib
import pickle
import runpy

import pytest
import torch
import torch._inductor.config
from torch import nn

import cumoe
from cases import DTYPES, GATES, assert_same_bits, every_gate, gradients, make_moe

T, H = 9, 10


def step(moe, x, seed=1):
    """Outputs and all gradients of one call."""
    moe.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    out = moe(x)
    (out.y.float().square().sum() + out.loss).backward()
    return [out.y.detach(), out.losses.detach(), x.grad, *gradients(moe).values()]


def assert_same_step(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert_same_bits(left, right)


@every_gate
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type(gate, dtype):
    """Results are finite and near those of float64; gates are float32 below."""
    exact, moe = make_moe(gate, bias=True).eval(), make_moe(gate, dtype, bias=True).eval()
    moe.load_state_dict(exact.state_dict())
    assert moe.w_gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact.load_state_dict(moe.state_dict())  # what is left after rounding
    x = torch.randn(T, H, dtype=dtype)
    ours, theirs = step(moe, x), step(exact, x.double())
    limit = {torch.float64: 1e-13, torch.float32: 3e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= limit * (1 + b.abs().max())


@every_gate
def test_whole_module_in_16_bits(gate):
    """Gates in the type of the tokens, as .to(dtype) makes them; their gradients have it too."""
    moe = make_moe(gate, torch.float32).to(torch.bfloat16)
    for value in step(moe, torch.randn(T, H, dtype=torch.bfloat16))[2:]:
        assert value.dtype == torch.bfloat16 and value.isfinite().all()


@every_gate
def test_state_dict_deepcopy_pickle(gate):
    moe, x = make_moe(gate), torch.randn(T, H, dtype=torch.float64)
    expected = step(moe, x)
    other = make_moe(gate)
    other.reset_parameters()
    other.load_state_dict(moe.state_dict())
    for same in other, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)):
        assert_same_step(step(same, x), expected)


@every_gate
def test_meta_device(gate):
    options = dict(gate=gate) | GATES[gate]
    moe = cumoe.MoE(H, 12, 8, device="meta", **options)
    out = moe(torch.empty(2, T, H, device="meta"))
    assert out.y.device.type == "meta" and out.y.shape == (2, T, H) and out.loss.shape == ()
    moe = moe.to_empty(device="cpu")
    moe.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in moe.parameters())
    torch.manual_seed(0)
    twin = cumoe.MoE(H, 12, 8, **options)
    torch.manual_seed(0)
    moe.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), twin.parameters()))


def test_initial_values():
    torch.manual_seed(0)
    moe = cumoe.MoE(64, 96, 32, 4, activation="swiglu", bias=True)
    assert not moe.w_gate.any() and not moe.w_noise.any() and not moe.b_up.any()
    for name, columns in ("w_up", 64), ("w_glu", 64), ("w_down", 96):
        assert abs(getattr(moe, name).std() * columns**0.5 - 1) < 0.02
    assert abs(cumoe.MoE(64, 96, 32, 4, gate="softmax_topk").w_gate.std() - 0.02) < 0.002


def test_noise_follows_the_seed_and_eval_has_none():
    moe, x = make_moe("noisy_topk"), torch.randn(T, H, dtype=torch.float64)
    assert_same_step(step(moe, x, seed=1), step(moe, x, seed=1))
    assert not torch.equal(step(moe, x, seed=1)[0], step(moe, x, seed=2)[0])
    torch.manual_seed(1)
    assert not torch.equal(moe(x).y, moe(x).y)
    moe.eval()
    assert torch.equal(moe(x).y, moe(x).y)


def test_checkpointing_sees_the_same_noise():
    moe, x = make_moe("noisy_topk"), torch.randn(T, H, dtype=torch.float64)

    def run(checkpointed):
        moe.zero_grad()
        torch.manual_seed(3)
        value = x.detach().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(moe, value, use_reentrant=False) if checkpointed else moe(value)
        (out.y.sum() + out.loss).backward()
        return [value.grad, *gradients(moe).values()]

    assert_same_step(run(True), run(False))


def test_shapes_masks_and_outputs():
    moe = make_moe("noisy_topk")
    x = torch.randn(3, 4, H, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    torch.manual_seed(1)
    out = moe(x, token_mask=mask)
    assert out.y.shape == x.shape and not out.y[~mask].any()
    assert out.chosen_expert.shape == out.chosen_weight.shape == (12, 2)
    assert (out.chosen_expert[~mask.flatten()] == -1).all()
    statistics = out.statistics()
    assert statistics.tokens == mask.sum() and statistics.rows == 2 * mask.sum() == out.expert_count.sum()
    assert statistics.max_count == out.expert_count.max()
    torch.testing.assert_close(out.importance.sum(), mask.sum().double())
    assert out.load.shape == (8,) and out.batch_threshold is None
    torch.testing.assert_close(out.loss, 0.1 * out.losses[:5].sum())
    torch.manual_seed(1)
    assert torch.equal(moe(x, mask).y, out.y)


def test_loss_weights():
    weights = dict(importance=0.5, load=0.25)
    moe = cumoe.MoE(H, 12, 8, 2, loss_weights=weights)
    out = moe(torch.randn(T, H))
    torch.testing.assert_close(out.loss, 0.5 * out.losses[0] + 0.25 * out.losses[1])
    assert "loss_weights={'importance': 0.5, 'load': 0.25}" in repr(moe)
    with pytest.raises(ValueError, match="loss_weights has 'balance'"):
        cumoe.MoE(H, 12, 8, 2, loss_weights=dict(balance=1))


def test_balanced():
    """Exactly m rows for each expert in training; the thresholds of a batch choose what the batch chose."""
    moe, x = make_moe("balanced"), torch.randn(64, H, dtype=torch.float64)
    moe.eval()
    moe.start_thresholds(x)
    assert not moe.training
    out = moe.train()(x)
    assert (out.expert_count == 16).all() and torch.equal(out.batch_threshold, moe.thresholds)
    # The gate of a threshold is above it, so the token that is the threshold drops out: one row of 16.
    assert (moe.eval()(x).expert_count >= 15).all()
    out = moe(x)
    assert out.chosen_offset[-1] == out.statistics().rows
    with pytest.raises(RuntimeError, match="only 'balanced'"):
        make_moe("noisy_topk").start_thresholds(x)


def test_gate_bias():
    moe, x = make_moe("sigmoid_topk", torch.float32), torch.randn(64, H)
    out = moe(x)
    moe.update_gate_bias(out.expert_count, rate=0.25)
    expected = 0.25 * torch.sign(out.expert_count.float().mean() - out.expert_count)
    assert torch.equal(moe.gate_bias, expected) and "gate_bias" in moe.state_dict()
    assert not torch.equal(moe(x).chosen_expert, out.chosen_expert)
    with pytest.raises(RuntimeError, match="only 'sigmoid_topk'"):
        make_moe("noisy_topk").update_gate_bias(out.expert_count)


def test_gate_bias_is_not_rounded():
    """Steps of 0.001 add up where tokens and weights have 16 bits; double precision has a bias in float32, too."""
    for convert in nn.Module.bfloat16, nn.Module.half, nn.Module.double:
        moe = make_moe("sigmoid_topk", torch.float32)
        nn.init.constant_(moe.gate_bias, 1)
        moe = convert(moe)
        count = torch.tensor([9, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32)
        moe.update_gate_bias(count)
        assert moe.gate_bias.dtype == torch.float32 and moe.gate_bias[0] < 1 < moe.gate_bias[1]
        assert moe(torch.randn(T, H, dtype=moe.w_down.dtype)).y.isfinite().all()
    assert copy.deepcopy(moe).to("meta").to_empty(device="cpu").gate_bias.dtype == torch.float32


def test_recompute_gives_the_same_bits():
    x = torch.randn(T, H, dtype=torch.bfloat16)
    assert_same_step(step(make_moe("noisy_topk", torch.bfloat16, recompute=True), x),
                     step(make_moe("noisy_topk", torch.bfloat16), x))


@pytest.mark.parametrize("placement", ["first", "last", "interleaved"])
def test_placements_of_the_glu_half(placement):
    apart = cumoe.Experts(H, 12, 8, activation="geglu", bias=True)
    together = cumoe.Experts(H, 12, 8, activation="geglu", bias=True, glu=placement)
    for name, up, glu in ("w_up", apart.w_up, apart.w_glu), ("b_up", apart.b_up, apart.b_glu):
        nn.init.normal_(up), nn.init.normal_(glu)
        pair = {"first": [glu, up], "last": [up, glu], "interleaved": [glu, up]}[placement]
        value = torch.stack(pair, 2).flatten(1, 2) if placement == "interleaved" else torch.cat(pair, 1)
        getattr(together, name).data.copy_(value)
    together.w_down.data.copy_(apart.w_down)
    x, index, weight = torch.randn(T, H), torch.randint(0, 8, (T, 3)), torch.rand(T, 3)
    assert_same_bits(apart(x, index, weight), together(x, index, weight))


@every_gate
def test_compile(gate):
    """The whole graph, forward and backward, to the same bits as without."""
    torch._dynamo.reset()
    moe, x = make_moe(gate), torch.randn(T, H, dtype=torch.float64)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert_same_step(step(compiled, x), step(moe, x))
    moe.eval()
    assert_same_step(step(compiled, x), step(moe, x))


# Which instructions the processor has is found out by compiling a program for each, which takes longer than the test.
@torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "compile_threads": 1})
def test_compile_with_inductor_and_unknown_numbers_of_tokens():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    model = Both()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for tokens in 9, 12, 31:
        x = torch.randn(tokens, H, requires_grad=True)
        for a, b in zip(results_and_gradients(compiled, model, x), results_and_gradients(model, model, x), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_config_travels_by_its_fields():
    config = cumoe.Config(H, 12, 8, 2, activation="swiglu")
    assert pickle.loads(pickle.dumps(config)) == config and b"numbers" not in pickle.dumps(config)
    compiled = torch.compile(lambda x, w: cumoe.functional.moe(x, config, **w).y, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    moe = cumoe.MoE(H, 12, 8, 2, activation="swiglu")
    x, arrays = torch.randn(T, H), dict(moe.named_parameters())
    assert_same_bits(compiled(x, arrays), cumoe.functional.moe(x, config, **arrays).y)


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weights = dict(importance=0.123, load=0.456)  # of which nothing is cached yet
    with FakeTensorMode():
        assert cumoe.MoE(H, 12, 8, 2, loss_weights=weights)(torch.randn(T, H)).loss.shape == ()
    out = cumoe.MoE(H, 12, 8, 2, loss_weights=weights)(torch.randn(T, H))
    assert type(out.loss) is torch.Tensor and out.loss.isfinite()
    with torch.inference_mode():
        cumoe.MoE(H, 12, 8, 2, loss_weights=dict(importance=0.789))(torch.randn(T, H))
    out = cumoe.MoE(H, 12, 8, 2, loss_weights=dict(importance=0.789))(torch.randn(T, H))
    out.loss.backward()


def test_export():
    """The operators go into an exported program, with any number of tokens."""
    moe = make_moe("softmax_topk", torch.float32).eval()
    dynamic = {"x": {0: torch.export.Dim("tokens", min=2)}}
    with torch.no_grad():
        program = torch.export.export(moe, (torch.randn(T, H),), dynamic_shapes=dynamic)
        x = torch.randn(2 * T, H)
        assert_same_bits(program.module()(x).y, moe(x).y)


class Both(nn.Module):
    """A layer and experts that it routes for."""

    def __init__(self):
        super().__init__()
        self.moe = make_moe("softmax_topk", torch.float32)
        self.experts = cumoe.Experts(H, 12, 8, activation="swiglu")

    def forward(self, x):
        out = self.moe(torch.nn.functional.silu(x))
        return self.experts(out.y, out.chosen_expert, out.chosen_weight.detach()), out.loss


def results_and_gradients(function, model, x):
    y, loss = function(x)
    return [y, loss, *torch.autograd.grad(y.sum() + loss, [x, *model.parameters()])]


def test_exported_programs_have_gradients():
    model, x = Both(), torch.randn(T, H, requires_grad=True)
    program = torch.export.export(model, (x,)).module()
    for a, b in zip(results_and_gradients(program, program, x), results_and_gradients(model, model, x), strict=True):
        assert_same_bits(a, b)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
    with pytest.raises(RuntimeError, match="keep = False"):
        results_and_gradients(program, program, x)


def graph_of(function, *arguments):
    """What a compiler gets, as text."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(str(module.graph))
        return module

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return graphs[0]


def test_graphs_are_those_of_one_library(monkeypatch):
    """Compilers store them on disk: another library, which keeps more for backward, must not find them."""
    def graphs():
        moe, experts = make_moe("softmax_topk", torch.float32), cumoe.Experts(H, 12, 8)
        x, index, weight = torch.randn(T, H), torch.randint(0, 8, (T, 3)), torch.rand(T, 3)
        arrays = experts.w_up, experts.w_down
        return (graph_of(moe, x), graph_of(experts, x, index, weight),
                graph_of(lambda x: cumoe.functional.experts(x, index, weight, *arrays), x))

    first = graphs()
    assert graphs() == first
    bound = cumoe.Config.saved_bound
    with monkeypatch.context() as patch:
        patch.setattr(cumoe.Config, "saved_bound", lambda *a: (bound(*a)[0] + 64, *bound(*a)[1:]))
        other = cumoe.config._saved_layout()
    assert other != cumoe.config.SAVED_LAYOUT == cumoe.config._saved_layout()
    monkeypatch.setattr(cumoe.config, "SAVED_LAYOUT", other)
    monkeypatch.setattr(cumoe.functional, "SAVED_LAYOUT", other)
    for a, b in zip(first, graphs()):
        assert a != b


def test_repr():
    text = repr(cumoe.MoE(H, 12, 8, 2, gate="softmax_topk", activation="swiglu", renormalize=False))
    assert text == "MoE(10, 12, num_experts=8, top_k=2, gate='softmax_topk', activation='swiglu', renormalize=False)"
    assert repr(cumoe.Experts(H, 12, 8, bias=True)) == "Experts(10, 12, num_experts=8, bias=True)"


@pytest.mark.parametrize("wrong, sentence", [
    (dict(top_k=9), "top_k = 9, but must be 1..8"),
    (dict(gate="hierarchical", num_groups=3, top_k_groups=1), "num_groups = 3"),
    (dict(gate="external"), "the module is Experts"),
    (dict(gate="random"), "gate = 'random', but must be one of noisy_topk"),
    (dict(activation="tanh"), "activation = 'tanh'"),
    (dict(glu="first"), "'relu' is no gated linear unit"),
    (dict(max_rows=5), "max_rows = 5"),
    (dict(dtype=torch.int32), "dtype = torch.int32, but must be one of"),
    (dict(noise_epsilon=-1.0), "noise_epsilon"),
])
def test_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        cumoe.MoE(H, 12, 8, **dict(top_k=2) | wrong)


def test_training_lowers_the_loss():
    """Five lines of PyTorch: an optimizer, and a function that one expert cannot learn."""
    torch.manual_seed(0)
    moe = cumoe.MoE(16, 32, 8, 2, activation="swiglu")
    optimizer = torch.optim.Adam(moe.parameters(), 3e-3)
    target = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).requires_grad_(False)
    first = last = 0
    for i in range(300):
        x = torch.randn(128, 16)
        out = moe(x)
        loss = (out.y - target(x)).square().mean()
        optimizer.zero_grad()
        (loss + out.loss).backward()
        optimizer.step()
        first, last = (loss.item() if i == 0 else first), loss.item()
    assert last < 0.2 * first


def test_ddp_sees_every_gradient(tmp_path):
    """One process of gloo: DistributedDataParallel registers its hooks and finds all parameters used."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/gloo", rank=0, world_size=1)
    try:
        moe = nn.parallel.DistributedDataParallel(make_moe("noisy_topk", torch.float32))
        for _ in range(2):
            out = moe(torch.randn(5, H))
            (out.y.sum() + out.loss).backward()
        assert gradients(moe).keys() == dict(moe.named_parameters()).keys()
    finally:
        torch.distributed.destroy_process_group()


def test_example():
    runpy.run_path(pathlib.Path(__file__).parents[1] / "examples/layer.py")
