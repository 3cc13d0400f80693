"""What nvcc makes of the Hopper kernels: nothing spilled, no wgmma serialised, the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simt.test_sass import disassembler

ROOT = Path(__file__).resolve().parents[1]
INSTANCES = sorted((ROOT / "csrc/cuda/sm90/instances").glob("bfloat16_*.cu"))  # float16 differs by type names


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda path: path.stem)
def test_hopper_kernels(instance: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path / "instance.cubin"
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda/device'}"]
    command = ["nvcc", *flags, *include, "-cubin", str(instance), "-o", str(cubin)]
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
    assert opcodes >= {"HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"}
    assert not opcodes & {"LDL", "STL"}
