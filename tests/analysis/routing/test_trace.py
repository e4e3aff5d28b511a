import itertools
import math

import pytest
import torch

from capsexp.analysis.routing import trace
from capsexp.analysis.routing.trace import excess, routed_layers, trace_layer, trace_metrics, vote_distances
from capsexp.capsules import Capsules, Routed
from capsexp.config.build import build_components
from capsexp.config.compose import compose, to_plain
from capsexp.errors import UserError
from capsexp.ops.receptive_fields import scatter_sum

DYNAMIC = ["model.conv_channels=8", "model.primary_types=2", "model.decoder=null"]
UNIFORM = [*DYNAMIC, "routing=uniform"]
EM = ["model=em_routing", "model.conv_channels=8", "model.primary_types=2", "model.conv_types=[3,4]"]


def network(*overrides, seed=0):
    config = to_plain(compose("train", ["device=cpu", "device.threads=1", *overrides], config_dir=None))
    torch.manual_seed(seed)
    model = build_components(config, plugins=[]).new_model().double().eval()
    images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    if hasattr(model, "calibrate"):
        model.calibrate(images)
    return model.requires_grad_(False), images


def example(*overrides, number=-1):
    """Return a layer, by default the class capsules; a trace of it; and the output of the network."""
    model, images = network(*overrides)
    output = model(images)
    layer = routed_layers(model, output.layers)[number]
    return layer, next(trace_layer(layer, iterations=None)), output


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("overrides", [DYNAMIC, EM], ids=["dynamic", "em"])
def test_the_last_state_is_the_output_of_the_layer(overrides, implementation, monkeypatch):
    monkeypatch.setattr(trace, "images_per_chunk", lambda *_, **__: 2)
    model, images = network(*overrides, f"routing.implementation={implementation}")
    layers = model(images).layers
    routed = routed_layers(model, layers)
    assert [layer.name for layer in routed] == [*layers][1:]
    for layer in routed:
        chunks = list(trace_layer(layer, iterations=None))
        assert [len(chunk.votes) for chunk in chunks] == [2, 2, 1]
        for field in ("poses", "activations", "coupling"):
            last = torch.cat([getattr(chunk.states[-1], field) for chunk in chunks])
            torch.testing.assert_close(last, getattr(layers[layer.name], field), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("overrides", "count"), [(DYNAMIC, 3), (UNIFORM, 1), (EM, 3)])
def test_there_is_a_state_for_each_iteration_and_couplings_sum_to_one(overrides, count):
    model, images = network(*overrides)
    for layer in routed_layers(model, model(images).layers):
        (chunk,) = trace_layer(layer, iterations=None)
        assert len(chunk.states) == count
        for state in chunk.states:
            total = state.coupling.sum(-1)
            if state.fields is not None:
                total = scatter_sum(total, state.fields)
                total = total[:, total.sum(0) > 0]  # a stride leaves some children without parents
            torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("overrides", [DYNAMIC, EM], ids=["dynamic", "em"])
def test_fewer_iterations_are_the_beginning_of_more(overrides):
    if overrides is EM:
        overrides = [*overrides, "routing.beta_a=0.5"]  # a balanced start depends on the number of iterations
    # The lowest layer: the children of the others depend on the number, too.
    traces = [example(*overrides, f"routing.iterations={count}", number=0)[1].states for count in (1, 2, 4)]
    for shorter, longer in itertools.pairwise(traces):
        for state, other in zip(shorter, longer, strict=False):
            for field, expected in zip(state[:3], other[:3], strict=True):
                torch.testing.assert_close(field, expected)


def test_only_a_routing_that_can_continues_beyond_its_own_number():
    for overrides, count in ((DYNAMIC, 10), (UNIFORM, 1), (EM, 3)):
        layer, own, _ = example(*overrides)
        (longer,) = trace_layer(layer, iterations=10)
        assert len(longer.states) == count
        for state, other in zip(own.states, longer.states, strict=False):
            torch.testing.assert_close(state.poses, other.poses)
    (still,) = trace_layer(layer, iterations=1)
    assert len(still.states) == 3
    with pytest.raises(ValueError, match=r"^iterations must be >= 1, got 0$"):
        example(*DYNAMIC)[0].routing.trace(torch.zeros(1, 2, 3, 4), torch.ones(1, 2), iterations=0)


def test_a_routing_without_a_trace_counts_as_one_iteration():
    layer, _, output = example(*DYNAMIC)
    plain_layer = layer._replace(routing=lambda *inputs: layer.routing(*inputs))
    (chunk,) = trace_layer(plain_layer, iterations=10)
    (state,) = chunk.states
    torch.testing.assert_close(state.poses, output.layers["class_caps"].poses)
    assert trace.own_iterations(plain_layer.routing) == 1


