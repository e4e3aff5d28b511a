"""`capsexp predict`."""

import re

import pytest
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def images(at_home):
    """Two images of digits, larger than those that the network knows, one of them in color."""
    for number in (0, 1):
        pixels = Image.fromarray((load_digits().images[number] * 15.9).astype("uint8"))
        image = pixels.resize((30, 20)).convert("RGB" if number else "L")
        image.save(at_home / f"digit {number}.png")
    return ["digit 0.png", "digit 1.png"]


def test_predict_prints_classes_and_writes_reconstructions(images, home, capsexp):
    code, out, error = capsexp("predict", "run=run", *images, "top=2", COLUMNS="200")
    assert (code, error) == (0, "")
    for name in images:
        cells = next(line for line in out.splitlines() if name in line and "│" in line).split("│")
        guesses = [re.fullmatch(r" (\d) (0\.\d{3}|1\.000) +", cell) for cell in cells[2:4]]
        assert float(guesses[0][2]) >= float(guesses[1][2])
        assert guesses[0][1] != guesses[1][1]
        target = home / name.replace(".png", ".reconstruction.png")
        with Image.open(target) as image:
            assert image.size == (16, 8)  # the network's input and its reconstruction
        assert f"{target.name}: the network's input and its reconstruction" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "capsexp predict needs images: capsexp predict run=DIR FILES"),
        (["nothing.png"], "nothing.png: there is no such file"),
        (["digit 0.png", "nothing.png"], "nothing.png: there is no such file"),
        (["run/command.txt"], "run/command.txt is damaged and cannot be decoded"),
        (["digit 0.png", "top=0"], "top: must be an integer >= 1, got 0"),
        (["digit 0.png", "topp=1"], "unknown key 'topp': did you mean 'top'?"),
    ],
)
def test_predict_reports_what_it_cannot_use(arguments, message, images, capsexp):
    code, out, error = capsexp("predict", "run=run", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"capsexp: {message}")
    assert error.count("\n") == 1


def test_predict_without_reconstructions_writes_none(images, at_home, capsexp):
    target = at_home / "digit 0.reconstruction.png"
    target.unlink(missing_ok=True)
    code, out, _ = capsexp("predict", "run=run", "digit 0.png", "reconstructions=false")
    assert code == 0
    assert "digit 0.png" in out
    assert not target.exists()
