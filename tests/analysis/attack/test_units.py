import pytest
import torch

from capsexp.analysis.attack.methods import fgsm
from capsexp.analysis.attack.units import Scale, as_pixels, ball_of, scale_of
from capsexp.capsules import Batch
from capsexp.data.preprocess import Preprocess
from capsexp.dataset.digits import Digits
from capsexp.errors import UserError


def digits(standardise, crop=None):
    preprocess = Preprocess.identity(crop=crop, standardise=standardise)
    stored = Digits(preprocess=preprocess, validation=0, split_seed=0).read("test").images
    images, pixels, _ = preprocess.test(stored)
    labels = torch.zeros(len(images), dtype=torch.long)
    return stored, Batch(images, labels, pixels, torch.arange(len(images)))


def batch_of(images, pixels):
    return Batch(images, torch.zeros(len(images), dtype=torch.long), pixels, torch.arange(len(images)))


@pytest.mark.parametrize(
    ("standardise", "crop"), [("last", None), ("first", None), ("last", 6), ("first", 6)]
)
def test_the_scale_is_the_deviation_that_the_dataset_standardised_by(standardise, crop):
    stored, batch = digits(standardise, crop)
    if standardise == "last" and crop:
        stored = stored[:, :, 1:7, 1:7]
    whole = stored.flatten(1).double() / 255
    deviation = whole.std(1, correction=0)
    scale = scale_of(batch)
    assert scale.known.all()
    torch.testing.assert_close(scale.slope, 1 / deviation, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale.offset, -whole.mean(1) / deviation, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scale.epsilon(0.1, units="input", to="pixel"), 25.5 * deviation, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        scale.epsilon(8, units="pixel", to="input"), 8 / 255 / deviation, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(as_pixels(batch.images, scale), batch.pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("standardise", [None, "last", "first"])
def test_an_attack_in_pixels_moves_pixels_by_that_much_and_keeps_them_valid(standardise):
    _, batch = digits(standardise)
    scale = scale_of(batch)
    ball = ball_of(batch, scale, 51, units="pixel", clip=True)
    up = as_pixels(fgsm(torch.ones_like(batch.images), ball), scale)
    torch.testing.assert_close(up, (batch.pixels + 0.2).clamp_max(1), rtol=0, atol=2e-6)
    down = as_pixels(fgsm(-torch.ones_like(batch.images), ball), scale)
    torch.testing.assert_close(down, (batch.pixels - 0.2).clamp_min(0), rtol=0, atol=2e-6)
    free = ball_of(batch, scale, 51, units="pixel", clip=False)
    up = as_pixels(fgsm(torch.ones_like(batch.images), free), scale)
    torch.testing.assert_close(up, batch.pixels + 0.2, rtol=0, atol=2e-6)
    nothing = ball_of(batch, scale, 0, units="pixel", clip=True)
    assert torch.equal(fgsm(torch.ones_like(batch.images), nothing), batch.images)


def test_without_standardisation_input_and_pixels_have_one_scale_even_in_one_color():
    pixels = torch.cat([torch.rand(2, 1, 4, 4), torch.full((1, 1, 4, 4), 0.3)])
    scale = scale_of(batch_of(pixels, pixels))
    assert scale.known.all()
    assert scale.slope.tolist() == [1, 1, 1]
    ball = ball_of(batch_of(pixels, pixels), scale, 255, units="pixel", clip=True)
    assert torch.equal(fgsm(torch.ones_like(pixels), ball), torch.ones_like(pixels))


def test_a_standardised_image_of_one_color_has_no_scale_no_bounds_and_no_pixel_attack():
    pixels = torch.cat([torch.full((1, 1, 4, 4), 0.3), torch.rand(1, 1, 4, 4)])
    images = (pixels - pixels.mean((1, 2, 3), keepdim=True)) / 0.2
    batch = batch_of(images, pixels)
    scale = scale_of(batch)
    assert scale.known.tolist() == [False, True]
    assert scale.epsilon(1, units="input", to="pixel").isnan().tolist() == [True, False]
    ones = torch.ones_like(images)
    moved = fgsm(ones, ball_of(batch, scale, 9.0, units="input", clip=True)) - images
    torch.testing.assert_close(moved[0], torch.full((1, 4, 4), 9.0))
    assert moved[1].max() <= 5 + 1e-4
    moved = fgsm(ones, ball_of(batch, scale, 9.0, units="pixel", clip=True)) - images
    assert (moved[0] == 0).all()
    assert (moved[1] > 0).any()
    assert (as_pixels(images, scale)[0] == 0.5).all()


def test_one_pixel_that_is_one_255th_brighter_is_enough_for_a_scale():
    pixels = torch.full((1, 2, 32, 32), 77 / 255)
    pixels[0, 0, 3, 5] = 78 / 255
    images = ((pixels.double() - pixels.double().mean()) / (1 / (255 * 2048**0.5))).float()
    scale = scale_of(batch_of(images, pixels))
    assert scale.known.all()
    assert scale.slope.item() == pytest.approx(255 * 2048**0.5, rel=1e-5)


def test_inputs_that_are_not_linear_in_the_pixels_have_no_units():
    pixels = torch.rand(3, 1, 5, 5)
    with pytest.raises(
        UserError, match=r"^the network's input is not a multiple of the pixels plus a constant"
    ):
        scale_of(batch_of(pixels.square(), pixels))


def test_units_of_several_epsilons_follow_from_those_of_one():
    scale = Scale(torch.tensor([2.0, 4.0]).double(), torch.zeros(2).double(), torch.tensor([True, True]))
    assert scale.epsilon(0.5, units="input", to="input").tolist() == [0.5, 0.5]
    assert scale.epsilon(0.5, units="input", to="pixel").tolist() == [63.75, 31.875]
    assert scale.epsilon(51, units="pixel", to="input").tolist() == pytest.approx([0.4, 0.8])
