"""The training loop."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capsexp.capsules import Batch
from capsexp.config.components import Components
from capsexp.data.batches import Batches
from capsexp.routing import advance
from capsexp.schedule import Step
from capsexp.training import checkpoint
from capsexp.training.costs import note_network, note_peak
from capsexp.training.early_stop import describe_end
from capsexp.training.evaluate import evaluate
from capsexp.training.gradients import accumulate_gradients, gradient_norm
from capsexp.training.introduction import first_lines
from capsexp.training.metrics import prefixed, sentence
from capsexp.training.non_finite import refuse_non_finite
from capsexp.training.parallel import SINGLE, ProcessGroup
from capsexp.training.profiler import profiler
from capsexp.training.progress import Reporter
from capsexp.training.reconstructions import log_reconstructions
from capsexp.training.record import NoRecord, Record, closing
from capsexp.training.run_data import keep_data, keep_fingerprints
from capsexp.training.run_dir import RunDir
from capsexp.training.saved_state import process_count, saved_position
from capsexp.training.splits import Splits, read_splits, require_same_images
from capsexp.training.start import resume_state, start_state
from capsexp.training.state import State, random_state
from capsexp.training.stop_signal import StopSignal
from capsexp.training.tally import Tally, new_tally, report_test, report_validation
from capsexp.training.timing import StepClock


def train(
    components: Components, run: RunDir, config: Mapping[str, Any], processes: ProcessGroup = SINGLE
) -> dict[str, float]:
    """Train a network in a run directory, from its last checkpoint if there is one, and test it once.

    Args:
        components: what `capsexp.config.build.build_components` returned.
        run: the directory, locked by rank 0, the only process that writes there.
        config: the plain config, for TensorBoard's table.
        processes: those that train together; each calls this function and takes a slice of every batch.

    Returns:
        The test metrics, such as `test/accuracy`; with `trainer.test=none` the best validation accuracy.

    Raises:
        RunStopped: a signal, a loss or gradient that is not finite, or a full disk.
        UserError: no usable checkpoint; missing data.
    """
    components.device.prepare()
    torch.manual_seed(components.seed)
    report = functools.partial(print, flush=True)
    if processes.is_main:
        keep_data(run.path, components.dataset, force=config.get("resume") == "force", report=report)
    splits = read_splits(components)
    require_same_images(splits, processes)
    if processes.is_main:
        keep_fingerprints(run.path, components.dataset, report=report)
    saved = processes.broadcast(lambda: checkpoint.load_newest(run.checkpoints, report=report))
    of_main = report if processes.is_main else (lambda line: None)
    state = start_state(components, splits.training, processes, is_new=saved is None, report=of_main)
    resume_state(state, saved, components, processes)

    with checkpoint.explain_failed_write(run.checkpoints):
        run.log_resume(**state.progress, steps_per_epoch=len(splits.training), best=state.best)
        run.write_environment(f"{components.device}{processes}")
        record = (
            Record(run.path, start_step=state.step, length=state.recorded, settings=config)
            if processes.is_main
            else NoRecord()
        )
        reporter = Reporter(state.position, timed=components.trainer.max_seconds is not None)
        stop, profiled = StopSignal(), components.trainer.profile and processes.is_main
        with closing(record), stop, reporter, profiler(run.path, enabled=profiled) as profile:
            training = Training(components, splits, state, run, processes, record, reporter, stop, profile)
            training.introduce(saved)
            training.fit()
            return training.test()


@dataclass
class Training:
    """The loop of one process, with everything that it uses."""

    components: Components
    splits: Splits
    state: State
    run: RunDir
    processes: ProcessGroup
    record: Record | NoRecord
    reporter: Reporter
    stop: StopSignal
    profile: torch.profiler.profile | None
    testing: bool = False
    """Whether training is over. The weights may then be the best ones, so no checkpoint is saved."""

    def __post_init__(self) -> None:
        self.settings = self.components.trainer
        # Where time ends the run, all processes must agree on it.
        self.clock = StepClock(float if self.settings.max_seconds is None else self.processes.number_of_main)
        self.forward: nn.Module = self.state.model
        if self.settings.compile:
            self.forward = torch.compile(self.state.model)  # type: ignore[assignment]

    @property
    def evaluated_model(self) -> nn.Module:
        """The network to evaluate: the moving average of the weights where there is one."""
        return self.forward if self.state.average is None else self.state.average.module

    def introduce(self, saved: dict[str, Any] | None) -> None:
        """Print the run, its network, its data and the step at which it starts."""
        report, size = self.reporter.print, self.processes.size
        report(f"{self.run.path} on {self.components.device}{self.processes}")
        if saved is not None and process_count(saved) != size:
            change = f"was {process_count(saved)}, is {size}"
            report(f"number of processes: {change}; the run resumes, but not bit for bit")
        costs = note_network(self.run, self.components)
        for line in first_lines(self.components, self.splits, self.state, costs):
            report(line)

    def fit(self) -> None:
        """Train until the epochs, the steps or the seconds are used, or validation ends the training."""
        state = self.state
        self._log_reconstructions()
        while not self._is_ended and (not state.is_over or state.batch > 0):
            self._train_epoch()
            ended, last = state.epoch + 1, state.is_over
            if self.splits.has_validation and (ended % self.settings.validate_every == 0 or last):
                self._validate(epoch=ended, last=last)
            state.epoch, state.batch = ended, 0
            self._save()

    @property
    def _is_ended(self) -> bool:
        """Whether validation has ended the training."""
        return self.state.stopped is not None or self.settings.is_out_of_patience(self.state.unimproved)

    def _train_epoch(self) -> None:
        """Train on the rest of an epoch."""
        state = self.state
        batches = self.splits.epoch(state.epoch, start=state.batch, overfit=self.settings.overfit)
        while not state.is_over:
            self.clock.start()
            if (batch := next(batches, None)) is None:
                break
            self._train_step(batch)
            if self.profile is not None:
                self.profile.step()
            if state.step % self.settings.save_every == 0:
                self._save()
            self._stop_if_asked()

    def _train_step(self, batch: Batch) -> None:
        state, settings, loss, step = self.state, self.settings, self.components.loss, self.state.position
        scheduled = advance(state.model, step)
        learning_rate = self.components.learning_rate(step)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        logged = (step.number + 1) % settings.log_every == 0 or step.number + 1 == state.budget.steps
        metrics = accumulate_gradients(
            self.forward, loss, batch, step, settings, layers=logged, processes=self.processes
        )
        shown = {name: value for name, value in metrics.items() if "/" not in name}
        metrics["gradient_norm"] = gradient_norm(state.model, settings.grad_clip)
        refuse_non_finite(metrics, batch, step.number, self.run)
        state.optimizer.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
        state.step, state.batch = state.step + 1, state.batch + 1
        state.seconds += self.clock.stop()

        epoch = state.epoch + 1
        self.reporter.step(
            state.position, epoch=epoch, epochs=settings.max_epochs, metrics=shown, images=len(batch.labels)
        )
        if logged:
            schedule = {"learning_rate": learning_rate, **loss.scheduled(step), **scheduled}
            values = {**prefixed("train", metrics), **prefixed("schedule", schedule)}
            self.record.log_metrics(state.step, values, seconds=state.seconds, epoch=epoch)
            self.record.log_timing(state.step, {"images_per_second": self.reporter.images_per_second})

    def _validate(self, *, epoch: int, last: bool) -> None:
        """Evaluate at the end of an epoch, and decide whether an accuracy ends the training."""
        state, settings, images = self.state, self.settings, self.splits.validation
        tally = new_tally(self.components, "validation")
        metrics = {} if images is None else self._evaluate(images, "validation", state.position, tally)
        metrics |= self._familiar_accuracy(state.position)
        self.record.log_metrics(state.step, metrics, seconds=state.seconds, epoch=epoch)
        if images is not None:
            state.note_validation(metrics["validation/accuracy"], settings.rank(metrics))
        # Rank 0 decides for all: if only some processes stopped, the others would wait for them forever.
        stopped = self.processes.broadcast(lambda: settings.check_stop(metrics, state.step))
        if stopped is not None:
            state.note_stop(stopped, metrics)
        report_validation(self.run, tally, state, self.components)
        self.run.update_status("running", **state.progress, best=state.best)
        self.reporter.print(f"epoch {epoch}: {sentence(metrics)}")
        if epoch % settings.images_every == 0 or last or stopped is not None:
            self._log_reconstructions()

    def test(self) -> dict[str, float]:
        """Test the network and complete the run. Only here is the test split read, and it selects nothing.

        Returns:
            What `train` returns.
        """
        state, settings = self.state, self.settings
        self.testing = True
        results = {} if state.best_step is None else {"validation/best_accuracy": state.best_accuracy}
        for line in describe_end(settings, state):
            self.reporter.print(line)
        if settings.test != "none":
            position = self._restore_tested_weights()
            results |= self._familiar_accuracy(position)
            split = self.components.dataset.read("test")
            if self.processes.is_main:
                keep_fingerprints(self.run.path, self.components.dataset, report=self.reporter.print)
            batches = self.components.batches(split, limit=settings.limit_eval_batches)
            tally = new_tally(self.components, "test")
            results |= self._evaluate(batches, "test", position, tally)
            report_test(self.run, tally, position, self.components)
            self.reporter.print(f"test split, {batches.visited} images: {sentence(results)}")
        self.record.log_metrics(state.step, results, seconds=state.seconds, epoch=state.epoch)
        note_peak(self.run, self.components)
        ending = {"results": results, "stopped": state.stopped, "exit_code": 0}
        caveats = self.components.caveats()
        self.run.update_status("completed", **state.progress, **ending, caveats=caveats)
        return results

    def _restore_tested_weights(self) -> Step:
        """Restore the weights to test; return the step at which validation chose them, for the schedules."""
        if self.settings.test != "best" or self.state.chosen_step is None:
            return self.state.position
        path = self.run.checkpoints / "best.pt"
        saved = self.processes.broadcast(lambda: checkpoint.load(path))
        self.state.restore_weights(saved)
        return saved_position(saved)

    def _familiar_accuracy(self, position: Step) -> dict[str, float]:
        if self.splits.familiar is None:
            return {}
        if self.state.stopped is not None:  # measured with these weights
            return {"familiar/accuracy": self.state.stopped["accuracy"]}
        metrics = self._evaluate(self.splits.familiar, "familiar", position)
        return {"familiar/accuracy": metrics["familiar/accuracy"]}

    def _evaluate(self, on: Batches, split: str, at: Step, tally: Tally | None = None) -> dict[str, float]:
        """Return the metrics of a split, with its name as a prefix, with every schedule at a position."""
        advance(self.evaluated_model, at)
        metrics = evaluate(
            self.evaluated_model,
            on,
            self.components.loss,
            at,
            precision=self.settings.precision,
            processes=self.processes,
            at_batch=self._stop_if_asked,
            tally=tally,
        )
        return prefixed(split, metrics)

    def _log_reconstructions(self) -> None:
        # Not the compiled network: another batch size would compile it once more.
        model = self.state.model if self.state.average is None else self.state.average.module
        if self.splits.validation is not None:
            advance(model, self.state.position)
            log_reconstructions(self.record, model, self.splits.validation, self.state.step)

    def _save(self) -> None:
        """Save a checkpoint, link the best one and delete old ones."""
        state, folder = self.state, self.run.checkpoints
        self.reporter.pause()
        state.recorded = self.record.flushed_bytes()
        rng_states = self.processes.gather(random_state())
        if not self.processes.is_main:
            return
        self.run.require_present()
        checkpoint.save(folder, state.state_dict(rng_states), step=state.step)
        last_is_best = self.splits.validation is None and state.stopped is None
        best = state.step if last_is_best else state.chosen_step
        if best is not None:
            checkpoint.link(folder, "best", best)
        keep = [] if best is None else [best]
        checkpoint.prune(folder, keep_last=2, keep_steps=keep, keep_every=self.settings.keep_every)

    def _stop_if_asked(self) -> None:
        self.run.heartbeat(**self.state.progress)
        if self.stop.asked(self.processes):
            if not self.testing:
                self._save()
            self.stop.end(self.state.step, self.run.path)
