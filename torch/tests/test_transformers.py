"""Hugging Face models on cumoe's experts, beside their own eager ones. Tiny and random; nothing is fetched."""

import ast
import copy
import importlib
import inspect
import pathlib
import pickle
import runpy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cumoe

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

cumoe.register_transformers()

T, H, I, E, K = 11, 12, 8, 5, 3
FLOAT32 = 1e-5  # of the largest element, through two layers

# Whole models.

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MODELS = {
    "Mixtral": dict(intermediate_size=24, num_local_experts=6),
    "Qwen3Moe": dict(moe_intermediate_size=24, num_experts=6, head_dim=8),
    "GptOss": dict(intermediate_size=24, num_local_experts=6, head_dim=8, sliding_window=4),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make_model(name, top_k=2):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name], num_experts_per_tok=top_k)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def step(model, implementation, ids):
    """Logits and every gradient of one step."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"logits": out.logits.detach(), **gradients}


def distances(ours, theirs):
    """Of whole tensors, relative."""
    assert ours.keys() == theirs.keys()
    return {name: ((ours[name].double() - exact.double()).norm() / exact.double().norm()).item()
            for name, exact in theirs.items()}


def assert_near(ours, theirs, limit=FLOAT32):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


@every_model
@pytest.mark.parametrize("shape", [(3, 7), (1, 5)])
def test_model(name, shape):
    model = make_model(name)
    ids = torch.randint(61, shape)
    ours, theirs = step(model, "cumoe", ids), step(model, "eager", ids)
    for key in theirs:
        assert_near(ours[key], theirs[key])


@every_model
def test_model_in_bfloat16(name):
    """As near to float32 as eager is. Every expert is used: whom the router takes is no matter of rounding then."""
    exact = make_model(name, top_k=6)
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(61, (3, 7))
    exact = step(exact, "eager", ids)
    ours, theirs = distances(step(model, "cumoe", ids), exact), distances(step(model, "eager", ids), exact)
    assert max(ours.values()) <= 1.5 * max(theirs.values()) <= 0.05


@every_model
def test_generate(name):
    """Prefill, and then one token at a time with a cache."""
    model = make_model(name)
    ids = torch.randint(61, (2, 5))

    def generate(implementation):
        model.set_experts_implementation(implementation)
        return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)

    ours = generate("cumoe")
    assert ours.shape == (2, 17) and torch.equal(ours, generate("eager"))


@every_model
def test_from_pretrained(name, tmp_path):
    """Parameters that are mapped from a file stand at any address."""
    make_model(name).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="cumoe")
    assert model.config._experts_implementation == "cumoe"
    ids = torch.randint(61, (2, 5))
    seen = set()
    with Operators(lambda function, arguments: seen.add(str(function))), torch.no_grad():
        ours = model(ids).logits
    assert "cumoe.experts_forward.default" in seen
    model.set_experts_implementation("eager")
    assert_near(ours, model(ids).logits)


def test_example():
    runpy.run_path(pathlib.Path(__file__).parents[1] / "examples/huggingface.py")


# Experts alone.


class Operators(TorchDispatchMode):
    """Tells every operator that is called."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.told(function, arguments)
        return function(*arguments, **(keywords or {}))


def shrink(config):
    """Sizes of the constants above, under whatever name."""
    names = dict(hidden_size=H, moe_latent_size=None, moe_intermediate_size=I, intermediate_size=I,
                 **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E))
    for name, size in names.items():
        if hasattr(config, name) and not isinstance(getattr(config, name), list):  # Ernie 4.5 VL: one for each kind
            setattr(config, name, size)
    return config


def make(experts_class, **options):
    """The class's experts with the first configuration of its file that it can be made of."""
    torch.manual_seed(0)
    if "intermediate_size" in inspect.signature(experts_class.__init__).parameters:
        arguments = (I,)  # of which kind
    else:
        arguments = ()
    found = vars(sys.modules[experts_class.__module__]).values()
    for kind in found:
        if not inspect.isclass(kind) or not issubclass(kind, transformers.PreTrainedConfig):
            continue
        try:
            module = experts_class(shrink(kind(**options)), *arguments)
        except AttributeError:  # of a part of the model that has no experts
            continue
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        module.config._experts_implementation = "cumoe"
        return module
    pytest.fail(f"no configuration for {experts_class}")


