"""``ALTrainer``: training loop with logging, evaluation and checkpoints.

    train_batch -> on_step_end -> [log] -> [evaluate] -> [save]      in this order, each if its switch is set

The pipeline is drained only for those. Everything here is the same on every rank.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import DataCollatorWithPadding
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import (
    EvalPrediction,
    PredictionOutput,
    TrainOutput,
    denumpify_detensorize,
    speed_metrics,
)

from ds_al.checkpoint.folder import newest
from ds_al.checkpoint.own import INDEX
from ds_al.config.base import BLOCK
from ds_al.convert.export import export
from ds_al.engine import ALPipelineEngine
from ds_al.entry import initialize, read_config
from ds_al.errors import ALCheckpointError, ALConfigError
from ds_al.module import ALPipelineModule
from ds_al.parallel.agreement import agreed
from ds_al.trainer import elsewhere
from ds_al.trainer.arguments import ALTrainingArguments
from ds_al.trainer.batches import Batches, Inputs, check_datasets, joined
from ds_al.trainer.callbacks import Agreement, check_callback, of_loggers, one_folder, restore_states, saved_states
from ds_al.trainer.reported import reported
from ds_al.trainer.steps import steps_per_epoch, with_counts

CLIENT_STATE = "trainer_state"
"""Key of the :class:`transformers.TrainerState` in a checkpoint's ``client_state``."""


