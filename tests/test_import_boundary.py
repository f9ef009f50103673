"""Who may import whom: hosts -> data, evaluation, core; data, evaluation -> core; core -> torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssod

PACKAGE = Path(ssod.__file__).parent
MODULES = {
    ".".join(["ssod", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE_MAY_IMPORT = {"torch", "torchvision", "fvcore", "ssod.core", "ssod.errors"}


def _is_part_of(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _imports(module):
    """Full names of everything a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _forbidden(module, packages):
    return sorted(name for name in _imports(module) if _is_part_of(name, packages))


def _parts_of(*packages):
    found = [module for module in MODULES if _is_part_of(module, packages)]
    assert len(found) > len(packages)
    return found


@pytest.mark.parametrize("module", _parts_of("ssod.core"))
def test_core_imports_torch_and_itself(module):
    allowed = CORE_MAY_IMPORT | sys.stdlib_module_names
    assert sorted(name for name in _imports(module) if not _is_part_of(name, allowed)) == []


BELOW_HOSTS = ["ssod.data", "ssod.evaluation", "ssod.config", "ssod.keys", "ssod.plugins"]


@pytest.mark.parametrize("module", _parts_of(*BELOW_HOSTS))
def test_data_evaluation_and_config_import_no_host(module):
    assert _forbidden(module, ["ssod.hosts", "ssod.cli"]) == []


def test_only_the_detectron2_host_imports_detectron2():
    others = [m for m in MODULES if not _is_part_of(m, ["ssod.hosts.detectron2"])]
    assert {m: found for m in others if (found := _forbidden(m, ["detectron2"]))} == {}


def test_hosts_do_not_import_each_other():
    for host, other in (("torchvision", "detectron2"), ("detectron2", "torchvision")):
        for module in MODULES:
            if _is_part_of(module, [f"ssod.hosts.{host}"]):
                assert _forbidden(module, [f"ssod.hosts.{other}"]) == []


def test_what_hosts_share_imports_neither():
    hosts = ["ssod.hosts.torchvision", "ssod.hosts.detectron2"]
    shared = [m for m in _parts_of("ssod.hosts") if not _is_part_of(m, hosts)]
    assert "ssod.hosts.step" in shared
    assert {m: found for m in shared if (found := _forbidden(m, hosts))} == {}


def test_all_but_the_detectron2_host_can_be_imported_without_it():
    modules = [m for m in MODULES if not _is_part_of(m, ["ssod.hosts.detectron2"])]
    # None in `sys.modules` makes an import fail as if the package were not installed.
    code = "import importlib, sys\nsys.modules['detectron2'] = None\n"
    code += f"for name in {modules}:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
