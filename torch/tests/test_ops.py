"""The operators: PyTorch's own checks, gradients by differences, layouts, and what is refused."""

import collections
import mmap

import pytest
import torch
from torch.autograd import forward_ad, gradcheck

import cumoe
from cases import DTYPES, GATES, assert_same_bits, every_gate, make_moe
from cumoe import functional as F
from cumoe import ops

ARRAYS = ops.ARRAYS
T, H, I, E, K = 7, 10, 12, 8, 2
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# Slow, and it compares values, so that nothing may be unwritten. test_modules.py compiles every gate.
COMPILED = (*CHECKS, "test_aot_dispatch_dynamic")


def noise():
    return torch.tensor([11, 5])


def moe_arguments(moe, x, training, mask=None):
    arrays = [getattr(moe, name) for name in ARRAYS]
    arrays = [None if array is None else array.detach() for array in arrays]
    call = noise() if training and "noisy" in moe.config.gate else None
    return (x, *arrays, mask, call, moe.config.numbers, training)


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_opcheck_moe(gate, training):
    moe = make_moe(gate, bias=True)
    arguments = moe_arguments(moe, torch.randn(T, H, dtype=torch.float64), training, torch.arange(T) != 3)
    compiled = gate in ("noisy_topk", "softmax")  # choices of K experts, and of all
    torch.library.opcheck(torch.ops.cumoe.moe, (*arguments, False), test_utils=COMPILED if compiled else CHECKS)
    for operator in torch.ops.cumoe.moe, torch.ops.cumoe.moe_forward:
        torch.library.opcheck(operator, (*arguments, True), test_utils=CHECKS)
    y, losses, saved, *_ = torch.ops.cumoe.moe(*arguments, True)
    x, arrays, (mask, call, *rest) = arguments[0], arguments[1:1 + len(ARRAYS)], arguments[1 + len(ARRAYS):]
    wanted = [True] + [array is not None and name != "gate_bias" for name, array in zip(ARRAYS, arrays)] + [False]
    torch.library.opcheck(torch.ops.cumoe.moe_backward,
                          (torch.ones_like(y), torch.ones_like(losses), saved, x, *arrays, mask, *rest, False, wanted),
                          test_utils=COMPILED if compiled else CHECKS)


def expert_arrays(dtype=torch.float64, glu="separate", transposed=False, requires_grad=False, hidden=H, inner=I):
    """Arguments of functional.experts beside x, index, weight."""
    torch.manual_seed(3)
    rows = inner if glu == "separate" else 2 * inner

    def matrix(*size):
        made = torch.randn(E, size[1], size[0], dtype=dtype) if transposed else torch.randn(E, *size, dtype=dtype)
        made.requires_grad_(requires_grad)
        return made.transpose(1, 2) if transposed else made

    arrays, biases = dict(w_up=matrix(rows, hidden), w_down=matrix(hidden, inner)), dict(b_up=rows, b_down=hidden)
    if glu == "separate":
        arrays["w_glu"], biases["b_glu"] = matrix(inner, hidden), inner
    return arrays | {name: torch.randn(E, n, dtype=dtype, requires_grad=requires_grad) for name, n in biases.items()}


def routing(dtype=torch.float64, tokens=T, hidden=H):
    torch.manual_seed(4)
    index = torch.randint(-1, E + 1, (tokens, K))
    return torch.randn(tokens, hidden, dtype=dtype), index, torch.rand(tokens, K, dtype=dtype)


def expert_arguments(arrays, x, index, weight):
    config = cumoe.Config(H, I, E, K, "external", "swiglu")
    return (x, index, weight, *(arrays.get(name) for name in ARRAYS[6:]), config.numbers)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_experts(transposed):
    arguments = expert_arguments(expert_arrays(transposed=transposed), *routing())
    torch.library.opcheck(torch.ops.cumoe.experts, (*arguments, False), test_utils=COMPILED)
    for operator in torch.ops.cumoe.experts, torch.ops.cumoe.experts_forward:
        torch.library.opcheck(operator, (*arguments, True), test_utils=CHECKS)
    y, saved = torch.ops.cumoe.experts(*arguments, True)
    x, index, weight, *rest = arguments
    wanted = [True] + [False] * 6 + [True] * 6 + [True]
    torch.library.opcheck(torch.ops.cumoe.experts_backward, (torch.ones_like(y), saved, x, weight, *rest, wanted),
                          test_utils=COMPILED)


