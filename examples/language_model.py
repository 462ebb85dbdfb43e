"""Trains a small causal language model, each AL layer on the next token by itself, and lets it write.

    deepspeed --num_accelerators 2 examples/language_model.py --objective readout

The text is the source of the package itself, character by character.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ds_al

arguments = argparse.ArgumentParser()
arguments.add_argument("--batches", type=int, default=100)
arguments.add_argument("--objective", choices=["next_token", "readout", "token_codes"], default="next_token")
arguments.add_argument("--bridge_blocks", type=int, default=0)
arguments.add_argument("--local_rank", type=int)
options = arguments.parse_args()
text = "".join(path.read_text() for path in sorted(Path(ds_al.__file__).parent.glob("*.py")))
characters = sorted(set(text))
tokens = torch.tensor([characters.index(character) for character in text])


def batches(seed: int, size: int = 16, length: int = 64):
    """Pieces of the text; labels are the ids, the shift by one is made in the loss."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        ids = tokens[starts + torch.arange(length)]
        yield (ids, torch.ones_like(ids)), ids


torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(characters), pad_token_id=None, **sizes))
how = {"objective": options.objective, "bridge_blocks": options.bridge_blocks}
network = ds_al.from_pretrained(model, task="causal-lm", num_al_layers=2, **how)
config = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4, "steps_per_print": None}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}
engine, *_ = ds_al.initialize(model=network, config=config)
data, held_out = batches(seed=0), [batch for _, batch in zip(range(5), batches(seed=1), strict=False)]
for _ in range(options.batches):
    engine.train_batch(data)
print("perplexity at the exits", torch.tensor(engine.evaluate(held_out)["loss"]).exp().tolist())
ds_al.export(engine, folder := tempfile.mkdtemp())
if engine.is_first_stage():
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    start = torch.tensor([[characters.index(character) for character in "def "]])
    written = plain.generate(start, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    print("".join(characters[int(i)] for i in written[0]))
