"""csrc/cuda keeps its promises by its text: every call of the CUDA runtime and of cuBLASLt is checked, nothing
allocates or waits for the device, and calls that may be captured into a graph make no other calls than launches do.
"""

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# What nobody may call: device memory comes from the caller, and nothing waits.
FORBIDDEN = re.compile(
    r"\b(cudaMalloc\w*|cudaFree\w*|cudaMemPool\w*|cudaDeviceSynchronize|cudaStreamSynchronize|cudaEventSynchronize|"
    r"cudaStreamCreate\w*|cudaEventCreate\w*|cudaMemcpy|cudaMemcpyToSymbol|cudaMemset|cudaThread\w*|cudaDeviceReset|"
    r"cudaStreamQuery|cudaLaunchHostFunc|cuda\w*Prefetch\w*)\s*\("
)
# Of a launch: a setting of the function on the host, and the launch's own error. Both are allowed in a capture.
IN_A_CALL = {"cudaFuncSetAttribute", "cudaGetLastError"}
UNCHECKED = {
    "cudaGetLastError",  # clears an error that is being told
    "cudaGetErrorString",  # cannot fail
    "cudaDriverGetVersion", "cudaRuntimeGetVersion",  # inside the text of another error
}  # fmt: skip
_CALL = re.compile(r"\b(cuda[A-Z]\w*)\s*\(")


def code(path: Path) -> str:
    """The text without comments and strings."""
    text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


def files() -> list[Path]:
    return sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.h"), SOURCES / "architectures.cpp"])


def unchecked(text: str) -> list[str]:
    """Calls of the runtime that stand neither in check(...) nor where their status is kept."""
    found = []
    for call in _CALL.finditer(text):
        before = text[: call.start()].rstrip()
        kept = before.endswith("check(") or re.search(r"cudaError_t \w+ =$", before)
        if not kept and call.group(1) not in UNCHECKED:
            found.append(call.group(1))
    return found


def test_the_rule_sees_what_it_forbids() -> None:
    assert unchecked("cudaSetDevice(1);") == ["cudaSetDevice"]
    assert unchecked("if (cudaSetDevice(1) != cudaSuccess) return;") == ["cudaSetDevice"]
    assert unchecked("check(cudaSetDevice(1), what); const cudaError_t status = cudaGetDeviceCount(&n);") == []
    assert FORBIDDEN.search("cudaMallocAsync(&p, 1, s)") and FORBIDDEN.search("cudaMemcpy(a, b)")
    assert not FORBIDDEN.search("cudaMemcpyAsync(a, b)")


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_every_call_is_checked_and_none_allocates_or_waits(path: Path) -> None:
    text = code(path)
    assert unchecked(text) == []
    assert [found.group(1) for found in FORBIDDEN.finditer(text)] == []


def test_calls_of_kernels_make_no_call_but_a_launchs() -> None:
    names = {path.name: set(_CALL.findall(code(path))) for path in files() if path.name != "runtime.cu"}
    assert names.pop("launch.h") == IN_A_CALL
    assert {name: calls for name, calls in names.items() if calls} == {}


def test_every_launch_goes_through_the_one_that_is_checked() -> None:
    assert [path.name for path in files() if "<<<" in code(path)] == ["launch.h"]


def test_every_status_of_cublaslt_is_required() -> None:
    text = code(SOURCES / "library_product.cu")
    functions = "product_create|layout_create|preference_create|product_set|preference_set|choose|multiply"
    calls = re.findall(rf"(.{{0,40}})\blibrary\.({functions})\(", re.sub(r"\s+", " ", text))
    assert {name for _, name in calls} == set(functions.split("|"))
    for before, name in calls:
        assert before.rstrip().endswith(("require(", "Status status =")), name


def test_device_code_has_no_heap_output_or_unbounded_stack() -> None:
    for path in SOURCES.glob("*_kernels.h"):
        assert not re.search(r"\b(printf|malloc|new|assert|alloca|std::vector|std::string)\b", code(path)), path.name
