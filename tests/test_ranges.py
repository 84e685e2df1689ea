"""Checks of numbers by intervals."""

import math

import pytest

from lightning_mvar.errors import InputError, require_in


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "allowed"),
    [
        ("[0, 1)", [0, 0.5, None], [1, -1e-9, math.nan], "in [0, 1)"),
        ("(0, 1]", [1e-9, 1], [0, 1.5], "in (0, 1]"),
        ("(0, inf)", [1e-9, 1e9], [0, -1, -math.inf, math.nan], "positive"),
        ("(0, inf)", [1], [math.inf], "finite and positive"),
        ("[2, inf)", [2, 3], [1], "at least 2"),
        ("[2, inf)", [2], [math.inf], "finite and at least 2"),
        ("[0, 9223372036854775807]", [2**63 - 1], [2**63], "in [0, 9223372036854775807]"),
    ],
)
def test_numbers_outside_of_an_interval_are_named(
    interval: str, inside: list[float | None], outside: list[float], allowed: str
) -> None:
    for value in inside:
        require_in(interval, "--", ", such as 1", interval=value)
    for value in outside:
        with pytest.raises(InputError) as caught:
            require_in(interval, "--", ", such as 1", lr=inside[0], interval=value)
        assert str(caught.value) == f"--interval must be {allowed}, such as 1, got {value}"
