"""Every notebook runs from top to bottom on a CPU, and its committed outputs come from such a run.

`python tests/notebooks/test_notebooks.py` regenerates the outputs of all notebooks, or of those named after it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 600

# The audits are statistics of the package's runs: minutes, and the same under any JAX.
notebook_paths = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.once] * (path.stem == "04_auditing"), id=path.stem) for path in NOTEBOOKS],
)


def execute(path: Path) -> Any:
    """Runs a notebook in a fresh kernel of this very Python and returns it with its outputs; raises on any error."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            km=_kernel_manager(Path(folder)),
            timeout=SECONDS_PER_CELL,
            resources={"metadata": {"path": folder}},  # files that a notebook writes do not land in the repository
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(cleanup_kc=True)  # a client that was handed its manager would leave the kernel running
    notebook.metadata["language_info"] = {"name": "python"}  # the kernel's version would change with every run
    return notebook


def _kernel_manager(folder: Path) -> AsyncKernelManager:
    # A kernel spec of our own: a registered "python3" may belong to another environment, or not exist.
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this Python",
        "language": "python",
        "env": {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "JAXDP_NOTEBOOK_SIZE": "cpu",
        },
    }
    (folder / "this_python").mkdir()
    (folder / "this_python" / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)
    return AsyncKernelManager(kernel_name="this_python", kernel_spec_manager=specs)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@notebook_paths
def test_runs_from_top_to_bottom(path: Path):
    if "JAXDP_DATA" in path.read_text(encoding="utf-8") and not os.environ.get("JAXDP_DATA"):
        pytest.skip("JAXDP_DATA is not set, and the notebook would download what it needs")
    execute(path)


@notebook_paths
def test_starts_with_badge_guarded_install_and_devices(path: Path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert f"https://colab.research.google.com/github/jaxdp/jaxdp/blob/main/notebooks/{path.name}" in first.source
    install, devices, *_ = (cell.source for cell in code_cells(path))
    assert re.match(r"try:\n    import jaxdp\nexcept ImportError:\n    %pip install ", install)
    assert devices.endswith("jax.devices()")


@notebook_paths
def test_has_one_cell_of_hyper_parameters_and_a_switch_for_cpus(path: Path):
    settings = [cell.source for cell in code_cells(path) if "JAXDP_NOTEBOOK_SIZE" in cell.source]
    assert len(settings) == 1
    assert len(re.findall(r"^[A-Z][A-Z_]+ = ", settings[0], re.MULTILINE)) >= 3


@notebook_paths
def test_committed_outputs_are_those_of_one_clean_run(path: Path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        if "print(" in cell.source or "plt.subplots(" in cell.source:
            assert cell.outputs, f"no output below:\n{cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            text = json.dumps(output)
            assert "\\u001b" not in text, "an output holds terminal escapes"
            assert not re.search(r"/(home|root|tmp|Users)/", text), "an output names a folder of the machine it ran on"


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        nbformat.write(execute(Path(name)), name)
        print(f"executed {name}")