def test_metrics_are_those_of_the_loops_of_the_paper():
    layer, (votes, states), _ = example(*DYNAMIC)
    logits = [torch.zeros_like(votes[..., 0])]
    couplings = []
    for _ in range(3):
        couplings.append(logits[-1].softmax(2))
        total = (couplings[-1].unsqueeze(3) * votes).sum(1)
        size = total.norm(dim=2, keepdim=True)
        poses = total * size / (1 + size**2)
        logits.append(logits[-1] + (votes * poses.unsqueeze(1)).sum(3))
    metrics = trace_metrics(layer.routing, trace.RoutingTrace(votes, states))
    steps = [after - before for before, after in itertools.pairwise(logits[:3])]
    assert metrics["logit_change"] == pytest.approx([step.abs().mean().item() for step in steps])
    assert metrics["agreement_change"] == pytest.approx(
        [steps[0].abs().mean().item(), (steps[1] - steps[0]).abs().mean().item()]
    )
    moves = [(couplings[t + 1] - couplings[t]).abs().mean().item() for t in range(2)]
    assert metrics["coupling_change"] == pytest.approx(moves)
    entropies = [-(coupling * coupling.log()).sum(2).mean().item() / math.log(10) for coupling in couplings]
    assert metrics["entropy"] == pytest.approx(entropies)


@pytest.mark.parametrize("overrides", [DYNAMIC, EM], ids=["dynamic", "em"])
def test_distances_are_from_the_mean_of_the_votes_that_a_parent_gets(overrides):
    layer, (votes, states), _ = example(*overrides)
    for state in states:
        weights = (
            state.coupling if overrides is DYNAMIC else state.coupling * layer.children.activations[..., None]
        )
        mean = (weights.unsqueeze(3) * votes).sum(1) / weights.sum(1).unsqueeze(2)
        expected = (votes - mean.unsqueeze(1)).norm(dim=3)
        distances = vote_distances(layer.routing, votes, state, squared=False)
        torch.testing.assert_close(distances, expected)
        squares = vote_distances(layer.routing, votes, state, squared=True)
        torch.testing.assert_close(squares, expected**2)


@pytest.mark.parametrize("overrides", [DYNAMIC, EM], ids=["dynamic", "em"])
def test_an_even_share_is_no_excess_and_what_one_class_gains_others_lose(overrides):
    layer, (_, states), _ = example(*overrides)
    positions = network(*overrides)[0].grid.positions
    for number, state in enumerate(states):
        gained = excess(state, layer.children.activations, positions)
        torch.testing.assert_close(gained.sum(2), torch.zeros_like(gained[..., 0]))
        assert bool(gained.abs().max() > 1e-6) == (number > 0)
    coupling = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.75, 0.25]]])
    state = Routed(torch.zeros(1, 2, 1), torch.zeros(1, 2), coupling)
    gained = excess(state, torch.tensor([[1.0, 1.0, 0.5, 1.0]]), 2)
    torch.testing.assert_close(gained[0], torch.tensor([[0.5, -0.5], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "overrides",
    [
        [*DYNAMIC, "dataset=mnist", "model=dynamic_routing"],
        ["model=em_routing", "dataset=smallnorb", "routing.iterations=1"],
    ],
    ids=["dynamic", "em"],
)
def test_the_grid_of_a_network_has_the_receptive_fields_of_the_children_of_its_classes(overrides):
    config = to_plain(compose("train", ["device=cpu", *overrides], config_dir=None))
    components = build_components(config, plugins=[])
    model = components.new_model().double()
    centres = model.grid.centres()
    for place in (0, 1, len(centres) - 1):
        images = torch.rand(1, *components.dataset.image_shape, dtype=torch.float64, requires_grad=True)
        below = [*model(images).layers.values()][-2]
        types = below.poses.shape[1] // len(centres)
        of_place = below.poses.unflatten(1, (-1, types))[0, place]
        (gradient,) = torch.autograd.grad(of_place.sum(), images)
        seen = gradient[0].abs().sum(0).nonzero().double()
        middle = (seen.amin(0) + seen.amax(0)) / 2
        torch.testing.assert_close(centres[place].double(), middle)


def test_a_network_without_capsules_and_a_layer_without_votes_are_refused():
    model, images = network("model=cnn_sabour", "model.conv_channels=[2]", "model.hidden=[4]")
    with pytest.raises(UserError, match=r"^this network routes no capsules, so there is no routing"):
        routed_layers(model, model(images).layers)
    capsules = Capsules(torch.zeros(1, 2, 3), torch.zeros(1, 2))
    layers = {"primary": capsules, "top": Routed(*capsules, torch.zeros(1, 2, 2))}
    with pytest.raises(UserError, match=r"^top has no votes\(poses\) and no routing, so there is nothing"):
        routed_layers(model, layers)
