"""Checkpoints that pass their checksum and are no state of this run."""

import hashlib
import json

import pytest
import torch
from torch import nn

from capsexp.errors import UserError
from capsexp.training import checkpoint
from capsexp.training.budget import Budget
from capsexp.training.saved_state import CHECKS, LATER_CHECKS, problem, restore_optimizer, restore_weights
from capsexp.training.start import moving_average
from capsexp.training.state import State, random_state


def trained(make=torch.optim.Adam, *, width=3, decay=0.9, **options):
    """A small network after one step."""
    network = nn.Linear(2, width)
    optimizer = make(network.parameters(), lr=0.1, **options)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = State(network, optimizer, moving_average(network, decay), budget=Budget(8))
    state.step, state.recorded = 4, 50
    return state


def saved_state(**options):
    return trained(**options).state_dict([random_state(), random_state()])


COUNTS = ("step", "epoch", "batch", "recorded")
NO_OPTIMIZERS = [
    {"state": {}},
    {"state": [], "param_groups": []},
    {"state": {}, "param_groups": 5},
    {"state": {}, "param_groups": [5]},
    {"state": {}, "param_groups": [{}]},
    {"state": {"x": {}}, "param_groups": []},
    {"state": {0: 5}, "param_groups": []},
]
NO_STOPS = [{}, {"on": 5, "accuracy": 0.5, "step": 4}, {"on": "validation", "accuracy": "x", "step": 4}]
BYTES = torch.zeros(5, dtype=torch.uint8)
WRONG = {
    **{key: ["7", -1, 1.5, True, None, 2**60, [1]] for key in COUNTS},
    "total": ["7", -1, -1.5, float("nan"), True, None, 2**60, [1]],
    "seconds": ["7", -1.0, float("nan"), float("inf"), True, None, [1]],
    "best_accuracy": ["0.5", None, float("nan"), True, [0.5]],
    "best_step": ["../x", "7", -1, 1.5, True],
    "model": [5, None, [], {1: torch.ones(1)}, {"weight": 5}, {"weight": [1.0]}],
    "average": [5, [], {1: torch.ones(1)}, {"module.weight": "x"}],
    "optimizer": [5, None, {}, *NO_OPTIMIZERS],
    "random": [5, None, torch.zeros(5), BYTES, BYTES[None]],
    "random_cuda": [5, None, {}, [5], [torch.zeros(3)]],
    "random_others": [5, None, {}, [5], [{}], [{"random": torch.get_rng_state()}]],
    "stopped": [5, [], *NO_STOPS],
    "best_rank": [5, [], [None], [float("nan")], [0.1, 0.2, 0.3], {}],
    "unimproved": ["7", -1, 1.5, True, None, 2**60, [1]],
}


def test_the_state_of_a_run_has_no_problem():
    assert problem(saved_state()) is None
    assert problem(saved_state(decay=None)) is None


@pytest.mark.parametrize("key", [*CHECKS, *LATER_CHECKS])
def test_a_value_that_is_wrong_is_named(key):
    saved = saved_state()
    for value in WRONG[key]:
        assert problem({**saved, key: value}).startswith(f"its {key!r} is not "), value
    del saved[key]
    assert problem(saved) == (f"it has no {key!r}" if key in CHECKS else None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["model", "average"])
def test_weights_that_are_not_finite_are_named(key, value):
    saved = saved_state()
    next(reversed(saved[key].values()))[0] = value
    assert problem(saved) == f"its weights {next(reversed(saved[key]))!r} are not finite (NaN or infinite)"


def test_a_checkpoint_with_a_wrong_value_is_refused_and_the_previous_one_is_used(tmp_path):
    for step in (4, 8):
        path = checkpoint.save(tmp_path, saved_state() | {"step": step}, step=step)
    torch.save({"schema": 1, **saved_state(), "recorded": "x"}, path)
    content = path.read_bytes()
    path.with_suffix(".json").write_text(
        json.dumps({"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)})
    )
    lines = []
    assert checkpoint.load_newest(tmp_path, report=lines.append)["step"] == 4
    assert lines == [f"{path}: refused, its 'recorded' is not a number of bytes; trying the previous one"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            nn.Linear(2, 4),
            r"size mismatch for weight: \[4, 2\], here \[3, 2\]; size mismatch for bias: \[4\]",
        ),
        (nn.Linear(2, 3, bias=False), "no bias$"),
        (nn.Sequential(nn.Linear(2, 3)), "no weight; no bias; 0.weight, which this .*; and 1 more$"),
    ],
)
def test_weights_of_another_network_are_refused_with_the_first_differences(weights, message):
    own = nn.Linear(2, 3)
    before = own.weight.clone()
    with pytest.raises(UserError, match=f"^the weights in run are of another network: {message}"):
        restore_weights(own, weights.state_dict(), origin="run")
    assert torch.equal(own.weight, before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_the_state_of_the_same_optimizer_is_restored(make):
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    state, other = trained(make, **options), trained(make, **options)
    restore_optimizer(other.optimizer, state.optimizer.state_dict(), origin="run")
    assert str(other.optimizer.state_dict()) == str(state.optimizer.state_dict())


def without_parameter(saved):
    saved["param_groups"][0]["params"].pop()


def of_another_shape(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(7)


def of_no_parameter(saved):
    saved["state"][9] = saved["state"][0]


def with_a_text(saved):
    saved["param_groups"][0]["betas"] = "x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_parameter, "it has other parameters"),
        (of_another_shape, "its 'exp_avg' of parameter 0 does not fit"),
        (of_no_parameter, "of parameter 9 does not fit"),
        (with_a_text, "its 'betas' is 'x'"),
    ],
)
def test_a_state_that_does_not_fit_the_optimizer_is_refused(change, message):
    saved = trained().optimizer.state_dict()
    change(saved)
    with pytest.raises(UserError, match=rf"^the optimizer state in run does not fit Adam: .*{message}"):
        restore_optimizer(trained().optimizer, saved, origin="run")


@pytest.mark.parametrize(("saved", "own"), [("Adam", "SGD"), ("SGD", "Adam"), ("RMSprop", "Adam")])
def test_another_optimizer_is_refused(saved, own):
    state = trained(getattr(torch.optim, saved)).optimizer.state_dict()
    with pytest.raises(UserError, match=f"does not fit {own}: it has '"):
        restore_optimizer(trained(getattr(torch.optim, own)).optimizer, state, origin="run")


def test_a_moving_average_cannot_begin_in_the_middle_of_a_run():
    saved = saved_state(decay=None)
    line = "trainer.ema_decay: the checkpoint of step 4 has no moving average of the weights"
    with pytest.raises(UserError, match=f"^{line}$"):
        trained().restore(saved)
    trained(decay=None).restore(saved_state())
