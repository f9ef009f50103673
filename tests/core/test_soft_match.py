import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
from test_filters import HostReads, make_detections, random_images

from ssod.core.losses import weighted_classification_loss
from ssod.core.running_stats import RunningAverage
from ssod.core.soft_match import (
    SoftMatchWeighting,
    truncated_gaussian_weight,
    uniform_alignment,
)
from ssod.core.structures import Detections
from ssod.errors import InputError

CASES = json.loads((Path(__file__).parent / "data" / "worked_cases.json").read_text())
NUM_CLASSES = 3
COUNTS = torch.tensor([6, 3, 1])


def _double(values):
    return torch.tensor(values, dtype=torch.float64)


def _filter(num_classes=NUM_CLASSES, **kwargs):
    labels = SoftMatchWeighting(num_classes, **{"ema_decay": 0.9, "pool_floor": 0.3, **kwargs})
    counts = COUNTS if num_classes == NUM_CLASSES else torch.ones(num_classes)
    labels.set_label_distribution(counts, num_labeled=4)
    return labels


def _of_scores(scores, num_classes=NUM_CLASSES, classes=None):
    """One image in float64 with these scores, of class 0 unless said otherwise."""
    return make_detections(scores, classes or [0] * len(scores), num_classes, torch.float64)


def _pool_of(scores):
    """One image in the pool whatever its scores: the other classes share the rest."""
    rest = [[(1 - s) / 4] * 4 for s in scores]
    probs = _double(rest).reshape(-1, 4)
    probs[:, 0] = _double(scores)
    count = len(scores)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Detections(torch.rand(count, 4), _double(scores), zeros, probs, torch.rand(count, 2))


def _batches(count, sizes=(5, 0, 3), **kwargs):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return [random_images(generator, sizes, **kwargs) for _ in range(count)]


def _as_double(image):
    fields = {n: t.double() if t.is_floating_point() else t for n, t in vars(image).items()}
    return Detections(**fields)


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _moments(labels):
    return [float(value) for value in labels.mean_and_variance()]


# --- worked cases


@pytest.mark.parametrize("n_sigma", [1, 2, 3])
def test_worked_case_of_weights(n_sigma):
    case = CASES["S1_weight"]
    p, mean, var = _double(case["inputs"]["p"]), case["inputs"]["mu"], case["inputs"]["var"]
    expected = _double(case["outputs"][f"n_sigma={n_sigma}"])
    for moments in ((mean, var), (_double(mean), _double(var)), (_double([mean] * 6), var)):
        weights = truncated_gaussian_weight(p, *moments, n_sigma=n_sigma)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert torch.equal(truncated_gaussian_weight(p, mean, var, n_sigma, 0.5), weights / 2)


@pytest.mark.parametrize("name", ["S2_ema_m0.9", "S2_ema_started"])
def test_worked_cases_of_the_papers_start(name):
    inputs, outputs = CASES[name]["inputs"], CASES[name]["outputs"]
    labels = _filter(4, start="paper", alignment="none", pool_floor=0.0)
    if "mu0" in inputs:
        labels.moments.values.copy_(_double([[inputs["mu0"], inputs["var0"]]]))
    for batch, expected in zip(inputs["batches"], outputs, strict=True):
        image = make_detections(batch, [0] * 4, 4, torch.float64)
        image.class_probs[:] = _double([0.4, 0.1, 0.1, 0.1, 0.3])  # all of them in the pool
        (kept,) = labels([image])
        assert _moments(labels) == pytest.approx([expected["mu"], expected["var"]], rel=1e-12)
        weights = _double(expected["weights_n_sigma2"])
        torch.testing.assert_close(kept.weights, weights, rtol=1e-9, atol=0)


def test_worked_case_of_one_box_and_none_with_the_papers_start():
    inputs, outputs = CASES["S3_degenerate"]["inputs"], CASES["S3_degenerate"]["outputs"]
    for name in ("one", "zero"):
        labels = _filter(start="paper", alignment="none")
        labels.moments.values.copy_(_double([[inputs["mu"], inputs["var"]]]))
        labels([_pool_of(inputs[name])])
        expected = [outputs[name]["mu"], outputs[name]["var"]]
        assert _moments(labels) == pytest.approx(expected, rel=1e-12)


