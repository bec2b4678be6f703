"""Experts shared by processes, with one step of training: torchrun --nproc-per-node 2 ranks.py"""

import torch
import torch.distributed as dist

if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_node_local_rank(0))
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
# BEGIN
import cumoe

ep = cumoe.ExpertParallel()  # the ranks of torch.distributed
moe = cumoe.MoE(512, 1024, num_experts=32, top_k=4, activation="swiglu", ep=ep, device=ep.device)
out = moe(torch.randn(128, 512, device=ep.device))  # every rank has tokens of its own
(out.y.square().sum() + out.loss).backward()  # .loss: of the tokens of all ranks
moe.sum_gradients()  # of the gates, which every rank has; its experts' gradients are whole
print(f"experts {moe.own_experts[0]} to {moe.own_experts[-1]} of {out.statistics().tokens} tokens")
ep.close()
# END
assert all(parameter.grad is not None for parameter in moe.parameters())
dist.destroy_process_group()