def test_opcheck_gate_bias_update():
    torch.library.opcheck(torch.ops.cumoe.gate_bias_update,
                          (torch.zeros(4), torch.tensor([1, 2, 3, 4], dtype=torch.int32), 0.5))


def test_gate_bias_update_is_noticed():
    """By the version counter, and in a view with gaps."""
    bias, count = torch.zeros(4, 2), torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    before = bias._version
    torch.ops.cumoe.gate_bias_update(bias[:, 0], count, 0.5)
    assert bias._version == before + 1
    assert torch.equal(bias, torch.tensor([[0.5, 0], [0.5, 0], [-0.5, 0], [-0.5, 0]]))


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_moe(gate, training):
    """Of y and of every loss, with regard to everything that has a gradient."""
    moe = make_moe(gate, bias=True, hidden=5, inner=3)
    names = [name for name, _ in moe.named_parameters()]
    x = torch.randn(T, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(T) != 3
    rest = dict(token_mask=mask, call=noise(), training=training)
    if moe.gate_bias is not None:
        rest["gate_bias"] = moe.gate_bias

    def function(x, *values):
        out = F.moe(x, moe.config, **dict(zip(names, values)), **rest)
        # L_batchwise moves the thresholds alone (App. F), which differences with regard to x do not know.
        losses = out.losses[:4] if gate == "balanced" else out.losses
        return out.y, losses

    values = [parameter.detach().requires_grad_() for parameter in moe.parameters()]
    # Losses are made of sums in fixed point, in units of 2^-40: differences of less than 1e-5 would see the units.
    assert gradcheck(function, (x, *values), eps=2e-5, atol=1e-6, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.parametrize("glu", ["separate", "first", "last", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_experts(glu, transposed):
    arrays = expert_arrays(glu=glu, transposed=transposed, requires_grad=True, hidden=5, inner=3)
    x, index, weight = routing(hidden=5)
    names = list(arrays)

    def function(x, weight, *values):
        return F.experts(x, index, weight, **dict(zip(names, values)), activation="swiglu", glu=glu)

    values = [value.detach().requires_grad_() for value in arrays.values()]
    assert gradcheck(function, (x.requires_grad_(), weight.requires_grad_(), *values), nondet_tol=0.0)


@pytest.mark.parametrize("activation", cumoe.config.ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck_activations(activation, recompute):
    inner = H if activation == "identity" else I
    experts = cumoe.Experts(H, inner, E, activation=activation, bias=True, recompute=recompute, dtype=torch.float64)
    x, index, weight = routing()
    assert gradcheck(lambda x, weight: experts(x, index, weight), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_layout_and_type_of_parameters(dtype):
    arrays = expert_arrays(dtype, transposed=True, requires_grad=True)
    x, index, weight = routing(dtype)
    leaves = {name: array if array.is_leaf else array._base for name, array in arrays.items()}
    F.experts(x, index, weight, **arrays, activation="swiglu").sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == dtype and leaf.grad.stride() == leaf.stride(), name


def mapped(arrays, path, offset):
    """The same arrays in a file that is mapped, `offset` bytes behind a multiple of 16; transposed ones as they are."""
    with open(path, "wb+") as file:
        places = []
        for array in arrays.values():
            base = array if array.is_contiguous() else array.transpose(1, 2)
            file.write(bytes(-file.tell() % 16 + offset))
            places.append(file.tell())
            file.write(base.flatten().view(torch.uint8).numpy().tobytes())
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    moved = {}
    for (name, array), place in zip(arrays.items(), places):
        flat = torch.frombuffer(memory, dtype=array.dtype, count=array.numel(), offset=place)
        assert flat.data_ptr() % 16 == offset
        moved[name] = flat.as_strided(array.shape, array.stride()).requires_grad_()
    return moved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_arrays_at_any_address(dtype, transposed, tmp_path):
    """As where a file is mapped: read where they are, and copied only if they do not stand at a multiple of their
    elements. The bits are the same."""
    arrays = expert_arrays(dtype, transposed=transposed)
    x, index, weight = routing(dtype)

    def run(offset):
        moved = mapped(arrays, tmp_path / str(offset), offset)
        with torch.autograd.profiler.profile() as profile:
            y = F.experts(x, index, weight, **moved, activation="swiglu")
            gradients = torch.autograd.grad(y.sum(), list(moved.values()))
        return collections.Counter(event.name for event in profile.function_events), (y, *gradients)

    calls, expected = run(0)
    for offset in dtype.itemsize, 16 - dtype.itemsize, 1:
        other_calls, results = run(offset)
        assert other_calls["aten::copy_"] - calls["aten::copy_"] == (2 * len(arrays) if offset == 1 else 0)
        assert offset == 1 or other_calls == calls
        for a, b in zip(results, expected):
            assert_same_bits(a, b)


@every_gate
def test_gates_at_any_address(gate):
    """Copied on the CPU, too: they are small, and the library wants them at a multiple of 16 bytes."""
    moe = make_moe(gate, torch.float32)
    x, results = torch.randn(T, H), []
    arrays = {name: getattr(moe, name).detach() for name in ARRAYS if getattr(moe, name) is not None}
    for offset in 0, 1:
        moved = {name: torch.empty(array.numel() + offset)[offset:].view(array.shape).copy_(array).requires_grad_()
                 for name, array in arrays.items()}
        leaves = [array for name, array in moved.items() if name != "gate_bias"]
        y = F.moe(x, moe.config, **moved).y
        results.append((y, *torch.autograd.grad(y.sum(), leaves, materialize_grads=True)))
    for a, b in zip(*results):
        assert_same_bits(a, b)


@every_gate
def test_unwanted_gradients_change_nothing(gate):
    """The same bits whether one gradient is asked for, or all."""
    moe = make_moe(gate)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = moe(x)
    everything = torch.autograd.grad(out.y.square().sum() + out.loss, [x, *moe.parameters()])
    for wanted, value in zip([x, *moe.parameters()], everything):
        torch.manual_seed(1)
        out = moe(x)
        assert_same_bits(torch.autograd.grad(out.y.square().sum() + out.loss, wanted)[0], value)


@pytest.mark.parametrize("only", ["y", "losses"])
def test_one_output_alone(only):
    moe = make_moe("noisy_topk")
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = moe(x)
    both = torch.autograd.grad((out.y.sum(), out.losses.sum()), [x], retain_graph=True)
    one = {name: torch.autograd.grad(getattr(out, name).sum(), x, retain_graph=True)[0] for name in ("y", "losses")}
    torch.testing.assert_close(one["y"] + one["losses"], both[0])
    assert one[only].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["strided rows", "strided columns", "unaligned", "transposed", "expanded"])
def test_layouts_of_x(dtype, layout):
    """Rows at a distance are read where they are, everything else is copied; the bits are the same."""
    torch.manual_seed(5)
    x = {"strided rows": lambda: torch.randn(T, H + 6, dtype=dtype)[:, :H],
         "strided columns": lambda: torch.randn(T, 2 * H, dtype=dtype)[:, ::2],
         "unaligned": lambda: torch.randn(T * H + 1, dtype=dtype)[1:].view(T, H),
         "transposed": lambda: torch.randn(H, T, dtype=dtype).t(),
         "expanded": lambda: torch.randn(1, H, dtype=dtype).expand(T, H)}[layout]()
    moe = make_moe("softmax_topk", dtype)
    results = []
    for value in x, x.contiguous().clone():
        value = value.detach().requires_grad_()
        out = moe(value)
        gradient = x.detach().clone() if layout == "expanded" else x.detach()
        results.append((out.y, torch.autograd.grad(out.y, value, gradient)[0]))
    for a, b in zip(*results):
        assert_same_bits(a, b)


def test_no_tokens():
    moe = make_moe("noisy_topk")
    x = torch.empty(0, 3, H, dtype=torch.float64, requires_grad=True)
    out = moe(x)
    (out.y.sum() + out.loss).backward()
    assert out.y.shape == (0, 3, H) and x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())
    x, index, weight = routing(tokens=0)
    assert F.experts(x, index, weight, **expert_arrays(), activation="swiglu").shape == (0, H)


def test_shapes_of_tokens():
    """One token, or many in any shape."""
    x, index, weight = routing(tokens=6)
    arrays = expert_arrays()
    y = F.experts(x, index, weight, **arrays, activation="swiglu")
    assert torch.equal(F.experts(x[2], index[2], weight[2], **arrays, activation="swiglu"), y[2])
    shaped = (tensor.view(2, 3, -1) for tensor in (x, index, weight))
    assert torch.equal(F.experts(*shaped, **arrays, activation="swiglu"), y.view(2, 3, -1))


def test_sentinels_contribute_nothing():
    x, index, weight = routing(torch.float32)
    arrays = expert_arrays(torch.float32, requires_grad=True)
    weight = weight.masked_fill((index < 0) | (index >= E), float("nan")).requires_grad_()
    x = x.clone()
    index[2] = E
    x[2] = float("inf")
    x.requires_grad_()
    y = F.experts(x, index, weight, **arrays, activation="swiglu")
    y.sum().backward()
    assert y.isfinite().all() and not y[2].any()
    assert not x.grad[2].any() and not weight.grad[(index < 0) | (index >= E)].any()
    assert all(array.grad.isfinite().all() for array in arrays.values())


def test_index_and_weight_types():
    x, index, weight = routing(torch.bfloat16)
    arrays = expert_arrays(torch.bfloat16)
    y = F.experts(x, index, weight, **arrays, activation="swiglu")
    for other in torch.float32, torch.float64:
        got = weight.to(other).requires_grad_()
        same = F.experts(x, index.to(torch.int32), got, **arrays, activation="swiglu")
        assert_same_bits(y, same.detach())
        same.sum().backward()
        assert got.grad.dtype == other


def test_a_call_of_three_or_four_numbers():
    """The noise of a token hangs on its global number; rows that are not live are left out."""
    moe = make_moe("noisy_topk").train()
    x = torch.randn(2 * T, H, dtype=torch.float64)
    whole = moe(x, call=torch.tensor([11, 5, 0, 2 * T]))
    part = moe(x[T:], call=torch.tensor([11, 5, T, T]))
    assert torch.equal(whole.chosen_expert[T:], part.chosen_expert)
    live = moe(x, call=torch.tensor([11, 5, 0, T]))
    assert torch.equal(whole.chosen_expert[:T], live.chosen_expert[:T]) and (live.chosen_expert[T:] == -1).all()
    assert torch.equal(whole.chosen_expert, moe(x, call=torch.tensor([11, 5])).chosen_expert)
    assert torch.equal(part.chosen_expert, moe(x[T:], call=torch.tensor([11, 5, T])).chosen_expert)


def test_rows_that_are_not_live_are_zero():
    """Nobody writes them, and what autograd gets must not be memory of somebody else."""
    moe = make_moe("noisy_topk").train()
    x = torch.randn(2 * T, H, dtype=torch.float64, requires_grad=True)
    out = moe(x, call=torch.tensor([11, 5, 0, T]))
    (out.y.sum() + out.loss).backward()
    assert not out.y[T:].any() and not x.grad[T:].any() and x.grad[:T].any()


@pytest.mark.parametrize("name", ["w_up", "w_glu", "w_down", "b_up", "b_glu", "b_down"])
def test_one_parameter_alone(name):
    """Whatever else is frozen, its gradient is the same."""
    x, index, weight = routing()
    experts = cumoe.Experts(H, I, E, activation="swiglu", bias=True, dtype=torch.float64)
    experts(x, index, weight).square().sum().backward()
    expected = getattr(experts, name).grad
    experts.zero_grad()
    experts.requires_grad_(False)
    getattr(experts, name).requires_grad_()
    experts(x, index, weight).square().sum().backward()
    assert_same_bits(getattr(experts, name).grad, expected)


def test_one_of_two_matrices_is_copied():
    """They have gaps, which a copy has not, and must have strides in common."""
    x, index, weight = routing(torch.float32)
    w_down, both = torch.randn(E, H, 3), torch.randn(E, 6 + 3, H)
    odd = torch.frombuffer(bytearray(1 + both.nbytes), dtype=torch.float32, offset=1).view(both.shape).copy_(both)
    assert odd.data_ptr() % 4 != 0
    halves = dict(w_up=both[:, :3], w_glu=odd[:, 3:6])
    apart = {name: half.clone() for name, half in halves.items()}
    y = F.experts(x, index, weight, w_down=w_down, activation="swiglu", **halves)
    assert_same_bits(y, F.experts(x, index, weight, w_down=w_down, activation="swiglu", **apart))


def test_identity_has_square_matrices():
    x, index, weight = routing(torch.float32)
    assert cumoe.Experts(H, 2 * H, E, activation="identity").w_down.shape == (E, H, H)
    for inner in H - 2, H + 2:
        with pytest.raises(RuntimeError, match="with identity must be"):
            F.experts(x, index, weight, None, torch.randn(E, H, inner), activation="identity")


def test_autocast():
    moe = make_moe("softmax_topk", torch.float32)
    x = torch.randn(T, H, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
    assert out.y.dtype == torch.bfloat16 and out.losses.dtype == torch.float32
    (out.y.float().sum() + out.loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters()) and x.grad.dtype == torch.float32
    exact = moe(x)
    torch.testing.assert_close(out.y.float(), exact.y, atol=0.05, rtol=0.05)


def test_no_second_gradient():
    moe = make_moe("softmax_topk")
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    arrays = [getattr(moe, name) for name in ARRAYS]
    for y in moe(x).y, torch.ops.cumoe.moe(x, *arrays, None, None, moe.config.numbers, True, True)[0]:
        gradient = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="create_graph=True"):
            gradient.sum().backward()


def test_operators_of_graphs_have_gradients():
    """Those of torch.ops.cumoe.moe and experts, which exported programs call, are those of the functional forms."""
    moe = make_moe("softmax_topk")
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    arrays = [getattr(moe, name) for name in ARRAYS]
    out, wanted = moe(x), [x, *moe.parameters()]
    y, losses, *_ = torch.ops.cumoe.moe(x, *arrays, None, None, moe.config.numbers, True, True)
    for a, b in zip(torch.autograd.grad(y.sum() + losses.sum(), wanted),
                    torch.autograd.grad(out.y.sum() + out.losses.sum(), wanted)):
        assert_same_bits(a, b)
    arrays = expert_arrays(requires_grad=True)
    x, index, weight = routing()
    wanted = [x.requires_grad_(), weight.requires_grad_(), *arrays.values()]
    y, _ = torch.ops.cumoe.experts(*expert_arguments(arrays, x, index, weight), True)
    for a, b in zip(torch.autograd.grad(y.sum(), wanted),
                    torch.autograd.grad(F.experts(x, index, weight, **arrays, activation="swiglu").sum(), wanted)):
        assert_same_bits(a, b)
    y, _ = torch.ops.cumoe.experts(*expert_arguments(arrays, x, index, weight), False)
    with pytest.raises(RuntimeError, match="keep = False, which kept nothing"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused(frozen):
    moe = make_moe("softmax_topk", torch.float32).requires_grad_(not frozen)
    experts = cumoe.Experts(H, I, E).requires_grad_(not frozen)
    x, index, weight = routing(torch.float32)
    for function in (lambda x: moe(x).y), (lambda x: experts(x, index, weight)):
        with forward_ad.dual_level():
            assert function(x).isfinite().all()
            with pytest.raises(RuntimeError, match="cumoe: forward-mode gradients are not supported"):
                function(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(RuntimeError, match="functorch"):  # of PyTorch
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


def test_out_of_memory_is_pytorchs_own():
    """More than any address space has: y, what is kept, and gradients."""
    tokens, inner = 10**7, 4 * 10**6
    x, index, weight = torch.zeros(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64), torch.zeros(tokens, 1)
    with pytest.raises(RuntimeError) as of_pytorch:
        torch.empty(2**47)
    with pytest.raises(RuntimeError) as raised:
        F.experts(x, index, weight, torch.zeros(1, inner, 1), torch.zeros(1, 1, inner))
    assert type(raised.value) is type(of_pytorch.value)
    assert "DefaultCPUAllocator" in str(of_pytorch.value) and "DefaultCPUAllocator" in str(raised.value)
    error = RuntimeError("cumoe: out of memory: cumoe_layer_forward: CUDA device 0: out of memory")  # of the library
    assert type(ops.own_error(error)) is torch.OutOfMemoryError and str(ops.own_error(error)) == str(error)
    error = RuntimeError("cumoe: PyTorch gave no tensor of 8 bytes on cpu")  # which it has by now
    assert ops.own_error(error) is error


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 20, 64])
@pytest.mark.parametrize("max_rows", [0, 32])
def test_what_balanced_keeps(tokens, max_rows):
    """Enough around the number of tokens that has max_rows = 2 a token, and little more than without it."""
    moe = make_moe("balanced", max_rows=max_rows)
    x = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    for training in False, True:
        moe.train(training)
        out = moe(x)
        (out.y.sum() + out.loss).backward()
    sizes = [len(torch.ops.cumoe.moe(*moe_arguments(other, x.detach(), True), True)[2])
             for other in (moe, make_moe("softmax_topk", top_k=2))]
    room = 2 * max(tokens, max_rows / 2, E / 2) / (2 * tokens)  # rows there may be, to those of two a token
    assert sizes[0] < 1.2 * room * sizes[1] + 2048


def test_nothing_unwritten_beside_sums():
    """Rows of five experts are eight numbers apart, in memory that was used before."""
    moe, x = cumoe.MoE(H, I, 5, 2, gate="softmax_topk"), torch.randn(T, H)
    for _ in range(9):
        used = [torch.full((2, 8), torch.nan) for _ in range(99)]
        del used
        sums = moe(x).sums
        assert sums.shape == (2, 8) and not sums[:, 5:].any()


def test_threads_change_no_bits():
    moe = make_moe("noisy_topk", torch.float32)
    x = torch.randn(300, H)
    threads, results = torch.get_num_threads(), []
    try:
        for number in 1, 2, 3:
            torch.set_num_threads(number)
            torch.manual_seed(2)
            out = moe(x)
            results.append((out.y, *torch.autograd.grad(out.y.sum() + out.loss, list(moe.parameters()))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_same_bits(a, b)


REFUSED = {
    "x has 1 dim": lambda a: a.update(x=torch.randn(H)) or "x has 1 dimensions",
    "hidden": lambda a: a.update(x=torch.randn(T, H + 1)) or "w_up has shape",
    "type of w_up": lambda a: a.update(w_up=a["w_up"].double()) or "w_up is Double, but x is Float",
    "shape of w_glu": lambda a: a.update(w_glu=a["w_glu"][:, 1:]) or "w_glu has shape",
    "strides of w_glu": lambda a: a.update(w_glu=a["w_glu"].transpose(1, 2).contiguous().transpose(1, 2)) or "strides",
    "expanded w_up": lambda a: a.update(w_up=a["w_up"][:1].expand(E, I, H)) or "expanded",
    "bias missing": lambda a: a.update(b_up=None) or "b_up",
    "integers": lambda a: a.update(x=torch.ones(T, H, dtype=torch.int8)) or "float64",
    "index type": lambda a: a.update(index=torch.ones(T, K)) or "index_dtype",
    "index shape": lambda a: a.update(index=torch.ones(T - 1, K, dtype=torch.int64)) or "index has shape",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    x, index, weight = routing(torch.float32)
    arguments = dict(x=x, index=index, weight=weight) | expert_arrays(torch.float32)
    sentence = REFUSED[what](arguments)
    values = expert_arguments(arguments, arguments["x"], arguments["index"], arguments["weight"])
    with pytest.raises((RuntimeError, NotImplementedError), match=sentence):
        torch.ops.cumoe.experts(*values, False)


BACKWARD_REFUSED = {
    "dy's type": (lambda a: a.update(dy=a["dy"].float()), "dy is Float, but must be Double"),
    "dy's shape": (lambda a: a.update(dy=a["dy"][1:]), "dy has shape"),
    "dlosses' size": (lambda a: a.update(dlosses=a["dlosses"][:3]), "dlosses has shape"),
    "dlosses' type": (lambda a: a.update(dlosses=a["dlosses"].float()), "dlosses is Float"),
    "saved cut off": (lambda a: a.update(saved=a["saved"][:64].clone()), "saved has 64 bytes"),
    "saved not kept": (lambda a: a.update(saved=a["saved"][:0]), "saved"),
    "saved of another call": (lambda a: a.update(saved=torch.cat([a["saved"]] * 2)), "saved has"),
    "saved's type": (lambda a: a.update(saved=a["saved"].float()), "saved is Float"),
    "saved strided": (lambda a: a.update(saved=a["saved"].repeat_interleave(2)[::2]), "contiguous"),
    "flags": (lambda a: a.update(wanted=[True]), "wanted must have 14 values"),
    "no weight from outside": (lambda a: a.update(wanted=[True] * 14), "no weights from outside"),
    "configuration": (lambda a: a.update(numbers=a["numbers"][:5]), "another version"),
    "mask": (lambda a: a.update(mask=torch.ones(T + 1, dtype=torch.bool)), "token_mask has shape"),
    "mask's type": (lambda a: a.update(mask=torch.ones(T)), "token_mask must be bool"),
}


@pytest.mark.parametrize("what", BACKWARD_REFUSED)
def test_backward_refuses_nonsense(what):
    """Called by hand, as nobody should: a sentence, and nothing is read where there is nothing."""
    moe = make_moe("noisy_topk")
    x, *arrays, mask, call, numbers, training = moe_arguments(moe, torch.randn(T, H, dtype=torch.float64), True)
    y, losses, saved, *_ = torch.ops.cumoe.moe(x, *arrays, mask, call, numbers, training, True)
    a = dict(dy=torch.ones_like(y), dlosses=torch.ones_like(losses), saved=saved, mask=mask, numbers=numbers,
             wanted=[True] * 13 + [False])
    change, sentence = BACKWARD_REFUSED[what]
    change(a)
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.cumoe.moe_backward(a["dy"], a["dlosses"], a["saved"], x, *arrays, a["mask"], a["numbers"],
                                     training, False, a["wanted"])


@pytest.mark.parametrize("wrong, sentence", [
    (dict(activation="tanh"), "activation = 'tanh', but must be one of relu, swiglu"),
    (dict(glu="middle"), "glu = 'middle'"),
    (dict(compute="fp8"), "compute = 'fp8'"),
])
def test_refused_names(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        F.experts(*routing(), **expert_arrays() | wrong)


@pytest.mark.parametrize("numbers, sentence", [
    (dict(noise_stream=2**32), "noise_stream = 4294967296, but must be an integer in 0..4294967295"),
    (dict(noise_stream=-1), "noise_stream = -1, but must be an integer in 0..4294967295"),
    (dict(top_k=2.5), "top_k = 2.5, but must be an integer"),
    (dict(gate="balanced", max_rows=2**31), "max_rows = 2147483648, but must be an integer in -2147483648..2147483647"),
])
def test_refused_numbers(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        cumoe.MoE(H, I, E, **dict(top_k=2) | numbers)


@pytest.mark.parametrize("place", [0, 1, 2, 10])  # gate, activation, placement, compute
def test_numbers_of_names_are_not_cut_off(place):
    moe = make_moe("softmax_topk")
    x, *arrays, mask, call, numbers, training = moe_arguments(moe, torch.randn(T, H, dtype=torch.float64), False)
    numbers = [*numbers]
    numbers[place] += 2**32
    with pytest.raises(RuntimeError, match="but must be an integer in -2147483648..2147483647"):
        torch.ops.cumoe.moe(x, *arrays, mask, call, numbers, training, False)


def test_gate_arrays_of_integers_are_refused():
    moe = make_moe("sigmoid_topk", torch.float32)
    for name, kind in ("w_gate", torch.int64), ("gate_bias", torch.int32), ("w_gate", torch.complex64):
        arrays = dict(moe.named_parameters()) | dict(moe.named_buffers())
        arrays[name] = arrays[name].detach().to(kind)
        with pytest.raises(RuntimeError, match=f"cumoe: {name} is .*, but must be Double, Float, BFloat16 or Half"):
            F.moe(torch.randn(T, H), moe.config, **arrays)


def test_refused_calls():
    moe = make_moe("noisy_topk")
    x = torch.randn(T, H, dtype=torch.float64)
    for call in torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3, 4, 5]):
        with pytest.raises(RuntimeError, match="call must be int64 with 2 elements"):
            moe(x, call=call)
    with pytest.raises(ValueError, match="token_mask has shape"):
        moe(x, token_mask=torch.ones(T + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="last size must be 10"):
        moe(torch.randn(T, H + 1, dtype=torch.float64))
