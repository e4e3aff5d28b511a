"""An attack needs the gradient by the picture of a network whose weights need none."""

import pytest
import torch

from capsexp.analysis.attack.attacker import Attacker, AttackSettings
from capsexp.analysis.attack.objective import own_loss, score_margin
from capsexp.config.build import build_components
from capsexp.schedule import Step

PLAN = AttackSettings(1, 1, 1.0, 1, ("own", "difference"), 0)
SMALL_EM = ("model.conv_channels=8", "model.primary_types=4", "model.conv_types=[4,4]")


def parts_of(settings, implementation):
    settings["routing"]["implementation"] = settings["model"]["routing"]["implementation"] = implementation
    components = build_components(settings, plugins=[])
    pictures = components.dataset.read("test").take(torch.arange(12))
    return components, next(components.batches(pictures, limit=None).in_order())


def started(settings):
    """Weights as at the start of a training."""
    components, batch = parts_of(settings, "reference")
    torch.manual_seed(0)
    model = components.new_model()
    model.calibrate(batch.images)
    return model.state_dict()


def slopes(settings, weights, implementation, dtype):
    components, batch = parts_of(settings, implementation)
    model = components.new_model()
    model.load_state_dict(weights)
    model = model.eval().requires_grad_(False).to(dtype)
    batch = batch._replace(images=batch.images.to(dtype), pixels=batch.pixels.to(dtype))
    aims = {"own": own_loss(model, components.loss, Step(1, 1)), "difference": score_margin(model)}
    one = Attacker(model, aims, PLAN)
    return {name: one.input_gradient(batch, objective=name) for name in aims}


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("routing", ["dynamic", "em"])
def test_fused_routing_has_the_references_gradient_by_the_picture(
    routing, iterations, tiny_config, em_config
):
    words = ("trainer.batch_size=12", f"routing.iterations={iterations}")

    def settings():
        return tiny_config(*words) if routing == "dynamic" else em_config(*SMALL_EM, *words)

    weights = started(settings())
    exact = slopes(settings(), weights, "reference", torch.float64)
    for name, slope in slopes(settings(), weights, "fused", torch.float64).items():
        assert (exact[name] != 0).any()
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(slope, exact[name], rtol=1e-10, atol=1e-11 * scale)
    if iterations == 1:
        return  # at the start of EM routing one iteration sets no class apart: float32 has nothing to hold to
    plain = slopes(settings(), weights, "reference", torch.float32)
    fused = slopes(settings(), weights, "fused", torch.float32)
    for name, wanted in exact.items():
        allowed, got = [((one[name] - wanted).norm() / wanted.norm()).item() for one in (plain, fused)]
        assert got <= 2 * allowed + 1e-7