def test_worked_case_of_bias_correction():
    """Equal batches: the same means; our variance has the spread between batches as well."""
    inputs, outputs = CASES["S7_bias_corrected"]["inputs"], CASES["S7_bias_corrected"]["outputs"]
    labels = _filter(alignment="none", pool_floor=0.0)
    means, variances, shares = [], [], []
    for batch, expected in zip(inputs["batches"], outputs, strict=True):
        labels([_pool_of(batch)])
        scores = _double(batch)
        means, variances = [*means, scores.mean()], [*variances, scores.var(correction=0)]
        shares = _double([0.9**age for age in range(len(means))][::-1])
        shares /= shares.sum()
        mean = (shares * torch.stack(means)).sum()
        within = (shares * torch.stack(variances)).sum()
        between = (shares * (torch.stack(means) - mean).square()).sum()
        assert _moments(labels) == pytest.approx([expected["mu"], float(within + between)])
        assert float(within) == pytest.approx(expected["var"] * 3 / 4)  # theirs is unbiased
        weights = truncated_gaussian_weight(scores, expected["mu"], expected["var"])
        torch.testing.assert_close(weights, _double(expected["weights_n_sigma2"]))


def test_worked_case_of_sums():
    inputs, outputs = CASES["S8_ema_of_sums"]["inputs"], CASES["S8_ema_of_sums"]["outputs"]
    labels = _filter(alignment="none", pool_floor=0.0)
    for batch, expected in zip(inputs["batches"], outputs, strict=True):
        (kept,) = labels([_pool_of(batch)])
        assert len(kept) == len(batch)
        assert _moments(labels) == pytest.approx([expected["mu"], expected["var"]], rel=1e-12)


def test_worked_case_of_the_loss_that_weights_go_into():
    inputs, outputs = CASES["S6_roi_ce"]["inputs"], CASES["S6_roi_ce"]["outputs"]
    probs = torch.nn.functional.one_hot(torch.tensor(inputs["gt_classes"]), 3).double()
    for weights, name in ((inputs["weights"], "loss"), ([1.0] * 4, "unweighted")):
        loss = weighted_classification_loss(_double(inputs["logits"]), probs, _double(weights))
        assert float(loss) == pytest.approx(outputs[name], rel=1e-12)


def test_worked_case_of_alignment_from_the_first_batch():
    inputs, outputs = (
        CASES["U1_ua_first_batch_init"]["inputs"],
        CASES["U1_ua_first_batch_init"]["outputs"],
    )
    average = RunningAverage(1, 3, inputs["m"])
    target = _double([1 / 3] * 3)
    for step in ("1", "2"):
        probs = _double(inputs[f"P{step}"])
        average.update(probs.mean(0)[None], torch.tensor([[True]]))
        model = average.averages()[0]
        torch.testing.assert_close(model, _double(outputs[f"p_model_{step}"]))
        aligned = uniform_alignment(probs, target, model)
        torch.testing.assert_close(aligned, _double(outputs[f"aligned_{step}"]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("output", ["uniform", "prior"])
def test_worked_case_of_alignment_of_foreground_classes(output):
    inputs, outputs = CASES["U4_ua_fg"]["inputs"], CASES["U4_ua_fg"]["outputs"]
    probs = _double(inputs["P"])
    foreground = probs[:, :3] / probs[:, :3].sum(1, keepdim=True)
    torch.testing.assert_close(foreground, _double(outputs["r_before"]))
    target = _double([1 / 3] * 3 if output == "uniform" else inputs["prior"])
    aligned = uniform_alignment(foreground, target, _double(inputs["r_model"]))
    expected = _double(outputs[output])
    torch.testing.assert_close(aligned * (1 - probs[:, 3:]), expected[:, :3], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("alignment", "output"), [("uniform", "uniform"), ("labeled", "prior")])
def test_worked_case_of_alignment_in_the_filter(alignment, output):
    inputs, outputs = CASES["U4_ua_fg"]["inputs"], CASES["U4_ua_fg"]["outputs"]
    labels = _filter(alignment=alignment).eval()  # COUNTS are in the proportions of the prior
    labels.shares.sums.copy_(_double([[1.0, *inputs["r_model"]]]))
    labels.moments.sums.copy_(_double([[1.0, 0.7, 0.7**2 + 0.05]]))
    probs, classes = _double(inputs["P"]), torch.tensor([0, 2])
    scores = probs[[0, 1], classes]
    (kept,) = labels([Detections(torch.rand(2, 4), scores, classes, probs, torch.rand(2, 2))])
    aligned = _double(outputs[output])[[0, 1], classes]
    torch.testing.assert_close(kept.weights, truncated_gaussian_weight(aligned, 0.7, 0.05))
    assert torch.equal(kept.scores, scores) and torch.equal(kept.class_probs, probs)


# --- the two functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 50])
def test_weight_matches_loop_reference(size, dtype):
    torch.manual_seed(0)
    scores, mean, var = torch.rand(3, size, dtype=dtype)
    expected = [
        0.7 * (1.0 if s >= m else math.exp(-((s - m) ** 2) / (2 * v / 1.5**2)))
        for s, m, v in zip(scores.tolist(), mean.tolist(), var.tolist(), strict=True)
    ]
    weights = truncated_gaussian_weight(scores, mean, var, n_sigma=1.5, max_weight=0.7)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=dtype))


