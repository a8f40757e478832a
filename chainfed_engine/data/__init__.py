"""From files and Python records to batches of tokens: read, tokenise, partition, collate.

read_table / as_table  ->  Table  ->  encode_*  ->  EncodedData  ->  batches  ->  Batch
                                `->  partition.*  ->  {client name: rows}
"""

from chainfed_engine.data.batches import batches, collate, order_by_length
from chainfed_engine.data.encode import EncodedData, encode_causal, encode_classification, encode_messages
from chainfed_engine.data.partition import by_column, dirichlet, hold_out, iid
from chainfed_engine.data.table import Table, as_table, read_table
from chainfed_engine.data.tokenizer import Tokenizer

__all__ = [
    "EncodedData",
    "Table",
    "Tokenizer",
    "as_table",
    "batches",
    "by_column",
    "collate",
    "dirichlet",
    "encode_causal",
    "encode_classification",
    "encode_messages",
    "hold_out",
    "iid",
    "order_by_length",
    "read_table",
]
