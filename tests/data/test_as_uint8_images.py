import pytest
import torch

from capsexp.data.preprocess import as_uint8_images


def random_images(count=40, channels=3, height=9, width=11):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


ALL_BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bytes_divided_by_255_convert_back_to_the_same_bytes(dtype):
    assert torch.equal(as_uint8_images(ALL_BYTES.to(dtype) / 255, (1, 16, 16)), ALL_BYTES)
    in_numpy = (ALL_BYTES.to(dtype) / 255).numpy()
    assert torch.equal(as_uint8_images(in_numpy, (1, 16, 16)), ALL_BYTES)


def test_bytes_are_converted_without_a_copy():
    images = random_images()
    assert as_uint8_images(images, (3, 9, 11)).data_ptr() == images.data_ptr()
    assert torch.equal(as_uint8_images(images.numpy(), (3, 9, 11)), images)


def test_a_single_image_becomes_a_batch_of_one():
    images = random_images()
    assert torch.equal(as_uint8_images(images[4], (3, 9, 11)), images[4:5])


def test_grayscale_images_need_no_channel_axis():
    images = random_images(channels=1)
    for given, expected in (
        (images[:, 0], images),
        (images[4, 0], images[4:5]),
        (images[4], images[4:5]),
        (images[:1, 0], images[:1]),
    ):
        assert torch.equal(as_uint8_images(given, (1, 9, 11)), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 5, 5), r"images must have shape \[N, 3, 5, 4\], got \[2, 3, 5, 5\]"),
        (torch.zeros(2, 1, 5, 4), r"images must have shape \[N, 3, 5, 4\], got \[2, 1, 5, 4\]"),
        (torch.zeros(5, 4), r"images must have shape \[N, 3, 5, 4\], got \[5, 4\]"),
        (torch.zeros(0, 3, 5, 4), r"images must have shape \[N, 3, 5, 4\], got \[0, 3, 5, 4\]"),
        (torch.zeros(3, 5, 4, dtype=torch.int64), r"images must be uint8 or float in \[0, 1\], got int64"),
        (torch.zeros(3, 5, 4, dtype=torch.bfloat16), r"uint8 or float in \[0, 1\], got bfloat16"),
        (
            torch.full((3, 5, 4), 200.0),
            r"float images must be in \[0, 1\], got 200 … 200; pass 0 … 255 as uint8",
        ),
        (torch.full((3, 5, 4), -0.5), r"float images must be in \[0, 1\], got -0.5 … -0.5"),
        (torch.full((3, 5, 4), float("nan")), r"float images must be in \[0, 1\], got nan … nan"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        as_uint8_images(images, (3, 5, 4))


def test_read_only_and_reversed_arrays_are_converted():
    images = random_images().numpy()
    images.flags.writeable = False
    assert (as_uint8_images(images, (3, 9, 11)).numpy() == images).all()
    assert (as_uint8_images(images[:, ::-1], (3, 9, 11)).numpy() == images[:, ::-1]).all()
