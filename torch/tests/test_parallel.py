"""Ranks that share experts: processes over gloo (rank.py) against one that has all experts."""

import copy
import functools
import os
import pathlib
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import cumoe
import rank as alone
import reference
from cases import assert_same_bits, gradients, make_moe

HERE = pathlib.Path(__file__).resolve().parent
COUNTS = [2, 3]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank of a number of ranks found: ranks(2)[rank][name of a function of rank.py]."""
    found = {}

    def run(count):
        if count not in found:
            folder = tmp_path_factory.mktemp(f"ranks{count}")
            processes = [subprocess.Popen([sys.executable, HERE / "rank.py", str(r), str(count), folder],
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                         for r in range(count)]
            said = [process.communicate(timeout=200)[0] for process in processes]
            for process, words in zip(processes, said):
                assert process.returncode == 0, words
            found[count] = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(count)]
        return found[count]

    return run


@pytest.fixture(scope="module")
def ep(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("one") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    group = cumoe.ExpertParallel(timeout=20)
    yield group
    group.close()
    dist.destroy_process_group()


def whole(moe, x, **arguments):
    """step() of rank.py for a module that has all experts."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = moe(x, **arguments)
    (out.y.float().square().sum() + out.loss).backward()
    return SimpleNamespace(out=out, x=x, gradients=gradients(moe))


def joined(parts):
    return torch.cat([part for part in parts])


def check_gradients(found, expected, limit):
    """Of experts the bits, each rank its own; of gates the same on every rank, and near."""
    for name, gradient in expected.items():
        parts = [one[name] for one in found]
        if gradient.dim() == 3 or name[:2] == "b_":
            assert_same_bits(joined(parts), gradient)
        else:
            for part in parts:
                assert_same_bits(part, parts[0])
                assert (part - gradient).abs().max() <= limit * (1 + gradient.abs().max()), name


def check_step(found, expected, limit=1e-5):
    assert_same_bits(joined(one["y"] for one in found), expected.out.y.detach())
    assert_same_bits(joined(one["dx"] for one in found), expected.x.grad)
    assert_same_bits(joined(one["chosen"] for one in found), expected.out.chosen_expert)
    statistics = expected.out.statistics()._asdict()
    for one in found:
        assert_same_bits(one["losses"], found[0]["losses"])
        assert_same_bits(one["losses"][:2], expected.out.losses[:2].detach())  # importance and load
        torch.testing.assert_close(one["losses"], expected.out.losses.detach(), rtol=limit, atol=limit)
        assert_same_bits(one["count"], expected.out.expert_count)
        assert one["statistics"] == statistics and statistics["exchange_overflow"] == 0
    check_gradients([one["gradients"] for one in found], expected.gradients, limit)


def of(found, name):
    return [one[name] for one in found]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("gate", alone.EVERY_GATE)
def test_the_bits_of_one_rank(ranks, count, gate):
    """Exact; tokens shared out unevenly, of three ranks one without any; 8 experts of three ranks."""
    expected = whole(make_moe(gate, torch.float32), alone.batch())
    check_step(of(of(ranks(count), "gates"), gate), expected)


@pytest.mark.parametrize("count", COUNTS)
def test_with_a_capacity(ranks, count):
    expected = whole(make_moe("noisy_topk", torch.bfloat16, bias=True), alone.batch(torch.bfloat16))
    check_step(of(ranks(count), "bounded"), expected)


