"""The shape of the smallest BERT that a run trains: three layers, for tests through the program."""

SMALL_BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
