"""What a call of the layer gives beside y."""

import typing

import torch


class Statistics(typing.NamedTuple):
    """What a forward call counted (cumoe_statistics_t in cumoe/types.h)."""

    tokens: int
    rows: int
    nan_logits: int
    nan_tokens: int
    bad_indices: int
    dropped_rows: int
    exchange_overflow: int
    max_count: int
    cv_importance: float
    cv_load: float
    max_over_mean_load: float
    max_over_mean_count: float


class MoEOutput(typing.NamedTuple):
    """T is the number of tokens, E of experts, K of experts per token; "gate type" is float32, or float64 with float64.

    Gradients flow through y, loss and losses; everything else is for looking at.
    """

    y: torch.Tensor  # the shape of x
    loss: torch.Tensor  # [] the losses with their weights, to be added to the training loss; gate type
    losses: torch.Tensor  # [8] importance, load, switch, z, threshold, 0, 0, 0; unweighted, gate type
    chosen_expert: torch.Tensor  # [T, K] int32, -1 = none. Balanced: one row of slots, see chosen_offset
    chosen_weight: torch.Tensor  # [T, K] gate type
    chosen_offset: torch.Tensor  # [T + 1] balanced: token t has slots chosen_offset[t] .. chosen_offset[t + 1] - 1
    expert_count: torch.Tensor  # [E] int32, rows per expert
    sums: torch.Tensor  # [2 or 3, E, rounded up to a multiple of 4] gate type: see the properties
    raw_statistics: torch.Tensor  # [16] int64, on the device: see statistics()

    def _sums(self, row):
        return self.sums[row, :self.expert_count.size(0)]

    @property
    def importance(self):
        """[E] sums of gate values (eq. 6)."""
        return self._sums(0)

    @property
    def load(self):
        """[E] smooth load (eq. 10) of noisy gates in training, else rows per expert."""
        return self._sums(1)

    @property
    def batch_threshold(self):
        """[E] balanced, in training: the lowest gate value that each expert took; None otherwise."""
        return self._sums(2) if self.sums.size(0) == 3 else None

    def statistics(self):
        """What the call counted. Waits for the device."""
        raw = self.raw_statistics.cpu()
        return Statistics(*raw[:8].tolist(), *raw.view(torch.float64)[8:12].tolist())