@pytest.mark.parametrize("count", COUNTS)
def test_overflow_is_counted_and_dropped(ranks, count):
    """Of all rows that a rank sends another (or itself) one is left: what a token loses, its y loses."""
    moe, x = make_moe("softmax_topk", torch.float32), alone.batch()
    expected, found = whole(moe, x), of(ranks(count), "overflow")
    tokens = alone.TOKENS[count]
    bounds = [8 * r // count for r in range(count + 1)]
    with torch.no_grad():
        for one, own, index, weight in zip(found, x.split(tokens), expected.out.chosen_expert.split(tokens),
                                           expected.out.chosen_weight.split(tokens)):
            index, dropped = index.clone(), 0
            for first, last in zip(bounds, bounds[1:]):
                rows = sorted((e, t, k) for t, row in enumerate(index.tolist()) for k, e in enumerate(row)
                              if first <= e < last)
                for _, t, k in rows[1:]:
                    index[t, k], dropped = -1, dropped + 1
            assert one["statistics"]["exchange_overflow"] == dropped and one["statistics"]["rows"] == 27
            y = cumoe.functional.experts(own, index, weight, moe.w_up, moe.w_down, w_glu=moe.w_glu, activation="swiglu")
            torch.testing.assert_close(one["y"], y, rtol=1e-5, atol=1e-6)
    assert sum(one["statistics"]["exchange_overflow"] for one in found) > 0


@pytest.mark.parametrize("count", COUNTS)
def test_against_the_formulas(ranks, count):
    """All ranks together against the float64 statement in reference.py, which has never heard of ranks."""
    moe, found = make_moe("noisy_topk"), of(ranks(count), "reference")
    weights = {name: value.detach().clone().requires_grad_() for name, value in moe.named_parameters()}
    x = alone.batch(torch.float64).requires_grad_()
    theirs = reference.moe(x, weights, moe.config, seed=3, offset=4)
    (theirs.y.square().sum() + 0.1 * theirs.losses[:5].sum()).backward()
    torch.testing.assert_close(joined(of(found, "y")), theirs.y.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(joined(of(found, "dx")), x.grad, rtol=1e-5, atol=1e-5)
    for one in found:
        torch.testing.assert_close(one["losses"], theirs.losses.detach(), rtol=1e-6, atol=1e-6)
    for name, value in weights.items():
        parts = of(of(found, "gradients"), name)
        ours = joined(parts) if value.dim() == 3 else parts[0]
        torch.testing.assert_close(ours, value.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_padding(ranks, count):
    mask = torch.arange(9) % 3 != 0
    check_step(of(ranks(count), "masked"), whole(make_moe("noisy_topk"), alone.batch(torch.float64), token_mask=mask))


@pytest.mark.parametrize("count", COUNTS)
def test_external_routing(ranks, count):
    experts, (index, weight), found = alone.make_experts(), alone.external(), of(ranks(count), "external")
    x, weight = alone.batch().requires_grad_(), weight.requires_grad_()
    y = experts(x, index, weight)
    y.square().sum().backward()
    for name, value in dict(y=y.detach(), again=y.detach(), dx=x.grad, dweight=weight.grad).items():
        assert_same_bits(joined(of(found, name)), value)
    check_gradients(of(found, "gradients"), gradients(experts), 0)


@pytest.mark.parametrize("count", COUNTS)
def test_several_layers_and_calls_in_flight(ranks, count):
    first, second = (make_moe(gate, torch.float32) for gate in ("noisy_topk", "hierarchical"))
    x, found = alone.batch().requires_grad_(), of(ranks(count), "several")
    for i, y in enumerate(alone.several(first, second, x)):
        assert_same_bits(joined(one["y"][i] for one in found), y)
    assert_same_bits(joined(of(found, "dx")), x.grad)
    for i, moe in enumerate((first, second)):
        own = {name: value for name, value in gradients(moe).items() if name in moe.expert_names()}
        check_gradients([one["gradients"][i] for one in found], own, 0)


def test_initial_values(ranks, ep):
    """Those of rank 0's generator, for any number of ranks; gates alike everywhere."""
    torch.manual_seed(5)
    moe = cumoe.MoE(alone.H, 12, alone.EXPERTS, 2, gate="softmax_topk", ep=ep)
    for name, value in moe.state_dict().items():
        for count in COUNTS:
            parts = of(of(ranks(count), "initial_values"), name)
            for part in parts if name == "w_gate" else [joined(parts)]:
                assert_same_bits(part, value)
    assert abs(moe.w_gate.std() - 0.02) < 0.005 and abs(moe.w_down.std() * 12**0.5 - 1) < 0.1
    assert len({row.sum().item() for row in moe.w_up}) == alone.EXPERTS


@pytest.mark.parametrize("count", COUNTS)
def test_ddp(ranks, count):
    """The gradients of one process for the mean over ranks, all parameters, with DDP and without."""
    model, found = alone.Model(make_moe("softmax_topk", torch.float32)), of(ranks(count), "ddp")
    task, loss = model(alone.batch()[:3 * count])
    (task + loss).backward()
    names = [f"moe.{name}" for name in model.moe.expert_names()]
    for name, gradient in gradients(model).items():
        for way in 0, 1:
            parts = [one["gradients"][way][name] for one in found]
            ours = joined(parts) if name in names else parts[-1]
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6, msg=f"{name} {way}")
    assert found[0]["excluded"] == names and len(names) == 3


# Failures.


@pytest.mark.parametrize("count", COUNTS)
def test_a_config_that_differs(ranks, count):
    for sentence, total in of(ranks(count), "config_that_differs"):
        assert sentence == ("cumoe_layer_create: config.hidden_size of rank 1 is not that of rank 0, but must be the "
                            "same")
        assert total == count * (count + 1) / 2


def told(found, sentence, longest):
    said, seconds = found
    assert re.search(sentence, said) and seconds < longest, found


@pytest.mark.parametrize("count", COUNTS)
def test_failures_are_told_in_time(ranks, count):
    found = ranks(count)
    for r in range(count):
        told(found[r]["another_call"], "rank [01] makes another call, or with other sizes", 2)
        told(found[r]["leave"], "the group of ranks is closed" if r == 1 else "rank 1 has left or failed: ", 2)
        if r != 1:
            backward, later, making = found[r]["die"]
            told(backward, "rank 1 has left or failed: ", 2)
            told(later, re.escape(backward[0]), 1)
            told(making, "a rank did not come in 1 s, or failed: ", 5)


def test_a_late_rank(ranks):
    for r, one in enumerate(ranks(3)):
        told(one["late"], "rank 0 has left" if r == 1 else "rank 1 did not come in time", alone.SHORT + 2)


def test_abort(ranks):
    """At once on the rank itself."""
    for r, one in enumerate(ranks(3)):
        first, later = one["abort"]
        longest = 1.5 if r == 0 else alone.SHORT + 2
        told(first, "it has aborted" if r == 0 else "rank 0 has left or failed|rank 1 ", longest)
        told(later, re.escape(first[0]), 1)


def test_abort_within_data(ranks):
    for r, one in enumerate(ranks(2)):
        told(one["abort_within_data"], "it has aborted" if r == 0 else "rank 0 has left or failed", 3)


def test_an_interrupt(ranks):
    """Is the exception that it is everywhere; what did not come is taken for nothing, and the other rank is told."""
    first, second = of(ranks(2), "interrupt")
    for interrupt, other in zip(first, second):
        told(interrupt, "KeyboardInterrupt", 1)
        told(other, "rank 0 has left or failed", 2.5)
    assert len(first) == 2


def test_a_rank_that_fails_alone(ranks):
    for r, (first, total) in enumerate(of(ranks(2), "out_of_step")):
        told(first, "timeout = -1, but must be" if r == 1 else "a rank did not come in 0.5 s", 5)
        assert total == 2


# What one process can tell.


def test_refusals(ep):
    with pytest.raises(ValueError, match="CUMOE_GATE_BALANCED, but experts that choose among the tokens of all ranks"):
        cumoe.MoE(8, 8, 4, 2, gate="balanced", ep=ep)
    with pytest.raises(ValueError, match="config.exchange_capacity = 3, but without config.ep"):
        cumoe.MoE(8, 8, 4, 2, exchange_capacity=3)
    with pytest.raises(ValueError, match="config.exchange_chunks = 2, but without config.ep"):
        cumoe.MoE(8, 8, 4, 2, exchange_chunks=2)
    with pytest.raises(ValueError, match="config.exchange_chunks = 5, but one of the 1 ranks has 4 experts"):
        cumoe.Experts(8, 8, 4, ep=ep, exchange_chunks=5)
    with pytest.raises(ValueError, match="top_k = 9, but must be 1..4"):
        cumoe.MoE(8, 8, 4, 9, ep=ep)
    with pytest.raises(RuntimeError, match="timeout = -1, but must be"):
        cumoe.ExpertParallel(timeout=-1.0)
    with pytest.raises(ValueError, match="group = 'all', but must be a ProcessGroup that this rank is in"):
        cumoe.ExpertParallel("all")
    with pytest.raises(ValueError, match="device = 'meta', but must be the CPU or a CUDA device"):
        cumoe.ExpertParallel(device="meta")
    with pytest.raises(RuntimeError, match="dtype = 4, but must be F64"):
        ep.sum_(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="NCCL is for CUDA"):
        torch.ops.cumoe.group_create(1, torch.zeros(0), 0, 1, 1.0, -1)
    with pytest.raises(RuntimeError, match="the layer has no ranks"):
        make_moe("noisy_topk").sum_gradients()
    averaged = cumoe.MoE(8, 8, 4, 2, ep=cumoe.ExpertParallel(average=True))
    for call in averaged.sum_gradients, lambda: averaged.config.ep.sum_gradients([averaged.w_gate]):
        with pytest.raises(RuntimeError, match="the group has average = True"):
            call()
    for wrong in dist.group.WORLD, 1:
        with pytest.raises(ValueError, match="ep = .*, but must be an ExpertParallel"):
            cumoe.MoE(8, 8, 4, 2, ep=wrong)
    expanded = torch.ones(1).expand(3)
    with pytest.raises(RuntimeError, match="a sum of an expanded tensor"):
        ep.sum_(expanded)
    arrays = [torch.zeros(3, 8, 8)] * 2
    x, index, weight = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="w_down has 3 experts, but this rank has 4 of 4, from 0 on"):
        cumoe.functional.experts(x, index, weight, *arrays, ep=ep, num_experts=4)


def test_copies_share_the_group_and_files_have_none(ep):
    moe = cumoe.MoE(8, 8, 4, 2, ep=ep)
    twin = copy.deepcopy(moe)
    assert twin.config.ep is ep and twin.w_up is not moe.w_up
    assert repr(moe) == "MoE(8, 8, num_experts=4, top_k=2, ep=ExpertParallel(rank=0, size=1))"
    with pytest.raises(TypeError, match="a group of ranks cannot be pickled: save the state_dict"):
        pickle.dumps(moe)
    other = cumoe.MoE(8, 8, 4, 2)
    other.load_state_dict(moe.state_dict())  # one rank has everything


def test_sums(ep):
    moe = cumoe.MoE(8, 8, 4, 2, gate="softmax_topk", gate_dtype=torch.bfloat16, ep=ep)
    unused = torch.nn.Parameter(torch.zeros(3))
    moe(torch.randn(5, 8)).y.sum().backward()
    before = moe.w_gate.grad.clone()
    ep.sum_gradients([moe.w_gate, unused])
    assert_same_bits(moe.w_gate.grad, before)
    assert not unused.grad.any()
    strided = torch.arange(6.0).view(2, 3).t()
    before, version = strided.clone(), strided._version
    assert ep.sum_(strided) is strided and strided._version > version
    assert torch.equal(strided, before)
    ep.wait()


def test_a_closed_group(ep):
    own = cumoe.ExpertParallel(timeout=20)
    moe = cumoe.MoE(8, 8, 4, 2, ep=own)
    out = moe(torch.randn(5, 8))
    own.close()
    own.close()
    make = functools.partial(cumoe.MoE, 8, 8, 4, 2, ep=own)
    for call in out.loss.backward, own.wait, own.abort, lambda: moe(torch.randn(5, 8)), make:
        with pytest.raises(RuntimeError, match="the group of ranks is closed"):
            call()


def test_plans_end_with_their_graphs(ep):
    """Also where outputs live on; a graph that is kept keeps its own."""
    own = cumoe.ExpertParallel(timeout=20)
    moe, x = cumoe.MoE(8, 8, 4, 2, ep=own), torch.randn(5, 8)

    def plans():
        return torch.ops.cumoe.group_plans(own.number)

    first, second = moe(x), moe(x)
    assert plans() == 2
    first.loss.backward()
    assert plans() == 1
    second.loss.backward(retain_graph=True)
    assert plans() == 1
    second.loss.backward()
    assert plans() == 0
    third = moe(x)
    assert plans() == 1
    del third
    with torch.no_grad():
        moe(x)
    experts, index = cumoe.Experts(8, 8, 4, ep=own), torch.zeros(5, 1, dtype=torch.int32)
    y = experts(x, index, torch.ones(5, 1))
    assert plans() == 1
    y.sum().backward()
    assert plans() == 0
    bounded = cumoe.MoE(8, 8, 4, 2, ep=own, exchange_capacity=20)(x)
    assert plans() == 0
    bounded.loss.backward()


def test_experts_are_not_taken_for_everybodys(ep):
    moe = cumoe.MoE(8, 8, 4, 2, ep=ep, bias=True)
    for module in moe, copy.deepcopy(moe), copy.deepcopy(moe).double():
        for name in module.expert_names():
            with pytest.raises(RuntimeError, match="a parameter is of experts, which are this rank's alone"):
                ep.sum_gradients([module.w_gate, getattr(module, name)])
        assert module.w_gate.grad is None
        module.sum_gradients()
    model = alone.Model(cumoe.MoE(alone.H, 12, 4, 2, ep=ep))
    with pytest.raises(RuntimeError, match=r"among its parameters, .* call exclude_experts\(model\) before"):
        torch.nn.parallel.DistributedDataParallel(model)(torch.randn(5, alone.H))
    cumoe.exclude_experts(model)
    torch.nn.parallel.DistributedDataParallel(model)(torch.randn(5, alone.H))


@pytest.mark.parametrize("call", [torch.tensor([1.5, 2.0]), torch.tensor([1]), torch.zeros(5, dtype=torch.int64),
                                  torch.zeros(2, dtype=torch.int64, device="meta")])
def test_a_call_that_is_none(ep, monkeypatch, call):
    """Refused before the sum that goes with it, in which others would wait."""
    moe = cumoe.MoE(8, 8, 4, 2, ep=ep)
    monkeypatch.setattr(cumoe.ExpertParallel, "sum_", None)
    with pytest.raises(RuntimeError, match="call is .* but must be int64 with 2, 3 or 4, on the device of the group"):
        moe(torch.randn(5, 8), call=call)
    with pytest.raises(RuntimeError, match="x is on meta, but the group of ranks is of cpu"):
        moe(torch.randn(5, 8, device="meta"))


def test_compilers_leave_the_call_alone(ep):
    moe, x = cumoe.MoE(8, 8, 4, 2, gate="softmax_topk", ep=ep), torch.randn(5, 8)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="calls over ranks are not traced"):
        torch.compile(moe, fullgraph=True, backend="eager")(x)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    y = torch.compile(lambda x: moe(torch.relu(x)).y + 1, backend=backend)(x)
    assert_same_bits(y, moe(torch.relu(x)).y + 1)
    assert len(graphs) >= 2  # before and behind the call
    with pytest.raises(RuntimeError, match="a layer over ranks cannot be exported|calls over ranks are not traced"):
        torch.export.export(moe, (x,))


