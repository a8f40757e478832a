"""The trained classifier as the classification head of transformers' own model class.

Enters: a `TrainedRun`, the sizes of its model. Leaves: the head's arrays f32 by the store's names (`out_weight`, ...),
or None where the class cannot have such a head: it reads one position, never the mean.

Our default head is one linear, W h + b. The encoders' classes have a transform before it, which is chosen so that
nothing changes. tanh(e h) / e = h (1 - (e h)^2 / 3 ...), so with e = 2**-12 the transform e I and the output W / e are
the linear head up to 2e-8 h^2 of each feature. ReLU (DistilBERT) is the identity on h + c where c bounds |h|; the
output takes c back by its bias. c follows from the last layer norm: |h| <= sqrt(D) max|weight| + max|bias|.
"""

import math

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.exports.trained_run import TrainedRun
from chainfed_engine.model.families import family
from chainfed_engine.types import Arrays, ModelShape

_SMALL = 2.0**-12


def has_library_head(run: TrainedRun, shape: ModelShape) -> bool:
    """Whether transformers' ForSequenceClassification class reads what the run's classifier reads."""
    return run.pooling(shape.architecture) == family(shape.architecture).pooling


def library_head(run: TrainedRun, shape: ModelShape, largest_feature: float) -> Arrays:
    """The head's arrays without prefix. `largest_feature`: bound of the final hidden state, read for DistilBERT only.

    Raises InvalidArgument for a bias that the library's class does not have.
    """
    kind = family(shape.architecture)
    arrays = {
        key.removeprefix("classifier."): value for key, value in run.arrays.items() if key.startswith("classifier.")
    }
    if not kind.classifier_bias and arrays.pop("out_bias", np.zeros(1)).any():
        raise InvalidArgument(
            f"{run.path}: the classifier has a bias, which {shape.architecture}'s class does not have; train it again "
            "with this version"
        )
    if kind.transform_activation is None or "transform_weight" in arrays:
        return arrays
    identity = np.eye(shape.hidden_size, dtype=np.float32)
    weight, bias = arrays["out_weight"], arrays["out_bias"]
    if kind.transform_activation == "tanh":
        small = np.float32(_SMALL)
        arrays["transform_weight"] = identity * small
        arrays["transform_bias"] = np.zeros(shape.hidden_size, np.float32)
        arrays["out_weight"] = weight / small
        return arrays
    shift = 2.0 ** math.ceil(math.log2(max(largest_feature, 1.0)))
    arrays["transform_weight"] = identity
    arrays["transform_bias"] = np.full(shape.hidden_size, shift, np.float32)
    arrays["out_bias"] = (bias - shift * weight.sum(axis=1, dtype=np.float64)).astype(np.float32)
    return arrays
