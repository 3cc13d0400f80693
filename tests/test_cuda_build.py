"""What nvcc makes of the kernels: nothing spilled, no wgmma serialised, the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simt.test_sass import disassembler

ROOT = Path(__file__).resolve().parents[1]

# float16 differs from bfloat16 by type names. Of the portable kernels the smallest and the largest; CMake compiles all,
# and fails where one spills.
CASES = [
    ("sm80", "bfloat16_64", "80", {"HMMA", "LDSM", "LDGSTS"}),
    ("sm80", "float32_64", "80", {"HMMA", "LDSM", "LDGSTS"}),
    ("sm80", "float32_256", "80", {"HMMA", "LDSM", "LDGSTS"}),
    ("sm90", "bfloat16_64", "90a", {"HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"}),
    ("sm90", "bfloat16_128", "90a", {"HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"}),
]


@pytest.mark.parametrize("path, instance, arch, expected_opcodes", CASES)
def test_instances(path: str, instance: str, arch: str, expected_opcodes: set[str], tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path / "instance.cubin"
    flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda/device'}"]
    source = ROOT / "csrc/cuda" / path / "instances" / f"{instance}.cu"
    command = ["nvcc", *flags, *include, "-cubin", str(source), "-o", str(cubin)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=True)
    messages = compiled.stdout + compiled.stderr
    assert not re.findall(r".*\(C75\d\d\).*", messages), "ptxas serialises wgmma"
    spills = re.findall(r"(\d+) bytes spill stores", messages)
    assert spills and set(spills) == {"0"}

    cuobjdump = disassembler()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    path = f"{Path(cuobjdump).parent}:/usr/bin:/bin"  # cuobjdump calls the nvdisasm beside it
    dump = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env={"PATH": path})
    opcodes = set(re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", dump.stdout))
    assert opcodes >= expected_opcodes
    assert not opcodes & {"LDL", "STL"}
