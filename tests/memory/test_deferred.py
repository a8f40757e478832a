"""Imports that wait: what a run leaves out, and that everything works for whoever uses it afterwards."""

import importlib.util
import subprocess
import sys

import pytest

HEAVY = ("accelerate", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor")
LEAN = """
import sys, torch
import chainfed_engine.model.families as families
family = families.family(sys.argv[1])
sizes = {"num_hidden_layers": 1, "vocab_size": 50}
names = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
if sys.argv[1] == "distilbert":
    names = {"dim": 32, "n_heads": 2, "hidden_dim": 64, "n_layers": 1}
config = family.config_class(**sizes, **names)
config._attn_implementation = "sdpa"
family.layer(config, 0)
family.embeddings(config)
print(*[name for name in sys.argv[2:] if name in sys.modules])
"""
RECOMPUTED = """
import sys, torch
from chainfed_engine.window import _Recomputed
hidden = torch.ones(2, 3, 4, requires_grad=True)
adapter = torch.nn.Linear(4, 4)
layer = lambda hidden, context, adapter: hidden + torch.tanh(adapter(hidden))
again = _Recomputed.apply(layer, adapter, None, hidden, *adapter.parameters())
grad = torch.arange(24.0).reshape(2, 3, 4)
(again * grad).sum().backward()
grads = [hidden.grad.clone(), *(parameter.grad.clone() for parameter in adapter.parameters())]
hidden.grad = None
adapter.zero_grad()
(layer(hidden, None, adapter) * grad).sum().backward()
assert all(map(torch.equal, grads, [hidden.grad, *(parameter.grad for parameter in adapter.parameters())]))
print(*[name for name in sys.argv[1:] if name in sys.modules])
"""
AFTERWARDS = """
import sys, torch
import chainfed_engine.model.families as families
families.family("llama")
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils
from transformers.loss import loss_for_object_detection
config = LlamaConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1, vocab_size=50)
model = LlamaForCausalLM(config)
ids = torch.arange(6)[None]
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
assert torch.isfinite(loss)
rows, columns = loss_for_object_detection.linear_sum_assignment([[4.0, 1.0], [2.0, 3.0]])
assert list(columns) == [1, 0]
from scipy.optimize import linear_sum_assignment
import sympy, accelerate, torch._dynamo
from torch.distributed.tensor import DTensor
assert isinstance(DTensor, type) and not isinstance(model.lm_head.weight, DTensor)
assert sympy.simplify("x - x") == 0
model.eval()
model.zero_grad()
with torch.no_grad():
    compiled = torch.compile(model, backend="eager")(input_ids=ids).logits
    assert torch.allclose(compiled, model(input_ids=ids).logits, atol=1e-6)
print("works")
"""


def run_script(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_package_that_is_not_installed_stays_away() -> None:
    script = """
import importlib.util
from chainfed_engine.memory.deferred import deferred_imports
with deferred_imports(["nowhere_to_be_found", "email.nowhere", "wave"]):
    assert importlib.util.find_spec("nowhere_to_be_found") is None
    assert importlib.util.find_spec("email.nowhere") is None
    import wave
    from wave.parts import anything
    print(repr(wave.Wave_read), end=" ")
import wave
print(wave.Wave_read)
"""
    assert run_script(script) == "<wave.Wave_read, imported when it is used> <class 'wave.Wave_read'>"


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_family_and_its_modules_come_without_what_a_run_never_calls(architecture: str) -> None:
    assert run_script(LEAN, architecture, *HEAVY) == ""


def test_a_layer_that_runs_again_has_its_gradients_and_imports_no_symbolic_algebra() -> None:
    assert run_script(RECOMPUTED, *HEAVY) == ""


def test_what_was_deferred_works_for_whoever_uses_it_later() -> None:
    for package in ("accelerate", "scipy"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert run_script(AFTERWARDS).endswith("works")
