"""Fine-tunes a text classifier with the arguments, data sets, collators and callbacks of transformers' Trainer.

    deepspeed --num_accelerators 2 examples/trainer.py    # or: python examples/trainer.py, one process

Nothing is downloaded. For a model of your own, give its name or folder, and its tokenizer as processing_class.
"""

import argparse
import random
import tempfile

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback

import ds_al

TOPICS = ["goal match team league score", "market shares bank profit trade", "planet atom cell energy orbit"]
FILLERS = ["the", "a", "new", "old", "about", "with", "today", "again", "was", "will"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", *FILLERS, *" ".join(TOPICS).split()])}


def texts(samples: int, seed: int, length: int = 12) -> Dataset:
    """Sentences of 6 to 12 words, two of which tell the topic, as token ids and mask."""
    draw, rows = random.Random(seed), []
    for _ in range(samples):
        label = draw.randrange(len(TOPICS))
        words = draw.choices(FILLERS, k=draw.randint(4, 10)) + draw.choices(TOPICS[label].split(), k=2)
        ids = [VOCABULARY[word] for word in draw.sample(words, len(words))]
        rows.append({"input_ids": ids + [0] * (length - len(ids)), "label": label})
    return Dataset.from_list([{**row, "attention_mask": [int(i > 0) for i in row["input_ids"]]} for row in rows])


def compute_metrics(prediction) -> dict[str, float]:
    return {"right": (prediction.predictions.argmax(axis=1) == prediction.label_ids).mean()}


arguments = argparse.ArgumentParser()
arguments.add_argument("--batches", type=int, default=60)
arguments.add_argument("--local_rank", type=int)
options = arguments.parse_args()
torch.manual_seed(0)  # a model with random weights has to be the same on every rank
sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=len(VOCABULARY), num_labels=len(TOPICS), **sizes))
config = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4, "steps_per_print": None}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}}
args = {"output_dir": f"{tempfile.gettempdir()}/ds_al-trainer", "max_steps": options.batches, "disable_tqdm": True}
args |= {"logging_steps": 20, "eval_strategy": "steps", "save_strategy": "best", "metric_for_best_model": "right"}
trainer = ds_al.ALTrainer(
    ds_al.from_pretrained(model, task="sequence-classification", num_al_layers=4),
    args,
    config=config,
    train_dataset=texts(2048, seed=0),
    eval_dataset=texts(160, seed=1),
    compute_metrics=compute_metrics,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
)
trainer.train()
print("accuracy", trainer.evaluate()["eval_right"], "as", trainer.save_model())
