"""llama.cpp by its binding xllamacpp: the next token's log probabilities and greedy text, with a LoRA adapter."""

from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """A model file of `vocab_size` tokens, optionally with an adapter file, on one thread."""

    def __init__(self, model: Path, vocab_size: int, adapter: Path | None = None) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(model)
        options.n_ctx, options.cpuparams.n_threads, options.n_parallel, options.warmup = 256, 1, 1, False
        if adapter is not None:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server, self._vocab_size = xllamacpp.Server(options), vocab_size

    def log_probabilities(self, ids: list[int]) -> "np.ndarray[Any, Any]":
        """Of every possible next token after `ids`: f32 [vocab_size]."""
        out = np.full(self._vocab_size, np.nan, np.float32)
        for entry in self._tokens(ids, n_predict=1, n_probs=self._vocab_size)[0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The most likely next tokens, one after another."""
        return [int(token["id"]) for token in self._tokens(ids, n_predict=count, n_probs=1)]

    def _tokens(self, ids: list[int], **options: Any) -> list[dict[str, Any]]:
        request = {"prompt": ids, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False, **options}
        tokens: list[dict[str, Any]] = self._server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        return tokens
