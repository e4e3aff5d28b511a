import pytest

from capsexp.errors import UserError
from capsexp.study.reconstructions import Reconstructions


def test_failures_are_shown_from_the_label_and_from_the_prediction(trained_run):
    run = trained_run()
    numbers, figures, _ = Reconstructions(correct=4, wrong=2)(run)
    shown = numbers["shown"]
    correct, wrong = shown[:4], shown[4:]
    assert all(label == prediction == decoded for label, prediction, decoded in correct)
    assert len({label for label, _, _ in correct}) > 1
    assert [triple[:2] for triple in wrong[::2]] == [triple[:2] for triple in wrong[1::2]]
    assert all(label != prediction and decoded == label for label, prediction, decoded in wrong[::2])
    assert all(label != prediction and decoded == prediction for label, prediction, decoded in wrong[1::2])
    assert len(figures["reconstructions"].axes) == 2 * len(shown)
    mistakes = sum((output.scores.argmax(1) != batch.labels).sum().item() for batch, output in run.outputs())
    assert numbers["pictures"] == 359
    assert numbers["error"] == mistakes / 359
    assert 0 < numbers["squared_error"] < 1


def test_a_limit_is_exact(trained_run):
    numbers, *_ = Reconstructions(correct=1, wrong=0)(trained_run(limit=37))
    assert numbers["pictures"] == 37


def test_a_network_without_a_decoder_is_refused(trained_run):
    run = trained_run()
    run.model.decoder = None
    with pytest.raises(UserError, match=r"^this run has no decoder, so there are no reconstructions"):
        Reconstructions(correct=1, wrong=0)(run)


@pytest.mark.parametrize(("correct", "wrong"), [(-1, 1), (1, -1), (0, 0)])
def test_wrong_settings_are_refused(correct, wrong):
    with pytest.raises(ValueError, match=r"^correct and wrong must be >= 0 and not both 0, got"):
        Reconstructions(correct=correct, wrong=wrong)
