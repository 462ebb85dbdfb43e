"""Trains the very layer list of a PipelineModule by associated learning, and writes a program that needs no ds_al.

deepspeed --num_accelerators 2 examples/vision_from_layers.py
"""

import argparse
import tempfile

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_al
from ds_al.data import ShuffledLoader, load_vision, ordered_batches


def convolution(channels_in: int, channels: int, stride: int = 1) -> list[LayerSpec]:
    return [
        LayerSpec(nn.Conv2d, channels_in, channels, 3, stride=stride, padding=1, bias=False),
        LayerSpec(nn.BatchNorm2d, channels),
        LayerSpec(nn.ReLU),
    ]


layers = [  # as it is for deepspeed.pipe.PipelineModule(layers, num_stages=2, loss_fn=nn.CrossEntropyLoss())
    *convolution(1, 16, stride=2),
    *convolution(16, 32, stride=2),
    *convolution(32, 64, stride=2),
    *convolution(64, 64),
    LayerSpec(nn.AdaptiveAvgPool2d, 1),
    lambda x: x.flatten(1),
    LayerSpec(nn.Linear, 64, 10),
]

arguments = argparse.ArgumentParser()
arguments.add_argument("--batches", type=int, default=54)
arguments.add_argument("--local_rank", type=int)
options = arguments.parse_args()
data = load_vision("fashion-mnist-small", validation_fraction=0.1, seed=0)
batches = ShuffledLoader(data.train, batch_size=50, seed=0)
x, labels = next(iter(ordered_batches(data.validation, batch_size=1000)))
network = ds_al.from_layers(layers, num_al_layers=4, num_classes=10, example=x[:2])
config = {"train_micro_batch_size_per_gpu": 50, "gradient_accumulation_steps": 10, "steps_per_print": None}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}}
engine, *_ = ds_al.initialize(model=network, config=config)
for _ in range(options.batches):
    engine.train_batch(batches)
print("validation accuracy at the exits", engine.evaluate([(x, labels)])["accuracy"])
ds_al.export(engine, folder := tempfile.mkdtemp(), program="torch.export", example=x[:2])
if engine.is_first_stage():
    program = torch.export.load(f"{folder}/inference.pt2").module()
    print("validation accuracy of the program", (program(x).argmax(dim=1) == labels).float().mean().item())