def test_wide_gaussian_weighs_every_box_fully_and_no_variance_is_a_step():
    scores = _double([0.0, 0.3, 0.6, 1.0])
    assert truncated_gaussian_weight(scores, 0.6, 1e12).tolist() == pytest.approx([1.0] * 4)
    assert truncated_gaussian_weight(scores, 0.6, 0.0).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert truncated_gaussian_weight(scores.float(), 0.6, 0.0).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("num_classes", [1, 2, 30])
@pytest.mark.parametrize("size", [0, 1, 20])
def test_alignment_matches_loop_reference(size, num_classes):
    torch.manual_seed(0)
    probs = torch.rand(size, num_classes, dtype=torch.float64).softmax(1)
    target, model = torch.rand(2, num_classes, dtype=torch.float64)
    expected = []
    for row in probs.tolist():
        pairs = zip(row, target.tolist(), model.tolist(), strict=True)
        row = [p * (t + 1e-6) / (m + 1e-6) for p, t, m in pairs]
        expected.append([value / sum(row) for value in row])
    expected = _double(expected).reshape(size, num_classes)
    torch.testing.assert_close(uniform_alignment(probs, target, model), expected)
    torch.testing.assert_close(uniform_alignment(probs, model, model), probs)


def test_alignment_of_nothing_is_nothing():
    zeros = torch.zeros(1, 3)
    assert torch.equal(uniform_alignment(zeros, torch.ones(3) / 3, torch.zeros(3)), zeros)


def test_worked_case_of_bounded_ratios():
    inputs, outputs = CASES["U4_ua_fg"]["inputs"], CASES["U4_ua_fg"]["outputs"]
    foreground = _double(inputs["P"])[:, :3]
    target, model = _double([1 / 3] * 3), _double(inputs["r_model"])
    aligned = uniform_alignment(foreground, target, model, max_ratio=3.0)
    expected = _double(outputs["uniform_clip3"])[:, :3] / foreground.sum(1, keepdim=True)
    torch.testing.assert_close(aligned, expected, rtol=1e-12, atol=0)


# --- the filter


