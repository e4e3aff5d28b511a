import functools
import itertools

import pytest
import torch
from em_examples import MODULE
from torch.autograd.graph import saved_tensors_hooks

import capsexp
from capsexp.capsules import Capsules
from capsexp.errors import UserError
from capsexp.layer.matrix_caps import ConvCaps, SharedClassCaps
from capsexp.ops.receptive_fields import Grid
from capsexp.routing.dynamic import DynamicRouting
from capsexp.routing.em import EMRouting
from capsexp.routing.uniform import UniformRouting

MIB = 2**20
MATRICES = {"pose_dim": 16, "pose": "matrix", "init_identity": 1.0, "init_noise": 0.5, "votes_mib": None}
MATRICES["shared_transformations"] = False
PAPERS_GRID = Grid(4, 4, (8.0, 8.0), 4)  # that of ConvCaps2 for 32x32
POSE = pytest.mark.parametrize("pose", ["matrix", "vector"])
LAYERS = pytest.mark.parametrize("make", ["conv", "classes"])


def em(**changes):
    return functools.partial(EMRouting, **{**MODULE, "implementation": "reference", **changes})


def conv(rows, columns, in_types=2, *, types=3, kernel=3, stride=1, routing=None, **changes):
    torch.manual_seed(0)
    windows = {"types": types, "kernel": kernel, "stride": stride, "routing": routing or em()}
    return ConvCaps(Grid(rows, columns), in_types, **windows, **{**MATRICES, **changes}).double()


def classes(grid=PAPERS_GRID, in_types=2, count=3, *, image_size=(32, 32), routing=None, **changes):
    torch.manual_seed(0)
    placed = {"image_size": image_size, "coordinates": "paper", "coordinate_scale": 0.01}
    options = {**placed, **MATRICES, "routing": routing or em(), **changes}
    return SharedClassCaps(grid, in_types, count, **options).double()


def capsules(count, batch=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    poses = torch.randn(batch, count, dim, dtype=torch.float64, generator=generator)
    return Capsules(poses, torch.rand(batch, count, dtype=torch.float64, generator=generator))


def matrix_of(pose, layer):
    return pose.view(*pose.shape[:-1], -1, layer.weight.shape[2])


def both(make, **changes):
    """A layer of either kind, and capsules for it."""
    layer = conv(5, 5, **changes) if make == "conv" else classes(**changes)
    return layer, capsules(50 if make == "conv" else 32, batch=5)


@POSE
@pytest.mark.parametrize(
    ("rows", "columns", "kernel", "stride"), [(6, 6, 3, 2), (5, 4, 3, 1), (4, 7, 2, 3), (3, 3, 1, 2)]
)
def test_votes_are_those_of_the_loops_over_positions_places_and_types(rows, columns, kernel, stride, pose):
    layer, given = conv(rows, columns, kernel=kernel, stride=stride, pose=pose), capsules(rows * columns * 2)
    votes = layer.votes(given.poses)
    poses = given.poses.view(2, rows, columns, 2, 16)
    seen = 0
    for position, (row, column) in enumerate(
        itertools.product(range(layer.grid.rows), range(layer.grid.columns))
    ):
        offsets = itertools.product(range(kernel), range(kernel), range(2))
        for place, (down, right, kind) in enumerate(offsets):
            child = poses[:, row * stride + down, column * stride + right, kind]
            for j in range(3):
                expected = matrix_of(child, layer) @ layer.weight[place, j]
                torch.testing.assert_close(votes[:, position, place, j], expected.flatten(1))
                seen += 1
    assert seen == votes[0, ..., 0].numel()


@LAYERS
def test_layer_routes_its_votes(make):
    layer, given = both(make)
    expected = layer.routing(layer.votes(given.poses), given.activations)
    for tensor, other in zip(expected[:3], layer(given)[:3], strict=True):
        torch.testing.assert_close(other, tensor)


def test_shifting_the_children_by_the_stride_shifts_the_parents():
    routing = em(iterations=1, initial_coupling="official")  # later, parents at the border compete less
    layer, given = conv(9, 9, stride=2, routing=routing), capsules(9 * 9 * 2)
    shifted = Capsules(
        *(tensor.unflatten(1, (9, 9, 2)).roll((2, 2), (1, 2)).flatten(1, 3) for tensor in given)
    )
    before, after = (
        [tensor.unflatten(1, (4, 4, 3)) for tensor in layer(some)[:2]] for some in (given, shifted)
    )
    for tensor, other in zip(before, after, strict=True):
        torch.testing.assert_close(other[:, 1:, 1:], tensor[:, :-1, :-1])


def test_matrices_are_shared_over_positions():
    shapes = [tuple(conv(side, side, stride=2).weight.shape) for side in (3, 5, 14)]
    assert shapes == [(3 * 3 * 2, 3, 4, 4)] * 3
    assert [tuple(classes(Grid(side, side)).weight.shape) for side in (1, 4)] == [(2, 3, 4, 4)] * 2
    assert tuple(classes(pose="vector").weight.shape) == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("rows", "columns", "window", "grid"),
    [(2, 5, (2, 3), (1, 3)), (1, 1, (1, 1), (1, 1)), (7, 2, (3, 2), (5, 1))],
)
def test_a_window_larger_than_the_grid_shrinks_to_the_grid(rows, columns, window, grid):
    layer = conv(rows, columns)
    assert layer.weight.shape[0] == window[0] * window[1] * 2
    assert layer.grid[:2] == grid
    assert layer(capsules(rows * columns * 2)).poses.shape == (2, grid[0] * grid[1] * 3, 16)


