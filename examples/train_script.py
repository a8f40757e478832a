"""A training loop of your own around ChainTrainer, with transformers' tokenizer and torch's DataLoader.

python examples/train_script.py CHECKPOINT DATA.csv OUT      (DATA.csv has the columns text and label)
"""

import csv
import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import chainfed_engine as cfe

checkpoint, data, out = sys.argv[1:]
with open(data, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
labels = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(checkpoint)


def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    return {**batch, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}


torch.manual_seed(0)
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
store = cfe.convert(checkpoint, f"{out}-store")
with cfe.ChainTrainer(store, cfe.ChainConfig(rounds=6), num_labels=len(labels)) as trainer:
    while not trainer.done:
        losses = [trainer.step(batch) for batch in loader]
        print(f"layers {list(trainer.stage.window.layers)}: loss {sum(losses) / len(losses):.3f}")
        trainer.advance()
    print(trainer.evaluate(loader))
    cfe.save_run(trainer, out, labels)  # for cfe.export and cfe.load_adapted
