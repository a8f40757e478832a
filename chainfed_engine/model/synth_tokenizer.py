"""A byte-level tokenizer of 256 bytes and 5 special tokens, as the files of a store. No training, no merges."""

import json
from pathlib import Path

NUM_SPECIAL = 5
NUM_TOKENS = NUM_SPECIAL + 256
# Token ids 0 .. 4 by architecture; RoBERTa's position ids depend on its padding id being 1.
_SPECIAL = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "decoder": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}
_ROLES = {
    "bert": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
    "roberta": {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3, "mask": 4},
    "decoder": {"pad": 0, "unk": 1, "bos": 2, "eos": 3},
}


def special_token_ids(architecture: str) -> dict[str, int]:
    """`{"pad_token_id": 0, ...}` for the model's config."""
    roles = _ROLES[_kind(architecture)]
    return {f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles}


def write_byte_tokenizer(architecture: str, max_length: int, destination: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Encoders get their special tokens around the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kind = _kind(architecture)
    special, roles = _SPECIAL[kind], _ROLES[kind]
    vocabulary = {token: index for index, token in enumerate(special)}
    vocabulary |= {byte: NUM_SPECIAL + index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=special[roles["unk"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if "cls" in roles:
        first, last = special[roles["cls"]], special[roles["sep"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, roles["cls"]), (last, roles["sep"])],
        )
    settings = {f"{role}_token": special[index] for role, index in roles.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    content = json.dumps({**settings, "model_max_length": max_length}, indent=1)
    (destination / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (destination / "tokenizer_config.json").write_text(content, encoding="utf-8")


def _kind(architecture: str) -> str:
    if architecture in ("bert", "distilbert"):
        return "bert"
    return "roberta" if architecture == "roberta" else "decoder"
