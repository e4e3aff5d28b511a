import pytest
import torch
from torch.nn import functional as F

from capsexp.data.affine import apply_affine
from capsexp.data.batches import Batches
from capsexp.data.image_ops import resized
from capsexp.data.pairs import OverlaidPairs
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split

EVERYTHING = {
    "resize": None,
    "shift": 2,
    "shift_fill": "zeros",
    "crop": 7,
    "flip": True,
    "rotation": 10,
    "scale": [0.9, 1.1],
    "shear": 0.1,
    "elastic": 1,
    "brightness": 63,
    "contrast": [0.2, 1.8],
    "contrast_mean": "window",
    "standardise": "last",
    "mixup": 0,
    "test_crops": 1,
}


def random_images(count=40, channels=3, height=9, width=11):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shifted(image, down, right):
    """Shift an image pixel by pixel and fill with 0."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                result[:, y, x] = image[:, y - down, x - right]
    return result


def test_with_every_step_off_the_bytes_do_not_change():
    images = random_images()
    for result in (Preprocess.identity().train(images, generator()), Preprocess.identity().test(images)):
        torch.testing.assert_close(result.pixels, images.float() / 255, rtol=0, atol=0)
        assert result.images is result.pixels


def test_each_image_is_shifted_by_one_amount_and_all_amounts_occur():
    images = random_images(count=400, channels=2, height=5, width=6)
    pixels = Preprocess.identity(shift=2).train(images, generator()).pixels
    amounts = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    seen = []
    for image, result in zip(images, pixels, strict=True):
        matches = [a for a in amounts if torch.equal(shifted(image, *a).float() / 255, result)]
        assert len(matches) == 1
        seen += matches
    assert set(seen) == set(amounts)
    assert min(seen.count(amount) for amount in amounts) >= 4  # 16 expected


def test_each_random_crop_is_a_window_of_its_image_and_all_windows_occur():
    images = random_images(count=200, height=6, width=7)
    pixels = Preprocess.identity(crop=4).train(images, generator()).pixels
    corners = [(top, left) for top in range(3) for left in range(4)]
    seen = set()
    for image, result in zip(images, pixels, strict=True):
        windows = {c: image[:, c[0] : c[0] + 4, c[1] : c[1] + 4].float() / 255 for c in corners}
        matches = [corner for corner, window in windows.items() if torch.equal(window, result)]
        assert len(matches) == 1
        seen |= set(matches)
    assert seen == set(corners)


def test_a_shifted_crop_is_a_window_of_the_shifted_image():
    images = random_images(count=60, height=6, width=6)
    pixels = Preprocess.identity(crop=4, shift=2).train(images, generator()).pixels
    offsets = range(-2, 5)
    for image, result in zip(images, pixels, strict=True):
        padded = F.pad(image, [2, 2, 2, 2]).float() / 255
        windows = [padded[:, y + 2 : y + 6, x + 2 : x + 6] for y in offsets for x in offsets]
        assert any(torch.equal(window, result) for window in windows)


def test_flip_mirrors_about_half_of_the_images_left_to_right():
    images = random_images(count=400)
    pixels = Preprocess.identity(flip=True).train(images, generator()).pixels
    straight, mirrored = images.float() / 255, images.flip(3).float() / 255
    same = (pixels == straight).flatten(1).all(1)
    assert torch.equal(same, ~(pixels == mirrored).flatten(1).all(1))
    assert 150 < same.sum() < 250


def test_brightness_adds_one_number_to_an_image():
    result = Preprocess.identity(brightness=63).train(random_images(count=300), generator())
    added = (result.images - result.pixels).flatten(1)
    torch.testing.assert_close(added, added[:, :1].expand_as(added))
    amounts = added[:, 0] * 255
    assert -63 <= amounts.min() < -50
    assert 50 < amounts.max() <= 63
    assert result.pixels.min() >= 0


def test_contrast_scales_the_distance_from_the_mean_of_each_channel():
    result = Preprocess.identity(contrast=[0.2, 1.8]).train(random_images(count=300), generator())
    mean = result.pixels.mean((2, 3), keepdim=True)
    torch.testing.assert_close(result.images.mean((2, 3), keepdim=True), mean)
    factor = (
        ((result.images - mean) / (result.pixels - mean)).flatten(1).nanmedian(1).values
    )  # a pixel at the mean gives 0 / 0
    expected = mean + (result.pixels - mean) * factor[:, None, None, None]
    torch.testing.assert_close(result.images, expected, rtol=1e-4, atol=1e-5)
    assert 0.2 <= factor.min() < 0.4
    assert 1.6 < factor.max() <= 1.8001


def test_standardised_images_have_mean_0_and_deviation_1_and_constant_ones_stay_finite():
    images = random_images()
    images[0] = 7
    result = Preprocess.identity(standardise="last").test(images)
    assert result.images[0].abs().max() < 1e-3
    flat = result.images[1:].flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), rtol=0, atol=1e-5)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(len(flat)))


def test_standardisation_comes_after_brightness_and_contrast():
    # For one channel it undoes brightness and contrast, so only the geometry remains.
    preprocess = Preprocess.identity(brightness=63, contrast=[0.2, 1.8], standardise="last")
    result = preprocess.train(random_images(channels=1), generator())
    again = Preprocess.identity(standardise="last").test(random_images(channels=1))
    torch.testing.assert_close(result.images, again.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("region", ["window", "image"])
def test_with_standardisation_last_brightness_never_reaches_the_network(region):
    images, last = (
        random_images(height=13, width=14),
        Preprocess.identity(crop=7, contrast_mean=region, standardise="last"),
    )
    brighter = Preprocess.identity(crop=7, contrast_mean=region, standardise="last", brightness=63)
    # The crop is drawn first, so both have the same windows.
    torch.testing.assert_close(
        brighter.train(images, generator()).images,
        last.train(images, generator()).images,
        rtol=1e-4,
        atol=1e-5,
    )


def test_with_standardisation_first_brightness_is_in_units_of_the_images_deviation():
    images = random_images(count=300, height=13, width=14)
    first = Preprocess.identity(crop=7, standardise="first").train(images, generator())
    brighter = Preprocess.identity(crop=7, standardise="first", brightness=2.0).train(images, generator())
    added = (brighter.images - first.images).flatten(1)
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-5)
    assert -2 <= added.min() < -1.8
    assert 1.8 < added.max() <= 2.0001
    assert torch.equal(brighter.pixels, first.pixels)


def test_standardisation_first_uses_the_whole_image_not_the_window():
    images = random_images(height=13, width=14)
    images[0] = 7
    whole = (images[1:].double() - images[1:].double().mean((1, 2, 3), keepdim=True)).float()
    whole = whole / whole.flatten(1).std(1, correction=0)[:, None, None, None]
    result = Preprocess.identity(crop=7, standardise="first").test(images)
    torch.testing.assert_close(result.images[1:], whole[:, :, 3:10, 3:10], rtol=1e-4, atol=1e-5)
    assert result.images[0].abs().max() < 1e-3
    everything = Preprocess.identity(standardise="first").test(images[1:]).images.flatten(1)
    torch.testing.assert_close(everything.mean(1), torch.zeros(len(everything)), rtol=0, atol=1e-5)
    torch.testing.assert_close(everything.std(1, correction=0), torch.ones(len(everything)))


def test_the_zeros_of_a_shift_do_not_count_for_standardisation_first():
    images = random_images(count=60, height=6, width=6)
    result = Preprocess.identity(shift=2, standardise="first").train(images, generator())
    mean = images.float().mean((1, 2, 3), keepdim=True)
    deviation = (images.float() - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    expected = (255 * result.pixels - mean) / deviation
    torch.testing.assert_close(result.images, expected, rtol=1e-4, atol=1e-5)
    assert (result.pixels == 0).any()


@pytest.mark.parametrize("standardise", [None, "first"])
def test_contrast_about_the_mean_of_the_image_equals_contrast_before_the_crop(standardise):
    images = random_images(count=60, height=9, width=10)
    keywords = {"brightness": 2, "contrast": [0.2, 1.8], "contrast_mean": "image", "standardise": standardise}
    # One window for all, so that the draws that follow the crop's are the same with and without it.
    before = Preprocess.identity(**keywords)._network_input(images.float() / 255, images, generator())
    after = Preprocess.identity(**keywords)._network_input(
        images[..., 2:8, 3:9].float() / 255, images, generator()
    )
    torch.testing.assert_close(after, before[..., 2:8, 3:9], rtol=1e-5, atol=1e-5)
    of_the_window = Preprocess.identity(**{**keywords, "contrast_mean": "window"})
    other = of_the_window._network_input(images[..., 2:8, 3:9].float() / 255, images, generator())
    assert not torch.allclose(other, after, atol=1e-2)


def test_without_a_crop_the_window_is_the_image():
    keywords = {"flip": True, "brightness": 63, "contrast": [0.2, 1.8], "standardise": "last"}
    window, image = (
        Preprocess.identity(**keywords, contrast_mean=region).train(random_images(), generator())
        for region in ("window", "image")
    )
    torch.testing.assert_close(window.images, image.images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_can_repeat_the_edges(channels):
    images = random_images(channels=channels)
    keywords = {"shift": 3, "crop": None}
    zeros, edge = (
        Preprocess.identity(**keywords, shift_fill=fill).train(images, generator()).pixels
        for fill in ("zeros", "edge")
    )
    inside = zeros > 0  # the images have no zeros
    assert torch.equal(edge[inside], zeros[inside])
    padded = F.pad(images.float() / 255, [3] * 4, mode="replicate")
    for image, whole in zip(edge, padded, strict=True):
        windows = whole.unfold(1, 9, 1).unfold(2, 11, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (windows == image).all((1, 2, 3)).any()


@pytest.mark.usefixtures("no_type_checks")
def test_an_unknown_fill_is_refused():
    with pytest.raises(ValueError, match="shift_fill must be one of zeros, edge, got mirror"):
        Preprocess.identity(shift_fill="mirror")


def test_the_draws_of_images_in_a_batch_differ():
    images = random_images(count=1).expand(64, -1, -1, -1)
    for name in ("shift", "crop", "flip", "brightness", "contrast"):
        result = Preprocess.identity(**{name: EVERYTHING[name]}).train(images, generator())
        assert len(result.images.unique(dim=0)) > 1, name
    result = Preprocess(**EVERYTHING).train(images, generator())
    assert len(result.images.unique(dim=0)) == 64


@pytest.mark.parametrize("region", ["window", "image"])
@pytest.mark.parametrize("standardise", ["first", "last"])
def test_the_augmentation_of_an_image_does_not_depend_on_the_rest_of_the_batch(standardise, region):
    changes = {"brightness": 2, "standardise": standardise, "contrast_mean": region}
    preprocess, images = Preprocess(**{**EVERYTHING, **changes}), random_images()
    changed = images.clone()
    changed[:4] = 255 - changed[:4]
    first, second = (preprocess.train(batch, generator()) for batch in (images, changed))
    torch.testing.assert_close(first.images[4:], second.images[4:])
    assert not torch.allclose(first.images[:4], second.images[:4])


def test_augmentation_depends_only_on_the_generator():
    preprocess, images = Preprocess(**EVERYTHING), random_images()
    first, again = (preprocess.train(images, generator(3)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    torch.rand(5)
    assert not torch.equal(first.images, preprocess.train(images, generator(4)).images)


def test_pixels_stay_in_the_unit_range():
    pixels = Preprocess(**EVERYTHING).train(random_images(), generator()).pixels
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_test_images_are_centered_and_not_random():
    images = random_images(height=8, width=10)
    preprocess = Preprocess(**EVERYTHING)
    assert torch.equal(preprocess.test(images).images, preprocess.test(images).images)
    cropped = Preprocess.identity(crop=4, shift=2, flip=True, brightness=63).test(images)
    assert torch.equal(cropped.pixels, images[:, :, 2:6, 3:7].float() / 255)
    assert cropped.images is cropped.pixels


@pytest.mark.parametrize("standardise", [None, "first", "last"])
def test_a_test_image_alone_equals_itself_in_a_batch(standardise):
    images = random_images(height=14, width=15)
    preprocess = Preprocess.identity(crop=7, standardise=standardise, test_crops=13)
    views = zip(preprocess.test_views(images), preprocess.test_views(images[4:5]), strict=True)
    for batch, alone in views:
        torch.testing.assert_close(batch.images[4:5], alone.images)


@pytest.mark.parametrize(("height", "width"), [(13, 13), (14, 17)])
def test_13_views_are_the_center_and_the_windows_along_both_diagonals(height, width):
    images = random_images(height=height, width=width)
    preprocess = Preprocess.identity(crop=7, test_crops=13)
    views = preprocess.test_views(images)
    top, left = (height - 7) // 2, (width - 7) // 2
    moves = [(0, 0)] + [(d * f, r * f) for f in (1, 2, 3) for d in (-1, 1) for r in (-1, 1)]
    for (down, right), view in zip(moves, views, strict=True):
        window = images[:, :, top + down :, left + right :][:, :, :7, :7]
        assert torch.equal(view.pixels, window.float() / 255)
        assert view.images is view.pixels
    assert torch.equal(views[0].pixels, preprocess.test(images).pixels)


def test_views_are_standardised_like_the_center():
    images, whole = (
        random_images(height=13, width=13),
        Preprocess.identity(standardise="first").test(random_images(height=13, width=13)),
    )
    first = Preprocess.identity(crop=7, standardise="first", test_crops=13).test_views(images)[-1]
    torch.testing.assert_close(first.images, whole.images[:, :, 6:, 6:])
    last = Preprocess.identity(crop=7, standardise="last", test_crops=13).test_views(images)[-1]
    expected = Preprocess.identity(standardise="last").test(images[:, :, 6:, 6:])
    torch.testing.assert_close(last.images, expected.images)


def test_one_view_is_the_center():
    views = Preprocess(**EVERYTHING).test_views(random_images())
    assert len(views) == 1
    assert torch.equal(views[0].images, Preprocess(**EVERYTHING).test(random_images()).images)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (3, 9, 11)),
        ({"crop": 7}, (3, 7, 7)),
        ({"resize": 6}, (3, 6, 6)),
        ({"resize": [12, 14], "crop": 8}, (3, 8, 8)),
    ],
)
def test_output_shape_is_the_shape_of_the_output(changes, shape):
    preprocess, images = Preprocess.identity(**changes), random_images()
    stored = preprocess.resize_all(images)
    assert tuple(stored.shape[1:]) == preprocess.resized_shape((3, 9, 11))
    assert preprocess.output_shape((3, 9, 11)) == shape
    assert tuple(preprocess.test(stored).images.shape[1:]) == shape
    assert tuple(preprocess.train(stored, generator()).images.shape[1:]) == shape


def test_resize_averages_instead_of_skipping_pixels():
    stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = Preprocess.identity(resize=8).resize_all(stripes)
    assert small.float().sub(127.5).abs().max() < 40


def test_resizing_many_images_equals_resizing_each():
    images = random_images(count=1030, channels=1, height=4, width=4)
    together = Preprocess.identity(resize=3).resize_all(images)
    assert torch.equal(together[1025:], Preprocess.identity(resize=3).resize_all(images[1025:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": -1}, "shift must be >= 0, got -1"),
        ({"crop": 0}, "crop must be >= 1, got 0"),
        ({"resize": 0}, "resize must be >= 1 pixel, got 0"),
        ({"resize": [1, 2, 3]}, r"resize must be null, an integer or \[height, width\], got"),
        ({"brightness": -1}, r"brightness must be in \[0, 255\], got -1"),
        ({"brightness": 256}, r"brightness must be in \[0, 255\], got 256"),
        (
            {"brightness": 63, "standardise": "first"},
            r"brightness must be in \[0, 10\] standard deviations with standardise: first, got 63",
        ),
        ({"test_crops": 5}, "test_crops must be 1 or 13, got 5"),
        ({"test_crops": True}, "test_crops must be 1 or 13, got True"),
        ({"contrast": [1.8, 0.2]}, r"contrast must be null or \[lowest, highest\] .* got \[1.8, 0.2\]"),
        ({"contrast": [1.0]}, r"contrast must be null or \[lowest, highest\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.identity(**changes)


def test_a_crop_or_shift_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="crop must be <= the image's 8x9, got 10"):
        Preprocess.identity(crop=10).output_shape((1, 8, 9))
    with pytest.raises(ValueError, match="shift must be < the image's 8x9, got 8"):
        Preprocess.identity(shift=8).output_shape((1, 8, 9))


@pytest.mark.parametrize("crop", [None, 8])
def test_13_crops_without_room_for_them_are_refused(crop):
    message = f"test_crops 13 needs a crop with 3 pixels of the image's 13x14 on each side, got crop {crop}"
    with pytest.raises(ValueError, match=message):
        Preprocess.identity(crop=crop, test_crops=13).output_shape((1, 13, 14))


PAIRS = {"shift": 1, "margin": 1, "partners": 1, "pair_seed": 0}
OPTIONS = {
    "batch_size": 2,
    "seed": 0,
    "device": "cpu",
    "memory_format": torch.contiguous_format,
    "limit": None,
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool], ids=str
)
def test_images_that_are_not_bytes_are_refused_in_production(dtype, no_type_checks):
    images = (random_images().float() / 255).to(dtype)
    preprocess, labels = Preprocess.identity(), torch.arange(len(images))
    name = str(dtype).removeprefix("torch.")
    message = rf"images must be uint8, got {name}; convert floats in \[0, 1\] with as_uint8_images"
    for apply in (
        preprocess.test,
        preprocess.test_views,
        lambda images: preprocess.train(images, generator()),
        Preprocess.identity(resize=8).resize_all,
        lambda images: resized(images, (8, 8)),
        lambda images: Batches(Split(images, labels), preprocess, **OPTIONS),
        lambda images: OverlaidPairs(Split(images, labels), preprocess, **PAIRS, **OPTIONS),
        lambda images: apply_affine(images, torch.eye(2, dtype=torch.float64).expand(len(images), 2, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            apply(images)


@pytest.mark.gpu
def test_augmentation_is_the_same_on_every_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, preprocess = random_images(), Preprocess(**EVERYTHING)
    here, there = preprocess.train(images, generator()), preprocess.train(images.cuda(), generator())
    assert torch.equal(here.pixels, there.pixels.cpu())
    torch.testing.assert_close(here.images, there.images.cpu(), rtol=1e-4, atol=1e-4)
