"""The layer in PyTorch, with one step of training."""

import torch

x = torch.randn(4, 128, 512)
# BEGIN
import cumoe

moe = cumoe.MoE(512, 1024, num_experts=32, top_k=4, activation="swiglu")
out = moe(x)  # x [..., 512]
(out.y.square().mean() + out.loss).backward()  # .loss: the balancing losses with their weights
print(out.y.shape, out.statistics().max_over_mean_load)
# END
assert all(parameter.grad is not None for parameter in moe.parameters())
