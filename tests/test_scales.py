import json

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


def test_token_maps_may_be_oblong() -> None:
    schedule = ScaleSchedule(((1, 1), (1, 2), 3, [3, 5]))
    assert schedule.side_lengths == (1, (1, 2), 3, (3, 5))
    assert schedule.shapes == ((1, 1), (1, 2), (3, 3), (3, 5))
    assert schedule.names == ("1", "1x2", "3", "3x5")
    assert schedule.lengths == (1, 2, 9, 15)
    assert (schedule.num_tokens, schedule.offsets) == (27, (0, 1, 3, 12))
    assert ScaleSchedule(tuple(json.loads(json.dumps(schedule.side_lengths)))) == schedule


@pytest.mark.parametrize(
    "sides", [(), (0, 1), (1, 1), (2, 1), ((1, 2), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (9, 1)), ((0, 3),)]
)
def test_sides_that_do_not_grow_are_refused(sides: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="strictly increasing"):
        ScaleSchedule(sides)


@pytest.mark.parametrize("size", [(), (1,), (1, 2, 3), 2.7, "a", (2, None)])
def test_a_size_is_one_whole_number_or_two(size: object) -> None:
    with pytest.raises(InputError, match="a size is one side"):
        ScaleSchedule((1, size))


def test_an_unknown_resolution_is_refused() -> None:
    with pytest.raises(InputError, match="300 px"):
        ScaleSchedule.for_resolution(300)
