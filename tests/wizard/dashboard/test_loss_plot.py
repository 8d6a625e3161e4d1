import pytest

from crumb.wizard.dashboard.loss_plot import loss_plot
from crumb.wizard.dashboard.state import LossPoint


def plain(points, width=60, height=13, **more) -> list[str]:
    lines = [line.plain for line in loss_plot(points, width, height, **more)]
    assert len(lines) == height and all(len(line) <= width for line in lines), lines
    return lines


def test_axes_carry_the_true_numbers():
    points = [LossPoint(step, 0.3 - step * 0.002, 0.3 - step * 0.002) for step in range(0, 101)]
    lines = plain(points, ascii=True)
    labels = {float(line.split("|")[0]): row for row, line in enumerate(lines[:-2]) if line.split("|")[0].strip()}
    assert len(labels) >= 3
    for value, row in labels.items():
        steps_on_row = [x for x, char in enumerate(lines[row].split("|")[1]) if char == "*"]
        if not steps_on_row:
            assert value < 0.1 or value > 0.3, "a label within the curve's range stands beside the curve"
            continue
        columns = len(lines[row].split("|")[1])
        middle = sum(steps_on_row) / len(steps_on_row) / (columns - 1) * 100
        assert 0.3 - middle * 0.002 == pytest.approx(value, abs=0.04), f"row {row} is labelled {value}"
    marks = [x for x, char in enumerate(lines[-2]) if char == "+"][1:]
    for label, x in zip(lines[-1].split(), marks):
        columns = len(lines[0].split("|")[1])
        gutter = lines[-2].index("+") + 1
        assert (x - gutter) / (columns - 1) * 100 == pytest.approx(int(label), abs=1.5)


def test_outliers_are_left_out_and_counted_and_do_not_flatten_the_curve():
    points = [LossPoint(step, 0.1 + 0.01 * (step % 3), 0.11) for step in range(1, 50)]
    points += [LossPoint(50 + i, 9.0, 0.11) for i in range(3)] + [LossPoint(53, 0.0, 0.11)]
    lines = plain(points, ascii=True)
    assert lines[0].endswith("3 above, 1 below")
    assert max(float(line.split("|")[0]) for line in lines[:-2] if line.split("|")[0].strip()) < 0.2


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("points", [
    [], [LossPoint(1, 0.1, 0.1)], [LossPoint(1, None, None)], [LossPoint(1, 0.2, 0.2), LossPoint(2, 0.1, 0.15)],
    [LossPoint(1, 0.1, 0.1), LossPoint(2, None, None), LossPoint(3, 0.1, 0.1)],
    [LossPoint(step, 0.0, 0.0) for step in range(9)], [LossPoint(step, -1.0, -1.0) for step in range(9)],
    [LossPoint(1, 0.1, None)], [LossPoint(step, 1e-7 * step, 1e-7 * step) for step in range(1, 9)],
    [LossPoint(step, 1e9, 1e9) for step in range(999_000, 1_000_000)],
], ids=range(10))
def test_odd_histories_are_drawn(points, ascii):
    for width, height in ((76, 11), (20, 5), (12, 3)):
        lines = plain(points, width, height, ascii=ascii)
        assert not ascii or all(line.isascii() for line in lines)
    if len([point for point in points if point.smoothed is not None]) > 1:
        text = "".join(plain(points, 60, 11, ascii=ascii)[:-2])
        assert "*" in text or any("\u2801" <= char <= "\u28ff" for char in text)