def test_children_that_the_stride_leaves_out_have_no_effect():
    layer, given = conv(6, 6, stride=2), capsules(6 * 6 * 2)
    given.poses.requires_grad_()
    given.activations.requires_grad_()
    routed = layer(given)
    gradients = torch.autograd.grad(sum(tensor.square().sum() for tensor in routed[:3]), list(given))
    for gradient in gradients:
        by_place = gradient.unflatten(1, (6, 6, 2))
        assert by_place[:, :5, :5].any(1).all()
        assert not by_place[:, 5].any()
        assert not by_place[:, :, 5].any()
    poses = given.poses.detach().clone().unflatten(1, (6, 6, 2))
    poses[:, 5] = poses[:, :, 5] = 1e30
    changed = layer(Capsules(poses.flatten(1, 3), given.activations))
    for tensor, other in zip(routed[:3], changed[:3], strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0)


@LAYERS
@POSE
def test_chunks_give_the_same_result_and_gradients(make, pose):
    results = []
    for votes_mib in (None, 1e-6):  # a chunk is one image
        layer, given = both(make, pose=pose, votes_mib=votes_mib)
        inputs = [tensor.requires_grad_() for tensor in given]
        routed = layer(given)
        loss = sum(field.square().sum() for field in routed[:3])
        results.append((*routed[:3], *torch.autograd.grad(loss, [*inputs, *layer.parameters()])))
    for whole, chunks in zip(*results, strict=True):
        torch.testing.assert_close(chunks, whole, rtol=1e-10, atol=1e-12)


@LAYERS
def test_chunks_start_as_balanced_as_the_whole(make):
    starts = []
    for votes_mib in (None, 1e-6):
        layer, given = both(make, votes_mib=votes_mib)
        layer.calibrate(given)
        starts.append(layer.routing.beta_a)
    torch.testing.assert_close(*starts, rtol=1e-10, atol=0)
    assert starts[0].all()


def test_a_routing_that_needs_no_balance_is_left_alone():
    layer = classes(routing=functools.partial(UniformRouting, bias=True))
    before = layer.routing.bias.clone()
    layer.calibrate(capsules(32))
    torch.testing.assert_close(layer.routing.bias, before)


@LAYERS
def test_matrices_are_never_repeated_for_each_image(make, largest_tensor):
    layer, given = both(make, pose="vector")
    votes = given.poses.shape[0] * layer.votes_per_image * 8
    with largest_tensor as largest:
        layer(given).activations.sum().backward()
    assert max(votes, layer.weight.nbytes) == largest.size


