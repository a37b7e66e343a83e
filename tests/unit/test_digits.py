"""Numbers that people read: no powers of ten where digits fit, no zero where there is something."""

import pytest

from losia_dist.digits import percent, short


@pytest.mark.parametrize(
    "value, text",
    [
        (1020.4, "1,020"),
        (999.7, "1,000"),
        (12345678.0, "12,345,678"),
        (180.2, "180"),
        (4.314, "4.31"),
        (0.00252, "0.00252"),
        (5e-5, "5e-05"),
        (-2000.0, "-2,000"),
        (0.0, "0"),
        (float("nan"), "nan"),
    ],
)
def test_three_digits_count(value, text):
    assert short(value) == text


def test_more_digits_and_shares():
    assert [short(1234567.8, 6), short(832.4567891, 6)] == ["1,234,568", "832.457"]
    assert [percent(1.0), percent(1 / 16), percent(1 / 640)] == ["100 %", "6.2 %", "0.16 %"]