class _Reference:
    """The filter in Python floats, one box at a time."""

    def __init__(self, scope, start, alignment, decay, floor):
        self.scope, self.start, self.alignment, self.decay = scope, start, alignment, decay
        self.floor = floor
        groups = range(NUM_CLASSES) if scope == "per_class" else [0]
        self.sums = {g: [0.0, 0.0, 0.0] for g in groups}
        self.mean, self.var = dict.fromkeys(groups, 1 / NUM_CLASSES), dict.fromkeys(groups, 1.0)
        self.share_sums, self.shares = [0.0] * (NUM_CLASSES + 1), None

    def step(self, images):
        pools = [[row for row in self._rows(image) if self._is_pooled(*row)] for image in images]
        pool = [row for rows in pools for row in rows]
        for group in self.sums:
            own = [s for s, c, _ in pool if self.scope == "global" or c == group]
            self._move(group, own)
        self._move_shares([self._foreground(probs) for *_, probs in pool])
        return [[self._weight(*row) for row in rows] for rows in pools]

    @staticmethod
    def _rows(image):
        fields = image.scores.tolist(), image.classes.tolist(), image.class_probs.tolist()
        return zip(*fields, strict=True)

    def _is_pooled(self, score, label, probs):
        return score >= self.floor and max(probs[:-1]) == probs[label]

    @staticmethod
    def _foreground(probs):
        return [p / sum(probs[:-1]) for p in probs[:-1]]

    def _ema(self, old, new):
        return self.decay * old + (1 - self.decay) * new

    def _move(self, group, own):
        if own or self.scope == "global":
            batch = [len(own), sum(own), sum(s * s for s in own)]
            self.sums[group] = [
                self._ema(*pair) for pair in zip(self.sums[group], batch, strict=True)
            ]
        if self.start == "paper":
            if own:
                mean = sum(own) / len(own)
                self.mean[group] = self._ema(self.mean[group], mean)
            if len(own) > 1:
                var = sum((s - mean) ** 2 for s in own) / (len(own) - 1)
                self.var[group] = self._ema(self.var[group], var)
        elif self.sums[group][0]:
            n, first, second = self.sums[group]
            self.mean[group], self.var[group] = first / n, second / n - (first / n) ** 2

    def _move_shares(self, rows):
        sums = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * NUM_CLASSES
        if self.start == "paper":
            if rows:
                mean = [s / len(rows) for s in sums]
                pairs = zip(self.shares or mean, mean, strict=True)
                self.shares = [self._ema(*pair) for pair in pairs]
        else:
            pairs = zip(self.share_sums, [len(rows), *sums], strict=True)
            self.share_sums = [self._ema(*pair) for pair in pairs]
            if self.share_sums[0]:
                self.shares = [s / self.share_sums[0] for s in self.share_sums[1:]]

    def _weight(self, score, label, probs):
        if self.alignment != "none":
            total = float(COUNTS.sum())
            target = [1 / NUM_CLASSES] * NUM_CLASSES
            if self.alignment == "labeled":
                target = [n / total for n in COUNTS.tolist()]
            ratio = [(t + 1e-6) / (m + 1e-6) for t, m in zip(target, self.shares, strict=True)]
            if self.alignment == "labeled":
                ratio = [min(max(r, 1 / 3), 3) for r in ratio]
            row = [p * r for p, r in zip(self._foreground(probs), ratio, strict=True)]
            score = row[label] / sum(row) * sum(probs[:-1])
        group = label if self.scope == "per_class" else 0
        below = min(score - self.mean[group], 0)
        return math.exp(-below * below * 4 / (2 * max(self.var[group], 1e-4)))


@pytest.mark.parametrize("alignment", ["labeled", "uniform", "none"])
@pytest.mark.parametrize("start", ["bias_corrected", "paper"])
@pytest.mark.parametrize("scope", ["global", "per_class"])
def test_matches_loop_reference(scope, start, alignment):
    labels = _filter(scope=scope, start=start, alignment=alignment)
    reference = _Reference(scope, start, alignment, decay=0.9, floor=0.3)
    generator = torch.Generator().manual_seed(0)
    for sizes in [(2, 0), (0, 0), (1,), (7, 30, 3), (0,), (1, 1), (60,), (0, 5)]:
        images = random_images(generator, sizes, dtype=torch.float64)
        expected = reference.step(images)
        for kept, weights in zip(labels(images), expected, strict=True):
            torch.testing.assert_close(kept.weights, _double(weights), rtol=1e-9, atol=1e-12)
            assert torch.equal(kept.box_weights, kept.weights) and kept.reliable.all()
        mean, var = labels.mean_and_variance()
        seen = labels.moments.seen().tolist()
        assert [m for m, s in zip(mean.tolist(), seen, strict=True) if s] == pytest.approx(
            [m for m, s in zip(reference.mean.values(), seen, strict=True) if s]
        )
        assert [v for v, s in zip(var.tolist(), seen, strict=True) if s] == pytest.approx(
            [v for v, s in zip(reference.var.values(), seen, strict=True) if s], abs=1e-12
        )


