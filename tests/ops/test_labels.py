import itertools

import pytest
import torch

from capsexp.ops.labels import all_correct, fraction_correct, multi_hot, predicted_labels


def test_of_one_class_predictions_are_the_highest_scores():
    scores, labels = torch.rand(50, 7), torch.randint(7, (50,))
    guesses = predicted_labels(scores, labels)
    assert torch.equal(guesses, scores.argmax(1))
    assert torch.equal(all_correct(guesses, labels), scores.argmax(1) == labels)
    assert torch.equal(fraction_correct(guesses, labels), (scores.argmax(1) == labels).float())
    assert torch.equal(multi_hot(labels, 7), torch.nn.functional.one_hot(labels, 7))


def test_presence_marks_every_class_of_the_image():
    marked = multi_hot(torch.tensor([[3, 0], [1, 2]]), 5)
    assert marked.tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]


@pytest.mark.parametrize("several", [2, 3])
def test_predictions_are_the_highest_scores_with_the_right_ones_at_their_labels_places(several):
    labels = torch.tensor(list(itertools.permutations(range(5), several)))
    scores = torch.rand(len(labels), 5, generator=torch.Generator().manual_seed(0))
    guesses = predicted_labels(scores, labels)
    for chosen, label, row in zip(guesses.tolist(), labels.tolist(), scores.tolist(), strict=True):
        best = sorted(range(5), key=lambda index: -row[index])[:several]
        assert sorted(chosen) == sorted(best)
        assert all(chosen[label.index(index)] == index for index in set(label) & set(best))
        wrong = [guess for guess, index in zip(chosen, label, strict=True) if guess != index]
        assert wrong == [index for index in best if index not in label]
    right = [len({*a} & {*b}) / several for a, b in zip(guesses.tolist(), labels.tolist(), strict=True)]
    assert fraction_correct(guesses, labels).tolist() == pytest.approx(right)
    assert all_correct(guesses, labels).tolist() == [share == 1 for share in right]
    assert 0 < all_correct(guesses, labels).sum() < len(labels)


def test_exact_match_and_share_by_hand():
    labels = torch.tensor([[0, 1], [0, 1], [0, 1], [2, 0]])
    scores = torch.tensor([[0.7, 0.9, 0.1], [0.9, 0.1, 0.8], [0.1, 0.9, 0.8], [0.9, 0.2, 0.8]])
    guesses = predicted_labels(scores, labels)
    assert guesses.tolist() == [[0, 1], [0, 2], [2, 1], [2, 0]]
    assert all_correct(guesses, labels).tolist() == [True, False, False, True]
    assert fraction_correct(guesses, labels).tolist() == [1, 0.5, 0.5, 1]
