import matplotlib.image
import numpy as np
import pytest

from capsexp.compare.comparison import compare
from capsexp.compare.curves import (
    COLOURS,
    OTHER_COLOUR,
    Point,
    colour,
    downsample,
    draw,
    learning_curves,
    mean_over_seeds,
)
from capsexp.compare.find import find_all
from capsexp.compare.runs import read_all
from capsexp.errors import Notes

ACCURACY = "validation/accuracy"


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def comparison(write_run, tmp_path, notes):
    """Two settings of three seeds; one run has a single validation value."""
    for iterations in (1, 3):
        for seed in range(3):
            values = [0.1 * iterations + 0.01 * seed**2, 0.2 * iterations][
                : 1 if (iterations, seed) == (1, 2) else 2
            ]
            settings = {"routing.iterations": iterations, "seed": seed}
            write_run(f"{iterations}-{seed}", settings, validation=values)
    return compare(read_all(find_all([tmp_path], notes), notes), notes)


def test_a_curve_is_the_mean_over_the_seeds_of_a_setting(comparison, notes):
    first, second = learning_curves(mean_over_seeds(comparison, notes), [ACCURACY, "train/loss"], notes)
    assert (first.label, second.label) == ("iterations=3", "iterations=1")
    assert [run.path.name for run in first.runs] == ["3-0", "3-1", "3-2"]
    step, mean, sd = zip(*second.points[ACCURACY], strict=True)
    seeds = np.array([0.1, 0.11, 0.14])
    assert step == (10, 20)
    np.testing.assert_allclose(mean, [seeds.mean(), 0.2])
    np.testing.assert_allclose(sd, [seeds.std(ddof=1), 0], atol=1e-15)
    assert len(first.points["train/loss"]) == 3
    assert notes == Notes()


def test_curves_come_in_the_order_of_the_table(comparison, notes):
    runs = [row.runs[0] for row in comparison.rows]
    for order in ({"sort_by": "iterations"}, {"sort_by": "iterations", "descending": True}):
        table = compare(runs, notes, **order)
        found = learning_curves(mean_over_seeds(table, notes), [ACCURACY], notes)
        assert found[0].label == f"iterations={table.rows[0].cells['routing.iterations']}"


def test_means_over_another_setting_stay_as_they_are(comparison, notes):
    runs = [row.runs[0] for row in comparison.rows]
    found = learning_curves(
        mean_over_seeds(compare(runs, notes, group_by=["iterations"]), notes), [ACCURACY], notes
    )
    assert sorted(curve.label for curve in found) == ["seed=0", "seed=1", "seed=2"]


def test_runs_without_differing_settings_still_get_a_label(write_run, tmp_path, notes):
    write_run("one", validation=[0.5])

    def labels():
        runs = read_all(find_all([tmp_path], notes), notes)
        return [
            curve.label
            for curve in learning_curves(mean_over_seeds(compare(runs, notes), notes), [ACCURACY], notes)
        ]

    assert labels() == ["one"]
    write_run("two", {"seed": 1}, validation=[0.5])
    assert labels() == ["2 runs"]


def test_runs_without_a_config_get_separate_curves(write_run, tmp_path, notes):
    write_run("one", config={}, validation=[0.5])
    write_run("two", config={}, validation=[0.5])
    runs = read_all(find_all([tmp_path], notes), notes)
    assert len(learning_curves(mean_over_seeds(compare(runs, notes), notes), [ACCURACY], notes)) == 2


def test_the_curve_of_a_setting_is_that_of_its_finished_runs(write_run, tmp_path, notes):
    """Others have their own curves; of repetitions only the newest is drawn."""
    write_run("a", {"seed": 0}, validation=[0.5], started=2.0)
    write_run("again", {"seed": 0}, validation=[0.1], started=1.0)
    write_run("b", {"seed": 1}, validation=[0.7])
    write_run("c", {"seed": 2}, validation=[0.2], status="interrupted")
    table = compare(read_all(find_all([tmp_path], notes), notes), notes)
    mean, alone = learning_curves(mean_over_seeds(table, notes), [ACCURACY], notes)
    assert (mean.label, mean.points[ACCURACY][0].mean) == ("2 runs", 0.6)
    assert (alone.label, alone.points[ACCURACY][0].mean) == ("c, interrupted", 0.2)
    assert notes.warnings[0].endswith(f"left out: {tmp_path}/again")


