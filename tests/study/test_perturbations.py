import pytest
import torch

from capsexp.errors import UserError
from capsexp.study.perturbations import Perturbations, perturbed


def test_each_row_changes_one_dimension_of_the_pose_in_the_steps_of_the_paper(trained_run):
    run = trained_run()
    study = Perturbations(classes=[0], reach=0.25, step=0.05)
    numbers, figures, _ = study(run)
    assert numbers["deltas"] == pytest.approx(
        [-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]
    )
    assert set(figures) == {"perturbations-0"}
    batch, output = next(
        (batch, output)
        for batch, output in run.outputs()
        if ((batch.labels == 0) & (output.scores.argmax(1) == 0)).any()
    )
    place = ((batch.labels == 0) & (output.scores.argmax(1) == 0)).nonzero()[0, 0]
    pose = output.layers["class_caps"].poses[place, 0]
    rows = perturbed(pose, study.deltas, 0, 10, run.decoder())
    assert rows.shape == (16, 11, 1, 8, 8)
    for dimension, number in ((3, 0), (15, 10), (7, 5)):
        changed = pose.clone()
        changed[dimension] += study.deltas[number]
        poses = torch.zeros(1, 10, 16)
        poses[0, 0] = changed
        torch.testing.assert_close(rows[dimension, number], run.model.decoder(poses, torch.tensor([0]))[0])
    ends = (rows[:, [0, -1]] - rows[:, 5:6]).abs().mean((1, 2, 3, 4))
    assert numbers["change_by_dimension/0"] == pytest.approx(ends.tolist())
    assert min(numbers["change_by_dimension/0"]) > 0


def test_all_classes_have_a_figure_and_a_class_without_a_correct_image_is_named(trained_run):
    run = trained_run()
    with pytest.raises(UserError, match=r"^study\.classes: must be 0 … 9, got 10$"):
        Perturbations(classes=[3, 10], reach=0.1, step=0.1)(run)
    run.limit = 1
    with pytest.raises(UserError, match=r"^no image of class \d is classified correctly: there is no pose"):
        Perturbations(classes=None, reach=0.1, step=0.1)(run)


@pytest.mark.parametrize(("reach", "step"), [(0.25, 0), (0.25, -0.1), (0.1, 0.2)])
def test_steps_must_fit_the_reach(reach, step):
    with pytest.raises(ValueError, match=r"^step must be > 0 and <= reach, got step"):
        Perturbations(classes=None, reach=reach, step=step)
