import json
import math

import pytest
import torch

from capsexp.errors import RunStopped
from capsexp.training import checkpoint


@pytest.mark.parametrize(("wrong", "term"), [(math.nan, "margin"), (math.inf, "margin")])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(
    wrong, term, tmp_path, monkeypatch, train_tiny
):
    from capsexp.loss.margin import Margin

    real = Margin.__call__

    def poisoned(self, output, batch, step):
        terms = real(self, output, batch, step)
        return {**terms, term: terms[term] * wrong} if step.number == 7 and torch.is_grad_enabled() else terms

    monkeypatch.setattr(Margin, "__call__", poisoned)
    with pytest.raises(RunStopped, match=rf"step 7: .*{term} is (nan|inf).*step-00000006\.pt") as stopped:
        train_tiny(tmp_path)
    assert stopped.value.exit_code == 1
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert report["step"] == 7
    assert term in report["values"]
    assert len(report["indices"]) == 100
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == 6
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["status"] == "failed"
    assert "margin" in status["error"]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, train_tiny):
    from capsexp.training import train

    monkeypatch.setattr(train, "gradient_norm", lambda model, largest: math.nan)
    with pytest.raises(RunStopped, match=r"step 0: gradient_norm is nan.*there is no checkpoint yet"):
        train_tiny(tmp_path)
