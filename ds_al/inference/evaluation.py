"""Evaluation and prediction: accuracy and loss at every exit, scores, early exits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_al.errors import ALConfigError, ALDataError, ALLayerError
from ds_al.exits import averaged_accuracy, check_average, check_threshold, confidence_of, early_exits
from ds_al.inference.passes import Passes, apart
from ds_al.tensors import Activation
from ds_al.trace import joint_call


class Inference(Passes):
    """Implements ``engine.evaluate``, ``eval_batch`` and ``predict``. Every rank must call each method.

    It is constructed as :class:`~ds_al.inference.passes.Passes` is.
    """

    @joint_call
    @apart
    def evaluate(
        self,
        batches: Iterable[Any] | None,
        *,
        exit_confidence: Sequence[float] = (),
        averaged: bool = False,
        keep_scores: bool = False,
    ) -> dict[str, Any]:
        """Returns accuracy, loss and number of samples at every exit; see ``engine.evaluate``.

        Args:
            batches: see there.
            exit_confidence: thresholds; for each of them ``"early_exit"`` gets the
                :class:`~ds_al.exits.EarlyExit` of the data set.
            averaged: ``"averaged"`` gets the accuracy of the mean of the last n exits, n = 1 .. N
                (:mod:`ds_al.exits`). Keeps ``(V)`` numbers per sample and exit, on the host of every rank.
            keep_scores: ``"scores"`` and ``"labels"`` get those of each batch at the last exit, on the host of every
                rank.

        Raises:
            ALConfigError: a threshold is not in (0, 1]; or ``exit_confidence`` or ``averaged`` with an objective of
                language models.
        """
        for threshold in exit_confidence:
            check_threshold(threshold)
        if exit_confidence or averaged:
            self._check_one_class("exit_confidence" if exit_confidence else "averaged")
        seen: list[list[Tensor]] = [[] for _ in self.layers]
        kept: tuple[list[Tensor], list[Tensor]] = [], []
        exits: list[list[Tensor]] = [[] for _ in self.layers]
        all_labels: list[Tensor] = []
        count = self._announce(_length(batches) if self.topology.is_first else 0)
        sums = torch.zeros(self.module.num_layers, 3, dtype=torch.float64, device=self.device)
        for s, labels in self._forward(self._mapped(self._iterator(batches)), count):
            target = self.preparation.compared(labels)
            if averaged:
                all_labels.append(labels.to("cpu", copy=True))
            for index, scores in self._exits(s):
                if averaged:
                    exits[index - self.layers[0][0]].append(scores.softmax(dim=1).cpu())
                correct, labelled = self.module.objective.hits(scores, labels)
                if exit_confidence:
                    right = scores.argmax(dim=1) == labels
                    seen[index - self.layers[0][0]].append(torch.stack([confidence_of(scores), right.float()]))
                if keep_scores and index == self.module.num_layers - 1:
                    kept[0].append(scores.to("cpu", copy=True))
                    kept[1].append(labels.to("cpu", copy=True))  # they lie in a buffer that the next message takes
                loss = self.module.label_loss(scores, target) * labelled
                sums[index] += torch.stack([correct.double(), loss.double(), labelled.double()])
        sums = torch.stack(self.topology.gather(sums.cpu())).sum(dim=0)
        if not sums[-1, 2]:
            raise ALDataError("got an empty data set to evaluate: expected at least one sample")
        found = {
            "accuracy": (sums[:, 0] / sums[:, 2]).tolist(),
            "loss": (sums[:, 1] / sums[:, 2]).tolist(),
            "samples": int(sums[-1, 2]),
        }
        if keep_scores:
            found["scores"], found["labels"] = self.topology.gather(kept)[-1]
        if averaged:
            probabilities = self._of_all_exits([torch.cat(batches) for batches in exits if batches])
            found["averaged"] = averaged_accuracy(probabilities, torch.cat(all_labels))
        if exit_confidence:
            pairs = self._of_all_exits([torch.cat(batches, dim=1).cpu() for batches in seen if batches])
            confidence, right = pairs.unbind(dim=1)
            found["early_exit"] = early_exits(confidence, right, exit_confidence)
        return found

    @joint_call
    @apart
    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        *,
        micro_batches: int,
        return_logits: bool,
        compute_loss: bool,
        reduce_output: str | None,
    ) -> Any:
        """See ``engine.eval_batch``."""
        if reduce_output not in ("avg", None):
            raise NotImplementedError(f"reduction type {reduce_output} not supported.")
        losses, all_scores = [], []
        for s, labels in self._forward(self._mapped(data_iter), micro_batches):
            for scores in (scores for index, scores in self._exits(s) if index == self.module.num_layers - 1):
                losses.append(self.module.label_loss(scores, self.preparation.compared(labels)))
                all_scores.append(scores.clone())  # a layer may reuse what it returns
        losses, all_scores = self.topology.gather(
            (torch.stack(losses).cpu() if losses else None, torch.cat(all_scores).cpu() if all_scores else None)
        )[-1]
        loss = losses.mean() if reduce_output == "avg" else list(losses)
        loss = loss if compute_loss else None
        return (loss, all_scores.to(self.device)) if return_logits else loss

    def predict(self, x: Activation | None, *, exit: int | None, average: int = 1) -> Tensor:
        """See ``engine.predict``."""
        return self.scores([x], exit=exit, average=average)[0].to(self.device)

    @joint_call
    @apart
    def scores(
        self, xs: Iterable[Activation | None] | None, *, exit: int | None = None, average: int = 1
    ) -> list[Tensor]:
        """Returns scores of many batches, which pass through the stages one after another.

        Args:
            xs: a sized iterable of inputs of the first layer, of any size; read on the first stage; may be ``None``
                elsewhere.
            exit, average: see ``engine.predict``.

        Returns:
            Of each batch ``(B, V)``, or ``(B, T, V)`` of a language model, on the host of every rank.

        Raises:
            ValueError: there is no such exit.
            ALConfigError: there are fewer exits than to be averaged.
        """
        depth = self.module.num_layers if exit is None else exit
        if not 1 <= depth <= self.module.num_layers:
            raise ValueError(f"exit={exit}: expected 1..{self.module.num_layers}, the number of layers that x passes")
        check_average(average, exit=depth)
        count = self._announce(_length(xs) if self.topology.is_first else 0)
        kept: list[list[Tensor]] = [[] for _ in range(average)]  # by exit, the first of those averaged first
        for s, _ in self._forward(map(self._without_labels, self._iterator(xs)), count):
            for index, scores in self._exits(s):
                if depth - average <= index < depth:
                    kept[index - depth + average].append(scores.to("cpu", copy=True))
        stages = self.topology.gather(kept)
        exits: list[list[Tensor]] = [next((s[n] for s in stages if s[n]), []) for n in range(average)]
        if average == 1:
            return exits[0]
        return [
            torch.stack([scores.softmax(dim=-1) for scores in same]).mean(0).log() for same in zip(*exits, strict=True)
        ]

    def _without_labels(self, x: Activation | None) -> tuple[Activation | None, Tensor]:
        head = x[0] if isinstance(x, tuple) else x
        return x, self.preparation.no_labels(0 if head is None else len(head))

    @joint_call
    @apart
    def predict_early(self, x: Activation | None, *, confidence: float) -> tuple[Tensor, Tensor]:
        """Returns label scores of the first exit that is confident enough; later layers process only the remaining
        samples.

        Args:
            x: input of the first layer, of B samples; read on the first stage; may be ``None`` elsewhere.
            confidence: the softmax probability of a class at which a sample leaves, in (0, 1].

        Returns:
            Scores ``(B, V)`` and the exit of each sample ``(B,)``, 1-based, on every rank.

        Raises:
            ALConfigError: the confidence is out of range, or the objective is one of language models.
            ALLayerError: a layer returns a tensor whose first dimension is not that of samples.
        """
        check_threshold(confidence)
        self._check_one_class("predict_early")
        last = self.module.num_layers - 1
        head = x[0] if isinstance(x, tuple) else x
        self._prepare(1)
        s, numbers = self._take(iter([(x, torch.zeros(0 if head is None else len(head), dtype=torch.int64))]))
        # The number of each sample travels in its label's place; a message without activation says that none is left.
        if self._receiver is None:
            numbers = torch.arange(len(numbers), device=self.device)
        elif isinstance(s, tuple) and not s:
            numbers = numbers[:0]
        found: list[tuple[Tensor, Tensor, int]] = []
        for k, (index, layer) in enumerate(self.layers):
            if not len(numbers):
                break
            s = self._activation(index, layer, s)
            if not layer.ends:
                continue
            scores = self._score(k, s)
            stay = (confidence_of(scores) < confidence) & (index < last)
            found.append((numbers[~stay].cpu(), scores[~stay].cpu(), index + 1))
            numbers = numbers[stay]
            if index < last:
                s = _of_samples(s, stay, layer=index)
        if self._sender is not None and len(numbers):
            self._sender.send((*(s if isinstance(s, tuple) else (s,)), numbers))
        elif self._sender is not None:
            self._sender.send((torch.zeros(1, dtype=torch.int64, device=self.device),))
        if self._receiver is not None:
            self._receiver.release()
        self.passes += 1
        left = [part for stage in self.topology.gather(found) for part in stage]
        order = torch.cat([numbers for numbers, _, _ in left]).argsort()
        exits = torch.cat([torch.full((len(numbers),), exit) for numbers, _, exit in left])
        return torch.cat([scores for _, scores, _ in left])[order].to(self.device), exits[order].to(self.device)

    def _check_one_class(self, what: str) -> None:
        if self.module.objective.per_token:
            raise ALConfigError(
                f"{what}: got an objective of language models, with scores of every token: expected one class per "
                "sample. predict(x, exit=n, average=m) has the scores of every token"
            )

    def _of_all_exits(self, exits: list[Tensor]) -> Tensor:
        """Stacks one tensor per exit, of the exits of all stages."""
        return torch.stack([exit for stage in self.topology.gather(exits) for exit in stage])

    def _announce(self, count: int) -> int:
        """The first stage's count, on every rank."""
        return self.topology.gather(count)[0]


def _of_samples(s: Activation, stay: Tensor, *, layer: int) -> Activation:
    """What leaves a layer, of the samples that stay ``(B,)``."""
    parts = s if isinstance(s, tuple) else (s,)
    if shapes := [tuple(part.shape) for part in parts if part.shape[:1] != stay.shape]:
        raise ALLayerError(
            f"predict_early: f of AL layer {layer} returns a tensor of {shapes[0]} for {len(stay)} samples: expected "
            "(B, ...) of every tensor, since each sample leaves by itself; use predict(x, exit=n)"
        )
    left = tuple(part[stay] for part in parts)
    return left if isinstance(s, tuple) else left[0]


def _length(batches: Iterable[Any] | None) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise ALDataError(
            f"got a {type(batches).__name__} to evaluate: expected a sized iterable of (x, labels), such as a "
            "DataLoader or a list; use eval_batch(iterator, num_micro_batches=...) for an endless one"
        ) from None