def test_a_large_grid_never_holds_the_votes_of_the_whole_batch(largest_tensor):
    layer, given = conv(14, 14, types=6, stride=2, votes_mib=0.5), capsules(14 * 14 * 2, batch=8)
    votes_of_the_batch = 8 * layer.votes_per_image * 8
    stored = []
    with largest_tensor as largest, saved_tensors_hooks(lambda t: stored.append(t.nbytes) or t, lambda t: t):
        layer(given).activations.sum().backward()
    assert largest.size <= MIB / 2 < votes_of_the_batch / 7
    assert sum(stored) < votes_of_the_batch / 2


@LAYERS
def test_autocast_makes_and_routes_votes_in_float32(make):
    layer, given = both(make)
    layer, low = layer.float(), Capsules(*(tensor.bfloat16() for tensor in given))
    with torch.autocast("cpu", torch.bfloat16):
        routed = layer(low)
        routed.activations.sum().backward()
    expected = layer(Capsules(*(tensor.float() for tensor in low)))
    for tensor, other in zip(expected[:3], routed[:3], strict=True):
        torch.testing.assert_close(other, tensor, rtol=0, atol=0)
    assert layer.weight.grad.dtype == torch.float32


def test_matrices_start_as_identity_and_noise():
    poses = capsules(32).poses
    votes = classes(init_identity=1.0, init_noise=0.0, coordinates=None).votes(poses)
    torch.testing.assert_close(votes, poses.unsqueeze(2).expand_as(votes))
    weight = conv(5, 5, 8, types=8, init_identity=2.0, init_noise=0.1).weight.detach()
    torch.testing.assert_close(weight.mean((0, 1)), 2 * torch.eye(4).double(), rtol=0, atol=0.02)
    assert weight.std((0, 1)).mean().item() == pytest.approx(0.1, rel=0.05)


@POSE
def test_class_votes_are_those_of_the_loops_over_positions_and_types(pose):
    layer, given = classes(Grid(2, 3), pose=pose, coordinates=None), capsules(2 * 3 * 2)
    votes = layer.votes(given.poses)
    assert votes.shape == (2, 12, 3, 16)
    for position, kind, j in itertools.product(range(6), range(2), range(3)):
        child = position * 2 + kind
        expected = matrix_of(given.poses[:, child], layer) @ layer.weight[kind, j]
        torch.testing.assert_close(votes[:, child, j], expected.flatten(1))


@pytest.mark.parametrize(("placement", "elements"), [("paper", (3, 7)), ("official", (0, 1))])
@POSE
def test_votes_carry_the_centre_of_the_receptive_field(placement, elements, pose):
    poses = capsules(32).poses
    votes, without = (
        classes(coordinates=place, pose=pose, init_noise=0.1).votes(poses) for place in (placement, None)
    )
    added = (votes - without).view(2, 4, 4, 2, 3, 16)
    along = torch.tensor([-0.08, -0.04, 0.0, 0.04], dtype=torch.float64)
    expected = torch.zeros_like(added)
    expected[..., elements[0]] = along.view(1, 4, 1, 1, 1)
    expected[..., elements[1]] = along.view(1, 1, 4, 1, 1)
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-8)


def test_coordinates_are_those_of_a_image_that_is_not_square():
    grid = Grid(32, 48).after_convolution((5, 5), 2).after_convolution((3, 3), 2).after_convolution((3, 3), 1)
    offsets = classes(grid, image_size=(32, 48)).coordinates.view(4, 8, 16)
    assert offsets[:, 0, 3].tolist() == pytest.approx([-0.08, -0.04, 0, 0.04])
    assert offsets[0, :, 7].tolist() == pytest.approx([-0.16, -0.12, -0.08, -0.04, 0, 0.04, 0.08, 0.12])


@pytest.mark.parametrize(("pose_dim", "elements"), [(4, (1, 3)), (9, (2, 5)), (16, (3, 7)), (25, (4, 9))])
def test_coordinates_go_to_the_top_of_the_right_hand_column(pose_dim, elements):
    offsets = classes(Grid(1, 1, (0.0, 10.0), 1), pose_dim=pose_dim, image_size=(2, 2)).coordinates[0]
    assert offsets.nonzero().flatten().tolist() == list(elements)
    assert offsets[list(elements)].tolist() == pytest.approx([-0.01, 0.09])