def test_checkpointing(ep):
    moe, x = make_moe("noisy_topk"), torch.randn(9, alone.H, dtype=torch.float64)
    expected, over_ranks = whole(moe, x), alone.share(moe, ep)
    x = x.requires_grad_()
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(over_ranks, x, use_reentrant=False)
    (out.y.float().square().sum() + out.loss).backward()
    assert_same_bits(x.grad, expected.x.grad)


@pytest.mark.parametrize("gives", ["pointer", "nothing", "error"])
def test_nccl(monkeypatch, gives):
    """With a stand-in for PyTorch's group: its communicator is taken, else an id is sent around; nobody waits for an id
    that there cannot be."""
    from cumoe import parallel

    calls, device = [], SimpleNamespace(index=1)
    backend = SimpleNamespace(_comm_ptr=lambda: 4711) if gives == "pointer" else SimpleNamespace()
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2, _get_backend=lambda device: backend)

    def broadcast(tensor, group, group_src):
        calls.append(("broadcast", group_src, tensor[-1].item()))

    def group_id(tensor):
        if gives == "error":
            raise RuntimeError("no NCCL")
        tensor.copy_(torch.arange(128))

    def group_create(comm, unique, *rest):
        calls.append((comm, unique.sum().item(), *rest))
        return 9

    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor, group: calls.append("all_reduce"))
    monkeypatch.setattr(parallel.dist, "broadcast", broadcast)
    monkeypatch.setattr(torch.ops.cumoe, "group_id", group_id)
    monkeypatch.setattr(torch.ops.cumoe, "group_create", group_create)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(parallel, "_on", lambda tensor, device: tensor)
    if gives == "error":
        with pytest.raises(RuntimeError, match="no NCCL"):
            parallel._join_nccl(group, device, 5.0)
        assert calls == ["all_reduce", ("broadcast", 0, 0)]
        return
    assert parallel._join_nccl(group, device, 5.0) == 9
    if gives == "pointer":
        assert calls == ["all_reduce", (4711, 0, 0, 2, 5.0, 1)]
    else:
        assert calls == ["all_reduce", ("broadcast", 0, 1), (0, 128 * 127 // 2, 0, 2, 5.0, 1)]


def test_example():
    """As the README shows and starts it."""
    example = HERE.parent / "examples/ranks.py"
    code = example.read_text().split("# BEGIN\n")[1].split("# END")[0]
    assert code in (HERE.parent / "README.md").read_text()
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          example], capture_output=True, text=True, timeout=200,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "experts 0 to 15" in run.stdout and "experts 16 to 31" in run.stdout
