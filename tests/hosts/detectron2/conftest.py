"""Tests that need Detectron2; CI runs them with it installed."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("detectron2") else ["test_*.py"]


@pytest.fixture(scope="module", autouse=True)
def _clean_catalogs():
    """Remove what a module's tests have registered."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    known = [(catalog, set(catalog.list())) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in known:
        for name in set(catalog.list()) - names:
            catalog.remove(name)