def _published_weights(batches, decay):
    """Weights of the last batch, of distributions: SoftMatch with uniform alignment, in floats."""
    classes = range(len(batches[0][0]))
    mean, var, shares = 1 / len(classes), 1.0, None
    for rows in batches:
        tops = [max(row) for row in rows]
        batch_mean = sum(tops) / len(tops)
        batch_var = sum((top - batch_mean) ** 2 for top in tops) / (len(tops) - 1)
        mean = decay * mean + (1 - decay) * batch_mean
        var = decay * var + (1 - decay) * batch_var
        found = [sum(row[c] for row in rows) / len(rows) for c in classes]
        pairs = zip(shares or found, found, strict=True)
        shares = [decay * old + (1 - decay) * new for old, new in pairs]
    weights = []
    for row in batches[-1]:
        scaled = [p * (1 / len(classes)) / share for p, share in zip(row, shares, strict=True)]
        below = min(max(scaled) / sum(scaled) - mean, 0)
        weights.append(math.exp(-below * below * 2**2 / (2 * var)))
    return weights


def test_uniform_alignment_with_the_papers_start_is_as_published():
    """Of regions without background, none of which changes its class; 90 % are of the first."""
    generator = torch.Generator().manual_seed(0)
    labels = _filter(4, start="paper", alignment="uniform", pool_floor=0.0)
    batches = []
    for _ in range(20):
        top = 0.985 + 0.015 * torch.rand(30, 1, generator=generator, dtype=torch.float64)
        probs = torch.cat([top, (1 - top).expand(-1, 3) / 3], 1)
        for row in range(3):
            probs[row] = probs[row].roll(row + 1)
        scores, classes = probs.max(1)
        rows = torch.cat([probs, torch.zeros_like(top)], 1)
        batches.append(probs.tolist())
        (kept,) = labels([Detections(rows[:, :4], scores, classes, rows, rows)])
    shares = labels.shares.averages()[0]
    assert 0.89 < shares[0] < 0.91 and 0.25 / shares[0] < 1 / 3 and (0.25 / shares[1:] > 3).all()
    # eps, which the paper's code does not have, is 1e-6 of shares above 0.03.
    expected = _double(_published_weights(batches, decay=0.9))
    assert expected.min() < 0.7 and expected.max() == 1
    torch.testing.assert_close(kept.weights, expected, rtol=1e-4, atol=0)


def test_ratios_towards_the_labels_are_bounded():
    """A class found 30 times too rarely counts 3 times as much, and one 3.1 times too often 1/3."""
    labels = _filter(alignment="labeled").eval()  # towards shares of 0.6, 0.3 and 0.1
    labels.shares.sums.copy_(_double([[1.0, 0.02, 0.93, 0.05]]))
    labels.moments.sums.copy_(_double([[1.0, 0.8, 0.8**2 + 0.05]]))
    image = make_detections([0.5, 0.5], [0, 1], NUM_CLASSES, torch.float64)
    image.class_probs[:] = _double([[0.5, 0.3, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]])
    (kept,) = labels([image])
    sums = (0.5 * 3 + 0.3 / 3 + 0.1 * 2, 0.3 * 3 + 0.5 / 3 + 0.1 * 2)
    aligned = _double([0.9 * 0.5 * 3 / sums[0], 0.9 * 0.5 / 3 / sums[1]])
    expected = truncated_gaussian_weight(aligned, 0.8, 0.05)
    torch.testing.assert_close(kept.weights, expected, rtol=1e-4, atol=0)


def test_pool_by_hand():
    """Kept: above or at the floor, and the region's likeliest class."""
    probs = [
        [0.6, 0.3, 0.05, 0.05],
        [0.6, 0.35, 0.0, 0.05],
        [0.5, 0.1, 0.0, 0.4],
        [0.4, 0.1, 0, 0.5],
    ]
    classes, scores = torch.tensor([0, 1, 0, 0]), _double([0.6, 0.35, 0.5, 0.4])
    image = Detections(torch.rand(4, 4), scores, classes, _double(probs), torch.rand(4, 2))
    (kept,) = _filter(pool_floor=0.5, alignment="none")([image])
    assert kept.scores.tolist() == [0.6, 0.5]
    assert torch.equal(kept.boxes, image.boxes[[0, 2]])
    assert torch.equal(kept.class_probs, image.class_probs[[0, 2]])
    # Mean 0.55 and standard deviation 0.05: the lower one is one below.
    assert kept.weights.tolist() == pytest.approx([1.0, math.exp(-2)])


