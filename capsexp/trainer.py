"""Settings of the training loop."""

from typing import Literal

import torch

from capsexp.errors import require_at_least_1


class Trainer:
    """How long and how carefully to train; conf/trainer/default.yaml says what each setting means.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        max_epochs: int,
        max_steps: int | None,
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
        )
        if grad_clip is not None and grad_clip <= 0:
            raise ValueError(f"grad_clip must be > 0, got {grad_clip}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {ema_decay}")
        if accumulate > batch_size:
            raise ValueError(f"accumulate must be <= batch_size ({batch_size}), got {accumulate}")
        self.max_epochs, self.max_steps, self.batch_size = max_epochs, max_steps, batch_size
        self.accumulate, self.grad_clip, self.ema_decay = accumulate, grad_clip, ema_decay
        self.precision = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.compile, self.overfit, self.test, self.profile = compile, overfit, test, profile
        self.limit_train_batches, self.limit_eval_batches = limit_train_batches, limit_eval_batches
        self.validate_every, self.log_every, self.images_every = validate_every, log_every, images_every
        self.save_every, self.keep_every = save_every, keep_every

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        steps = self.max_epochs * batches_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)