class ALTrainer:
    """Trains an AL network on a data set, with the interface of transformers' ``Trainer``.

    Every rank creates one and calls the same methods, under the ``deepspeed`` command; ``python script.py`` is one
    rank.

    Args:
        model: result of :func:`ds_al.from_pretrained` or ``from_layers``, or an
            :class:`~ds_al.module.ALPipelineModule`. Texts padded to the longest of a batch require
            ``dynamic_shape=True`` there.
        args: :class:`~ds_al.trainer.arguments.ALTrainingArguments`, or a mapping.
        config: the DeepSpeed config, a path or a mapping: batch sizes, optimizer, LR schedule, and the block
            ``"associated_learning"``. ``"total_num_steps": "auto"`` of a schedule is set to the number of batches.
        train_dataset, eval_dataset: map-style, such as ``datasets.Dataset``; ``eval_dataset`` may be a dict of data
            sets. They are read on all ranks of the first stage; training and evaluation require labels.
        processing_class: tokenizer or image processor, saved with the model; a tokenizer pads batches.
        data_collator: maps rows to a batch; by default transformers' ``DataCollatorWithPadding`` with a tokenizer, else
            ``default_data_collator``.
        batch_fn: maps such a batch to ``(x, labels)``, for networks with an input other than that of
            :func:`ds_al.convert.batch_fn`.
        compute_metrics: maps an ``EvalPrediction`` with the scores of the last exit to a dict.
        preprocess_logits_for_metrics: maps scores and labels of a batch to the predictions of that ``EvalPrediction``.
        callbacks: callbacks of transformers or your own; see :mod:`ds_al.trainer.callbacks`.

    Attributes:
        engine: the :class:`~ds_al.engine.ALPipelineEngine`.
        state, control: transformers' own.

    Raises:
        ALConfigError: an argument, a callback or a config key is not supported.
    """

    def __init__(
        self,
        model: ALPipelineModule,
        args: ALTrainingArguments | Mapping[str, Any],
        *,
        config: str | Path | Mapping[str, Any],
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        batch_fn: Callable[[Any], Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        **others: Any,
    ) -> None:
        if others:
            raise ALConfigError(elsewhere.parameters(others))
        if not isinstance(model, ALPipelineModule):
            raise ALConfigError(
                f"got a model of {type(model).__name__}: expected an ALPipelineModule. ds_al.from_pretrained(model, "
                "task=...) makes one of a model of transformers"
            )
        self.args = ALTrainingArguments.of(args)
        if self.args.eval_strategy != "no" and eval_dataset is None:
            raise ALConfigError(f'"args.eval_strategy": got {self.args.eval_strategy!r} without eval_dataset: give one')
        check_datasets(train_dataset, eval_dataset)
        if data_collator is None and hasattr(processing_class, "pad"):
            data_collator = DataCollatorWithPadding(processing_class)
        self.batches = Batches(data_collator, batch_fn=batch_fn, used_alone=self.args.remove_unused_columns)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class, self.compute_metrics = processing_class, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        callbacks = [*of_loggers(self.args.report_to), *callbacks]
        for callback in callbacks:
            check_callback(callback)
        one_folder(self.args.output_dir)
        self.engine = self._engine(model, config)
        shown = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback, shown, *callbacks],
            self.engine.module,
            processing_class,
            self.engine.optimizer,
            self.engine.lr_scheduler,
        )
        self.callback_handler.train_dataloader = self.engine.loader
        self.control = TrainerControl()
        self._agree = Agreement()
        self.state = self._new_state()
        self._losses = torch.zeros(model.num_layers, 2)  # sums since the start of training
        self._batches_seen = 0
        self.control = self._event("on_init_end")

    # ---- training ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Trains for the number of batches set by the arguments.

        Args:
            resume_from_checkpoint: ``True`` resumes from the last complete checkpoint of ``output_dir``, ``"auto"``
                does so where there is one, a path from that one; on any number of stages, bit-for-bit equal to
                uninterrupted training.

        Returns:
            Number of batches, mean loss per batch (summed over layers), and speed metrics.

        Raises:
            ALConfigError: there is no training data.
            ALCheckpointError: there is no checkpoint, or it was not saved by an ``ALTrainer``.
        """
        if self.train_dataset is None:
            raise ALConfigError("got no train_dataset: ALTrainer(train_dataset=...) is needed to train")
        self.state = self._new_state()
        if resume_from_checkpoint:
            self._resume(resume_from_checkpoint)
        self._losses.zero_()
        self._batches_seen = 0
        self._former_steps = self._engine_steps() - self.state.global_step
        first, start = self.state.global_step, time.time()
        self._event("on_train_begin")
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self._epoch()
        metrics = self._end(first, start)
        self._event("on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def _epoch(self) -> None:
        state, control = self.state, self.control
        self._event("on_epoch_begin")
        left = self._steps_per_epoch - state.global_step % self._steps_per_epoch
        for _ in range(min(left, state.max_steps - state.global_step)):
            self._event("on_step_begin")
            self.engine.train_batch()
            self.callback_handler.lr_scheduler = self.engine.lr_scheduler  # a new one where layers have moved
            state.global_step += 1
            state.epoch = state.global_step / self._steps_per_epoch
            self._event("on_step_end")
            self._agree(control)
            self._act()
            if control.should_training_stop:
                break
        self._event("on_epoch_end")
        self._agree(control)
        self._act()

    def _act(self) -> None:
        """Logs, evaluates and saves according to the switches."""
        control = self.control
        if control.should_epoch_stop:
            raise ALConfigError(
                "a callback set control.should_epoch_stop: data is one stream, of which no epoch can be cut short; use "
                "should_training_stop"
            )
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        if control.should_log:
            self._log_losses()
        if control.should_evaluate and self.eval_dataset is not None:
            best = self._is_best(self.evaluate())
            if self.args.save_strategy == "best":
                control.should_save = best
        if control.should_save:
            self._save()
        self._agree(control)

    def _end(self, first: int, start: float) -> dict[str, float]:
        """Drains the pipeline and loads the best weights if requested; returns metrics of the whole training."""
        self._take_losses()
        self.engine.flush()
        steps = self.state.global_step - first
        samples = steps * self.engine.train_batch_size()
        metrics = speed_metrics("train", start, num_samples=samples, num_steps=steps)
        metrics["train_loss"] = float(self._losses.sum()) / max(self._batches_seen, 1)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            self.engine.load_checkpoint(str(Path(best).parent), tag=Path(best).name, load_module_only=True)
        self.log(metrics)
        return metrics

    # ---- evaluation --------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluates on a data set with labels; every rank calls it.

        Returns:
            ``<prefix>_loss`` and ``<prefix>_accuracy`` of the last exit, ``<prefix>_accuracy_exit_<m>`` of all exits,
            the results of ``compute_metrics``, and speed.

        Raises:
            ALConfigError: there is no data set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ALConfigError("got no eval_dataset: give ALTrainer or evaluate() one")
        check_datasets(None, dataset)
        if isinstance(dataset, Mapping):
            found: dict[str, float] = {}
            for name, part in dataset.items():
                found |= self.evaluate(part, f"{metric_key_prefix}_{name}")
            return found
        metrics, _ = self._measured(dataset, metric_key_prefix)
        self.log(metrics)
        self._event("on_evaluate", metrics=metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """Computes the scores of a data set, with or without labels; every rank calls it and receives them.

        Returns:
            ``predictions`` ``(N, V)``, or ``(N, T, V)`` of a language model; ``label_ids`` and metrics if there are
            labels. numpy arrays.
        """
        check_datasets(None, test_dataset)
        start = time.time()
        if self.batches.has_labels(test_dataset):
            metrics, (scores, labels) = self._measured(test_dataset, metric_key_prefix, keep=True)
        else:
            inputs = Inputs(self._in_order(test_dataset))
            scores, labels = joined(self.engine.inference.scores(inputs)), None
            metrics = speed_metrics(metric_key_prefix, start, num_samples=len(test_dataset))
        self._event("on_predict", metrics=metrics)
        return PredictionOutput(scores, labels, metrics)

    def _measured(self, dataset: Any, prefix: str, *, keep: bool = False) -> tuple[dict[str, float], Any]:
        start = time.time()
        keep = keep or self.compute_metrics is not None
        found = self.engine.inference.evaluate(self._in_order(dataset), keep_scores=keep)
        exits = {f"accuracy_exit_{m}": value for m, value in enumerate(found["accuracy"], start=1)}
        metrics: dict[str, Any] = {"loss": found["loss"][-1], "accuracy": found["accuracy"][-1], **exits}
        arrays = self._arrays(found["scores"], found["labels"]) if keep else None
        if arrays is not None and self.compute_metrics is not None:
            metrics |= self.compute_metrics(EvalPrediction(predictions=arrays[0], label_ids=arrays[1]))
        metrics = denumpify_detensorize(metrics)
        named = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
        return {**named, **speed_metrics(prefix, start, num_samples=len(dataset))}, arrays

    def _arrays(self, scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """Returns the predictions and labels of all batches."""
        if (preprocess := self.preprocess_logits_for_metrics) is not None:
            scores = [preprocess(*batch) for batch in zip(scores, labels, strict=True)]
        return joined(scores), joined(labels)

    def _in_order(self, dataset: Any) -> Any:
        return self.batches.in_order(dataset, batch_size=self.args.per_device_eval_batch_size)

    # ---- files and logs ----------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> str:
        """Writes a plain model, and the tokenizer or image processor; see :func:`ds_al.export`. Every rank calls it.

        Returns:
            The result of :func:`ds_al.export`; ``"program"`` if the network was not built by ``from_pretrained``.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        options: dict[str, Any] = {}
        if self.engine.module.source is None:
            dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
            if dataset is None:
                raise ALConfigError("save_model needs a data set, to trace the program with: use ds_al.export instead")
            x, _ = next(iter(self.batches.in_order(dataset, batch_size=2)))
            options = {"program": "torch.export", "example": x}
        kind = export(self.engine, folder, **options)
        if self.state.is_world_process_zero and hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)
        return kind

    def log(self, logs: Mapping[str, float]) -> None:
        """Appends to ``state.log_history`` and calls ``on_log`` of the callbacks."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._event("on_log", logs=logs)

    def _log_losses(self) -> None:
        """Logs the mean losses since the last log, in total and per layer."""
        losses = self._take_losses()
        if losses is None:
            return
        layers = {
            f"layer_{index}/{name}": float(value)
            for index, row in enumerate(losses)
            for name, value in zip(("associated_loss", "autoencoder_loss"), row, strict=True)
        }
        self.log({"loss": float(losses.sum()), "learning_rate": self.engine.get_lr()[0], **layers})

    def _take_losses(self) -> torch.Tensor | None:
        """Returns the means ``(N, 2)`` over the batches since the last call; drains the pipeline."""
        losses = self.engine.gather_losses()
        self._losses += losses.sum(dim=0)
        self._batches_seen += len(losses)
        return losses.mean(dim=0) if len(losses) else None

    def _save_at_stop(self) -> Path:
        """Saves where ``"non_finite": "save_and_stop"`` ends training; returns the path."""
        self.state.global_step = self._engine_steps() - self._former_steps
        self.state.epoch = self.state.global_step / self._steps_per_epoch
        self._save()
        self.engine.flush()
        return Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    def _engine_steps(self) -> int:
        return int(self.engine.global_samples // self.engine.train_batch_size())

    def _save(self) -> None:
        tag = f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / tag)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.engine.checkpoints.best = None if best is None else Path(best)  # kept until the end loads it
        states = TrainerState(stateful_callbacks=saved_states(self.callback_handler.callbacks)).stateful_callbacks
        self.state.stateful_callbacks = states
        self.engine.save_checkpoint(self.args.output_dir, tag=tag, client_state={CLIENT_STATE: asdict(self.state)})
        self._event("on_save")

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        name = self.args.metric_for_best_model
        if name is None:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            raise ALConfigError(f'"args.metric_for_best_model": got {name!r}, expected one of {", ".join(metrics)}')
        value, before = metrics[name], self.state.best_metric
        if not isinstance(value, (int, float)):
            raise ALConfigError(f'"args.metric_for_best_model": {name!r} is {value!r}: expected a number to compare by')
        if before is None:
            before = -math.inf if self.args.greater_is_better else math.inf  # NaN is never better
        better = value > before if self.args.greater_is_better else value < before
        if better:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        return better

    def _resume(self, origin: str | Path | Literal[True]) -> None:
        last = origin is True or origin == "auto"
        folder, tag = Path(self.args.output_dir if origin is True or last else origin), None
        if last:
            tag = agreed("the checkpoint", lambda: newest(folder), facts=lambda found: {"the tag": found})
            if tag is None and origin == "auto":
                return
        elif (folder / INDEX).is_file():
            folder, tag = folder.parent, folder.name
        found, client = self.engine.load_checkpoint(str(folder), tag=tag)
        if CLIENT_STATE not in client:
            raise ALCheckpointError(f"{found!r} was not saved by an ALTrainer: use engine.load_checkpoint")
        here = asdict(self.state)
        counts = ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
        own = (*counts, "is_local_process_zero", "is_world_process_zero")
        self.state = TrainerState(**{**client[CLIENT_STATE], **{name: here[name] for name in own}})
        states: Any = self.state.stateful_callbacks  # initially a list, later a dict
        restore_states(self.callback_handler.callbacks, states)

    # ---- parts -------------------------------------------------------------------------------------

    def _event(self, event: str, **more: Any) -> TrainerControl:
        self.control = getattr(self.callback_handler, event)(self._reported, self.state, self.control, **more)
        return self.control

    def _engine(self, module: ALPipelineModule, config: str | Path | Mapping[str, Any]) -> ALPipelineEngine:
        content, replicas = read_config(None, config), dist.get_world_size() // module.num_stages
        if content.get(BLOCK, {}).get("recovery") is not None:
            raise ALConfigError(
                f'"{BLOCK}.recovery": an ALTrainer has none, since a new process would call its callbacks again for '
                "every step before the death; train in a loop of your own, or remove it"
            )
        self._steps_per_epoch, data = 0, None
        if self.train_dataset is not None:
            self._steps_per_epoch = steps_per_epoch(content, samples=len(self.train_dataset), replicas=replicas)
            data = self.batches.used(self.train_dataset)
        by_epochs = math.ceil(self.args.num_train_epochs * self._steps_per_epoch)
        self._max_steps = self.args.max_steps if self.args.max_steps > 0 else by_epochs
        content = with_counts(
            content,
            steps=self._max_steps,
            keep_last=self.args.save_total_limit,
            spanned=module.runs is not None,
        )
        self._reported = reported(self.args, content, seed=module.base_seed)
        engine, *_ = initialize(model=module, config=content, training_data=data, collate_fn=self.batches.collate)
        if engine.stops is not None:
            engine.stops.save = self._save_at_stop
        return engine

    def _new_state(self) -> TrainerState:
        state = TrainerState(
            max_steps=self._max_steps,
            num_train_epochs=math.ceil(self._max_steps / max(self._steps_per_epoch, 1)),
            is_world_process_zero=dist.get_rank() == 0,
            is_local_process_zero=int(os.environ.get("LOCAL_RANK", 0)) == 0,
        )
        state.compute_steps(self.args, self._max_steps)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, int(getattr(state, name)))
        return state
