"""Associated learning without DeepSpeed: two layers and a plain Python loop.

    python examples/plain_loop.py

Layer 1 never hears from layer 2. What a pipeline does with this is run the body of the inner loop for each
layer in a process of its own, and pass (s, t) on.
"""

from __future__ import annotations

import torch
from torch import nn

from ds_al.data import ShuffledLoader, load_vision, ordered_batches
from ds_al.layer import ALLayer, predict
from ds_al.tensors import stop_gradient

torch.manual_seed(0)
CLASSES, CODE, WIDTH = 10, 32, 128

data = load_vision("fashion-mnist-small", validation_fraction=0.1, seed=0)


def layer(in_features: int, in_code: int, loss: str) -> ALLayer:
    """f and b on the input side, g and h on the target side."""
    return ALLayer(
        f=nn.Sequential(nn.Flatten(), nn.Linear(in_features, WIDTH), nn.ReLU()),
        b=nn.Sequential(nn.Linear(WIDTH, CODE), nn.Tanh()),
        g=nn.Sequential(nn.Linear(in_code, CODE), nn.Tanh()),
        h=nn.Linear(CODE, in_code),
        autoencoder_loss=loss,
    )


layers = [layer(28 * 28, CLASSES, "cross_entropy"), layer(WIDTH, CODE, "mse")]
optimizers = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in layers]
batches = ShuffledLoader(data.train, batch_size=50, seed=0)

for epoch in range(3):
    for _ in range(batches.batches_per_epoch):
        x, labels = next(batches)
        s, t = x, nn.functional.one_hot(labels, CLASSES).float()
        for each, optimizer in zip(layers, optimizers, strict=True):
            s_out, t_out = each(s, t)  # (B, WIDTH), (B, CODE)
            losses = each.local_losses(s_out, t_out, t)
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            s, t = stop_gradient(s_out), stop_gradient(t_out)
    x, labels = next(iter(ordered_batches(data.validation, batch_size=1000)))
    for exit in (1, 2):
        accuracy = (predict(layers, x, exit=exit).argmax(dim=1) == labels).float().mean()
        print(f"epoch {epoch + 1}, exit {exit}: validation accuracy {accuracy:.4f}")