def test_the_farthest_box_keeps_some_weight():
    """A box of weight 0 would be sampled last, as one without a loss."""
    image = _of_scores([0.99] * 500 + [0.5])
    (kept,) = _filter(pool_floor=0.0, alignment="none")([image])
    assert kept.weights.dtype == image.scores.dtype
    assert 0 < kept.weights.float().min() < 1e-30


def test_before_the_first_box_everything_weighs_fully():
    image = _of_scores([0.9, 0.4])
    for alignment in ("labeled", "none"):
        labels = _filter(alignment=alignment).eval()
        assert labels([image])[0].weights.tolist() == [1.0, 1.0]


def test_before_the_first_box_the_papers_start_weighs_without_alignment():
    labels = _filter(start="paper", alignment="labeled", n_sigma=40.0).eval()
    (kept,) = labels([_pool_of([0.9, 0.31])])
    expected = truncated_gaussian_weight(_double([0.9, 0.31]), 1 / NUM_CLASSES, 1.0, n_sigma=40.0)
    torch.testing.assert_close(kept.weights, expected)


@pytest.mark.parametrize("start", ["bias_corrected", "paper"])
@pytest.mark.parametrize("scope", ["global", "per_class"])
def test_empty_and_single_boxes_never_give_nan(scope, start):
    labels = _filter(scope=scope, start=start)
    for scores in ([], [0.8], [], [0.6], [0.6, 0.6], []):
        (kept,) = labels([_of_scores(scores)])
        assert len(kept) == len(scores) and kept.weights.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in labels.state_dict().values())
        assert all(value.isfinite() for value in labels.metrics().values())


def test_an_empty_pool_leaves_mean_and_variance():
    labels = _filter()
    labels(_batches(1)[0])
    before = _moments(labels)
    labels([_of_scores([0.29, 0.1]), _of_scores([])])
    assert _moments(labels) == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("start", ["bias_corrected", "paper"])
def test_absent_classes_stay_untouched(start):
    labels = _filter(scope="per_class", start=start)
    labels([_of_scores([0.9, 0.8, 0.5, 0.4], classes=[0, 1, 1, 2])])
    before = [value.clone() for value in labels.mean_and_variance()]
    for _ in range(20):
        labels([_of_scores([0.9, 0.6], classes=[1, 1])])
    for old, new in zip(before, labels.mean_and_variance(), strict=True):
        assert torch.equal(new[[0, 2]], old[[0, 2]]) and new[1] != old[1]


def test_one_class_per_class_equals_global():
    first, second = (_filter(1, scope=scope) for scope in ("global", "per_class"))
    for batch in _batches(5, num_classes=1):
        for a, b in zip(first(batch), second(batch), strict=True):
            assert torch.equal(a.weights, b.weights)


def test_alignment_favors_the_classes_that_are_found_too_rarely():
    image = _of_scores([0.9] * 8 + [0.6, 0.6], classes=[0] * 8 + [0, 1])
    image.class_probs[8] = _double([0.6, 0.3, 0.05, 0.05])
    image.class_probs[9] = _double([0.3, 0.6, 0.05, 0.05])
    weights = {a: _filter(alignment=a)([image])[0].weights[8:] for a in ("uniform", "none")}
    assert weights["none"][0] == weights["none"][1]
    assert weights["uniform"][1] > weights["none"][1] > weights["uniform"][0]


