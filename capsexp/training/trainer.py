"""Settings of the training loop."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from capsexp.errors import refuse, require_at_least_1, require_in, require_positive

BestBy = Literal["accuracy", "balanced_accuracy", "macro_f1", "loss"]
ROUNDING = 1e-6
"""Largest rounding error of a mean of float32 accuracies."""


class Trainer:
    """Settings of the training loop; conf/trainer/default.yaml explains each of them.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None,
        max_steps: int | None,
        max_seconds: int | float | None,
        batch_size: int,
        accumulate: int,
        grad_clip: int | float | None,
        precision: Literal["float32", "bfloat16"],
        ema_decay: int | float | None,
        compile: bool,
        limit_train_batches: int | None,
        limit_eval_batches: int | None,
        overfit: bool,
        validate_every: int,
        stop_accuracy: int | float | None,
        stop_on: Literal["validation", "familiar"],
        best_by: BestBy | None,
        patience: int | None,
        log_every: int,
        images_every: int,
        save_every: int,
        keep_every: int | None,
        test: Literal["best", "last", "none"],
        profile: bool,
    ) -> None:
        require_at_least_1(
            max_epochs=max_epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulate=accumulate,
            limit_train_batches=limit_train_batches,
            limit_eval_batches=limit_eval_batches,
            validate_every=validate_every,
            log_every=log_every,
            images_every=images_every,
            save_every=save_every,
            keep_every=keep_every,
            patience=patience,
        )
        require_positive(grad_clip=grad_clip, max_seconds=max_seconds)
        require_in("(0, 1)", ema_decay=ema_decay)
        require_in("(0, 1]", stop_accuracy=stop_accuracy)
        if accumulate > batch_size >= 1:
            refuse(f"accumulate must be <= batch_size ({batch_size}), got {accumulate}")
        if max_epochs is None and max_steps is None and max_seconds is None:
            refuse("max_epochs, max_steps or max_seconds must be set: nothing would end the training")
        self.max_epochs, self.max_steps, self.max_seconds = max_epochs, max_steps, max_seconds
        self.batch_size = batch_size
        self.accumulate, self.grad_clip, self.ema_decay = accumulate, grad_clip, ema_decay
        self.precision = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.compile, self.overfit, self.test, self.profile = compile, overfit, test, profile
        self.limit_train_batches, self.limit_eval_batches = limit_train_batches, limit_eval_batches
        self.validate_every, self.log_every, self.images_every = validate_every, log_every, images_every
        self.save_every, self.keep_every = save_every, keep_every
        self.stop_accuracy, self.stop_on = stop_accuracy, stop_on
        self.best_by, self.patience = best_by, patience

    def total_steps(self, batches_per_epoch: int) -> int | None:
        """Return the optimizer steps that end the run; None if only `max_seconds` ends it."""
        epochs = None if self.max_epochs is None else self.max_epochs * batches_per_epoch
        return min((steps for steps in (epochs, self.max_steps) if steps is not None), default=None)

    def rank(self, metrics: Mapping[str, float]) -> list[float]:
        """Return what orders validation rounds by these metrics of each, the best last.

        With `best_by` two numbers, the second of which decides between rounds that are equal in the first.
        """
        if self.best_by is None:
            return [metrics["validation/accuracy"]]
        loss = -metrics["validation/loss"]
        return [loss] if self.best_by == "loss" else [metrics[f"validation/{self.best_by}"], loss]

    def is_out_of_patience(self, unimproved: int) -> bool:
        """Whether this many validation rounds since the best one end the training."""
        return self.patience is not None and unimproved >= self.patience

    def check_stop(self, metrics: Mapping[str, float], step: int) -> dict[str, Any] | None:
        """Return accuracy, images and step of the stop if these validation metrics end the training."""
        if self.stop_accuracy is None:
            return None
        stop = {"on": self.stop_on, "accuracy": metrics[f"{self.stop_on}/accuracy"], "step": step}
        return stop if self.ends_at(stop) else None

    def ends_at(self, stop: Mapping[str, Any]) -> bool:
        """Whether a stop that `check_stop` returned, maybe with other settings, ends the training."""
        if self.stop_accuracy is None or stop["on"] != self.stop_on:
            return False
        return bool(stop["accuracy"] >= self.stop_accuracy - ROUNDING)
