"""Metrics of a batch: accuracy, loss and its terms, capsule statistics."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsexp.capsules import Batch, Output, Routed
from capsexp.ops.entropy import coupling_entropy
from capsexp.ops.labels import all_correct, fraction_correct, predicted_labels
from capsexp.schedule import Step

Loss = Callable[[Output, Batch, Step], dict[str, Tensor]]


def pool_crops(probabilities: Sequence[Float[Tensor, "B J"]]) -> Float[Tensor, "B J"]:
    """Return scores of each image: the sum over its crops of their probabilities, scaled to sum to 1."""
    return torch.stack([F.normalize(crop, p=1, dim=1) for crop in probabilities]).sum(0)


def accuracies(scores: Float[Tensor, "B J"], labels: Int[Tensor, " B *T"]) -> dict[str, Float[Tensor, ""]]:
    """Return the fraction of images whose classes are all right.

    With several labels per image, also return `digit_accuracy`, the fraction of labels that are found.
    """
    predictions = predicted_labels(scores, labels)
    metrics = {"accuracy": all_correct(predictions, labels).float().mean()}
    if labels.dim() > 1:
        metrics["digit_accuracy"] = fraction_correct(predictions, labels).mean()
    return metrics


def batch_metrics(
    output: Output, batch: Batch, terms: dict[str, Tensor], *, layers: bool = True
) -> dict[str, float]:
    """Return the metrics of one batch.

    Args:
        output: of the network.
        batch: its input.
        terms: of the loss.
        layers: whether to include the metrics of layers, which read all couplings.

    Returns:
        `accuracy` in [0, 1]; `loss` and its terms. With several labels per image `accuracy` is the fraction
        of images whose classes are all right, and `digit_accuracy` the fraction of labels that are found.
        With `layers`, for each layer of capsules: `activation/LAYER`, the mean activation; `active/LAYER`,
        the fraction of activations above 1/2; for each routed one `coupling_entropy/LAYER`.
    """
    metrics = accuracies(output.scores, batch.labels)
    metrics |= {"loss": torch.stack(list(terms.values())).sum(), **terms}
    with torch.no_grad():
        for name, capsules in output.layers.items() if layers else ():
            metrics[f"activation/{name}"] = capsules.activations.mean()
            metrics[f"active/{name}"] = (capsules.activations > 0.5).float().mean()
            if isinstance(capsules, Routed):
                metrics[f"coupling_entropy/{name}"] = coupling_entropy(capsules.coupling, capsules.fields)
    # One transfer for all: on an accelerator each transfer waits for the work in the queue.
    numbers = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, numbers, strict=True))


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return a context of mixed precision on a device; float32 disables it."""
    enabled = precision is not torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else torch.bfloat16, enabled=enabled)


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return metrics under the name of their split, such as `validation/accuracy`."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def sentence(values: Mapping[str, float]) -> str:
    """Return metrics as one line, without those of layers."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.count("/") < 2)
