import pytest
import torch

from capsexp.layer.decoder import Decoder, decoded_class


def test_decoder_takes_160_inputs_of_which_all_but_one_class_are_zero():
    decoder = Decoder(10, 16, (1, 28, 28), hidden=[512, 1024])
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    poses = torch.randn(2, 10, 16)
    decoder(poses, torch.tensor([3, 9]))
    expected = torch.zeros(2, 10, 16)
    expected[0, 3], expected[1, 9] = poses[0, 3], poses[1, 9]
    assert decoder.layers[0].in_features == 160
    assert torch.equal(seen[0], expected.flatten(1))


def test_decoder_paints_a_image_in_the_unit_range():
    decoder = Decoder(4, 3, (2, 5, 7), hidden=[8])
    image = decoder(10 * torch.randn(6, 4, 3), torch.arange(6) % 4)
    assert image.shape == (6, 2, 5, 7)
    assert ((image >= 0) & (image <= 1)).all()


def test_the_masked_capsules_get_no_gradient():
    poses = torch.randn(1, 4, 3, requires_grad=True)
    Decoder(4, 3, (1, 5, 5), hidden=[8, 8])(poses, torch.tensor([2])).sum().backward()
    assert poses.grad.any(2).tolist() == [[False, False, True, False]]


def test_hidden_layers_are_rectified():
    decoder = Decoder(4, 3, (1, 5, 5), hidden=[8, 6])
    seen = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder(torch.randn(5, 4, 3), torch.zeros(5, dtype=torch.int64))
    assert [tuple(tensor.shape) for tensor in seen] == [(5, 12), (5, 8), (5, 6)]
    assert all((tensor >= 0).all() for tensor in seen[1:])


def test_several_classes_are_decoded_one_at_a_time_by_the_same_weights():
    decoder = Decoder(4, 3, (1, 5, 7), hidden=[8])
    poses, classes = torch.randn(6, 4, 3), torch.randint(4, (6, 2))
    images = decoder(poses, classes)
    assert images.shape == (6, 2, 1, 5, 7)
    for place in range(2):
        torch.testing.assert_close(images[:, place], decoder(poses, classes[:, place]))


@pytest.mark.parametrize("labels", [torch.tensor([2, 0]), torch.tensor([[2, 0], [0, 1]])])
def test_as_many_classes_are_decoded_as_there_are_labels(labels):
    scores = torch.tensor([[0.1, 0.9, 0.8], [0.7, 0.2, 0.6]])
    assert torch.equal(decoded_class("label", scores, labels), labels)
    assert torch.equal(decoded_class(1, scores, labels), torch.ones_like(labels))
    guesses = decoded_class("prediction", scores, labels)
    # Of several, the right one stands at its label's place.
    assert guesses.tolist() == ([1, 0] if labels.dim() == 1 else [[2, 1], [0, 2]])
    assert decoded_class("label", scores, None).tolist() == [1, 0]
