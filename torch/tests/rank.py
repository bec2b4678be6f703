"""One process of test_parallel.py: runs every function below that begins with `do_`, in this order, and writes what
each gives, or the error and how long it took, to a file. Usage: rank.py RANK RANKS FOLDER"""

import datetime
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn

import cumoe
from cumoe import _gloo
from cases import GATES, gradients, make_moe

H, EXPERTS = 10, 8
RANK, RANKS = 0, 1  # until main() knows better
TOKENS = {1: (9,), 2: (5, 4), 3: (5, 0, 4)}  # of each rank
SHORT = 3.0  # seconds that a rank may be late where one is
EVERY_GATE = [gate for gate in GATES if gate != "balanced"]


def own_tokens(x):
    """This rank's rows of the global batch."""
    return x.split(TOKENS[RANKS])[RANK]


def share(module, ep, **options):
    """A module over ranks with the values of one that has all experts."""
    c = module.config
    options |= {name: getattr(c, name) for name in ("activation", "bias", "glu")}
    if isinstance(module, cumoe.Experts):
        made = cumoe.Experts(H, c.intermediate_size, EXPERTS, ep=ep, dtype=module.w_down.dtype, **options)
    else:
        weights = dict(zip(cumoe.config.LOSSES, module.loss_weights))
        kind = {name: getattr(c, name) for name in ("gate", "num_groups", "top_k_groups", "renormalize")}
        made = cumoe.MoE(H, c.intermediate_size, EXPERTS, c.top_k, loss_weights=weights, ep=ep,
                         dtype=module.w_down.dtype, **kind, **options)
    own, state = slice(made.own_experts.start, made.own_experts.stop), module.state_dict()
    made.load_state_dict({name: value[own] if name in made.expert_names() else value for name, value in state.items()})
    return made


def step(moe, x, **arguments):
    """Outputs and gradients of one call: of this rank's tokens and experts, gates added up."""
    x = own_tokens(x).requires_grad_()
    torch.manual_seed(1 if RANK == 0 else 100 + RANK)  # the noise is rank 0's
    out = moe(x, **arguments)
    (out.y.float().square().sum() + out.loss).backward()
    moe.sum_gradients()
    return dict(y=out.y.detach(), losses=out.losses.detach(), count=out.expert_count, dx=x.grad,
                chosen=out.chosen_expert, statistics=out.statistics()._asdict(), gradients=gradients(moe))


def batch(dtype=torch.float32):
    return torch.randn(9, H, generator=torch.Generator().manual_seed(2)).to(dtype)


def do_gates(ep):
    return {gate: step(share(make_moe(gate, torch.float32), ep), batch()) for gate in EVERY_GATE}


def do_bounded(ep):
    moe = make_moe("noisy_topk", torch.bfloat16, bias=True)
    return step(share(moe, ep, exchange_capacity=100), batch(torch.bfloat16))


def do_overflow(ep):
    """One row from each rank to each."""
    return step(share(make_moe("softmax_topk", torch.float32), ep, exchange_capacity=1), batch())


def do_reference(ep):
    return step(share(make_moe("noisy_topk"), ep), batch(torch.float64), call=torch.tensor([3, 4]))


def do_masked(ep):
    """Padding has places among all tokens, too. In two chunks."""
    mask = torch.arange(9) % 3 != 0
    return step(share(make_moe("noisy_topk"), ep, exchange_chunks=2), batch(torch.float64), token_mask=own_tokens(mask))


def external():
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(-1, EXPERTS, (9, 3), generator=generator)  # -1 = none
    return index, torch.rand(9, 3, generator=generator)


def make_experts():
    torch.manual_seed(4)
    return cumoe.Experts(H, 12, EXPERTS, activation="swiglu", glu="first", bias=True)


def do_external(ep):
    experts, (index, weight) = share(make_experts(), ep), external()
    x, weight = own_tokens(batch()).requires_grad_(), own_tokens(weight).requires_grad_()
    y = experts(x, own_tokens(index), weight)
    y.square().sum().backward()
    arrays = [experts.w_up, experts.w_down]
    biases = dict(b_up=experts.b_up, b_down=experts.b_down)
    with torch.no_grad():
        again = cumoe.functional.experts(x, own_tokens(index), weight, *arrays, **biases, activation="swiglu",
                                         glu="first", ep=ep, num_experts=EXPERTS, exchange_capacity=100,
                                         exchange_chunks=2)
    return dict(y=y.detach(), again=again, dx=x.grad, dweight=weight.grad, gradients=gradients(experts))


def several(first, second, x):
    """Two layers, and two calls of one before any goes backward."""
    torch.manual_seed(1)
    a = first(x)
    b = second(a.y)
    c = first(b.y)
    (a.y.sum() + c.y.square().sum() + b.loss + c.loss).backward()
    return a.y.detach(), b.y.detach(), c.y.detach()


def do_several(ep):
    first, second = (share(make_moe(gate, torch.float32), ep) for gate in ("noisy_topk", "hierarchical"))
    x = own_tokens(batch()).requires_grad_()
    y = several(first, second, x)
    return dict(y=y, dx=x.grad, gradients=[gradients(first), gradients(second)])


def do_initial_values(ep):
    """The same of any number of ranks, whatever numbers were drawn before."""
    torch.manual_seed(5 + RANK)
    moe = cumoe.MoE(H, 12, EXPERTS, 2, gate="softmax_topk", ep=ep)
    return moe.state_dict()