def make_input(dtype=torch.float32):
    """Gates up to where a clamp matters; an expert without tokens, and a token that chose one twice."""
    x = 3 * torch.randn(T, H, dtype=dtype)
    index = torch.rand(T, E - 1).argsort(1)[:, :K]
    index[4] = torch.tensor([2, 2, 0])
    return x, index, torch.rand(T, K, dtype=dtype)


def run(module, implementation, x, index, weight, call=None):
    """y and the gradients of x, weight and every parameter."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = (module if call is None else call)(x, index, weight)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    module.config._experts_implementation = "cumoe"
    return [y.detach(), x.grad, weight.grad, *(parameter.grad for parameter in module.parameters())]


def assert_as_eager(module, call=None, given=None, limit=FLOAT32):
    given = given or make_input()
    for ours, theirs in zip(run(module, "cumoe", *given, call), run(module, "eager", *given), strict=True):
        assert_near(ours, theirs, limit)


def decorated_classes():
    """Of the sources, by their decorator."""
    folder = pathlib.Path(transformers.__file__).parent
    for path in sorted(folder.glob("models/*/*.py")):
        text = path.read_text()
        if path.name.startswith("modular_") or "@use_experts_implementation" not in text:
            continue
        module = ".".join(("transformers", *path.relative_to(folder).with_suffix("").parts))
        for node in ast.parse(text).body:
            if any("use_experts_implementation" in ast.unparse(d) for d in getattr(node, "decorator_list", ())):
                yield pytest.param(module, node.name, id=node.name)


CLAMPED = "a gating function of its own"  # silu(min(gate, limit)) * clamp(up), without the + 1 of gpt-oss
REFUSED = {
    "DeepseekV4Experts": CLAMPED,
    "DiffusionGemmaTextExperts": "a gate with GELUTanh",
    "Gemma4TextExperts": "a gate with GELUTanh",
    "Glm5NextTextExperts": CLAMPED,
    "HYV4Experts": CLAMPED,
}


CLASSES = list(decorated_classes())


@pytest.mark.parametrize("module, name", CLASSES)
def test_every_experts_class(module, name):
    module = make(getattr(importlib.import_module(module), name))
    assert module.num_experts == E and module.down_proj.numel() == E * H * I
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=f"cumoe: {name} has {REFUSED[name]}.*grouped_mm"):
            module(*make_input())
    else:
        assert_as_eager(module)


def test_survey_is_not_empty():
    names = {parameter.id for parameter in CLASSES}
    assert len(names) > 30 and names > {"MixtralExperts", "GptOssExperts", "NemotronHExperts"}


three_classes = pytest.mark.parametrize("experts_class", [MixtralExperts, GptOssExperts, NemotronHExperts])


@three_classes
def test_indices_of_no_expert(experts_class):
    """They contribute nothing, whatever stands in their rows; eager has weight 0 for them."""
    module = make(experts_class)
    x, index, weight = make_input()
    away = torch.rand(T, K) < 0.4
    away[3] = True
    sane = index.masked_fill(away, 0), weight.masked_fill(away, 0)
    theirs = run(module, "eager", x, *sane)
    x[3] = torch.nan
    ours = run(module, "cumoe", x, index.masked_fill(away, E), weight.masked_fill(away, torch.nan))
    theirs[2] = theirs[2].masked_fill(away, 0)
    for a, b in zip(ours, theirs):
        assert_near(a, b)
    assert (ours[0][3] == 0).all() and (ours[1][3] == 0).all() and (ours[2][away] == 0).all()


def test_expert_parallelism():
    """Two ranks as transformers makes them: local ids, other experts = the number of local ones."""
    module = make(GptOssExperts)
    x, index, weight = make_input()
    whole = run(module, "cumoe", x, index, weight)
    sums, split = 0, []
    for mine in slice(0, 2), slice(2, E):
        rank = copy.deepcopy(module)
        for name, parameter in module.named_parameters():
            setattr(rank, name, torch.nn.Parameter(parameter.detach()[mine].clone()))
        rank.num_experts = len(rank.down_proj)
        local = index - mine.start
        local = local.masked_fill((local < 0) | (local >= rank.num_experts), rank.num_experts)
        y, dx, dweight, *gradients = run(rank, "cumoe", x, local, weight.masked_fill(local == rank.num_experts, 0))
        sums = [a + b for a, b in zip(sums, (y, dx, dweight))] if sums else [y, dx, dweight]
        split.append(gradients)
    for ours, exact in zip([*sums, *(torch.cat(parts) for parts in zip(*split))], whole):
        assert_near(ours, exact)


@three_classes
def test_weights_are_not_copied(experts_class):
    module = make(experts_class)
    pointers = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
    read, views = [], ("cumoe.", "aten.transpose.", "aten.detach.", "aten.view.", "aten.t.")

    def told(function, arguments):
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.data_ptr() in pointers:
                assert str(function).startswith(views)
                if str(function).startswith("cumoe."):
                    read.append(argument.data_ptr())

    given = make_input()
    with Operators(told):
        y = module(*given)
        y.sum().backward()
    assert set(read) == pointers.keys()
    for parameter in module.parameters():
        assert parameter.grad.stride() == parameter.stride() and parameter.data_ptr() in pointers


def test_no_tokens():
    x, index, weight = make_input()
    for y in (make(GptOssExperts)(x[:0], index[:0], weight[:0]), make(MixtralExperts)(x[:0], index[:0], weight[:0])):
        assert y.shape == (0, H)


def test_other_types():
    """Norms in float32 beside weights in bfloat16, and autocast; what comes back has the type of the tokens."""
    module = make(MixtralExperts)
    x, index, weight = make_input()
    exact = module(x, index, weight)
    half = copy.deepcopy(module).bfloat16()
    y = half(x, index, weight)
    assert y.dtype == torch.float32 and (y - exact).norm() < 0.01 * exact.norm()
    y = half(x.bfloat16(), index, weight)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.01 * exact.norm()
    for experts in module, half:
        with torch.autocast("cpu", torch.bfloat16):
            y = experts(x, index, weight)
        assert y.dtype == torch.float32 and 0 < (y - exact).norm() < 0.01 * exact.norm()
    assert_near(module.double()(x, index, weight), exact)


# Gating functions.


@pytest.mark.parametrize("experts_class, act", [
    *((MixtralExperts, act) for act in ("silu", "gelu", "gelu_python")),
    *((NemotronHExperts, act) for act in ("relu", "silu", "gelu", "relu2", "gelu_new", "gelu_pytorch_tanh")),
])
def test_activation(experts_class, act):
    assert_as_eager(make(experts_class, **{act_name(experts_class): act}))


@pytest.mark.parametrize("experts_class, act, why", [
    *((MixtralExperts, act, f"a gate with {type(ACT2FN[act]).__name__}, which cumoe has no kernel for")
      for act in ("relu", "gelu_new", "quick_gelu", "gelu_10", "mish", "linear", "tanh", "sigmoid")),
    *((NemotronHExperts, act, f"the activation {type(ACT2FN[act]).__name__}, which cumoe has no kernel for")
      for act in ("quick_gelu", "gelu_10", "mish", "linear", "tanh", "relu6", "leaky_relu")),
    (MixtralExperts, "xielu", "a gate with XIELUActivation, which has parameters"),
])
def test_unknown_activation(experts_class, act, why):
    with pytest.raises(NotImplementedError, match=f"cumoe: {experts_class.__name__} has {why}"):
        make(experts_class, **{act_name(experts_class): act})(*make_input())


def act_name(experts_class):
    return "mlp_hidden_act" if experts_class is NemotronHExperts else "hidden_act"


class StraightThrough(torch.autograd.Function):
    """silu with another gradient."""

    @staticmethod
    def forward(ctx, z):
        return torch.nn.functional.silu(z)

    @staticmethod
    def backward(ctx, dy):
        return dy


SILU = torch.nn.functional.silu
STRANGE = {
    "clamped far out": lambda self, z: SILU(z.chunk(2, -1)[0]).clamp(max=1e4) * z.chunk(2, -1)[1],
    "an offset": lambda self, z: SILU(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1] + 0.1,
    "a factor": lambda self, z: 1.001 * SILU(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1],
    "a channel is off": lambda self, z: SILU(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1] * (torch.arange(I) != 6),
    "channels are mixed": lambda self, z: SILU(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1].flip(-1),
    "other gradient": lambda self, z: StraightThrough.apply(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1],
    "random": lambda self, z: torch.nn.functional.dropout(SILU(z.chunk(2, -1)[0]), 0.1) * z.chunk(2, -1)[1],
    "other size": lambda self, z: z,
    "in place": lambda self, z: z.zero_().chunk(2, -1)[0],
    "raises": lambda self, z: z.nonsense(),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_gating_function(name, monkeypatch):
    monkeypatch.setattr(MixtralExperts, "_apply_gate", STRANGE[name])
    with pytest.raises(NotImplementedError, match="cumoe: MixtralExperts has a gating function of its own"):
        make(MixtralExperts)(*make_input())


def halves_swapped(self, z):
    up, gate = z.chunk(2, -1)
    return torch.nn.functional.gelu(gate) * up


def interleaved(self, z):
    return torch.nn.functional.silu(z[..., ::2]) * z[..., 1::2]


@pytest.mark.parametrize("function", [halves_swapped, interleaved])
def test_where_the_halves_stand(function, monkeypatch):
    """The function knows, not a flag."""
    monkeypatch.setattr(MixtralExperts, "_apply_gate", function)
    module = make(MixtralExperts)
    x, index, weight = make_input()
    with torch.no_grad():
        hidden = [function(module, x @ w.T) @ d.T for w, d in zip(module.gate_up_proj, module.down_proj)]
        exact = sum(weight[:, [k]] * torch.stack(hidden)[index[:, k], torch.arange(T)] for k in range(K))
    assert_near(module(x, index, weight).detach(), exact)


def test_changes_are_noticed():
    module = make(GptOssExperts)
    assert_as_eager(module)
    module.limit = 2.5
    assert_as_eager(module)
    module.alpha = 0.6
    assert_as_eager(module)
    module = make(MixtralExperts)
    assert_as_eager(module)
    module.act_fn = ACT2FN["gelu"]
    assert_as_eager(module)
    module._apply_gate = lambda z: z.chunk(2, -1)[0]
    with pytest.raises(NotImplementedError, match="_apply_gate"):
        module(*make_input())


def test_a_module_is_asked_once(monkeypatch):
    """For each mode, as dropout would show in one alone."""
    asked = []
    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, z: asked.append(z) or interleaved(self, z))
    module, given = make(MixtralExperts), make_input()
    module(*given)
    first = len(asked)
    module(*given)
    assert len(asked) == first > 0
    module.eval()(*given)
    assert len(asked) == 2 * first


def test_deepcopy_pickle_meta():
    module, given = make(GptOssExperts), make_input()
    before = set(vars(module))
    y = module(*given)
    assert set(vars(module)) == before
    stored = pickle.dumps(module)
    assert b"cumoe." not in stored  # whoever loads it need not have cumoe
    for same in copy.deepcopy(module), pickle.loads(stored):
        assert torch.equal(same(*given), y)
    there = copy.deepcopy(module).to("meta")(*(tensor.to("meta") for tensor in given))
    assert there.device.type == "meta" and there.shape == (T, H)


def test_inference_mode_first():
    """What was asked there serves for training."""
    module, given = make(GptOssExperts), make_input()
    with torch.inference_mode():
        module(*given)
    assert_as_eager(module, given=given)


# Compilers.


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@three_classes
def test_compile(experts_class):
    torch.compiler.reset()
    module = make(experts_class)
    assert_as_eager(module, compiled(module))


def test_compile_asks_every_module():
    """One compiled forward() serves all modules of a class, but not with the formula of another."""
    torch.compiler.reset()
    first, second, third = (make(GptOssExperts) for _ in range(3))
    second.limit, third.alpha = 2.5, 0.6
    for module in first, second, third, first:
        assert_as_eager(module, compiled(module))
    first.limit = 1.5
    assert_as_eager(first, compiled(first))
    for act in "silu", "gelu", "silu":
        module = make(MixtralExperts, hidden_act=act)
        assert_as_eager(module, compiled(module))


def test_compile_shows_why_not():
    no_kernel, odd = make(MixtralExperts, hidden_act="relu"), make(MixtralExperts)
    odd.num_experts = 4
    for module, why in (no_kernel, "a gate with ReLU"), (odd, "num_experts = 4"):
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"cumoe: MixtralExperts has {why}"):
            compiled(module)(*make_input())
        with pytest.raises(NotImplementedError, match=f"cumoe: MixtralExperts has {why}"):
            torch.compile(module, backend="aot_eager")(*make_input())


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = make(GptOssExperts), make(GptOssExperts)
        self.second.limit = 2.5

    def forward(self, x, index, weight):
        return self.second(self.first(x, index, weight), index, weight)


def test_compile_two_in_one_graph_with_any_number_of_tokens():
    torch.compiler.reset()
    module = Pair()
    call = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    x, index, weight = make_input()
    for tokens in T, 5, 2:
        given = x[:tokens], index[:tokens], weight[:tokens]
        assert torch.equal(call(*given), module(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    module, given = Pair(), make_input()
    program = torch.export.export(module, given, strict=strict)
    assert torch.equal(program.module()(*given), module(*given))


# What is refused.


def test_arrays_that_are_refused():
    def refused(why, change):
        module = make(MixtralExperts)
        change(module)
        with pytest.raises(NotImplementedError, match=f"cumoe: MixtralExperts has {why}"):
            module(*make_input())

    class Sharded(torch.Tensor):
        __tensor_flatten__ = None

    def shard(module):
        module._parameters["down_proj"] = torch.nn.Parameter(module.down_proj.detach().as_subclass(Sharded))

    def quantize(module):
        module.requires_grad_(False).gate_up_proj.data = module.gate_up_proj.to(torch.float8_e4m3fn)

    refused("num_experts = 4, but arrays of 5 experts", lambda module: setattr(module, "num_experts", 4))
    refused("down_proj as a Sharded", shard)
    refused("gate_up_proj of type torch.float8_e4m3fn", quantize)
    refused("no gate_up_proj_bias", lambda module: setattr(module, "has_bias", True))
    refused("scale, which cumoe does not know", lambda module: module.register_buffer("scale", torch.ones(E)))
    refused("shared.weight, ", lambda module: module.add_module("shared", torch.nn.Linear(2, 2)))


def test_parametrized_weights():
    """As PEFT adds its matrices."""
    class Plus(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(E, 2 * I, 2)), torch.nn.Parameter(torch.randn(E, 2, H))

        def forward(self, w):
            return w + self.a @ self.b

    module = make(MixtralExperts)
    torch.nn.utils.parametrize.register_parametrization(module, "gate_up_proj", Plus())
    assert len(list(module.parameters())) == 4
    assert_as_eager(module)


def test_quantized_classes_know_the_name():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    assert "cumoe" in ALL_FP8_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("version", ["4.57.1", "5.6.2", "5.6.0.dev0"])
def test_old_transformers(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"cumoe needs transformers 5.7 or later, but this is {version}: pip"):
        cumoe.register_transformers()


def test_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="cumoe needs transformers 5.7 or later, which cannot be imported .*: pip"):
        cumoe.register_transformers()


def test_other_name():
    cumoe.register_transformers("cumoe_too")
    module, given = make(MixtralExperts), make_input()
    assert torch.equal(run(module, "cumoe_too", *given)[0], run(module, "cumoe", *given)[0])
