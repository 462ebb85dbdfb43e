"""Fine-tunes a text classifier of transformers by associated learning, and hands it back to transformers.

    deepspeed --num_accelerators 2 examples/text_classifier.py

Nothing is downloaded. For a model of your own, replace `model` by its name or folder, and `words` by its tokenizer.
"""

import argparse
import random
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import ds_al

TOPICS = ["goal match team league score", "market shares bank profit trade", "planet atom cell energy orbit"]
FILLERS = ["the", "a", "new", "old", "about", "with", "today", "again", "was", "will"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", *FILLERS, *" ".join(TOPICS).split()])}


def words(sentences: list[list[str]], length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, T), as a tokenizer gives them."""
    ids = [[VOCABULARY[word] for word in sentence] for sentence in sentences]
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    return padded, (padded != 0).long()


def batches(seed: int, size: int = 16):
    """Sentences of 6 to 12 words, two of which tell the topic."""
    draw = random.Random(seed)
    while True:
        labels = [draw.randrange(len(TOPICS)) for _ in range(size)]
        texts = [draw.choices(FILLERS, k=draw.randint(4, 10)) + draw.choices(TOPICS[y].split(), k=2) for y in labels]
        yield words([draw.sample(text, len(text)) for text in texts]), torch.tensor(labels)


arguments = argparse.ArgumentParser()
arguments.add_argument("--batches", type=int, default=40)
arguments.add_argument("--local_rank", type=int)
options = arguments.parse_args()
torch.manual_seed(0)  # a model with random weights has to be the same on every rank
sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=len(VOCABULARY), num_labels=len(TOPICS), **sizes))
network = ds_al.from_pretrained(model, task="sequence-classification", num_al_layers=4)
config = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4, "steps_per_print": None}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}}
engine, *_ = ds_al.initialize(model=network, config=config)
data, held_out = batches(seed=0), [batch for _, batch in zip(range(10), batches(seed=1), strict=False)]
for _ in range(options.batches):
    engine.train_batch(data)
print("accuracy at the exits", engine.evaluate(held_out)["accuracy"])
ds_al.export(engine, folder := tempfile.mkdtemp())
if engine.is_first_stage():
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    right = [(plain(*x).logits.argmax(dim=1) == labels).float().mean() for x, labels in held_out]
    print("accuracy of the plain model", torch.stack(right).mean().item())
