"""``EvaluatingEngine``: evaluation and prediction with the layers of all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from ds_al.inference import Inference
from ds_al.tensors import Activation
from ds_al.trace import joint_call
from ds_al.training.engine import TrainingEngine, check_iterator


class EvaluatingEngine(TrainingEngine):
    """Evaluates what a :class:`~ds_al.training.engine.TrainingEngine` trains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inference = Inference(
            self.module,
            topology=self.topology,
            preparation=self.preparation,
            channels=self.links.evaluation,
            generators=self.generators,
            timed=self.runner.timed,
            calls=self.calls,
        )

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Applies a function to every batch of training and evaluation, on the first stage."""
        super().set_batch_fn(fn)
        self.inference.batch_fn = fn

    @joint_call
    def eval_batch(
        self,
        data_iter: Iterator[Any] | None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluates the next micro-batches of ``data_iter``, of any size, without training; every rank must call it.

        Args:
            data_iter: yields ``(x, labels)``; read on the first stage.
            return_logits: also return the scores ``(samples, V)`` of all micro-batches, on every rank.
            reduce_output: ``"avg"``, or ``None`` for the losses of the single micro-batches.
            bcast_loss: has no effect: every rank gets the loss.
            num_micro_batches: by default as many as in training. Further arguments as in DeepSpeed.

        Returns:
            The loss of the last exit's scores against the labels (``D_E`` of the first layer), or ``None`` without
            ``compute_loss``; with ``return_logits`` ``(loss, scores)``.
        """
        if data_iter is not None:
            check_iterator(data_iter)
        return self.inference.eval_batch(
            data_iter,
            micro_batches=self.micro_batches if num_micro_batches is None else num_micro_batches,
            return_logits=return_logits,
            compute_loss=compute_loss,
            reduce_output=reduce_output,
        )

    @joint_call
    def evaluate(self, batches: Iterable[Any] | None) -> dict[str, Any]:
        """Returns accuracy and loss at every exit over a data set; every rank must call it.

        Args:
            batches: a sized iterable of ``(x, labels)``, such as a ``DataLoader``; batches of any size. Read on the
                first stage; may be ``None`` elsewhere.

        Returns:
            ``{"accuracy": [a_1, ..., a_N], "loss": [l_1, ..., l_N], "samples": n}`` on every rank; exit N is
            the full inference path.
        """
        return self.inference.evaluate(batches)

    @joint_call
    def predict(self, x: Activation | None, exit: int | None = None, average: int = 1) -> Tensor:
        """Returns label scores ``(B, V)`` after ``exit`` layers (1-based, by default all); every rank must call it.

        Args:
            x: input of the first layer; read on the first stage; may be ``None`` elsewhere.
            average: number of exits to average, ``exit`` and those before it; 2 or more return the log of their mean
                probability.

        Returns:
            The scores, ``(B, T, V)`` of a language model, on every rank.
        """
        return self.inference.predict(x, exit=exit, average=average)
