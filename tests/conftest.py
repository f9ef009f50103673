import json

import pytest
import torch

# Tensors are tiny: more threads are no faster, and far slower beside another process.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder of a Shapes set of a few images."""
    from ssod.data.shapes import write_shapes
    from tiny_run import SPEC

    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, SPEC)
    return root


@pytest.fixture(scope="session")
def first_run(shapes, tmp_path_factory):
    """Folder of a finished run with the tiny config; not to be changed."""
    from tiny_run import tiny_config, train

    output = tmp_path_factory.mktemp("first") / "run"
    train(tiny_config(shapes, output))
    return output


@pytest.fixture(scope="session")
def found_as_truth(first_run, shapes):
    """Validation JSON with some of the first run's detections as truth, so that AP is not 0."""
    truth = json.loads((shapes / "annotations" / "val.json").read_text())
    files = sorted((first_run / "inference").iterdir())
    results = [r for file in files for r in json.loads(file.read_text())[::7]]
    truth["annotations"] = [
        {"id": n, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        | {key: r[key] for key in ("image_id", "category_id", "bbox")}
        for n, r in enumerate(results)
    ]
    path = first_run.parent / "found.json"
    path.write_text(json.dumps(truth))
    return path


@pytest.fixture(scope="session")
def finished_run(found_as_truth, shapes, tmp_path_factory):
    """Folder of another run, like the first but with an AP above 0; not to be changed."""
    from tiny_run import tiny_config, train

    output = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_config(shapes, output, "SSOD.DATA.VAL_JSON", found_as_truth))
    return output
