"""Passes of batches through the stages, without training: forward, and the scores of this stage's exits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ds_al.batch import BatchPreparation
from ds_al.errors import ALDataError
from ds_al.layer import ALLayer, located, seed_layer
from ds_al.module import ALPipelineModule
from ds_al.parallel.topology import StageTopology
from ds_al.system.generators import Generators
from ds_al.tensors import Activation, to_float32
from ds_al.trace import Calls
from ds_al.transport.neighbours import EvaluationChannels

Method = TypeVar("Method", bound=Callable[..., Any])


def apart(method: Method) -> Method:
    """Runs a method in evaluation mode and without graphs, apart from the user's generators and from his
    ``torch.inference_mode``, whose tensors could not be used in training."""

    @functools.wraps(method)
    def run(self: Passes, *args: Any, **options: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), self._generators.aside(), _evaluating(self.module):
            return method(self, *args, **options)

    return cast(Method, run)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards that of before: a norm that the user keeps in evaluation mode stays there."""
    was, modes = module.training, [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(was)
        for part, training in modes:
            if training is not was:
                part.training = training


class Passes:
    """Runs batches through the stages in evaluation mode, one after another; messages go forward only.

    Args:
        module: the network.
        topology: place of this rank.
        preparation: checks batches, and moves them to the device.
        channels: channels of evaluation alone; every message announces its own shapes.
        generators: the user's generators, which his batches draw from.
        timed: returns a context that times the computation inside, by name.
        calls: calls of the engine.
    """

    def __init__(
        self,
        module: ALPipelineModule,
        *,
        topology: StageTopology,
        preparation: BatchPreparation,
        channels: EvaluationChannels,
        generators: Generators,
        timed: Callable[[str], AbstractContextManager[None]],
        calls: Calls,
    ) -> None:
        self.calls = calls
        self.module, self.topology, self.preparation = module, topology, preparation
        self.layers, self.device = module.local_layers, preparation.device
        self.batch_fn: Callable[[Any], Any] | None = None
        """Applied to every batch before it is checked."""
        (self._sender, self._receiver), self._timed = channels, timed
        self._earlier: list[nn.Module] | None = None
        self._tables: list[Tensor] = []
        self._generators = generators
        self.passes = 0
        """Batches so far, which number the draws of layers."""

    def reset(self) -> None:
        """Takes the layers that the module holds now."""
        self.layers, self._earlier = self.module.local_layers, None

    def _prepare(self, messages: int) -> None:
        """What every pass through the stages begins with."""
        self._exchange_decoders()
        self._exchange_code_table()
        if self._receiver is not None:
            self._receiver.expect(messages)

    def _forward(self, batches: Iterator[Any] | None, count: int) -> Iterator[tuple[list[Activation], Tensor]]:
        """Yields ``([s_i of each local layer], labels)`` of ``count`` batches, and sends each one on first."""
        self._prepare(count)
        for _ in range(count):
            with self._timed("Evaluation"):
                s, labels = self._take(batches)
                outputs = []
                for index, layer in self.layers:
                    s = self._activation(index, layer, s)
                    outputs.append(s)
                if self._sender is not None:
                    self._sender.send((*(s if isinstance(s, tuple) else (s,)), labels))
            yield outputs, labels
            if self._receiver is not None:
                self._receiver.release()
            self.passes += 1

    def _iterator(self, batches: Iterable[Any] | None) -> Iterator[Any]:
        """The user's iterator: a ``DataLoader`` draws its seed here."""
        with self._generators.restored():
            return iter(batches or ())

    def _mapped(self, batches: Iterator[Any] | None) -> Iterator[Any] | None:
        """Batches as the user's ``batch_fn`` makes them."""
        return batches if batches is None or self.batch_fn is None else map(self.batch_fn, batches)

    def _take(self, batches: Iterator[Any] | None) -> tuple[Activation, Tensor]:
        if self._receiver is not None:
            *s, labels = self._receiver.receive()
            return (s[0] if len(s) == 1 else tuple(s)), labels
        try:
            with self._generators.restored():
                batch = next(batches) if batches is not None else None
        except StopIteration:
            raise ALDataError("the data to evaluate ran out: pass as many micro-batches as are asked for") from None
        x, labels = self.preparation.split(batch)
        parts = tuple(self.preparation.cast(part.to(self.device)) for part in (x if isinstance(x, tuple) else (x,)))
        return (parts if isinstance(x, tuple) else parts[0]), labels.to(self.device)

    def _exits(self, outputs: list[Activation]) -> Iterator[tuple[int, Tensor]]:
        """Yields ``(layer index, scores (B, V))`` of each exit of this stage."""
        for k, (index, layer) in enumerate(self.layers):
            if layer.ends:
                yield index, self._score(k, outputs[k])

    def _score(self, k: int, s: Activation) -> Tensor:
        """Scores ``(B, V)`` of the exit after this stage's k-th layer, from what leaves the layer."""
        assert self._earlier is not None
        earlier = [*self._earlier, *(layer.h for _, layer in self.layers[:k])]
        (index, layer), table = self.layers[k], self._tables[k] if self._tables else None
        self._seed(index, part=1)
        try:
            return to_float32(layer.scores(s, earlier=earlier, table=table))
        except Exception as error:
            raise located(error, layer, stage=self.topology.stage, what="scores of an exit") from error

    def _activation(self, index: int, layer: ALLayer, s: Activation) -> Activation:
        """What leaves a layer."""
        self._seed(index, part=0)
        try:
            return layer.activation(s)
        except Exception as error:
            raise located(error, layer, stage=self.topology.stage, what="forward in evaluation") from error

    def _seed(self, layer: int, *, part: int) -> None:
        """Seeds a layer that draws in evaluation, too: by its index and the number of the batch."""
        seed_layer(self.module.base_seed, layer=layer, step=self.passes, part=part)
        self._generators.seed_host()

    def _exchange_decoders(self) -> None:
        """Brings the weights of all earlier ``h`` here, and sends them on with this stage's own.

        Each tensor is a message of its own, so that a network may have any number of layers.
        """
        if self._earlier is None:
            self._earlier = self.preparation.on_device(self.module.build_decoders(self.layers[0][0]))
        for weight in _weights(self._earlier):
            weight.copy_(self._receive_one())
        if self._sender is not None:
            for weight in _weights([*self._earlier, *(layer.h for _, layer in self.layers if layer.ends)]):
                self._sender.send((weight,))

    def _exchange_code_table(self) -> None:
        """Carries the codes of all classes ``(V, K)`` through the layers, where exits are scored with them."""
        self._tables = []
        objective = self.module.objective
        if not objective.has_code_table:
            return
        if self._receiver is None:
            table = self.preparation.cast(objective.all_classes(self.module.num_classes, device=self.device))
        else:
            table = self._receive_one()
        for _, layer in self.layers:
            table = layer.codes(table) if layer.ends else table
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


def _weights(decoders: list[nn.Module]) -> Iterator[Tensor]:
    """Weights and buffers of these decoders, one after the other."""
    for decoder in decoders:
        yield from decoder.state_dict().values()
