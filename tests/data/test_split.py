"""Draws by name; `test_batches.py` tests the draws by position."""

import unicodedata

import pytest

from capsexp.data.split import draw_by_name, name_number


def names(label, count):
    return [f"{label}/{number:03d}.png" for number in range(count)]


def draw(*classes, amount=0.2, seed=0, purpose="test_share"):
    return draw_by_name(classes, amount=amount, seed=seed, purpose=purpose)


def test_numbers_are_the_same_in_every_process():
    # Frozen: a change here changes the splits of every folder of images.
    assert name_number("cat/001.png", seed=0, purpose="test_share") == 0.01688485807429788


@pytest.mark.parametrize("name", ["Caf\u00e9/\u00fc.png", "\uac00/1.png", "x\udcff/1.png"])
def test_numbers_do_not_depend_on_how_unicode_writes_a_name(name):
    numbers = {name_number(unicodedata.normalize(form, name), seed=0, purpose="p") for form in ("NFC", "NFD")}
    assert len(numbers) == 1
    assert 0 <= numbers.pop() < 1


def test_numbers_are_uniform():
    values = sorted(name_number(name, seed=0, purpose="p") for name in names("a", 1000))
    # The largest deviation of 1,000 uniform numbers exceeds 0.0615 with probability 1e-3; the seed is fixed.
    assert max(abs(value - (rank + 0.5) / 1000) for rank, value in enumerate(values)) < 0.0615


@pytest.mark.parametrize("amount", [0.1, 0.2, 0.5])
def test_added_files_move_no_other(amount):
    before = draw(names("a", 200), names("b", 200), amount=amount)
    after = draw([*names("a", 260), "a/new.png"], names("b", 200), names("c", 50), amount=amount)
    assert before == after & {*names("a", 200), *names("b", 200)}
    assert abs(len(before) - 400 * amount) < 5 * (400 * amount * (1 - amount)) ** 0.5


def test_draws_depend_on_seed_and_purpose():
    files = names("a", 200)
    draws = [draw(files), draw(files, seed=1), draw(files, purpose="validation")]
    assert draws[0] == draw(files[::-1])
    assert all(draws[left] != draws[right] for left, right in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("amount", [1e-6, 0.2, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_of_two_files_or_more_one_is_drawn_and_one_is_left(amount, count):
    for seed in range(20):
        assert 1 <= len(draw(names("a", count), amount=amount, seed=seed)) <= count - 1


def test_every_class_keeps_a_file():
    drawn = draw(names("a", 1), names("b", 2), names("c", 100), amount=0.99)
    assert "a/000.png" not in drawn
    assert all(len(drawn & set(names(label, count))) < count for label, count in (("b", 2), ("c", 100)))


@pytest.mark.parametrize("amount", [0, 1, 7, 18])
def test_a_count_is_exact_and_larger_counts_contain_smaller_ones(amount):
    drawn = draw(names("a", 10), names("b", 10), amount=amount)
    assert len(drawn) == amount
    assert drawn <= draw(names("a", 10), names("b", 10), amount=18)


@pytest.mark.parametrize(("classes", "amount"), [([10, 11], 20), ([1, 1], 1), ([1, 1], 0.5)])
def test_a_draw_that_leaves_a_class_empty_is_refused(classes, amount):
    with pytest.raises(
        ValueError, match=rf"validation must leave an image of every class .*, got {amount}: at most"
    ):
        draw(*(names(str(size), size) for size in classes), amount=amount, purpose="validation")
