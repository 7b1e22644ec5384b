"""Sums and means over the subjects of a batch, which a site with several devices spreads over processes.

In one process they are plain sums. `panfm.training.spread` sets the other two functions while a step is spread.
"""

from collections.abc import Callable

from torch import Tensor

add_processes: Callable[[Tensor], Tensor] | None = None
"""Adds up a tensor over the processes; the gradient reaches this process's part."""
mean_of_processes: Callable[[Tensor, Tensor | float], Tensor] | None = None
"""Mean over the rows of all processes, or else a given value."""


def batch_sum(own: Tensor) -> Tensor:
    """Sum over the batch, given the sum over this process's subjects."""
    return own if add_processes is None else add_processes(own)


def batch_mean(values: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """Mean over the batch, given this process's rows [B, ...]; `otherwise` where no process has any."""
    return values.mean(dim=0) if mean_of_processes is None else mean_of_processes(values, otherwise)
