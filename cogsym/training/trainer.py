"""The training loop is transformers' Trainer; what a run of ours adds to it."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cogsym.data import PackedDataset
from cogsym.data.packing import IGNORE
from cogsym.errors import RunStopped
from cogsym.heartbeat import Heartbeat, clock
from cogsym.ranks import Ranks
from cogsym.records import reason, write_whole
from cogsym.signals import handled
from cogsym.training import checkpoint
from cogsym.training.evaluate import bits
from cogsym.training.run_folder import RunFolder
from cogsym.training.sharded import gathered, part_for, trained_tensors, whole
from cogsym.training.shares import SharedOrder, SharedRows

_LOGGED = ("loss", "grad_norm", "learning_rate")


class OuterTrainer(Trainer):
    """Trainer for a prepared model.

    It writes checkpoints of the trained parameters alone, evaluates in bits per byte, computes in bfloat16 where asked
    while the trained parameters stay in float32, and stops at a loss or gradient that is not finite. Of several ranks
    the first one writes, and each evaluates its share.

    Attributes:
        first_loss: that of its first step; 0 before it.
    """

    model: Any  # never None here, as the base class allows
    args: Any
    eval_dataset: Any

    def __init__(
        self, *args: Any, bf16: bool, folder: RunFolder, history: list[dict[str, float]], ranks: Ranks, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._bf16, self._folder, self._history, self._ranks = bf16, folder, history, ranks
        self._order: SharedOrder | None = None
        self.first_loss, self._stepped, self._norm = 0.0, False, 0.0
        self._loss, self._learned = torch.zeros(2, dtype=torch.float64, device=self.args.device).unbind()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, but that would train a step more where the checkpoint is that of the last step."""
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / checkpoint.STATE))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return self.callback_handler.on_train_begin(self.args, self.state, self.control)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _move_model_to_device(self, *_: Any) -> None:
        """Leave the model where it is, on its device: each weight would be moved apart, and parts cannot be moved."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Trainer's, but that ranks never see a row twice, where they do not share the rows out evenly."""
        if self._ranks.size == 1:
            return super()._get_train_sampler(train_dataset)
        self._order = SharedOrder(train_dataset)
        return self._order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, which tells the order nothing of an epoch that begins in its middle."""
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens in rows in which something is learned; they are added up when the step ends."""
        self._learned = self._learned + (inputs["labels"] != IGNORE).any(dim=1).sum() * inputs["labels"].shape[1]

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Trainer's contexts, and autocast.

        Not through `TrainingArguments.bf16`: accelerate would convert the logits to float32 once more, the largest
        tensor of a step, though the loss has done so already.
        """
        stack = super().compute_loss_context_manager()
        if self._bf16:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; each forward pass of a step has a part of it."""
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self._loss = self._loss + loss.detach().double()
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's."""
        self.check_gradients()
        return self._norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's: the norm before it was clipped."""
        if grad_norm is None:  # nothing is clipped
            self.check_gradients()
        return self._norm

    def check_gradients(self) -> None:
        """Clip them, and stop before the optimizer makes the weights useless. Once a step a GPU is waited for, here,
        and told is all that the host has to know of the step.

        Raises:
            RunStopped: the loss or the gradient is not finite; of several ranks all stop at the gradient.
        """
        of = super()._clip_grad_norm if self.args.max_grad_norm > 0 else super()._get_grad_norm
        norm = torch.as_tensor(whole(of(self.model_wrapped)), device=self.args.device)
        learned = self.accelerator.gather(self._learned).sum()
        loss, self._norm, learned = torch.stack([self._loss, norm.double(), learned.double()]).tolist()
        if self._ranks.size == 1 and not math.isfinite(loss):
            raise self._not_finite("loss", loss)
        if not math.isfinite(self._norm):
            raise self._ranks.once(self._not_finite("norm of the gradient", self._norm))
        self.first_loss = self.first_loss if self._stepped else loss
        self.state.num_input_tokens_seen += int(learned)
        self._stepped = True
        self._loss, self._learned = torch.zeros_like(self._loss), torch.zeros_like(self._learned)

    def _not_finite(self, what: str, value: float) -> RunStopped:
        kept = self._folder.complete_checkpoints()
        saved = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        return RunStopped(
            f"The {what} became {value} at step {self.state.global_step + 1}; {saved}. Start again with a lower "
            f"learning rate than {self.args.learning_rate:g}, or look for damaged text in the data."
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Bits per byte of each held-out text."""
        datasets: dict[str, PackedDataset] = eval_dataset or self.eval_dataset
        metrics = {}
        for name, dataset in datasets.items():
            rows = SharedRows(dataset, self._ranks.size)  # as many forward passes of each rank
            share = range(self._ranks.rank, len(rows), self._ranks.size)
            with self.compute_loss_context_manager():
                found = bits(self.model, rows, share, self.args.per_device_eval_batch_size)
            metrics[f"{metric_key_prefix}_{name}_bits_per_byte"] = self._ranks.total(found) / dataset.num_bytes
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / checkpoint.TRAINED)
        with torch.no_grad():
            for name, p in trained_tensors(model or self.model).items():
                p.copy_(part_for(saved[name], p))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_optimizer(self.optimizer, self.lr_scheduler, Path(folder) / checkpoint.OPTIMIZER)

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_random(Path(folder) / checkpoint.RANDOM)

    def _load_scaler(self, folder: str | None) -> None:
        """There is none; a scaler.pt that lies in the folder is not read."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write what a run goes on from, and remove the checkpoints that are not needed any more."""
        self.store_flos()
        # The frozen parameters are in the base model already.
        trained = gathered(trained_tensors(self.model), self._ranks.first)
        states = gathered(checkpoint.optimizer_state(self.optimizer)[0], self._ranks.first)
        self._ranks.on_first(lambda: self._write_checkpoint(trained, states))

    def _write_checkpoint(self, trained: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        self._folder.check_held()
        step = self.state.global_step
        try:
            with self._folder.new_checkpoint(step) as new:
                save_file(trained, new / checkpoint.TRAINED)
                checkpoint.save_optimizer(self.optimizer, self.lr_scheduler, states, new / checkpoint.OPTIMIZER)
                checkpoint.save_random(new / checkpoint.RANDOM)
                self.state.save_to_json(str(new / checkpoint.STATE))
                _write_lines(new / checkpoint.METRICS, self._history)
        except (OSError, SafetensorError) as error:
            kept = self._folder.complete_checkpoints()
            saved = f"{kept[-1]} is intact; free some space and resume" if kept else "free some space and start again"
            raise RunStopped(f"The checkpoint at step {step} was not written ({error}); {saved}.") from error


class RunCallback(TrainerCallback):
    """Shows progress, writes `metrics.jsonl`, checks gradients, and turns a signal into a checkpoint and a clean end.

    Attributes:
        stopped_by: the signal that ended the run, or None.
        seconds: time spent in optimizer steps, this run's part of them.
        history: the lines of `metrics.jsonl`, of earlier parts of the run too.
    """

    def __init__(self, folder: RunFolder, resumed: Path | None, console: Console, ranks: Ranks) -> None:
        self.trainer: OuterTrainer | None = None
        self.stopped_by: int | None = None
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        if resumed:
            self.history = [json.loads(line) for line in (resumed / checkpoint.METRICS).read_text("utf-8").splitlines()]
        self._folder, self._console, self._ranks = folder, console, ranks
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._heartbeat = Heartbeat(lambda: self._say(self._state))
        self._state = ""
        self._running = contextlib.ExitStack()
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the lines up to the checkpoint that the run goes on from, and start the clock."""
        if self._ranks.first:
            with self._writing_metrics():
                _write_lines(self._folder.metrics, self.history, self._folder.check_held)
        if state.global_step >= state.max_steps:
            self._say(
                f"The run is finished, at step {state.global_step} of {state.max_steps}; nothing is left to train."
            )
            return
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, detail="")
        self._first_step, self._tokens = state.global_step, state.num_input_tokens_seen
        self._running.enter_context(handled(self._stop))
        self._running.callback(self._shown, self._progress.stop)
        self._shown(self._progress.start)
        self._state = f"step {state.global_step}/{state.max_steps}, the first is being computed"
        if not self._console.is_terminal:
            self._say(f"training begins: {state.max_steps - state.global_step:,} steps, a line a minute")
            self._heartbeat.start()
            self._running.callback(self._heartbeat.stop)

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None:
            if number == signal.SIGINT:  # a second time: at once
                raise KeyboardInterrupt
            return  # a closing terminal sends SIGHUP more than once
        self.stopped_by = number
        self._say("Stopping after this step; press Ctrl-C again to stop at once without saving.")

    def _say(self, line: str) -> None:
        self._shown(self._console.print, line)

    def _shown(self, show: Callable[..., Any], *args: Any) -> None:
        """Show something, or go on without where the terminal is gone."""
        with contextlib.suppress(OSError):
            show(*args)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start a step's clock: evaluation and saving are not training."""
        self._step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show where the run is; save and stop where a signal asked for it."""
        self.seconds += time.perf_counter() - self._step_started
        rate = (state.num_input_tokens_seen - self._tokens) / self.seconds
        self._progress.update(
            self._task, completed=state.global_step, detail=f"{self._last_loss()}{rate:,.0f} tokens/s"
        )
        done = state.global_step - self._first_step
        left = self.seconds / done * (state.max_steps - state.global_step)
        self._state = (
            f"step {state.global_step}/{state.max_steps}, {self._last_loss()}{rate:,.0f} tokens/s, "
            f"{clock(self.seconds)} elapsed, {clock(left)} left"
        )
        if not self._console.is_terminal and done == 1 and state.global_step < state.max_steps:
            self._say(self._state)
        if state.global_step >= state.max_steps:
            control.should_log = True
        # A signal reaches each rank at a moment of its own; all stop after the same step.
        if stopped_by := self._ranks.largest(self.stopped_by or 0):
            self.stopped_by = stopped_by  # not without one: it may come while the ranks are asked
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append a line to `metrics.jsonl`; a line to the log where no terminal shows the bar."""
        logs = {key: v for key, v in kwargs["logs"].items() if key in _LOGGED or key.startswith("eval_")}
        if not logs:  # Trainer's closing summary, which counts evaluation as training time
            return
        line: dict[str, float] = {"step": state.global_step, "tokens": int(state.num_input_tokens_seen), **logs}
        if self.seconds:
            line["tokens_per_second"] = round((state.num_input_tokens_seen - self._tokens) / self.seconds, 1)
        self.history.append(line)
        if not self._ranks.first:
            return
        with self._writing_metrics(), self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._console.is_terminal:
            return
        if scores := [f"{key.removeprefix('eval_')} {value:.4g}" for key, value in line.items() if "eval_" in key]:
            self._say(f"step {state.global_step}/{state.max_steps}, {', '.join(scores)}")
        elif state.global_step >= state.max_steps:
            self._say(
                f"step {state.global_step}/{state.max_steps}, loss {line['loss']:.4f}, "
                f"{line['tokens_per_second']:,.0f} tokens/s, {clock(self.seconds)} elapsed"
            )

    @contextlib.contextmanager
    def _writing_metrics(self) -> Iterator[None]:
        self._folder.check_held()
        try:
            yield
        except OSError as error:
            raise RunStopped(
                f"{self._folder.metrics} was not written ({reason(error)}); free some space and run again with "
                "--resume, from the last checkpoint."
            ) from error

    def _last_loss(self) -> str:
        assert self.trainer is not None
        losses = [line["loss"] for line in self.history[-4:] if "loss" in line] or [self.trainer.first_loss]
        return f"loss {losses[-1]:.3f}, "

    def close(self) -> None:
        """Give the terminal and the signals back."""
        self._running.close()


def _write_lines(path: Path, history: list[dict[str, float]], check: Callable[[], None] = lambda: None) -> None:
    """Write a whole `metrics.jsonl`.

    Raises:
        OSError: it was not written; what was there is as it was.
    """
    write_whole(path, "".join(json.dumps(line) + "\n" for line in history).encode(), check)
