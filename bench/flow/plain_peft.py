"""The federation of a finished run once more, in plain transformers and peft: what a user would have without us.

    python bench/flow/plain_peft.py RUN MODEL [--threads N] [--lr LR]

RUN is the directory of a classification run: its configuration, and from metrics.jsonl who took part in each round.
MODEL is the checkpoint in f32. LoRA of the run's adapter size on query and value of every layer and a linear classifier
on the mean of the tokens, trained end to end by AdamW with the run's rate, decay, batch and local epochs; averaged by
the samples trained on. Prints one JSON line a evaluated round: accuracy, processor seconds of training, bytes sent.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from chainfed_engine import data
from chainfed_engine.config_file import load_config
from chainfed_engine.data import EncodedData, Tokenizer
from chainfed_engine.federation.inputs import complete, deal_rows, encode
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.schedule import learning_rate
from chainfed_engine.types import Batch

State = dict[str, Tensor]


class MeanClassifier(nn.Module):
    def __init__(self, checkpoint: str, num_labels: int, rank: int) -> None:
        super().__init__()
        body = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["query", "value"])
        self.body = get_peft_model(body, lora)
        self.out = nn.Linear(body.config.hidden_size, num_labels)

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.out((hidden * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]

    def trained(self) -> State:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lr", type=float, help="another rate than the run's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_config(options.run / "config.toml")
    chain = config.chain
    torch.manual_seed(chain.seed)
    tokenizer = Tokenizer.load(config.store, StoreInfo.read(config.store).config)
    table = complete(config, data.read_table(config.data.train, config.data.columns))
    samples = encode(config, table, tokenizer, None)
    assert config.data.eval is not None and isinstance(samples.labels, np.ndarray)
    held_out = complete(config, data.read_table(config.data.eval, config.data.columns))
    evaluation = encode(config, held_out, tokenizer, list(samples.label_names))
    clients = deal_rows(config, table, samples)
    model = MeanClassifier(options.model, len(samples.label_names), chain.adapter_size)
    shared = {name: value.detach().clone() for name, value in model.trained().items()}
    cpu_seconds, sent = 0.0, 0
    for round_id, cohort in enumerate(_cohorts(options.run)):
        lr = learning_rate(options.lr or chain.lr, chain.lr_decay, round_id, chain.rounds)
        began, replies = time.process_time(), []
        for name in cohort:
            seed = chain.seed + 1_000 * round_id
            replies.append(_train(model, shared, clients[name], config, lr, seed, tokenizer.pad_id))
        most = chain.max_local_steps * chain.batch_size or math.inf  # a client weighs the samples that it trained on
        sizes = torch.tensor([float(min(len(clients[name]), most)) for name in cohort])
        shares = (sizes / sizes.sum()).tolist()
        shared = {
            key: sum(share * reply[key] for share, reply in zip(shares, replies, strict=True))  # type: ignore[misc]
            for key in shared
        }
        cpu_seconds += time.process_time() - began
        sent += 2 * len(cohort) * sum(4 * value.numel() for value in shared.values())
        last = round_id + 1 == chain.rounds
        if last or (chain.eval_every and (round_id + 1) % chain.eval_every == 0):
            accuracy = _evaluate(model, shared, evaluation, chain.batch_size, tokenizer.pad_id)
            row = {"round": round_id, "accuracy": accuracy, "cpu_seconds": round(cpu_seconds, 1), "bytes_sent": sent}
            print(json.dumps(row), flush=True)


def _cohorts(run: Path) -> list[list[str]]:
    events = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["clients"] for event in events if event["event"] == "round"]


def _train(model: Any, shared: State, own: EncodedData, config: Any, lr: float, seed: int, pad_id: int) -> State:
    chain = config.chain
    _load(model, shared)
    optimizer = torch.optim.AdamW(model.trained().values(), lr=lr, weight_decay=chain.weight_decay)
    steps = 0
    for epoch in range(chain.local_epochs):
        for batch in data.batches(own, chain.batch_size, seed=seed + epoch, pad_id=pad_id):
            if chain.max_local_steps and steps >= chain.max_local_steps:
                break
            steps += 1
            optimizer.zero_grad()
            assert batch.labels is not None
            loss = functional.cross_entropy(model(batch), batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(float(loss.detach())):
                raise SystemExit(f"loss became {float(loss.detach())}")
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.trained().items()}


@torch.no_grad()
def _load(model: Any, shared: State) -> None:
    for name, value in model.trained().items():
        value.copy_(shared[name])


@torch.no_grad()
def _evaluate(model: Any, shared: State, evaluation: EncodedData, batch_size: int, pad_id: int) -> float:
    _load(model, shared)
    right = 0
    for batch in data.batches(evaluation, batch_size, seed=None, pad_id=pad_id):
        right += int((model(batch).argmax(1) == batch.labels).sum())
    return right / len(evaluation)


if __name__ == "__main__":
    main()