@pytest.mark.parametrize("field", ["scores", "class_probs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_detections_are_left_out(field, value):
    for start in ("bias_corrected", "paper"):
        image = _of_scores([0.9, 0.8, 0.5])
        labels, clean = _filter(start=start), _filter(start=start)
        rest = image[1:]
        image = copy.deepcopy(image)
        getattr(image, field)[0] = value
        (kept,), (expected,) = labels([image]), clean([rest])
        torch.testing.assert_close(kept.weights, expected.weights)
        assert _moments(labels) == pytest.approx(_moments(clean))


def test_equal_scores_weigh_fully():
    (kept,) = _filter(alignment="none")([_of_scores([0.7, 0.7, 0.7])])
    assert kept.weights.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("start", ["bias_corrected", "paper"])
@pytest.mark.parametrize("saved_at", [1, 4])
def test_resumed_run_equals_an_uninterrupted_one(saved_at, start):
    batches = _batches(7)
    whole = _filter(start=start)
    for batch in batches[:saved_at]:
        whole(batch)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = SoftMatchWeighting(NUM_CLASSES, ema_decay=0.9, pool_floor=0.3, start=start)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[saved_at:]:
        for a, b in zip(whole(batch), resumed(batch), strict=True):
            assert torch.equal(a.weights, b.weights)
        states = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_eval_mode_changes_nothing_and_weighs_with_the_state():
    labels = _filter(alignment="none")
    first, second = _batches(2)
    labels(first)
    before = _state(labels)
    kept = labels.eval()(second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(labels).items())
    mean, var = _moments(labels)
    for k in kept:
        expected = truncated_gaussian_weight(k.scores.double(), mean, max(var, 1e-4))
        torch.testing.assert_close(k.weights, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_and_autocast_do_not_change_the_state(dtype, autocast):
    labels, reference = _filter(), _filter()
    for batch in _batches(3, dtype=dtype):
        reference([_as_double(image) for image in batch])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kept = labels(batch)
        assert all(k.weights.dtype == dtype for k in kept)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(labels.state_dict()[name], tensor, rtol=1e-12, atol=0)


def test_input_is_not_changed_and_weights_have_no_gradient():
    batch = _batches(1)[0]
    before = copy.deepcopy(batch)
    for image in batch:
        image.scores.requires_grad_()
    kept = _filter()(batch)
    assert not any(k.weights.requires_grad for k in kept)
    for image, copied in zip(batch, before, strict=True):
        assert all(torch.equal(getattr(image, n), t) for n, t in vars(copied).items())


@pytest.mark.parametrize("start", ["bias_corrected", "paper"])
def test_the_host_is_asked_once_a_batch(start):
    labels = _filter(start=start, scope="per_class")
    (batch,) = _batches(1)
    with HostReads() as reads:
        labels(batch)
        labels.metrics()
    assert reads.count == 1


def test_metrics_are_the_mean_over_classes_that_were_seen():
    labels = _filter(scope="per_class", alignment="none")
    labels([_of_scores([0.9, 0.7, 0.6], classes=[0, 0, 1])])
    metrics = {name: float(value) for name, value in labels.metrics().items()}
    expected = {"pseudo/running_mean": (0.8 + 0.6) / 2, "pseudo/running_var": (0.01 + 0.0) / 2}
    assert metrics == pytest.approx(expected)
    assert all(value.shape == () for value in labels.metrics().values())


def test_labels_must_be_told_first_if_they_are_needed():
    batch = _batches(1)[0]
    with pytest.raises(ValueError, match="SoftMatchWeighting needs the number of labeled boxes"):
        SoftMatchWeighting(NUM_CLASSES)(batch)
    assert len(SoftMatchWeighting(NUM_CLASSES, alignment="uniform")(batch)) == len(batch)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("ema_decay", 1.0, r"SSOD.FILTER.EMA_DECAY must be in \(0, 1\), got 1.0"),
        ("ema_decay", -0.1, r"SSOD.FILTER.EMA_DECAY must be in \(0, 1\), got -0.1"),
        ("n_sigma", 0, "n_sigma must be above 0, got 0"),
        ("n_sigma", math.nan, "n_sigma must be above 0, got nan"),
        ("scope", "image", r"SSOD.FILTER.SCOPE must be one of .*'per_class'\), got 'image'"),
        ("start", "zero", r"SSOD.FILTER.START must be one of .*'paper'\), got 'zero'"),
        ("alignment", "gt", r"SSOD.FILTER.ALIGNMENT must be one of .*'none'\), got 'gt'"),
        ("pool_floor", 1.5, r"SSOD.FILTER.POOL_FLOOR must be in \[0, 1\], got 1.5"),
    ],
)
def test_argument_out_of_range_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        SoftMatchWeighting(NUM_CLASSES, **{argument: value})
