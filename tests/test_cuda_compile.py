"""What nvcc makes of cuda.cu, wherever there is an nvcc: no GPU needed."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import NVCC, PARTS

pytestmark = [pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH"), pytest.mark.slow]

KERNEL = re.compile(
    r"(?P<norm>batch_norm_)?(?P<pass>forward|backward)_kernelI.*?\d(?P<neuron>IF|LIF|ParametricLIF)ChargeEEE?"
    r"(?P<dtype>f|d|13__nv_bfloat16|6__half)Li(?P<T>\d+)ELi\d+ELi(?P<W>\d+)E(?P<more>(?:Lb[01]E)*)"
)


def cuobjdump():
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(candidate) if candidate.exists() else None
    return found


@pytest.fixture(scope="session")
def machine_code(nvcc_output):
    """Of each kernel, by the match of its name."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump here, neither the CUDA toolkit's nor Triton's")
    kernels = {}
    for folder, _ in nvcc_output.values():
        (cubin,) = folder.glob("*.cubin")
        text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        for function in text.split("Function : ")[1:]:
            match = KERNEL.search(function.split("\n", 1)[0])
            if match:
                kernels[match] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", function)
    return kernels


@pytest.fixture(scope="session")
def instructions(machine_code):
    """Of the neurons alone: (pass, neuron, dtype, T, W) -> list of instructions."""
    return {
        (m["pass"], m["neuron"], m["dtype"], int(m["T"]), int(m["W"])): code
        for m, code in machine_code.items()
        if not m["norm"]
    }


@pytest.mark.parametrize("name", PARTS)
def test_no_spills(nvcc_output, name):
    log = nvcc_output[name][1]
    frames = re.findall(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", log)
    assert len(frames) >= 3 * (3 * 6 + 2)  # neurons x (dtypes x buckets)
    assert set(frames) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert "warning" not in log


def test_forward_is_not_contracted(nvcc_output):
    folder, _ = nvcc_output["forward"]
    (ptx,) = folder.glob("*.ptx")
    text = ptx.read_text().replace("rcp.rn.f64", "")  # rounded as a division: of the norm's vectors per channel
    assert text.count("div.rn.f32") > 0
    for wrong in ("fma.", "div.full", "div.approx", ".ftz", "rcp.", "ex2."):
        assert wrong not in text, f"{wrong} in the forward's PTX"


@pytest.mark.parametrize("neuron", ["IF", "LIF", "ParametricLIF"])
@pytest.mark.parametrize(("dtype", "W"), [("f", 4), ("13__nv_bfloat16", 8)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PARTS)
def test_wide_accesses_before_the_first_step(instructions, name, dtype, W, neuron):
    code = instructions[name, neuron, dtype, 4, W]
    first_store = next(i for i, instruction in enumerate(code) if "STG" in instruction)
    rows = sum("LDG.E.128" in instruction for instruction in code[:first_store])
    assert rows >= (4 if name == "forward" else 8), "all rows of x (and of grad_s) are asked for first"
    assert sum("STG.E.128" in instruction for instruction in code) >= 4


def test_no_narrow_accesses(instructions):
    wide = {key: code for key, code in instructions.items() if key[4] > 1}
    assert len(wide) >= 3 * 4 * 6
    for key, code in wide.items():
        narrow = [i for i in code if re.search(r"(LDG|STG)\.E", i) and not re.search(r"\.(64|128)\b", i)]
        assert len(narrow) <= (key[1] == "ParametricLIF"), f"{key}: {narrow}"  # the decay
        assert not any(re.search(r"\b(LDL|STL)", i) for i in code), f"{key} uses local memory"


def test_batch_norm_accesses(machine_code):
    """Four steps in accesses of 8 bytes or more; nothing is in local memory."""
    kernels = {m: code for m, code in machine_code.items() if m["norm"]}
    per_neuron = (4 + 8) + 2 * (4 + 4) + 3  # float32; 16 bits, whose second kernel knows no neuron; float64
    assert len(kernels) >= 3 * per_neuron
    for m, code in kernels.items():
        assert not any(re.search(r"\b(LDL|STL)", i) for i in code), m.string
        if (m["T"], m["more"]) not in (("4", "Lb0E"), ("4", "Lb1ELb0E")):
            continue
        tensors = 1 if m["pass"] == "forward" else 2
        width = r"\.128" if m["dtype"] == "f" or m["pass"] == "forward" else r"\.64"
        loads = [i for i in code if re.search(rf"LDG\.E{width}", i)]
        assert len(loads) >= 4 * tensors, m.string
        if m["pass"] == "forward":
            assert sum("STG.E.128" in i for i in code) >= 4