def test_non_finite_values_are_left_out(write_run, tmp_path, notes):
    lines = ('{"step": 1, "x/y": NaN}', '{"step": 2, "x/y": 1.5}', '{"step": 3, "x/y": Infinity}')
    (write_run("one") / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    runs = read_all(find_all([tmp_path], notes), notes)
    (curve,) = learning_curves(mean_over_seeds(compare(runs, notes), notes), ["x/y"], notes)
    assert curve.points["x/y"] == [Point(2.0, 1.5, 0.0)]


def test_an_unknown_metric_is_reported_and_the_others_are_drawn(comparison, notes):
    assert len(learning_curves(mean_over_seeds(comparison, notes), [ACCURACY, "train/los"], notes)) == 2
    assert learning_curves(mean_over_seeds(comparison, notes), ["train/los"], notes) == []
    assert notes.errors == ["--metric: no run has the metric 'train/los': did you mean 'train/loss'?"]


def test_long_curves_are_means_of_neighbours():
    points = [Point(float(step), float(step % 2), 0.5) for step in range(1000)]
    few = downsample(points)
    assert len(few) == 200
    assert few[0] == Point(2.0, 0.4, 0.5)
    assert downsample(points[:200]) == points[:200]
    assert downsample([]) == []


def pixels(file, colour):
    """Count the pixels of an image that have a colour, `#rrggbb`."""
    image = matplotlib.image.imread(file)[..., :3]
    rgb = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return int((np.abs(image - rgb).max(-1) < 0.02).sum())


def test_each_setting_has_its_own_colour(comparison, notes, tmp_path):
    file = tmp_path / "curves.png"
    draw(
        learning_curves(mean_over_seeds(comparison, notes), [ACCURACY, "train/loss"], notes),
        [ACCURACY, "train/loss"],
        file,
    )
    assert pixels(file, COLOURS[0]) > 200
    assert pixels(file, COLOURS[1]) > 200
    assert pixels(file, COLOURS[2]) == 0


def test_curves_beyond_the_palette_are_grey(write_run, tmp_path, notes):
    for number in range(len(COLOURS) + 2):
        write_run(
            str(number), {"model.conv_channels": number}, validation=[0.1 * number, 0.5 + 0.01 * number]
        )
    runs = read_all(find_all([tmp_path], notes), notes)
    found = learning_curves(mean_over_seeds(compare(runs, notes), notes), [ACCURACY], notes)
    draw(found, [ACCURACY], tmp_path / "curves.png")
    assert colour(len(COLOURS)) == OTHER_COLOUR
    assert all(pixels(tmp_path / "curves.png", hue) > 20 for hue in (*COLOURS, OTHER_COLOUR))


@pytest.mark.parametrize("name", ["curves.svg", "curves.pdf"])
def test_other_formats_can_be_drawn(name, comparison, notes, tmp_path):
    draw(learning_curves(mean_over_seeds(comparison, notes), [ACCURACY], notes), [ACCURACY], tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_a_curve_may_be_missing_from_a_panel(write_run, tmp_path, notes):
    write_run("one", {"model.conv_channels": 1}, validation=[0.5])
    write_run("two", {"model.conv_channels": 2})
    runs = read_all(find_all([tmp_path], notes), notes)
    tags = [ACCURACY, "train/loss"]
    draw(
        learning_curves(mean_over_seeds(compare(runs, notes), notes), tags, notes),
        tags,
        tmp_path / "curves.png",
    )
    assert pixels(tmp_path / "curves.png", COLOURS[0]) > 100
