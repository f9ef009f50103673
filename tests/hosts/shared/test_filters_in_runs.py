"""Each pseudo-label filter in a tiny run: labels reach it, it resumes, and it can be exchanged."""

import shutil

import pytest
import torch

from ssod.core.adaptive_threshold import class_thresholds
from ssod.hosts.inference import find
from ssod.hosts.metric_log import read_metrics
from ssod.hosts.sweep import sweep_if_due
from ssod.hosts.torchvision.run import Run
from tiny_run import (
    BURN_IN_ITERS,
    MAX_ITER,
    differences,
    read_lines,
    read_state,
    resume,
    tiny_config,
)

FILTERS = {
    "queue": ("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.QUEUE_IMAGES", 64),
    "sweep": (
        *("SSOD.FILTER.NAME", "AdaptiveClassThreshold", "SSOD.FILTER.SOURCE", "sweep"),
        *("SSOD.FILTER.REFRESH_PERIOD", 2, "SSOD.FILTER.SWEEP_IMAGES", 4),
    ),
    "gmm": ("SSOD.FILTER.NAME", "GaussianMixtureThreshold"),
    "soft": (
        *("SSOD.FILTER.NAME", "SoftMatchWeighting", "SSOD.FILTER.POOL_FLOOR", 0.0),
        *("SSOD.FILTER.SCOPE", "per_class"),
    ),
}
STATE = {"queue": "pseudo/reliable_thresh", "sweep": "pseudo/reliable_thresh"}
STATE |= {"soft": "pseudo/running_mean", "gmm": "pseudo/reliable_thresh"}


@pytest.fixture(scope="module", params=FILTERS)
def finished(request, shapes, tmp_path_factory):
    """Name, config overrides and folder of a finished run."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    overrides = (*FILTERS[request.param], "SSOD.DATA.VAL_JSON", "")
    Run(tiny_config(shapes, output, *overrides)).train()
    yield request.param, overrides, output
    shutil.rmtree(output)


def test_state_of_the_filter_is_logged_and_saved(finished, shapes, tmp_path):
    name, overrides, output = finished
    values = [line[STATE[name]] for line in read_metrics(output) if STATE[name] in line]
    assert len(values) == 2 and all(0 < value < 1 for value in values)
    fresh = Run(tiny_config(shapes, tmp_path, *overrides)).model.pseudo_label_filter
    saved = read_state(output)["model"]
    buffers = dict(fresh.named_buffers())
    changed = {
        n for n, b in buffers.items() if not torch.equal(saved[f"pseudo_label_filter.{n}"], b)
    }
    assert changed == buffers.keys() - {"labels.class_counts"}


@pytest.mark.parametrize("left", [1, 2])  # a sweep is due at one of them, not at the other
def test_resumed_run_equals_an_uninterrupted_one(finished, left, shapes, tmp_path):
    _, overrides, output = finished
    Run(tiny_config(shapes, tmp_path, *overrides, "SOLVER.MAX_ITER", MAX_ITER - left)).train()
    resume(tiny_config(shapes, tmp_path, *overrides)).train()
    assert differences(read_state(tmp_path), read_state(output)) == []
    assert differences(read_lines(tmp_path)[-1], read_lines(output)[-1]) == []


def test_filters_can_be_exchanged_during_a_run(finished, first_run, shapes, tmp_path, caplog):
    """From the fixed threshold to this filter: everything but the filter is taken over."""
    _, overrides, _ = finished
    folder = shutil.copytree(first_run, tmp_path / "run")
    keys = (*overrides, "SOLVER.MAX_ITER", MAX_ITER + 1)
    with caplog.at_level("INFO"):
        trainer = resume(tiny_config(shapes, folder, *keys))
    assert any("another pseudo-label filter" in message for message in caplog.messages)
    saved = read_state(first_run)["model"]
    own = trainer.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    trainer.train()
    assert trainer.model.iteration == MAX_ITER + 1


def test_a_sweep_computes_the_thresholds_of_its_sample(shapes, tmp_path):
    keys = ("SSOD.FILTER.SWEEP_IMAGES", 10**6, "SSOD.FILTER.RELIABLE_FRACTION", 0.5)
    trainer = Run(tiny_config(shapes, tmp_path, *FILTERS["sweep"], *keys))
    model, data = trainer.model, trainer.data
    sweep_if_due(model, data, trainer.cfg, trainer.device)
    assert not model.pseudo_label_filter.has_thresholds  # still in the burn-in
    model.iteration = BURN_IN_ITERS
    state = torch.get_rng_state()
    sweep_if_due(model, data, trainer.cfg, trainer.device)
    assert torch.equal(torch.get_rng_state(), state)
    found = [d for _, d in find(model.teacher, data.unlabeled, trainer.cfg, trainer.device)]
    expected = class_thresholds(
        torch.cat([d.scores for d in found]),
        torch.cat([d.classes for d in found]),
        torch.from_numpy(data.labeled.class_counts),
        len(data.labeled),
        len(data.unlabeled),
        reliable_fraction=0.5,
    )
    adaptive = model.pseudo_label_filter
    assert torch.equal(adaptive.reliable_thresh, expected[0])
    assert torch.equal(adaptive.uncertain_thresh, expected[1])

    adaptive.reliable_thresh.zero_()
    model.iteration += 1
    sweep_if_due(model, data, trainer.cfg, trainer.device)
    assert adaptive.reliable_thresh.sum() == 0  # not due
    model.iteration += 1
    sweep_if_due(model, data, trainer.cfg, trainer.device)
    assert torch.equal(adaptive.reliable_thresh, expected[0])


def test_a_sweep_leaves_broken_images_out(shapes, tmp_path):
    images = shutil.copytree(shapes / "images", tmp_path / "images")
    keys = ("SSOD.DATA.UNLABELED_IMAGES", images, "SSOD.FILTER.SWEEP_IMAGES", 10**6)
    keys += ("SSOD.DATA.UNLABELED_TRUTH_JSON", "")
    trainer = Run(tiny_config(shapes, tmp_path / "run", *FILTERS["sweep"], *keys))
    with open(trainer.data.unlabeled.file_names[0], "wb") as file:
        file.write(b"no image")
    trainer.model.iteration = BURN_IN_ITERS
    sweep_if_due(trainer.model, trainer.data, trainer.cfg, trainer.device)
    assert trainer.model.pseudo_label_filter.has_thresholds
