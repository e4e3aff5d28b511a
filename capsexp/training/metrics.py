"""Metrics of a batch: accuracy, loss and its terms, capsule statistics."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsexp.capsules import Batch, Output, Routed
from capsexp.ops.entropy import coupling_entropy
from capsexp.ops.labels import all_correct, fraction_correct, predicted_labels
from capsexp.schedule import Step

Loss = Callable[[Output, Batch, Step], dict[str, Tensor]]


def pooled(probabilities: Sequence[Float[Tensor, "B J"]]) -> Float[Tensor, "B J"]:
    """Scores of each picture by all its crops: each crop's probabilities count scaled to a sum of 1."""
    return torch.stack([F.normalize(one, p=1, dim=1) for one in probabilities]).sum(0)


def _accuracies(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> dict[str, Float[Tensor, ""]]:
    """Share of pictures of which all classes are right; of several in each, also the share of classes."""
    predictions = predicted_labels(scores, labels)
    told = {"accuracy": all_correct(predictions, labels).float().mean()}
    return (
        told if labels.dim() == 1 else told | {"digit_accuracy": fraction_correct(predictions, labels).mean()}
    )


def figures(
    output: Output, batch: Batch, terms: dict[str, Tensor], *, layers: bool = True
) -> dict[str, float]:
    """What is told about one batch.

    Returns:
        `accuracy` in [0, 1], `loss` and its terms. Of several classes in each picture all must be right for
        `accuracy`; `digit_accuracy` is then the share of classes that are. With `layers`, which read all
        couplings: for each layer of capsules `activation/LAYER`, their mean, and `active/LAYER`, the share
        above 1/2; for each routed one `coupling_entropy/LAYER`.
    """
    values = _accuracies(output.scores, batch.labels)
    values |= {"loss": torch.stack(list(terms.values())).sum(), **terms}
    with torch.no_grad():
        for name, capsules in output.layers.items() if layers else ():
            values[f"activation/{name}"] = capsules.activations.mean()
            values[f"active/{name}"] = (capsules.activations > 0.5).float().mean()
            if isinstance(capsules, Routed):
                values[f"coupling_entropy/{name}"] = coupling_entropy(capsules.coupling, capsules.fields)
    # One transfer: on an accelerator each would wait for all the work that was queued.
    told = torch.stack([value.float() for value in values.values()]).tolist()
    return dict(zip(values, told, strict=True))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Mixed precision for a device; float32 switches it off."""
    enabled = precision is not torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else torch.bfloat16, enabled=enabled)
