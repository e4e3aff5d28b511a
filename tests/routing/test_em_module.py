"""The module EMRouting: parameters, schedules, settings."""

import copy
import pickle

import pytest
import torch
from em_examples import (
    DENSE,
    MODULE,
    WINDOWS,
    assert_all_close,
    example,
    fields_of,
    random,
    route,
)

from capsexp.config.build import build
from capsexp.config.compose import compose, to_plain
from capsexp.routing.em import EMRouting
from capsexp.schedule import Linear, Saturating, Step


def module(layer, dim=3, **changes):
    children = fields_of(layer).in_caps if fields_of(layer) else layer[0]
    return EMRouting(children, layer[-1], dim, fields_of(layer), **{**MODULE, **changes}).double()


def votes_for(layer, **options):
    """Votes and activations as a module takes them."""
    votes, activations, *_ = example(layer, **options)
    return (votes.squeeze(1) if fields_of(layer) is None else votes), activations


def test_lambda_is_that_of_the_authors():
    node = to_plain(compose("train", ["routing=em", "routing.iterations=5"], config_dir=None))["routing"]
    make = build(node, at="routing")
    expected = [5.0e-4, 9.75e-4, 1.426e-3, 1.855e-3, 2.262e-3]
    conv, classes = make(25, 2, 16, fields_of((5, 5, 1, (3, 3), 1, 2))), make(25, 2, 16)
    assert conv.inverse_temperatures.tolist() == pytest.approx(expected, rel=1e-3)
    assert classes.inverse_temperatures.tolist() == pytest.approx(
        [temperature / 4 for temperature in expected], rel=1e-3
    )


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_module_routes_with_the_parameters_it_owns(layer):
    routing, (votes, activations) = module(layer, beta_u=0.5, beta_a=20), votes_for(layer)
    factor = 1.0 if fields_of(layer) else 0.25
    expected = route(
        layer,
        votes.view(2, -1, *votes.shape[-3:]),
        activations,
        torch.full((layer[-1],), 0.5, dtype=torch.float64),
        torch.full((layer[-1],), 20.0, dtype=torch.float64),
        temperatures=[factor * 0.01 * (1 - 0.95 ** (i + 1)) for i in range(3)],
    )
    routed = routing(votes, activations)
    # lambda is float32 until .double()
    assert_all_close(expected[:2], routed[:2], rtol=1e-6, atol=1e-9)
    assert_all_close(expected[3:], [routing.cost(votes, activations)], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("layer", "gain"), [(WINDOWS[0], 250), (DENSE[0], 1000)], ids=str)
def test_beta_a_starts_at_its_number_whatever_the_gain(layer, gain):
    routing = module(layer, beta_a=-1250, beta_u=0.709)
    assert (routing.gain, routing.beta_a.shape) == (gain, (layer[-1],))
    torch.testing.assert_close(routing.gain * routing.beta_a, torch.full_like(routing.beta_a, -1250))
    torch.testing.assert_close(routing.beta_u, torch.full_like(routing.beta_u, 0.709), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("layer", "children_per_parent"),
    [((14, 14, 8, (3, 3), 2, 16), 2.3472), ((6, 6, 16, (3, 3), 1, 16), 2.25), ((256, 5), 51.2)],
    ids=str,
)
def test_cost_norm_divides_by_the_children_per_parent(layer, children_per_parent):
    scale = module(layer, cost_norm=100).options.cost_scale
    assert 100 / scale == pytest.approx(children_per_parent, rel=1e-4)
    assert module(layer).options.cost_scale == 1


@pytest.mark.parametrize("layer", [(9, 9, 3, (3, 3), 2, 4), (40, 5)], ids=str)
@pytest.mark.parametrize("cost_norm", [None, 100])
@pytest.mark.parametrize("iterations", [1, 3])
def test_balance_leaves_half_of_the_capsules_of_each_type_active(layer, cost_norm, iterations):
    routing = module(layer, dim=16, cost_norm=cost_norm, iterations=iterations)
    votes, activations = votes_for(layer, batch=16, dim=16)
    for _ in range(3):
        routing.balance(routing.cost(votes, activations))
    active = routing(votes, activations).activations.view(-1, layer[-1]) > 0.5
    assert active.double().mean(0).tolist() == pytest.approx([0.5] * layer[-1], abs=0.05)


def test_balance_leaves_a_number_alone():
    routing = module((7, 3), beta_a=3.0)
    routing.balance(random(4, 1, 3))
    torch.testing.assert_close(routing.gain * routing.beta_a, torch.full_like(routing.beta_a, 3.0))


@pytest.mark.parametrize("layer", [WINDOWS[0], DENSE[0]], ids=str)
def test_advance_moves_lambda_along_its_ramp_and_returns_the_last(layer):
    ramp = Linear(start=0.5, end=2.0, steps=1.0)
    routing, (votes, activations) = module(layer, inverse_temperature_ramp=ramp), votes_for(layer)
    last = (1.0 if fields_of(layer) else 0.25) * 0.01 * (1 - 0.95**3)
    for number, factor in [(0, 0.5), (50, 1.25), (100, 2.0)]:
        values = routing.advance(Step(number, 100))
        assert values == {"inverse_temperature": pytest.approx(factor * last)}
        logit = routing(votes, activations).activations.logit()
        cost = routing.cost(votes, activations).flatten(1)
        torch.testing.assert_close(-factor * last * cost, logit, rtol=1e-6, atol=1e-9)


