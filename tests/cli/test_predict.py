"""`capsexp predict`."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from capsexp.analysis import predict as predict_module


@pytest.fixture
def images(at_home):
    """Two images of digits, larger than those that the network knows, one of them in color."""
    for number in (0, 1):
        write_digit(at_home / f"digit {number}.png", number)
    yield ["digit 0.png", "digit 1.png"]
    shutil.rmtree(at_home / "run" / "predictions", ignore_errors=True)


def write_digit(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.fromarray((load_digits().images[number] * 15.9).astype("uint8"))
    pixels.resize((30, 20)).convert("RGB" if number else "L").save(path)
    return path


def rows(out):
    """The cells of the table below its header."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]


def everything_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_predict_prints_classes_and_writes_reconstructions(images, home, capsexp):
    code, out, error = capsexp("predict", "run=run", *images, "top=2", COLUMNS="200")
    assert (code, error) == (0, "")
    assert [cells[0] for cells in rows(out)] == images
    for _, *cells in rows(out):
        guesses = [re.fullmatch(r"(\d) (0\.\d{3}|1\.000)", cell) for cell in cells]
        assert float(guesses[0][2]) >= float(guesses[1][2])
        assert guesses[0][1] != guesses[1][1]
    for name in images:
        target = f"run/predictions/{name}.reconstruction.png"
        with Image.open(home / target) as image:
            assert image.size == (16, 8)  # the network's input and its reconstruction
        assert f"{target}: the network's input and its reconstruction" in out


def test_nothing_is_written_beside_the_images(images, home, capsexp):
    folder = home / "set"
    for number in range(3):
        write_digit(folder / "class" / f"{number}.png", number)
    before = everything_below(folder)
    names = sorted(os.listdir(home))
    assert capsexp("predict", "run=run", folder, folder / "class" / "0.png", *images)[0] == 0
    assert everything_below(folder) == before
    assert sorted(os.listdir(home)) == names


def test_reconstructions_of_the_same_name_have_numbers_and_replace_nothing(images, home, tmp_path, capsexp):
    sources = ["same.png", "same.bmp", "a/same.png", "b/same.png"]
    for name in sources:
        write_digit(tmp_path / name)
    out = tmp_path / "out"
    out.mkdir()
    (out / "same.bmp.reconstruction.png").write_text("precious")
    call = ("predict", "run=run", *(tmp_path / name for name in sources), f"output={out}")
    assert capsexp(*call)[0] == 0
    names = {
        f"same.{name}.png" for name in ("png.reconstruction", "png.reconstruction-2", "png.reconstruction-3")
    }
    names |= {"same.bmp.reconstruction.png", "same.bmp.reconstruction-2.png"}
    assert {*os.listdir(out)} == names
    assert (out / "same.bmp.reconstruction.png").read_text() == "precious"
    first = everything_below(out)
    assert capsexp(*call)[0] == 0
    assert first.items() <= everything_below(out).items()
    assert len(os.listdir(out)) == len(names) + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "capsexp predict needs images: capsexp predict run=DIR FILES"),
        (["nothing.png"], "nothing.png: there is no such file"),
        (["digit 0.png", "nothing.png"], "nothing.png: there is no such file"),
        (["run/checkpoints"], "run/checkpoints: there is no image in this folder"),
        (["run/command.txt"], "run/command.txt is damaged and cannot be decoded"),
        (["/dev/zero"], "/dev/zero is damaged and cannot be decoded: it is not a regular file"),
        (["digit 0.png", "top=0"], "top: must be an integer >= 1, got 0"),
        (["digit 0.png", "top=true"], "top: must be an integer >= 1, got True"),
        (["digit 0.png", "reconstructions=2"], "reconstructions: must be true or false, got 2"),
        (["digit 0.png", "output=3"], "output: must be a folder or null, got 3"),
        (["digit 0.png", "topp=1"], "unknown key 'topp': did you mean 'top'?"),
    ],
)
def test_predict_reports_what_it_cannot_use(arguments, message, images, capsexp):
    code, out, error = capsexp("predict", "run=run", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"capsexp: {message}")
    assert error.count("\n") == 1


def test_images_that_cannot_be_read_are_named_and_the_others_are_classified(images, tmp_path, capsexp):
    for number in range(40):
        write_digit(tmp_path / f"{number:02}.png", number % 10)
    (tmp_path / "03.png").write_bytes(b"no image")
    (tmp_path / "35.png").write_bytes((tmp_path / "36.png").read_bytes()[:60])
    code, out, error = capsexp("predict", "run=run", tmp_path, "reconstructions=false", COLUMNS="200")
    assert code == 1
    assert [cells[0] for cells in rows(out)] == [
        str(tmp_path / f"{number:02}.png") for number in range(40) if number not in (3, 35)
    ]
    assert out.count("┏") == out.count("└") == 1  # one table, though it was printed in parts
    assert len({len(line) for line in out.splitlines()}) == 1
    assert [line.split(" is damaged")[0] for line in error.splitlines()] == [
        f"capsexp: {tmp_path}/03.png",
        f"capsexp: {tmp_path}/35.png",
    ]


