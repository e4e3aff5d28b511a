import pytest
import torch

from capsexp.analysis.trained_run import TrainedRun
from capsexp.errors import UserError
from capsexp.schedule import Step
from capsexp.study.overlap import Overlap, absent_class
from capsexp.study.perturbations import Perturbations
from capsexp.study.reconstructions import Reconstructions

PAIRS = ("dataset=multimnist", "dataset@dataset.source=digits", "dataset.shift=2", "dataset.pad=2")


@pytest.fixture
def untrained(tmp_path, tiny_components):
    """A run with initial weights: a few of its predictions are correct by chance."""

    def make(*overrides, limit=None):
        torch.manual_seed(0)
        components = tiny_components(*overrides)
        return TrainedRun(components.new_model(), components, path=tmp_path, step=Step(0, 1), limit=limit)

    return make


@pytest.fixture
def pairs(untrained):
    return lambda **options: untrained(*PAIRS, **options)


def correct_digits(run):
    """Yield the number of correct digits, 0 … 2, of each image."""
    for batch, output in run.outputs():
        best = output.scores.topk(2).indices.tolist()
        yield from (len({*a} & {*b}) for a, b in zip(best, batch.labels.tolist(), strict=True))


def test_columns_are_decoded_from_labels_predictions_and_absent_digits(pairs):
    run = pairs()
    numbers, figures, _ = Overlap(correct=3, wrong=2, absent=2)(run)
    shown = numbers["shown"]
    marks = [mark for mark, _, _ in shown]
    assert marks == ["R"] * marks.index("*R") + ["*R"] * 2 + ["R", "R:P"] * 2
    assert 1 <= marks.index("*R") <= 3
    for mark, decoded, labels in shown:
        assert labels[0] != labels[1]
        if mark == "R":
            assert decoded == labels
        elif mark == "*R":
            assert decoded[0] == labels[0]
            assert decoded[1] not in labels
        else:
            assert {*decoded} != {*labels}
            # A class that is in both has the same color in both columns.
            assert all(decoded.index(label) == labels.index(label) for label in {*decoded} & {*labels})
    assert [labels for _, _, labels in shown[-4::2]] == [labels for _, _, labels in shown[-3::2]]
    assert len(figures["overlap"].axes) == 1


def test_the_numbers_are_means_over_all_images(pairs):
    run = pairs()
    numbers, *_ = Overlap(correct=1, wrong=0, absent=0)(run)
    counts = list(correct_digits(run))
    assert numbers["pictures"] == numbers["test_pairs"] == len(counts) == 359
    assert numbers["error"] == pytest.approx(1 - counts.count(2) / 359)
    assert numbers["digit_error"] == pytest.approx(1 - sum(counts) / 718)
    squares = ink = 0.0
    for batch, output in run.outputs():  # this network decodes the labels
        squares += (output.reconstruction - batch.pixels).square().mean((1, 2, 3, 4)).sum().item()
        ink += output.reconstruction.mean((1, 2, 3, 4)).sum().item()
    assert numbers["squared_error"] == pytest.approx(squares / 359)
    assert numbers["ink_present"] == pytest.approx(ink / 359)
    assert 0 < numbers["ink_absent"] < 1
    measured = run.in_batches(run.components.dataset.read("test")).overlap()
    assert (numbers["overlap_frames"], numbers["overlap_ink"]) == (measured["frames"], measured["ink"])
    assert numbers["overlap_paper"] == 0.8


def test_a_limit_is_exact(pairs):
    numbers, *_ = Overlap(correct=0, wrong=1, absent=0)(pairs(limit=37))
    assert (numbers["pictures"], numbers["test_pairs"]) == (37, 359)


def test_an_absent_class_is_drawn_uniformly_from_those_that_are_neither_label_nor_prediction():
    taken = torch.tensor([[0, 1, 1, 4]]).repeat(3000, 1)
    absent, exists = absent_class(taken, 6, torch.Generator().manual_seed(0))
    assert exists.all()
    assert {*absent.tolist()} == {2, 3, 5}
    assert (absent.bincount(minlength=6)[[2, 3, 5]] - 1000).abs().max() < 5 * 26  # standard error
    _, exists = absent_class(torch.tensor([[0, 1, 0, 2], [0, 1, 1, 0]]), 3, torch.Generator().manual_seed(0))
    assert exists.tolist() == [False, True]


def test_it_needs_a_decoder_and_two_digits_in_each_image(pairs, untrained):
    study = Overlap(correct=1, wrong=1, absent=1)
    with pytest.raises(UserError, match=r"^this study needs pairs of digits, .* has; this is digits$"):
        study(untrained())
    run = pairs()
    run.model.decoder = None
    with pytest.raises(UserError, match=r"^this run has no decoder"):
        study(run)


@pytest.mark.parametrize(
    "study", [Reconstructions(correct=1, wrong=0), Perturbations(classes=None, reach=1, step=1)]
)
def test_studies_of_one_class_refuse_pairs(study, pairs):
    message = r"^this study needs images of one class each; those of multimnist have 2$"
    with pytest.raises(UserError, match=message):
        study(pairs())


def test_nothing_to_show_is_one_line(pairs):
    run = pairs(limit=1)
    is_wrong = next(correct_digits(run)) < 2
    study = Overlap(correct=int(is_wrong), wrong=int(not is_wrong), absent=0)
    with pytest.raises(UserError, match=r"^there is no image of the kinds that study\.correct, wrong and"):
        study(run)


@pytest.mark.parametrize(("correct", "wrong", "absent"), [(-1, 1, 0), (1, -1, 0), (1, 0, -1), (0, 0, 0)])
def test_wrong_settings_are_refused(correct, wrong, absent):
    with pytest.raises(ValueError, match=r"^correct, wrong and absent must be >= 0 and not all 0, got"):
        Overlap(correct=correct, wrong=wrong, absent=absent)