def test_class_poses_say_where_the_active_children_are():
    given = capsules(32)
    for position in (0, 7, 15):
        here = torch.arange(32) // 2 == position
        seen = Capsules(given.poses, given.activations * here)
        moved, unmoved = (classes(coordinates=place)(seen) for place in ("paper", None))
        row, column = 0.04 * (position // 4) - 0.08, 0.04 * (position % 4) - 0.08
        expected = torch.zeros(16, dtype=torch.float64)
        expected[3], expected[7] = row, column
        torch.testing.assert_close(
            moved.poses - unmoved.poses, expected.expand_as(moved.poses), rtol=0, atol=1e-7
        )
        torch.testing.assert_close(moved.activations, unmoved.activations, rtol=0, atol=1e-7)


def test_class_capsules_are_routed_by_any_algorithm():
    dynamic = functools.partial(
        DynamicRouting,
        iterations=2,
        prior="zero",
        bias=False,
        leaky=False,
        detach=False,
        implementation="auto",
    )
    assert classes(routing=dynamic)(capsules(32)).coupling.shape == (2, 32, 3)


def test_windows_are_routed_by_an_algorithm_that_knows_them_only():
    with pytest.raises(
        ValueError, match="routing must route windows, as `em` does; this one has no argument"
    ):
        conv(5, 5, routing=functools.partial(DynamicRouting, iterations=2))


@LAYERS
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pose": "quaternion"}, "pose must be one of matrix, vector, got quaternion"),
        ({"pose_dim": 15}, "pose_dim must be a square for matrix poses, got 15"),
        ({"votes_mib": 0}, "votes_mib must be > 0 or null, got 0"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        both(make, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coordinates": "left"}, "coordinates must be one of paper, official, got left"),
        ({"pose_dim": 1}, "pose_dim must be >= 4 for coordinates, got 1"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_coordinates_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        classes(**wrong)


def with_gradients(layer, given):
    inputs = [*(tensor.detach().requires_grad_() for tensor in given), *layer.parameters()]
    routed = layer(Capsules(*inputs[:2]))
    loss = sum(tensor.square().sum() for tensor in routed[:3])
    return [*routed[:3], *torch.autograd.grad(loss, inputs, materialize_grads=True)]


@LAYERS
@POSE
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_fused_layer_does_what_the_plain_one_does(make, pose, iterations):
    results = []
    for implementation in ("reference", "fused", "auto"):
        routing = em(implementation=implementation, iterations=iterations, beta_a=1.0)
        layer, given = both(make, pose=pose, routing=routing)
        results.append(with_gradients(layer, given))
    for tensor, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, tensor, rtol=1e-8, atol=1e-10)


@LAYERS
def test_a_fused_layer_makes_no_votes(make, monkeypatch):
    layer, given = both(make, routing=em(implementation="fused"))
    monkeypatch.setattr(layer, "votes", lambda poses: pytest.fail("votes were made"))
    layer(given)
    layer.routing.implementation = "reference"
    with pytest.raises(pytest.fail.Exception, match="votes were made"):
        layer(given)


@LAYERS
def test_a_fused_layer_routes_in_full_precision_under_autocast(make):
    layer, given = both(make, routing=em(implementation="fused"))
    layer, given = layer.float(), Capsules(*(tensor.float() for tensor in given))
    expected = layer(given)
    with torch.autocast("cpu", torch.bfloat16):
        for tensor, other in zip(expected[:3], layer(given)[:3], strict=True):
            assert torch.equal(tensor, other)


def test_mixing_takes_the_reference_path_unless_the_fused_one_is_asked_for():
    layer, given = both("conv", routing=em(implementation="auto", activation="mixing"))
    assert layer.fused_reason() == "there is no fused EM routing with activation mixing"
    assert layer(given).activations.sum(1).tolist() == pytest.approx([1.0] * 5)
    with pytest.raises(ValueError, match="implementation fused is for activation logistic, got mixing"):
        em(implementation="fused", activation="mixing")(6, 4, 16)


def test_where_there_is_no_fused_path_asking_for_it_is_an_error(monkeypatch):
    monkeypatch.setattr("capsexp.routing.em.fused_reason", lambda *arguments: "no compiler")
    layer, given = both("conv", routing=em(implementation="fused"))
    with pytest.raises(UserError, match=r"routing\.implementation=fused: no compiler"):
        layer(given)
    layer, given = both("conv", routing=em(implementation="auto"))
    reference, _ = both("conv", routing=em(implementation="reference"))
    for tensor, other in zip(reference(given)[:3], layer(given)[:3], strict=True):
        assert torch.equal(tensor, other)


@LAYERS
@pytest.mark.parametrize("name", ["vb", "heinsen"])
@pytest.mark.parametrize("bias", [False, True])
def test_other_fused_layers_do_what_the_plain_ones_do(make, name, bias):
    results = []
    for implementation in ("reference", "fused", "auto"):
        routing = capsexp.make(f"routing/{name}", implementation=implementation)
        layer, given = both(make, routing=routing, vote_bias=bias)
        assert (layer.fused_reason() is None) == (implementation != "reference")
        results.append(with_gradients(layer, given))
    for expected, *got in zip(*results, strict=True):
        for tensor in got:
            torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.compile
@LAYERS
@pytest.mark.parametrize("name", ["em", "vb", "heinsen"])
def test_torch_compile_takes_the_fused_layer_as_a_whole(make, name):
    layer, given = both(make, routing=capsexp.make(f"routing/{name}", implementation="fused"))
    expected = with_gradients(layer, given)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    inputs = [*(tensor.detach().requires_grad_() for tensor in given), *layer.parameters()]
    routed = compiled(Capsules(*inputs[:2]))
    loss = sum(tensor.square().sum() for tensor in routed[:3])
    got = [*routed[:3], *torch.autograd.grad(loss, inputs, materialize_grads=True)]
    for tensor, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-9, atol=1e-11)


@POSE
@LAYERS
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_shared_transformations_are_matrices_that_are_all_the_same(make, pose, implementation):
    routing = em(implementation=implementation)
    tied, given = both(make, pose=pose, routing=routing, shared_transformations=True)
    untied, _ = both(make, pose=pose, routing=em(implementation="reference"))
    places = 18 if make == "conv" else 2
    assert (len(tied.weight), len(untied.weight)) == (1, places)
    untied.weight.data.copy_(tied.weight.data.expand_as(untied.weight))
    results = [layer(given) for layer in (tied, untied)]
    for got, expected in zip(*(routed[:3] for routed in results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    for routed in results:
        (routed.poses.sin().sum() + routed.activations.sum() + routed.coupling.square().sum()).backward()
    summed = untied.weight.grad.sum(0, keepdim=True)  # every place's share of one W_j
    torch.testing.assert_close(tied.weight.grad, summed, rtol=1e-8, atol=1e-10)


@LAYERS
def test_a_layer_with_shared_transformations_starts_balanced(make):
    layer, given = both(make, shared_transformations=True)
    layer.calibrate(given)
    half = (layer(given).activations > 0.5).double().mean().item()
    assert half == pytest.approx(0.5, abs=0.07)


@LAYERS
@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_capsules_that_do_not_fit_the_layer_are_one_line(make, implementation):
    layer, given = both(make, routing=em(implementation=implementation))
    count = given.poses.shape[1]
    with pytest.raises(
        ValueError, match=f"^expected {count} capsules with poses of 16 numbers, got {count - 1}"
    ):
        layer(Capsules(given.poses[:, 1:], given.activations[:, 1:]))


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (
            "conv",
            "ConvCaps(\n  in_caps=50, out_types=3, pose_dim=16, matrix=4x4, shared_transformations=False",
        ),
        ("classes", "SharedClassCaps(\n  in_caps=32, out_types=3, pose_dim=16, matrix=4x4"),
    ],
)
def test_a_layer_shows_its_sizes(make, shown):
    assert repr(both(make)[0]).startswith(shown)
