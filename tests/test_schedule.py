"""Learning rates against torch's own schedulers, image orders against what a data-parallel epoch must be."""

import pytest
import torch

from adaptface.schedule import EpochBatches, learning_rate


def rate(schedule: str, epoch: float, **arguments: float) -> float:
    values = {"base": 0.1, "minimum": 1e-3, "warmup_epochs": 2, "total_epochs": 12, **arguments}
    return learning_rate(schedule, epoch=epoch, **values)


def torch_rates(scheduler_of, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs_after_a_linear_warmup() -> None:
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=1e-3), 41)
    assert [rate("cosine", 2 + i / 4) for i in range(41)] == pytest.approx(expected)
    assert [rate("cosine", e) for e in (0, 0.5, 1, 1.5)] == pytest.approx([0, 0.025, 0.05, 0.075])
    assert rate("cosine", 13) == pytest.approx(1e-3)


def test_froundation_is_constant_then_torchs_warm_restarts() -> None:
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=1e-3), 35
    )
    assert [rate("froundation", epoch) for epoch in (0, 2.5, 4.99)] == [0.1] * 3
    assert [rate("froundation", 5.0 + epoch) for epoch in range(35)] == pytest.approx(expected)


def test_constant_stays() -> None:
    assert [rate("constant", epoch) for epoch in (1, 2, 7, 12)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert rate("constant", 0, warmup_epochs=0) == 0.1


def test_a_floor_above_the_peak_does_not_raise_it() -> None:
    assert rate("cosine", 12, minimum=1.0) == pytest.approx(0.1)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="'linear' is not one of"):
        rate("linear", 3)


def test_an_epoch_visits_each_image_at_most_once_and_differs_from_the_next() -> None:
    batches = EpochBatches(23, batch_size=2, batches_per_step=2)
    first = [list(batch) for batch in batches]
    assert len(first) == len(batches) == 10  # 5 steps of 4 images; the last 3 images wait for another epoch
    seen = [image for batch in first for image in batch]
    assert len(set(seen)) == len(seen) == 20 and set(seen) <= set(range(23))
    assert [list(batch) for batch in batches] == first
    batches.set_position(1)
    assert [list(batch) for batch in batches] != first
    assert [list(batch) for batch in EpochBatches(23, 2, 2, seed=1)] != first


@pytest.mark.parametrize(("size", "accumulation", "processes"), [(2, 2, 2), (4, 1, 2), (8, 1, 1), (2, 1, 4)])
def test_the_images_of_a_step_do_not_depend_on_their_division(size: int, accumulation: int, processes: int) -> None:
    whole = [set(batch) for batch in EpochBatches(50, batch_size=8)]
    parts = [list(EpochBatches(50, size, accumulation, rank, processes)) for rank in range(processes)]
    for step, images in enumerate(whole):
        seen = [i for part in parts for batch in part[step * accumulation :][:accumulation] for i in batch]
        assert len(seen) == 8 and set(seen) == images


def test_a_position_continues_the_epoch() -> None:
    batches = EpochBatches(50, 4, 2, rank=1, num_processes=2)
    batches.set_position(3)
    whole = list(batches)
    batches.set_position(3, first_step=2)
    assert list(batches) == whole[4:] and len(batches) == len(whole) - 4


def test_too_few_images_for_a_step() -> None:
    with pytest.raises(ValueError, match=r"a step needs 64 images .* but there are 63; lower batch_size"):
        EpochBatches(63, 16, 2, num_processes=2)
