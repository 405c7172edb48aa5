"""The project's own files agree with each other."""

import pathlib
import re
import tomllib

import jaxdp

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_tested_floors_are_the_declared_ones():
    declared = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
    pinned = [line for line in (ROOT / ".ci/oldest.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(spec.replace(">=", "==") for spec in declared) == sorted(pinned)


def test_both_packages_are_in_the_wheel():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["jaxdp", "pallas_kernels"]


def test_the_changelog_has_an_entry_for_this_version():
    assert re.search(rf"^## {re.escape(jaxdp.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_readme_names_every_public_function():
    """A stranger finds the surface from the README or from the objects that it names."""
    readme = (ROOT / "README.md").read_text()
    for name in (
        "plan",
        "clipped_grad",
        "privatize",
        "poisson_batches",
        "make_dp_step",
        "dp_aggregate",
        "Checkpointer",
    ):
        assert hasattr(jaxdp, name)
        assert name in readme
