import pytest
import torch

from lightning_mvar import ScaleSchedule
from lightning_mvar.errors import InputError


@pytest.mark.parametrize(("resolution", "num_tokens"), [(256, 680), (512, 2240), (1024, 9451)])
def test_published_schedules_have_the_published_token_counts(resolution: int, num_tokens: int) -> None:
    assert ScaleSchedule.for_resolution(resolution).num_tokens == num_tokens


def test_offsets_lengths_and_ids_describe_the_same_packing() -> None:
    schedule = ScaleSchedule((1, 2, 3, 4))
    assert schedule.lengths == (1, 4, 9, 16)
    assert schedule.offsets == (0, 1, 5, 14)
    for scale, (offset, length) in enumerate(zip(schedule.offsets, schedule.lengths, strict=True)):
        assert (schedule.scale_ids[offset : offset + length] == scale).all()
    assert torch.bincount(schedule.scale_ids).tolist() == list(schedule.lengths)


def test_ratio_runs_from_0_to_1_and_is_0_for_a_single_scale() -> None:
    assert [ScaleSchedule((1, 2, 4)).ratio(k) for k in range(3)] == [0.0, 0.5, 1.0]
    assert ScaleSchedule((4,)).ratio(0) == 0.0


@pytest.mark.parametrize("sides", [(), (0, 1), (1, 1), (2, 1)])
def test_sides_that_do_not_grow_are_refused(sides: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="strictly increasing"):
        ScaleSchedule(sides)


def test_an_unknown_resolution_is_refused() -> None:
    with pytest.raises(InputError, match="300 px"):
        ScaleSchedule.for_resolution(300)
