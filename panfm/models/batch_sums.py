"""Sums and means over the subjects of a batch, which a site with several devices spreads over processes.

In one process they are plain sums. `panfm.training.spread` sets `add_processes` while a step is spread.
"""

from collections.abc import Callable

from torch import Tensor

add_processes: Callable[[Tensor], Tensor] | None = None
"""Adds up a tensor over the processes; the gradient reaches this process's part."""


def batch_sum(own: Tensor) -> Tensor:
    """Sum over the batch, given the sum over this process's subjects."""
    return own if add_processes is None else add_processes(own)


def batch_mean(values: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """Mean over the batch, given this process's rows [B, ...]; `otherwise` where no process has any."""
    if add_processes is None:
        return values.mean(dim=0)
    total, count = add_processes(values.sum(dim=0)), add_processes(values.new_tensor(float(len(values))))
    return (total / count.clamp_min(1)).where(count > 0, otherwise)