class Model(nn.Module):
    def __init__(self, moe, seed=6):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.moe = nn.Linear(H, H), moe

    def forward(self, x):
        out = self.moe(self.linear(x))
        return out.y.square().mean(), out.loss


def do_ddp(ep):
    """Gradients of the mean over ranks, by DistributedDataParallel and by hand; ranks have as many tokens each."""
    found = []
    for average in True, False:
        own = cumoe.ExpertParallel(timeout=20, average=average)
        seed = 7 if RANK > 0 and average else 6  # DDP copies rank 0's
        model = Model(share(make_moe("softmax_topk", torch.float32), own), seed)
        excluded = cumoe.exclude_experts(model)
        called = nn.parallel.DistributedDataParallel(model) if average else model
        task, loss = called(batch().split(3)[RANK])
        if average:
            (task + loss).backward()
        else:
            (task / RANKS + loss).backward()
            own.sum_gradients([p for name, p in model.named_parameters() if name not in excluded])
        found.append(gradients(model))
    return dict(excluded=excluded, gradients=found)


def do_config_that_differs(ep):
    try:
        cumoe.MoE(H if RANK != 1 else 12, 12, EXPERTS, 2, ep=ep)
    except ValueError as error:
        return str(error), ep.sum_(torch.tensor([1.0 + RANK]))  # of further use


# Failures: each of a group of its own. What `failing` gives: the error, and seconds until it came.


def failing(function, *arguments):
    begin = time.monotonic()
    try:
        function(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        return str(error).split("\n")[0] or type(error).__name__, time.monotonic() - begin


def short_group():
    return cumoe.ExpertParallel(timeout=SHORT)


def do_another_call(ep):
    return failing(short_group().sum_, torch.zeros(2 + (RANK == 1)))


def do_leave(ep):
    own = short_group()
    if RANK == 1:
        own.close()
    return failing(own.sum_, torch.zeros(2))


def do_late(ep):
    if RANKS < 3:
        return None  # to save time
    own = short_group()
    if RANK == 1:
        time.sleep(SHORT + 1)
    return failing(own.sum_, torch.zeros(2))


def do_abort(ep):
    """While the first rank waits for the second; the third waits with it."""
    if RANKS < 3:
        return None
    own = short_group()
    if RANK == 1:
        time.sleep(2)
    if RANK == 0:
        threading.Timer(0.5, own.abort).start()
    return failing(own.sum_, torch.zeros(2)), failing(own.wait)


def do_abort_within_data(ep):
    """Of one long message: gloo does not tell those who wait for the rest."""
    if RANKS > 2:
        return None
    own, data = cumoe.ExpertParallel(timeout=10), torch.ones(100_000_000, dtype=torch.uint8)

    def carry():
        begin = time.monotonic()
        own._gloo._carry([_gloo._Message(1 - RANK, RANK, data.data_ptr(), data.numel())], begin + 10)
        return time.monotonic() - begin

    seconds = carry()
    dist.barrier()
    if RANK == 0:
        threading.Timer(seconds / 2, own.abort).start()
    return failing(lambda: [carry() for _ in range(100)])


def do_interrupt(ep):
    """Ctrl-C in the first rank: where the library computes, which ends in an exchange, and where it waits."""
    found = []
    for values in (torch.zeros(4000, 5000).t(), torch.zeros(2)) if RANKS == 2 else ():
        own, begin = cumoe.ExpertParallel(timeout=10), time.monotonic()
        values.contiguous()  # which a sum begins with
        seconds = 0.5 * (time.monotonic() - begin) if values.dim() == 2 else 0.5
        own.sum_(torch.zeros(1))
        if RANK == 0:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif values.dim() == 1:
            time.sleep(1)
        found.append(failing(own.sum_, values))
        own.close()  # it may have come before the call
    return found


def do_out_of_step(ep):
    """One rank alone fails before it meets the other: the next group is no worse for it."""
    if RANKS == 2:
        first = failing(lambda: cumoe.ExpertParallel(timeout=-1.0 if RANK == 1 else 0.5))
        return first, short_group().sum_(torch.ones(1))


def do_die(ep):
    """A rank ends between forward and backward. Nobody can make a group with it."""
    own = short_group()
    out = share(make_moe("noisy_topk", torch.float32), own)(own_tokens(batch()).requires_grad_())
    if RANK == 1:
        return None
    first = failing(out.loss.backward)
    again = failing(own.sum_, torch.zeros(2))
    return first, again, failing(lambda: cumoe.ExpertParallel(timeout=1))


def main(rank, count, folder):
    global RANK, RANKS
    RANK, RANKS = int(rank), int(count)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=RANK, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=60))
    ep, results, seconds = cumoe.ExpertParallel(timeout=60), {}, {}
    for name, function in list(globals().items()):
        if name.startswith("do_"):
            begin = time.monotonic()
            results[name[3:]] = function(ep)
            seconds[name[3:]] = time.monotonic() - begin
    torch.save(results, f"{folder}/{RANK}.pt")
    print(" ".join(f"{name} {value:.2f}" for name, value in seconds.items()), flush=True)
    os._exit(0)  # as a process that is killed: no connection is closed in an orderly way


if __name__ == "__main__":
    main(*sys.argv[1:])