def test_a_folder_is_read_with_its_folders_and_says_what_it_passes_over(images, tmp_path, capsexp):
    for name in ("b.png", "a/c.png", ".hidden/d.png", "._b.png"):
        write_digit(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    code, out, error = capsexp("predict", "run=run", tmp_path, "reconstructions=false", COLUMNS="200")
    assert (code, error) == (0, "")
    assert [cells[0] for cells in rows(out)] == [str(tmp_path / "b.png"), str(tmp_path / "a/c.png")]
    assert "1 .txt" in out


def test_images_are_read_in_batches(images, tmp_path, capsexp, monkeypatch):
    sizes, original = [], predict_module.predict_batch

    def note(model, components, batch):
        sizes.append(len(batch))
        return original(model, components, batch)

    monkeypatch.setattr(predict_module, "predict_batch", note)
    for number in range(20):
        write_digit(tmp_path / f"{number}.png")
    assert capsexp("predict", "run=run", "trainer.batch_size=8", tmp_path, "reconstructions=false")[0] == 0
    assert sizes == [8, 8, 4]


@pytest.mark.parametrize("name", ["[x].png", "[/x].png", "[bold]y[/bold].png", "\x1b[31mred.png", "a\nb.png"])
def test_names_are_text(name, images, tmp_path, capsexp):
    write_digit(tmp_path / name)
    code, out, error = capsexp("predict", "run=run", tmp_path / name, COLUMNS="300")
    assert (code, error) == (0, "")
    shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert rows(out)[0][0] == f"{tmp_path}/{shown}"
    assert f"run/predictions/{shown.rpartition('/')[2]}.reconstruction.png: " in out
    assert "\x1b" not in out


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/null", "digit 0.png/below", "digit 0.png"])
def test_a_place_that_cannot_be_written_is_named_below_the_table(place, images, capsexp):
    code, out, error = capsexp("predict", "run=run", *images, f"output='{place}'", COLUMNS="200")
    assert code == 1
    assert [cells[0] for cells in rows(out)] == images
    assert error.startswith(f"capsexp: the reconstructions cannot be written into {place}: ")
    assert error.count("\n") == 1


def test_a_link_in_the_run_directory_is_not_followed(images, at_home, tmp_path, capsexp):
    (at_home / "run" / "predictions").symlink_to(tmp_path)
    try:
        code, _, error = capsexp("predict", "run=run", *images)
    finally:
        (at_home / "run" / "predictions").unlink()
    assert code == 1
    assert "run/predictions" in error
    assert "link" in error
    assert list(tmp_path.iterdir()) == []


def test_predict_without_reconstructions_writes_none(images, at_home, capsexp):
    code, out, _ = capsexp("predict", "run=run", "digit 0.png", "reconstructions=false")
    assert code == 0
    assert "digit 0.png" in out
    assert not (at_home / "run" / "predictions").exists()


def test_predict_and_eval_know_the_images_of_a_run(tmp_path, monkeypatch, capsexp, tiny_overrides):
    """From every working directory, and after the folder has changed."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("[b]cat", "dog")):
        for number in range(6):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([label, number]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    quick = ("trainer.max_steps=2", "trainer.batch_size=4")
    data = ("dataset=image_folder", "dataset.path=data")
    assert capsexp("train", *tiny_overrides, *data, *quick, "run=run")[0] == 0
    shutil.copy("data/dog/0.png", "one.png")
    elsewhere = tmp_path / "elsewhere"
    for name in ("wrong", "folder"):
        shutil.copytree("data/dog", elsewhere / "data" / name)
    predict = ("predict", f"run={tmp_path}/run", tmp_path / "one.png", "reconstructions=false")
    expected, evaluated = rows(capsexp(*predict)[1]), rows(capsexp("eval", "run=run")[1])
    assert {cell.rpartition(" ")[0] for cell in expected[0][1:]} == {"[b]cat", "dog"}
    monkeypatch.chdir(elsewhere)
    assert rows(capsexp("eval", f"run={tmp_path}/run")[1]) == evaluated
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "wolf")
    assert rows(capsexp(*predict)[1]) == expected
    code, _, error = capsexp("eval", f"run={tmp_path}/run")
    assert code == 2
    assert f"{tmp_path}/data: the classes are [b]cat, wolf; this run learned [b]cat, dog" in error
    shutil.rmtree(tmp_path / "data")
    assert rows(capsexp(*predict)[1]) == expected
    code, _, error = capsexp("eval", f"run={tmp_path}/run")
    assert (code, error.count("\n")) == (2, 1)
    assert f"path {tmp_path}/data does not exist" in error
