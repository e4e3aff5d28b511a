"""The training loop."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.data.seeds import derive_seed
from capsexp.data.split import Split
from capsexp.errors import RunStopped, UserError, is_interruption
from capsexp.ops.labels import predicted_labels
from capsexp.routing import advance
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.early_stop import ending, familiar_batches, remarks_on
from capsexp.training.evaluate import evaluate, inference
from capsexp.training.gradients import gradient_norm, gradients
from capsexp.training.parallel import SINGLE, ProcessGroup
from capsexp.training.profiler import profiler
from capsexp.training.progress import Reporter
from capsexp.training.record import NoRecord, Record
from capsexp.training.run_dir import RunDir
from capsexp.training.state import State, processes_of, random_state
from capsexp.training.stop_signal import StopSignal

SHOWN = 16  # pictures whose reconstruction goes to TensorBoard


def train(
    components: Components, run: RunDir, config: Mapping[str, Any], processes: ProcessGroup = SINGLE
) -> dict[str, float]:
    """Train a network in a run directory, from its last checkpoint if there is one, and test it once.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        run: the directory, owned by this process or by the lead, which alone writes there.
        config: the plain config, for TensorBoard's table.
        processes: those that train together; each calls this function and shares every batch.

    Returns:
        The test figures, such as `test/accuracy`, or the last validation's with `trainer.test=none`.

    Raises:
        RunStopped: a signal, or a loss or gradient that is not finite.
        UserError: no usable checkpoint; missing data.
    """
    settings, device = components.trainer, components.device
    device.prepare()
    torch.manual_seed(components.seed)

    # Data
    training, validation = _read_splits(components)
    familiar = familiar_batches(components)
    looked_at = {"validation": validation, "familiar": familiar}
    if settings.stop_accuracy is not None and looked_at[settings.stop_on] is None:
        raise UserError("trainer.stop_accuracy: this run has no validation pictures to reach it on")
    total = settings.total_steps(len(training))

    # Network, optimiser
    model = device.place(components.new_model())
    optimizer = components.new_optimizer(model.parameters(), lr=components.learning_rate(Step(0, total)))
    tell = functools.partial(print, flush=True)
    saved = processes.broadcast(lambda: checkpoint.newest(run.checkpoints, tell=tell))
    if saved is None:
        _calibrate(model, training)
    processes.broadcast_parameters(model)
    average = _moving_average(model, settings.ema_decay)
    state = State(model, optimizer, average)
    forward: nn.Module = torch.compile(model) if settings.compile else model  # type: ignore[assignment]

    # Resume
    if processes.rank > 0:  # dropout: other pictures, other masks
        torch.manual_seed(
            derive_seed(components.seed, saved["step"] if saved else 0, processes.rank, "process")
        )
    if saved is not None:
        state.restore(saved, rank=processes.rank)
    if state.stopped is not None and not settings.ends_at(state.stopped):  # resume=force, with other settings
        state.stopped = None
    run.log_resume(step=state.step, total=total, steps_per_epoch=len(training), best=state.best)
    run.write_environment(f"{device}{processes}")
    beginning: dict[str, Any] = {"start_step": state.step, "length": state.recorded, "settings": config}
    record = Record(run.path, **beginning) if processes.is_main else NoRecord()
    reporter = Reporter(total=total, done=state.step)
    stop, testing = StopSignal(), False

    def save() -> None:
        reporter.pause()
        state.recorded = record.flushed_bytes()
        rng_states = processes.gather(random_state())
        if not processes.is_main:
            return
        checkpoint.save(run.checkpoints, state.state_dict(rng_states), step=state.step)
        best = state.step if validation is None and state.stopped is None else state.chosen_step
        if best is not None:
            checkpoint.link(run.checkpoints, "best", best)
        keep = [] if best is None else [best]
        checkpoint.prune(run.checkpoints, keep_last=2, keep_steps=keep, keep_every=settings.keep_every)

    def stop_if_asked() -> None:
        run.heartbeat(state.step)
        if stop.asked(processes):
            if not testing:  # for the test the weights may have gone back to the best
                save()
            stop.end(state.step, run.path)

    def mean_figures(batches: Batches, part: str) -> dict[str, float]:
        subject = forward if average is None else average.module
        advance(subject, Step(state.step, total))
        options: dict[str, Any] = {"precision": settings.precision, "processes": processes}
        options["at_batch"] = stop_if_asked
        return _prefixed(
            part, evaluate(subject, batches, components.loss, Step(state.step, total), **options)
        )

    profiled = settings.profile and processes.is_main
    with _closing(record), stop, reporter, profiler(run.path, profiled) as profile:
        reporter.say(f"{run.path} on {device}{processes}")
        if saved is not None and processes_of(saved) != processes.size:
            change = f"was {processes_of(saved)}, is {processes.size}"
            reporter.say(f"number of processes: {change}; the run goes on, but not bit for bit")
        reporter.say(_introduction(model, training, validation, Step(state.step, total)))
        for remark in [*components.dataset.caveats(), *remarks_on(familiar)]:
            reporter.say(remark)
        if validation is not None:
            _show_reconstructions(record, model, validation, state.step)
        while state.stopped is None and (state.step < total or state.batch > 0):
            for batch in _training_batches(training, state.epoch, state.batch, settings.overfit):
                if state.step >= total:
                    break
                step = Step(state.step, total)
                moved = advance(model, step)
                learning_rate = components.learning_rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                logged = (state.step + 1) % settings.log_every == 0 or state.step + 1 == total
                told = gradients(
                    forward, components.loss, batch, step, settings, layers=logged, processes=processes
                )
                told["gradient_norm"] = gradient_norm(model, settings.grad_clip)
                _refuse_non_finite(told, batch, state.step, run)
                optimizer.step()
                if average is not None:
                    average.update_parameters(model)
                state.step, state.batch = state.step + 1, state.batch + 1

                shown = {name: told[name] for name in told if "/" not in name and name != "gradient_norm"}
                place = {"epoch": state.epoch + 1, "epochs": settings.max_epochs}
                reporter.step(state.step, **place, figures=shown, pictures=len(batch.labels))
                if logged:
                    scheduled = {"learning_rate": learning_rate, **components.loss.scheduled(step), **moved}
                    values = {**_prefixed("train", told), **_prefixed("schedule", scheduled)}
                    record.log_metrics(state.step, values, epoch=state.epoch + 1)
                    record.log_timing(state.step, {"images_per_second": reporter.images_per_second})
                if profile is not None:
                    profile.step()
                if state.step % settings.save_every == 0:
                    save()
                stop_if_asked()

            # End of an epoch
            ended = state.epoch + 1
            last = state.step >= total
            if any(looked_at.values()) and (ended % settings.validate_every == 0 or last):
                values = {} if validation is None else mean_figures(validation, "validation")
                if familiar is not None:
                    values["familiar/accuracy"] = mean_figures(familiar, "familiar")["familiar/accuracy"]
                record.log_metrics(state.step, values, epoch=ended)
                if validation is not None:
                    state.note_validation(values["validation/accuracy"])
                # One process decides: if only some of them stopped, the others would wait for ever.
                stopped = processes.broadcast(functools.partial(settings.stop, values, state.step))
                if stopped is not None:
                    state.note_stop(stopped, values)
                run.update_status("running", step=state.step, best=state.best)
                reporter.say(f"epoch {ended}: {_sentence(values)}")
                if validation is not None and (ended % settings.images_every == 0 or last or stopped):
                    _show_reconstructions(record, model, validation, state.step)
            state.epoch, state.batch = state.epoch + 1, 0
            save()

        # The test set is read here, once, and chooses nothing.
        testing = True
        results = {"validation/best_accuracy": state.best_accuracy} if state.best_step is not None else {}
        if settings.stop_accuracy is not None:
            reporter.say(ending(settings, state.stopped, total))
        if settings.test != "none":
            if settings.test == "best" and state.chosen_step is not None:
                state.restore_weights(
                    processes.broadcast(lambda: checkpoint.load(run.checkpoints / "best.pt"))
                )
            if familiar is not None and state.stopped is not None:  # it was told of these very weights
                results["familiar/accuracy"] = state.stopped["accuracy"]
            elif familiar is not None:
                results["familiar/accuracy"] = mean_figures(familiar, "familiar")["familiar/accuracy"]
            test = components.batches(components.dataset.read("test"), limit=settings.limit_eval_batches)
            results |= mean_figures(test, "test")
            reporter.say(f"test set, {test.visited} pictures: {_sentence(results)}")
        record.log_metrics(state.step, results, epoch=state.epoch)
        run.update_status("completed", step=state.step, results=results, stopped=state.stopped, exit_code=0)
    return results


def _training_batches(batches: Batches, epoch: int, start: int, overfit: bool) -> Iterator[Batch]:
    """The batches of an epoch from number `start` on; for overfitting, unshuffled and unaugmented."""
    if not overfit:
        return batches.training(epoch, start=start)
    return (batch for number, batch in enumerate(batches.in_order()) if number >= start)


def _read_splits(components: Components) -> tuple[Batches, Batches | None]:
    """Training and validation pictures on the device; None for no validation."""
    settings = components.trainer
    training, validation = components.dataset.read_training()
    if settings.overfit:
        training = validation = Split(
            training.images[: settings.batch_size], training.labels[: settings.batch_size]
        )
    batches = components.batches(training, limit=settings.limit_train_batches, training=True)
    if validation.size == 0:
        return batches, None
    return batches, components.batches(validation, limit=settings.limit_eval_batches)


def _calibrate(model: nn.Module, batches: Batches) -> None:
    """Let a network that can, start from its first batch of training pictures."""
    if (calibrate := getattr(model, "calibrate", None)) is not None:
        calibrate(next(batches.training(0)).images)


def _moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    # Buffers are copied: the average of indices, as a layer of windows has them, would be other indices.
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)


def _refuse_non_finite(told: dict[str, float], batch: Batch, step: int, run: RunDir) -> None:
    """End the run before a loss or gradient that is no number reaches the weights."""
    wrong = {name: str(value) for name, value in told.items() if not math.isfinite(value)}
    if not wrong:
        return
    report = {"step": step, "values": wrong, "indices": batch.indices.tolist()}
    run.report("non_finite", report)
    good = checkpoint.saved(run.checkpoints)
    kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
    names = ", ".join(f"{name} is {value}" for name, value in wrong.items())
    first = ", ".join(str(index).replace(", ", " + ").strip("[]") for index in batch.indices[:8].tolist())
    where = f"training pictures {first}, … (all in non_finite.json)"
    raise RunStopped(f"step {step}: {names}, with {where}; {kept}", exit_code=1)


def _show_reconstructions(record: Record | NoRecord, model: nn.Module, batches: Batches, step: int) -> None:
    """Pictures above what the network makes of them, by the class that it takes them for.

    Of several classes in each: the picture, what it was made of, and what the network makes of it by the
    classes that it takes it for, each right one at its own place.
    """
    images, labels, pixels, _ = (field[:SHOWN] for field in next(batches.in_order()))
    several = labels.dim() > 1
    with inference(model):
        output = model(images)
        if several:
            output = model(images, predicted_labels(output.scores, labels))
    if output.reconstruction is not None:
        decoded = output.reconstruction
        rows = [images, *pixels.unbind(1), *decoded.unbind(1)] if several else [pixels, decoded]
        record.log_images(step, "reconstruction", rows)


@contextlib.contextmanager
def _closing(record: Record | NoRecord) -> Iterator[None]:
    """However the run ends: say so in TensorBoard."""
    try:
        yield
    except BaseException as error:
        record.close("interrupted" if is_interruption(error) else "failed")
        raise
    record.close("completed")


def _introduction(model: nn.Module, training: Batches, validation: Batches | None, step: Step) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pictures = f"{training.count} training and {validation.count if validation else 0} validation pictures"
    begin = f"going on at step {step.number} of {step.total}" if step.number else f"{step.total} steps"
    return f"{type(model).__name__} with {parameters:,} parameters; {pictures}; {begin}"


def _prefixed(part: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}/{name}": value for name, value in values.items()}


def _sentence(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.count("/") < 2)
