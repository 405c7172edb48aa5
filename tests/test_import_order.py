"""A file imports from lower floors only; files on one floor do not import each other, except inside one package."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

FLOORS = {
    0: [
        "pallas_kernels",
        "jaxdp._files",
        "jaxdp._replicas",
        "jaxdp._materialize",
        "jaxdp._typing",
        "jaxdp._validate",
        "jaxdp.block_model",
        "jaxdp.noise_keys",
    ],
    1: [
        "jaxdp.sampling",
        "jaxdp.clipping",
        "jaxdp.noise",
        "jaxdp.accounting",
        "jaxdp.quantization",
        "jaxdp.fingerprint",
        "jaxdp.models",
        "jaxdp.datasets",
        "jaxdp.text",
    ],
    2: ["jaxdp.mechanism", "jaxdp.gradients"],
    3: ["jaxdp.transforms", "jaxdp.checkpointing"],
    4: ["jaxdp.training", "jaxdp.zeroth_order"],
    5: ["jaxdp", "jaxdp.auditing"],
    6: ["jaxdp.cli"],  # a client of the public surface
    7: ["jaxdp.__main__"],
}


def room_of(module: str) -> tuple[int, str]:
    rooms = [(floor, room) for floor, names in FLOORS.items() for room in names if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=lambda pair: len(pair[1]))


def imports_of(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("jaxdp", "pallas_kernels")}


def test_imports_go_from_upper_floors_to_lower():
    checked = 0
    for path in [*ROOT.glob("jaxdp/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        floor, room = room_of(module)
        for name in imports_of(path):
            other_floor, other_room = room_of(name)
            assert other_room == room or other_floor < floor, (
                f"{module} (floor {floor}) imports {name} (floor {other_floor})"
            )
            checked += 1
    assert checked > 50


def test_every_module_has_a_room_of_its_own():
    """Only the package itself may stand in the room called `jaxdp`: a new file must be given a floor."""
    for path in ROOT.glob("jaxdp/**/*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert room_of(module)[1] != "jaxdp" or module == "jaxdp", f"{module} is on no floor"


def test_kernels_import_jax_only():
    for path in ROOT.glob("pallas_kernels/**/*.py"):
        assert not {name for name in imports_of(path) if name.startswith("jaxdp")}
