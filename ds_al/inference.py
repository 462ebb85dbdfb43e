"""Evaluation and prediction through the stages of an :class:`~ds_al.engine.ALPipelineEngine`.

Inference ends on ``h_1``, whose home is the first stage. Instead of sending every code back there, the
decoders travel: once per evaluation each stage gets the weights of all earlier ``h`` from its predecessor.
They are small, and this costs a few messages per stage; codes would cost one per exit, stage and batch, and
would make stages wait for later ones. Each stage then scores its own exits by itself, and evaluation, too,
only ever sends forward. At its end the counts of all stages are summed up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ds_al.errors import ALDataError
from ds_al.layer import Activation
from ds_al.transport import Receiver, Sender

if TYPE_CHECKING:
    from ds_al.engine import ALPipelineEngine


class Inference:
    """What ``engine.evaluate``, ``eval_batch`` and ``predict`` do. Every rank calls each method."""

    def __init__(self, engine: ALPipelineEngine) -> None:
        self.engine = engine
        self._earlier: list[nn.Module] | None = None
        common: dict[str, Any] = {"device": engine.device, "dynamic": True}
        grid, stage = engine.grid, engine.stage_id
        self._sender = (
            None
            if engine.is_last_stage()
            else Sender(grid.stage_to_global(stage + 1), queue_depth=2, stages=(stage, stage + 1), **common)
        )
        self._receiver = (
            None
            if engine.is_first_stage()
            else Receiver(grid.stage_to_global(stage - 1), stages=(stage, stage - 1), **common)
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any] | None) -> dict[str, Any]:
        """Accuracy, loss and number of samples at every exit; see ``engine.evaluate``."""
        engine = self.engine
        count = self._announce(_length(batches) if engine.is_first_stage() else 0)
        sums = torch.zeros(engine.module.num_layers, 3, dtype=torch.float64, device=engine.device)
        for s, labels in self._forward(self._mapped(iter(batches or ())), count):
            target = engine.intake.compared(labels)
            for index, scores in self._exits(s):
                correct, labelled = engine.module.objective.hits(scores, labels)
                loss = engine.module.label_loss(scores, target) * labelled
                sums[index] += torch.stack([correct.double(), loss.double(), labelled.double()])
        sums = torch.stack(engine.gather(sums.cpu())).sum(dim=0)
        if not sums[-1, 2]:
            raise ALDataError("got an empty data set to evaluate: expected at least one sample")
        return {
            "accuracy": (sums[:, 0] / sums[:, 2]).tolist(),
            "loss": (sums[:, 1] / sums[:, 2]).tolist(),
            "samples": int(sums[-1, 2]),
        }

    @torch.no_grad()
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
        engine = self.engine
        losses, all_scores = [], []
        for s, labels in self._forward(self._mapped(data_iter), micro_batches):
            for scores in (scores for index, scores in self._exits(s) if index == engine.module.num_layers - 1):
                losses.append(engine.module.label_loss(scores, engine.intake.compared(labels)))
                all_scores.append(scores)
        losses, all_scores = engine.gather(
            (torch.stack(losses).cpu() if losses else None, torch.cat(all_scores).cpu() if all_scores else None)
        )[-1]
        loss = losses.mean() if reduce_output == "avg" else list(losses)
        loss = loss if compute_loss else None
        return (loss, all_scores.to(engine.device)) if return_logits else loss

    @torch.no_grad()
    def predict(self, x: Activation | None, *, exit: int | None) -> Tensor:
        """See ``engine.predict``."""
        engine = self.engine
        depth = engine.module.num_layers if exit is None else exit
        if not 1 <= depth <= engine.module.num_layers:
            raise ValueError(f"exit={exit}: expected 1..{engine.module.num_layers}, the number of layers that x passes")
        head = x[0] if isinstance(x, tuple) else x
        batch = iter([(x, engine.intake.no_labels(0 if head is None else len(head)))])
        scores = None
        for s, _ in self._forward(batch, 1):
            scores = next((scores for index, scores in self._exits(s) if index == depth - 1), None)
        found = engine.gather(None if scores is None else scores.cpu())
        return next(scores for scores in found if scores is not None).to(engine.device)

    def _forward(self, batches: Iterator[Any] | None, count: int) -> Iterator[tuple[list[Activation], Tensor]]:
        """Yields ``([s_i of each local layer], labels)`` of ``count`` batches, and sends each one on first."""
        engine = self.engine
        engine.module.eval()
        self._exchange_decoders()
        self._exchange_code_table()
        if self._receiver is not None:
            self._receiver.expect(count)
        for _ in range(count):
            with engine.recorded("Evaluation"):
                s, labels = self._take(batches)
                outputs = []
                for _, layer in engine.layers:
                    s = layer.f(s)
                    outputs.append(s)
                if self._sender is not None:
                    self._sender.send((*(s if isinstance(s, tuple) else (s,)), labels))
            yield outputs, labels
            if self._receiver is not None:
                self._receiver.release()

    def _mapped(self, batches: Iterator[Any] | None) -> Iterator[Any] | None:
        """Batches as the user's ``batch_fn`` makes them."""
        batch_fn = self.engine.batch_fn
        return batches if batches is None or batch_fn is None else map(batch_fn, batches)

    def _take(self, batches: Iterator[Any] | None) -> tuple[Activation, Tensor]:
        engine = self.engine
        if self._receiver is not None:
            *s, labels = self._receiver.receive()
            return (s[0] if len(s) == 1 else tuple(s)), labels
        try:
            batch = next(batches) if batches is not None else None
        except StopIteration:
            raise ALDataError("the data to evaluate ran out: pass as many micro-batches as are asked for") from None
        x, labels = engine.intake.split(batch)
        parts = tuple(part.to(engine.device) for part in (x if isinstance(x, tuple) else (x,)))
        return (parts if isinstance(x, tuple) else parts[0]), labels.to(engine.device)

    def _exits(self, outputs: list[Activation]) -> Iterator[tuple[int, Tensor]]:
        """Yields ``(layer index, scores (B, V))`` of each exit of this stage."""
        assert self._earlier is not None
        decoders = [*self._earlier, *(layer.h for _, layer in self.engine.layers)]
        for k, (index, layer) in enumerate(self.engine.layers):
            earlier, table = decoders[: len(self._earlier) + k], self._tables[k] if self._tables else None
            yield index, layer.objective.scores(layer, outputs[k], earlier=earlier, table=table)

    def _exchange_decoders(self) -> None:
        """Brings the weights of all earlier ``h`` here, and sends them on with this stage's own.

        Each tensor is a message of its own, so that a network may have any number of layers.
        """
        engine = self.engine
        if self._earlier is None:
            earlier = engine.module.build_decoders(engine.layers[0][0])
            self._earlier = [decoder.to(engine.device) for decoder in earlier]
        for weight in _weights(self._earlier):
            weight.copy_(self._receive_one())
        if self._sender is not None:
            for weight in _weights([*self._earlier, *(layer.h for _, layer in engine.layers)]):
                self._sender.send((weight,))

    def _exchange_code_table(self) -> None:
        """Carries the codes of all classes ``(V, K)`` through the layers, where exits are scored with them."""
        engine = self.engine
        self._tables: list[Tensor] = []
        if not engine.module.objective.has_code_table:
            return
        if self._receiver is None:
            table = torch.eye(engine.module.num_classes, device=engine.device)
        else:
            table = self._receive_one()
        for _, layer in engine.layers:
            table = layer.g(table)
            self._tables.append(table)
        if self._sender is not None:
            self._sender.send((table,))

    def _receive_one(self) -> Tensor:
        """The next message, of one tensor."""
        assert self._receiver is not None
        self._receiver.expect(1)
        (tensor,) = self._receiver.receive()
        tensor = tensor.clone()
        self._receiver.release()
        return tensor

    def _announce(self, count: int) -> int:
        """The first stage's count, on every rank."""
        return self.engine.gather(count)[0]


def _weights(decoders: list[nn.Module]) -> Iterator[Tensor]:
    """Weights and buffers of these decoders, one after the other."""
    for decoder in decoders:
        yield from decoder.state_dict().values()


def _length(batches: Iterable[Any] | None) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise ALDataError(
            f"got a {type(batches).__name__} to evaluate: expected a sized iterable of (x, labels), such as a "
            "DataLoader or a list; use eval_batch(iterator, num_micro_batches=...) for an endless one"
        ) from None
