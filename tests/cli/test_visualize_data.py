import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from ssod.cli import visualize_data
from ssod.cli.main import main
from ssod.data.build import build_train_loader, load_run_data
from ssod.data.loader import first_samples
from ssod.evaluation.drawing import PALETTE, TRUTH_COLOR, draw_boxes
from ssod.hosts.checkpoint import load_run
from ssod.hosts.torchvision import host
from ssod.hosts.torchvision.run import CHECKPOINT_NAME
from tiny_run import BURN_IN_ITERS, data_options, tiny_config


@pytest.fixture
def visualize(first_run, tmp_path):
    """Draw views of the finished run's config; returns the status, and the pictures by name."""

    def run(*args, options=()):
        config = str(first_run / "config.yaml")
        command = ["visualize-data", "--config-file", config, "--output", str(tmp_path / "out")]
        status = main([*command, *map(str, args), *map(str, options)])
        files = sorted((tmp_path / "out").glob("*"))
        return status, {f.name: np.asarray(Image.open(f).convert("RGB")) for f in files}

    return run


def _is(picture, color):
    """Mask of the pixels of a color."""
    return (np.abs(picture - 255 * np.array(to_rgb(color))) < 1).all(-1)


def _has_truth(picture):
    return bool(_is(picture, TRUTH_COLOR).any())


def _rows(printed, name):
    """Cells of the table below a picture's path."""
    lines = printed.split(f"{name}\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in lines[2:]]


def test_samples_are_those_of_the_training(shapes, tmp_path):
    cfg = tiny_config(shapes, tmp_path)
    data = load_run_data(cfg)
    batch = next(iter(build_train_loader(cfg, data, BURN_IN_ITERS)))
    samples = first_samples(build_train_loader(cfg, data, BURN_IN_ITERS), 2)
    for stream, views in zip(samples, (batch.labeled, batch.unlabeled), strict=True):
        assert [sample.image_id for sample in stream] == views.image_ids
        for sample, weak, strong in zip(stream, views.weak, views.strong, strict=True):
            assert torch.equal(sample.weak, weak) and torch.equal(sample.strong, strong)
    for sample, targets in zip(samples[0], batch.labeled.targets, strict=True):
        assert torch.equal(sample.boxes, targets.boxes)


def test_samples_before_the_end_of_the_burn_in_are_labeled(shapes, tmp_path):
    cfg = tiny_config(shapes, tmp_path)
    loader = build_train_loader(cfg, load_run_data(cfg), 0)
    assert [len(stream) for stream in first_samples(loader, 2)] == [2, 0]


def test_tables_have_the_counts_of_the_training(visualize, first_run, shapes, tmp_path, capsys):
    """Against the model run on the batch of the training, and the annotation files."""
    status, pictures = visualize("--weights", first_run, "--num-images", 2)
    assert status == 0 and list(pictures) == ["labeled.png", "unlabeled.png"]
    printed = capsys.readouterr().out

    cfg = tiny_config(shapes, tmp_path)
    batch = next(iter(build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS)))
    model = host.build(cfg)
    load_run(model, first_run / CHECKPOINT_NAME)
    pseudo = model.eval().pseudo_labels(batch.unlabeled.weak)
    truth = json.loads((shapes / "annotations" / "unlabeled_truth.json").read_text())
    true_ids = [annotation["image_id"] for annotation in truth["annotations"]]
    assert _rows(printed, "/labeled.png") == [
        [str(image_id), str(len(targets))]
        for image_id, targets in zip(batch.labeled.image_ids, batch.labeled.targets, strict=True)
    ]
    assert _rows(printed, "/unlabeled.png") == [
        [str(image_id), str(int(p.reliable.sum())), str(int((~p.reliable).sum()))]
        + [str(true_ids.count(image_id))]
        for image_id, p in zip(batch.unlabeled.image_ids, pseudo, strict=True)
    ]
    assert any(len(p) for p in pseudo)


def test_hidden_truth_is_drawn_if_it_is_known(visualize):
    no_truth = ("SSOD.DATA.UNLABELED_TRUTH_JSON", "")
    assert _has_truth(visualize("--num-images", 2)[1]["unlabeled.png"])
    assert not _has_truth(visualize("--num-images", 2, options=no_truth)[1]["unlabeled.png"])


def test_hidden_truth_of_a_split_is_drawn(visualize, capsys):
    none = [f"SSOD.DATA.UNLABELED_{end}" for end in ("JSON", "IMAGES", "TRUTH_JSON")]
    options = ("SSOD.DATA.PERCENT", 50, *(item for key in none for item in (key, "")))
    assert _has_truth(visualize("--num-images", 3, options=options)[1]["unlabeled.png"])
    assert all(int(row[1]) > 0 for row in _rows(capsys.readouterr().out, "/unlabeled.png"))


def test_drawing_pseudo_boxes_changes_the_unlabeled_picture_alone(visualize, first_run):
    _, bare = visualize("--num-images", 2)
    _, boxed = visualize("--num-images", 2, "--weights", first_run)
    np.testing.assert_array_equal(boxed["labeled.png"], bare["labeled.png"])
    colored = [
        sum(int(_is(picture["unlabeled.png"], color).sum()) for color in PALETTE)
        for picture in (bare, boxed)
    ]
    assert colored[1] > colored[0] + 500  # the outline of one box is longer


