"""Learning rates and image orders as pure functions of the step: nothing to save, nothing to lose on resume."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

FROUNDATION_CONSTANT_EPOCHS = 5
FROUNDATION_FIRST_CYCLE_EPOCHS = 5


def learning_rate(
    schedule: str, base: float, minimum: float, epoch: float, warmup_epochs: float, total_epochs: float
) -> float:
    """Learning rate at a point in time.

    Args:
        schedule: `cosine` (linear warm-up, then half a cosine down to `minimum`), `constant` (linear warm-up) or
            `froundation` (constant for 5 epochs, then cosine warm restarts of 5, 10, 20... epochs).
        base, minimum: peak and floor.
        epoch: epochs done, with the fraction of the current one.
    Raises:
        ValueError: unknown schedule.
    Source: FRoundation, arXiv:2410.23831, section 4; SGDR, arXiv:1608.03983, eq. 5.
    """
    minimum = min(minimum, base)
    if schedule == "froundation":
        if epoch < FROUNDATION_CONSTANT_EPOCHS:
            return base
        position, cycle = epoch - FROUNDATION_CONSTANT_EPOCHS, float(FROUNDATION_FIRST_CYCLE_EPOCHS)
        while position >= cycle:
            position, cycle = position - cycle, 2 * cycle
        return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * position / cycle))
    if epoch < warmup_epochs:
        return base * epoch / warmup_epochs
    if schedule == "constant":
        return base
    if schedule == "cosine":
        progress = min(1.0, (epoch - warmup_epochs) / max(total_epochs - warmup_epochs, 1e-12))
        return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"schedule: {schedule!r} is not one of cosine, constant, froundation")


class EpochBatches(Sampler[list[int]]):
    """The image indices of each batch of one process: a pure function of (seed, epoch, batch, rank).

    An epoch is one permutation, cut into steps of `batch_size * batches_per_step * num_processes` images; the rest is
    dropped, so every step of every process is complete. The images of a step do not depend on how it is divided: two
    processes see together what one sees that accumulates twice.

    Args:
        num_images: size of the data set.
        batch_size: images of one forward pass of one process.
        batches_per_step: forward passes of each process an optimiser step.
        rank, num_processes: this process.
    Raises:
        ValueError: there are fewer images than one step needs.
    """

    def __init__(
        self, num_images: int, batch_size: int, batches_per_step: int = 1, rank: int = 0, num_processes: int = 1,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.num_images, self.batch_size, self.batches_per_step = num_images, batch_size, batches_per_step
        self.rank, self.num_processes, self.seed = rank, num_processes, seed
        self.step_size = batch_size * batches_per_step * num_processes
        self.steps = num_images // self.step_size
        if self.steps == 0:
            raise ValueError(
                f"a step needs {self.step_size} images (batch_size {batch_size} x gradient_accumulation "
                f"{batches_per_step} x {num_processes} processes), but there are {num_images}; lower batch_size"
            )
        self.epoch, self.first_step = 0, 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Say which epoch the next iteration is, and at which of its steps it starts."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        batches = order[: self.steps * self.step_size].reshape(-1, self.num_processes, self.batch_size)
        for batch in batches[self.first_step * self.batches_per_step :, self.rank]:  # (batch_size,)
            yield batch.tolist()
