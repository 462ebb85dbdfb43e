"""A project's own loop and its callbacks stay as they are: the engine takes the place of forward, backward and step.

deepspeed --num_accelerators 2 examples/own_loop.py    # or: python examples/own_loop.py, one process
"""

import argparse

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_al
from ds_al.data import ShuffledLoader, load_vision, ordered_batches


class Callback:  # the project's, called on every rank
    def on_batch(self, number: int, loss: torch.Tensor) -> None: ...
    def on_epoch(self, number: int, accuracy: list[float]) -> bool: ...  # whether to stop


class Printed(Callback):
    def on_epoch(self, number: int, accuracy: list[float]) -> None:
        if torch.distributed.get_rank() == 0:
            print(f"epoch {number}: validation accuracy at the exits {accuracy}")


class EarlyStop(Callback):
    best = 0.0

    def on_epoch(self, number: int, accuracy: list[float]) -> bool:
        before, self.best = self.best, max(self.best, accuracy[-1])
        return accuracy[-1] < before  # the same on every rank, as evaluate() returns the same there


arguments = argparse.ArgumentParser()
arguments.add_argument("--batches", type=int, default=18, help="of an epoch")
arguments.add_argument("--local_rank", type=int)
options = arguments.parse_args()
data = load_vision("fashion-mnist-small", validation_fraction=0.1, seed=0)
layers = [nn.Flatten(), LayerSpec(nn.Linear, 784, 64), LayerSpec(nn.ReLU), LayerSpec(nn.Linear, 64, 64)]
layers += [LayerSpec(nn.ReLU), LayerSpec(nn.Linear, 64, 10)]
network = ds_al.from_layers(layers, num_al_layers=2, num_classes=10, example=torch.zeros(2, 1, 28, 28))
config = {"train_micro_batch_size_per_gpu": 50, "gradient_accumulation_steps": 10, "steps_per_print": None}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}}
engine, *_ = ds_al.initialize(model=network, config=config)
batches = ShuffledLoader(data.train, batch_size=50, seed=0)
callbacks, epoch, stop = [Printed(), EarlyStop()], 0, False
while not stop and epoch < 3:
    epoch += 1
    for number in range(options.batches):
        loss = engine.train_batch(batches)  # was: loss = criterion(model(x), y); loss.backward(); optimizer.step()
        for callback in callbacks:
            callback.on_batch(number, loss)  # of this stage; reading its value waits for this stage alone
    accuracy = engine.evaluate(ordered_batches(data.validation, batch_size=500))["accuracy"]
    stop = any([callback.on_epoch(epoch, accuracy) for callback in callbacks])