@pytest.mark.parametrize(
    "options", [("SSOD.UNSUP_LOSS_WEIGHT", 0), ("SSOD.BURN_IN_ITERS", 5)], ids=["weight", "burn-in"]
)
def test_config_without_unlabeled_images(visualize, options, first_run, capsys, caplog):
    status, pictures = visualize("--num-images", 3, "--weights", first_run, options=options)
    assert status == 0 and list(pictures) == ["labeled.png"]
    assert len(_rows(printed := capsys.readouterr().out, "/labeled.png")) == 3
    assert "no unlabeled images" in printed
    assert any("--weights is not used" in r.getMessage() for r in caplog.records)


def test_boxes_of_a_strong_view_are_drawn_where_they_are_there(visualize, shapes, tmp_path):
    """The labels, one by one, in a run whose strong views are warped and nothing else."""
    keys = ("SSOD.VIEWS.INDEPENDENT", True, "SSOD.VIEWS.WARP", True, "SSOD.LABELED_VIEWS", "both")
    cfg = tiny_config(shapes, tmp_path, *keys)
    batch = next(iter(build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS)))
    samples, _ = first_samples(build_train_loader(cfg, load_run_data(cfg), BURN_IN_ITERS), 2)
    rows = zip(samples, batch.labeled.strong, batch.labeled.strong_targets, strict=True)
    for sample, strong, targets in rows:
        names = [str(label) for label in sample.classes.tolist()]
        boxes = {
            "boxes": sample.boxes.numpy(),
            "classes": sample.classes.numpy(),
            "texts": names,
            "dashed": np.zeros(len(names), bool),
            "true_boxes": sample.boxes.numpy(),
        }
        _, (picture, text) = visualize_data._draw_views(sample, ("", ""), **boxes)
        assert "strong view" in text
        image = strong.permute(1, 2, 0).numpy()
        labels = targets.classes.tolist()
        arguments = (targets.boxes.numpy(), labels, [str(label) for label in labels])
        truth = {"true_boxes": targets.boxes.numpy()}
        expected = draw_boxes(image, *arguments, scale=480 / max(image.shape), **truth)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_hidden_truth_and_labels_of_warped_views_are_drawn(visualize, first_run):
    options = ("SSOD.VIEWS.INDEPENDENT", True, "SSOD.VIEWS.WARP", True)
    status, pictures = visualize("--num-images", 6, "--weights", first_run, options=options)
    assert status == 0 and _has_truth(pictures["unlabeled.png"])


def test_only_views_that_are_made_are_drawn(visualize):
    sizes = {
        views: visualize("--num-images", 4, options=("SSOD.LABELED_VIEWS", views))[1]["labeled.png"]
        for views in ("weak", "both")
    }
    assert sizes["weak"].shape[0] < sizes["both"].shape[0]  # one row instead of two


def test_filter_that_is_not_ready_says_so(visualize, first_run, caplog, capsys):
    options = ("SSOD.FILTER.NAME", "AdaptiveClassThreshold")
    status, _ = visualize("--num-images", 2, "--weights", first_run, options=options)
    assert status == 0
    messages = [record.getMessage() for record in caplog.records]
    assert sum("AdaptiveClassThreshold has no thresholds yet" in m for m in messages) == 1
    assert all(len(row) == 2 for row in _rows(capsys.readouterr().out, "/unlabeled.png"))


def test_image_that_cannot_be_decoded_is_told(visualize, shapes, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    broken = sorted((copy / "images").glob("unlabeled_*"))[:2]
    for path in broken:
        path.write_bytes(b"no image")
    keys = [item for pair in data_options(copy).items() for item in pair]
    status, _ = visualize("--num-images", 6, options=keys)
    assert status == 0
    messages = [record.getMessage() for record in caplog.records]
    assert all(any(f"{path} cannot be decoded" in m for m in messages) for path in broken)


@pytest.mark.parametrize(
    ("args", "options", "part"),
    [
        (["--num-images", 0], [], "--num-images must be at least 1, got 0"),
        (["--weights", "nowhere.pth"], [], "nowhere.pth: checkpoint not found; --weights takes"),
        ([], ["SSOD.NOTHING", 1], "unknown key SSOD.NOTHING"),
        ([], ["SSOD.DATA.LABELED_JSON", ""], "LABELED_JSON is empty"),
    ],
)
def test_bad_input_is_one_line(visualize, args, options, part, capsys):
    status, pictures = visualize(*args, options=options)
    assert status == 2 and pictures == {}
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error


def test_teacher_that_has_not_started_has_no_pseudo_boxes(visualize, first_run, tmp_path, capsys):
    state = torch.load(first_run / CHECKPOINT_NAME, weights_only=True)
    state["model"]["_extra_state"] = torch.tensor([1, 0])
    torch.save(state, tmp_path / "early.pth")
    status, pictures = visualize("--weights", tmp_path / "early.pth")
    assert status == 2 and pictures == {}
    assert "its teacher had not started at iteration 1" in capsys.readouterr().err