def test_the_ramp_travels_with_the_weights():
    ramp = Linear(start=0.0, end=2.0, steps=1.0)
    routing, other = (module((7, 3), inverse_temperature_ramp=ramp) for _ in range(2))
    assert other.ramp == 0
    routing.advance(Step(75, 100))
    other.load_state_dict(routing.state_dict())
    assert other.ramp == 1.5


def test_weights_fit_any_number_of_iterations():
    single, three = module((7, 3), iterations=1), module((7, 3), iterations=3, beta_a=2.0)
    single.load_state_dict(three.state_dict())
    torch.testing.assert_close(single.beta_a, three.beta_a)
    assert len(single.inverse_temperatures) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda routing: pickle.loads(pickle.dumps(routing))])
def test_a_copy_routes_alike(duplicate):
    routing, inputs = module(WINDOWS[2]), votes_for(WINDOWS[2])
    assert_all_close(routing(*inputs)[:3], duplicate(routing)(*inputs)[:3])


SETTINGS = {  # without `implementation`, which changes no result
    "iterations": 2,
    "inverse_temperature": Saturating(limit=0.02, decay=0.95),
    "inverse_temperature_ramp": 2.0,
    "class_factor": 0.5,
    "beta_u": 0.5,
    "beta_a": 2.0,
    "beta_a_gain": 500,
    "cost_norm": 100,
    "variance_floor": 0.01,
    "normalisation": "types",
    "initial_coupling": "official",
    "activation": "mixing",
    "mean_smoothing": 0.1,
    "detach": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_acts(name):
    layer, results = DENSE[0] if name == "class_factor" else WINDOWS[0], []
    for changes in ({}, {name: SETTINGS[name]}):
        routing = module(layer, **{"beta_a": 1.0, **changes})
        votes, activations = votes_for(layer)
        routed = routing(votes.requires_grad_(), activations)
        loss = routed.poses.square().sum() + routed.activations.square().sum()
        gradients = torch.autograd.grad(loss, [votes, *routing.parameters()], materialize_grads=True)
        results.append(torch.cat([tensor.flatten() for tensor in (*routed[:3], *gradients)]))
    assert not torch.allclose(*results, rtol=1e-6, atol=0)


def test_no_setting_of_the_config_is_left_out():
    node = to_plain(compose("train", ["routing=em"], config_dir=None))["routing"]
    assert set(node) - {"_target_", "_partial_"} == set(MODULE) == {*SETTINGS, "implementation"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1, got 0"),
        ({"normalisation": "all"}, "normalisation must be one of paper, types, official_v1, got all"),
        ({"initial_coupling": "zero"}, "initial_coupling must be one of paper, official, got zero"),
        ({"activation": "softmax"}, "activation must be one of logistic, mixing, got softmax"),
        ({"class_factor": 0}, "class_factor must be > 0, got 0"),
        ({"beta_a_gain": -1.0}, "beta_a_gain must be > 0, got -1.0"),
        ({"cost_norm": 0}, "cost_norm must be > 0, got 0"),
        ({"cost_norm": float("inf")}, "cost_norm must be > 0, got inf"),
        ({"variance_floor": -0.1}, "variance_floor must be >= 0, got -0.1"),
        ({"variance_floor": float("nan")}, "variance_floor must be >= 0, got nan"),
        ({"mean_smoothing": 1}, r"mean_smoothing must be in \[0, 1\), got 1"),
        ({"mean_smoothing": -0.1}, r"mean_smoothing must be in \[0, 1\), got -0.1"),
        ({"beta_a": "median"}, "beta_a must be a number or balanced, got median"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EMRouting(6, 4, 3, **{**MODULE, **wrong})


@pytest.mark.compile
def test_compiled_module_gives_the_same_values_and_gradients():
    layer = WINDOWS[2]
    routing = module(layer, beta_a=1.0, iterations=2)
    inputs, compiled = [tensor.requires_grad_() for tensor in votes_for(layer)], torch.compile(routing)

    def results(forward):
        routed = forward(*inputs)[:3]
        loss = sum(tensor.square().sum() for tensor in routed)
        return *routed, *torch.autograd.grad(loss, [*inputs, *routing.parameters()])

    for step in (Step(0, 1), Step(1, 1)):
        routing.advance(step)
        assert_all_close(results(routing), results(compiled))


def test_a_plain_number_is_the_same_temperature_in_every_iteration():
    routing = EMRouting(5, 3, 4, **{**MODULE, "inverse_temperature": 0.01, "class_factor": 1.0})
    torch.testing.assert_close(routing.inverse_temperatures, torch.full((3,), 0.01))
