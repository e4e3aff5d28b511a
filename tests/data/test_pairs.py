import itertools

import pytest
import torch

from capsexp.data.pairs import OverlaidPairs
from capsexp.data.preprocess import Preprocess
from capsexp.data.split import Split
from capsexp.errors import UserError


def canvases(count, *, side=5, pad=4, classes=3):
    """Random images in the center of their canvas; the first class is twice as large as the others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) % (classes + 1)).clamp_max(classes) % classes
    return Split(torch.nn.functional.pad(images, [pad] * 4), labels)


def pairs(split, *, shift=4, margin=4, partners=1, pair_seed=0, batch_size=16, seed=0, limit=None):
    return OverlaidPairs(
        split,
        Preprocess.identity(),
        shift=shift,
        margin=margin,
        partners=partners,
        pair_seed=pair_seed,
        batch_size=batch_size,
        seed=seed,
        device="cpu",
        memory_format=torch.contiguous_format,
        limit=limit,
    )


def joined(batches):
    return [torch.cat(fields) for fields in zip(*(batch[:4] for batch in batches), strict=True)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def shift_of(source, original, reach):
    """Return the only shift of the original that gives the source, after trying all; fill with zeros."""
    height, width = original.shape[1:]
    matches = []
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        moved = torch.zeros_like(original)
        rows = slice(max(0, down), height + min(0, down)), slice(max(0, -down), height - max(0, down))
        columns = slice(max(0, right), width + min(0, right)), slice(max(0, -right), width - max(0, right))
        moved[:, rows[0], columns[0]] = original[:, rows[1], columns[1]]
        if torch.equal(moved, source):
            matches.append((down, right))
    (match,) = matches
    return match


def test_an_epoch_overlays_every_image_once_with_one_of_another_class():
    split = canvases(50)
    batches = pairs(split)
    assert (len(batches), batches.count, batches.visited) == (4, 50, 50)
    for epoch in (0, 1):
        images, labels, pixels, indices = joined(batches.training(epoch))
        assert sorted(indices[:, 0].tolist()) == list(range(50))
        assert torch.equal(labels, split.labels[indices])
        assert (labels[:, 0] != labels[:, 1]).all()
        assert images.shape == (50, 1, 13, 13)
        assert pixels.shape == (50, 2, 1, 13, 13)


def test_an_overlay_is_the_clipped_sum_of_its_two_sources():
    for batch in (*pairs(canvases(50)).training(0), *pairs(canvases(50)).in_order()):
        total = (batch.pixels * 255).round().sum(1).clamp_max(255)
        assert torch.equal(batch.images, total / 255)
        assert (batch.images == 1).any()


def test_a_source_is_its_image_shifted_within_the_canvas():
    split = canvases(40)
    moves = []
    for batch in (*pairs(split).training(0), *pairs(split).in_order()):
        sources = (batch.pixels * 255).round().to(torch.uint8)
        for number, index in itertools.product(range(len(batch.labels)), range(2)):
            original = split.images[batch.indices[number, index]]
            moves.append(shift_of(sources[number, index], original, 4))
    assert {*moves[::2]} != {*moves[1::2]}
    assert {amount for move in moves for amount in move} == set(range(-4, 5))


def test_shifts_and_partners_are_uniform():
    split = canvases(60)
    batches = pairs(split, batch_size=60, partners=600)
    drawn = batches.fixed_pairs
    assert drawn.shifts.shape == (36_000, 2, 2)
    assert (drawn.shifts.min(), drawn.shifts.max()) == (-4, 4)
    # Standard errors: of a mean shift 0.0136; of a share of 1 in 9, 0.0017.
    assert drawn.shifts.float().mean(0).abs().max() < 0.06
    for value in range(-4, 5):
        assert (drawn.shifts == value).float().mean((0,)).sub(1 / 9).abs().max() < 0.008
    for axes in itertools.combinations(drawn.shifts.flatten(1).float().T, 2):
        assert torch.corrcoef(torch.stack(axes))[0, 1].abs() < 0.03
    for base in range(60):
        others = drawn.partners[base::60]
        allowed = (split.labels != split.labels[base]).nonzero().flatten()
        counts = others.bincount(minlength=60)
        assert {*others.tolist()} == {*allowed.tolist()}
        expected = 600 / len(allowed)
        assert (counts[allowed] - expected).abs().max() < 6 * expected**0.5


def test_a_training_batch_is_a_function_of_seed_epoch_and_number():
    split = canvases(50)
    whole = list(pairs(split).training(3))
    for start in range(4):
        resumed = list(pairs(split, pair_seed=9).training(3, start=start))
        assert len(resumed) == 4 - start
        assert all(map(same, resumed, whole[start:]))
    assert not same(whole[0], next(pairs(split, seed=1).training(3)))
    assert not same(whole[0], next(pairs(split).training(4)))


def test_fixed_pairs_depend_only_on_their_own_seed():
    split = canvases(50)
    fixed = joined(pairs(split, partners=3).in_order())
    assert len(fixed[1]) == 150
    assert same(fixed, joined(pairs(split, partners=3, seed=5, batch_size=7).in_order()))
    assert same(fixed, joined(views[0] for views in pairs(split, partners=3).views()))
    assert not same(fixed, joined(pairs(split, partners=3, pair_seed=1).in_order()))
    # More partners add pairs after the first ones.
    assert same([field[:50] for field in fixed], joined(pairs(split).in_order()))
    assert torch.equal(fixed[3][:, 0], torch.arange(50).repeat(3))


def test_a_subset_of_pairs_equals_those_of_the_whole_split():
    split, positions = canvases(50), torch.arange(1, 40, 2)
    fixed, few = joined(pairs(split).in_order()), pairs(split).subset(positions)
    assert (few.count, few.visited, len(few)) == (20, 20, 2)
    assert same([field[positions] for field in fixed], joined(few.in_order()))
    assert pairs(split, limit=2).visited == 32


def test_a_shift_beyond_the_margin_cuts_the_image_off():
    split = Split(
        torch.nn.functional.pad(torch.full((40, 1, 5, 5), 200), [1] * 4).byte(), torch.arange(40) % 2
    )
    sources = torch.cat([batch.pixels for batch in pairs(split, shift=3, margin=1).training(0)])
    lit = (sources > 0).sum((2, 3, 4))
    assert (lit.max(), lit.min()) == (25, 9)  # 2 rows and 2 columns are cut off


def test_overlap_is_shared_area_over_box_area():
    """Frames overlap by the analytic mean; the ink is a square of known size within the frame."""
    images = torch.zeros(3000, 1, 36, 36, dtype=torch.uint8)
    images[:, :, 8:28, 8:28] = 1
    overlap = pairs(Split(images, torch.arange(3000) % 10), batch_size=500).overlap()
    apart = torch.tensor([abs(a - b) for a in range(-4, 5) for b in range(-4, 5)]).double()
    for name, side in (("frames", 28), ("ink", 20)):
        assert overlap[name] == pytest.approx((1 - apart.mean().item() / side) ** 2, abs=0.005)
    assert (1 - apart.mean().item() / 28) ** 2 == pytest.approx(0.7996, abs=5e-5)


def test_overlap_of_ink_is_relative_to_the_mean_area_and_0_without_ink():
    images = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    images[0, 0, 1:3, 1:3] = 255  # a box of 4
    images[1, 0, 2:5, 2] = 255  # a box of 3, one pixel of it in the other
    split = Split(images, torch.tensor([0, 1]))
    assert pairs(split, shift=0, margin=0).overlap() == {"frames": 1, "ink": pytest.approx(1 / 3.5)}
    images[1] = 0
    assert pairs(split, shift=0, margin=0).overlap()["ink"] == 0


def test_images_of_one_class_are_refused():
    split = Split(torch.zeros(4, 1, 9, 9, dtype=torch.uint8), torch.full((4,), 2))
    with pytest.raises(UserError, match=r"^pairs need images of two classes, and all 4 of this split are of"):
        pairs(split)
