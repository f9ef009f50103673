import json
import math
from pathlib import Path

import pytest
import torch

from ssod.core.daso import (
    blend_class_probs,
    blend_coefficients,
    semantic_alignment_loss,
    similarity_probs,
)

CASES = json.loads((Path(__file__).parent / "data" / "worked_cases.json").read_text())
SHAPES = [(0, 3, 2), (1, 2, 4), (7, 5, 3), (20, 1, 8)]  # regions, classes, values
F64 = torch.float64


def _tensor(values):
    return torch.tensor(values, dtype=F64)


def _random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- references, row by row


def _loop_similarity(row, prototypes, t_proto):
    norm = math.sqrt(sum(x * x for x in row))
    cosines = [
        sum(x * y for x, y in zip(row, p, strict=True)) / (norm * math.hypot(*p)) if any(p) else 0.0
        for p in prototypes
    ]
    exps = [math.exp(c / t_proto) for c in cosines]
    return [e / sum(exps) for e in exps]


def _loop_blend(row, similarity, coefficients):
    *foreground, background = row
    v = coefficients[foreground.index(max(foreground))]
    mass = 1 - background
    blended = [(1 - v) * p + v * mass * q for p, q in zip(foreground, similarity, strict=True)]
    return [*blended, background]


# ---------------------------------------------------------------- worked cases


@pytest.mark.parametrize("as_float", [False, True])
def test_worked_coefficients(as_float):
    outputs = CASES["D1_v"]["outputs"]
    counts = torch.tensor(CASES["D1_v"]["inputs"]["counts"])
    for t_dist in (0.3, 1.0, 1.5):
        found = blend_coefficients(counts.double() if as_float else counts, t_dist)
        torch.testing.assert_close(found, _tensor(outputs[f"T={t_dist}"]))
    unseen = blend_coefficients(_tensor([50, 0, 50]), 1.5)
    assert unseen.tolist() == outputs["unseen [50,0,50] T=1.5"]
    assert blend_coefficients(torch.zeros(3), 0.3).tolist() == outputs["all zero"]


def test_worked_similarity():
    inputs, outputs = (CASES["D3_similarity"][k] for k in ("inputs", "outputs"))
    z, prototypes = _tensor(inputs["z"]), _tensor(inputs["prototypes"])
    for t_proto in (0.05, 0.5):
        expected = _tensor(outputs[f"T={t_proto}"])
        torch.testing.assert_close(similarity_probs(z, prototypes, t_proto), expected)
    torch.testing.assert_close(similarity_probs(z, prototypes), _tensor(outputs["T=0.05"]))


def test_worked_alignment():
    inputs, outputs = (CASES["D5_align"][k] for k in ("inputs", "outputs"))
    weak, strong, prototypes = (_tensor(inputs[k]) for k in ("z_weak", "z_strong", "prototypes"))
    loss = semantic_alignment_loss(strong, weak, prototypes, torch.ones(2))
    assert loss.item() == pytest.approx(outputs["loss"], rel=1e-9)
    for row, expected in enumerate(outputs["per_row"]):
        one = semantic_alignment_loss(strong, weak, prototypes, torch.arange(2) == row)
        assert one.item() == pytest.approx(expected, rel=1e-9)


def test_worked_blend_of_regions():
    inputs, outputs = (CASES["D7_roi_blend"][k] for k in ("inputs", "outputs"))
    probs, similarity = _tensor(inputs["p"]), _tensor(inputs["q"])
    coefficients = blend_coefficients(torch.tensor(inputs["counts"]), inputs["T_dist"])
    blended = blend_class_probs(probs, similarity, coefficients)
    torch.testing.assert_close(blended, _tensor(outputs["p_blend"]))
    assert blended[:, :-1].argmax(1).tolist() == outputs["fg_label"]


# ---------------------------------------------------------------- against the loops, and limits


@pytest.mark.parametrize(("rows", "classes", "values"), SHAPES)
def test_similarity_and_blend_equal_loops(rows, classes, values):
    z, prototypes = _random(0, rows, values), _random(1, classes, values)
    similarity = similarity_probs(z, prototypes, 0.2)
    expected = [_loop_similarity(row, prototypes.tolist(), 0.2) for row in z.tolist()]
    torch.testing.assert_close(similarity, _tensor(expected).view(rows, classes))
    probs, coefficients = _random(2, rows, classes + 1).softmax(1), _random(3, classes).sigmoid()
    before = probs.clone()
    blended = blend_class_probs(probs, similarity, coefficients)
    pairs = zip(probs.tolist(), similarity.tolist(), strict=True)
    expected = [_loop_blend(row, q, coefficients.tolist()) for row, q in pairs]
    torch.testing.assert_close(blended, _tensor(expected).view(rows, classes + 1))
    assert torch.equal(probs, before)
    assert torch.equal(blended[:, -1], probs[:, -1])
    torch.testing.assert_close(blended.sum(1), torch.ones(rows, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_coefficient_of_zero_leaves_rows_as_they_are(dtype):
    probs = (5 * _random(0, 50, 4)).softmax(1).to(dtype)
    similarity = torch.full((50, 3), math.nan, dtype=dtype)  # of a class without a prototype, say
    coefficients = _tensor([0, 1, 0])
    blended = blend_class_probs(probs, similarity, coefficients)
    is_kept = probs[:, :-1].argmax(1) != 1
    assert blended.dtype == dtype and is_kept.any() and not is_kept.all()
    assert torch.equal(blended[is_kept], probs[is_kept])
    assert blended[~is_kept, :-1].isnan().all()


def test_a_class_without_a_prototype_is_never_similar():
    z, prototypes = _random(0, 6, 4), _random(1, 3, 4)
    known = torch.tensor([True, False, True])
    similarity = similarity_probs(z, prototypes, 0.05, known)
    assert not similarity[:, 1].any()
    rest = similarity_probs(z, prototypes[known], 0.05)
    torch.testing.assert_close(similarity[:, known], rest)
    loss = semantic_alignment_loss(z.roll(1, 0), z, prototypes, torch.ones(6), 0.05, known)
    of_rest = semantic_alignment_loss(z.roll(1, 0), z, prototypes[known], torch.ones(6))
    torch.testing.assert_close(loss, of_rest)


def test_embeddings_are_compared_in_full_precision_under_autocast():
    z, prototypes = _random(0, 6, 64).float(), _random(1, 3, 64).float()
    expected = similarity_probs(z.bfloat16().float(), prototypes)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity_probs(z.bfloat16(), prototypes)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_alignment_teaches_the_students_embeddings_alone():
    student, teacher, prototypes = (_random(i, *s).requires_grad_() for i, s in enumerate(SIZES))
    weights = _tensor([1, 0, 1, 0.5])
    loss = semantic_alignment_loss(student, teacher, prototypes, weights, 0.3)
    loss.backward()
    assert teacher.grad is None and prototypes.grad is None
    assert not student.grad[1].any() and student.grad[[0, 2, 3]].any(1).all()
    targets, found = (similarity_probs(z, prototypes, 0.3) for z in (teacher, student))
    rows = [
        -w * sum(t * math.log(q) for t, q in zip(*pair, strict=True))
        for w, *pair in zip(weights.tolist(), targets.tolist(), found.tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(rows) / 2.5)


SIZES = ((4, 3), (4, 3), (5, 3))


@pytest.mark.parametrize("rows", [0, 3])
def test_alignment_of_nothing_is_a_connected_zero(rows):
    student = torch.ones(rows, 2, requires_grad=True)
    known = torch.tensor([False, False])
    loss = semantic_alignment_loss(
        student, torch.zeros(rows, 2), torch.zeros(2, 2), torch.zeros(rows), known=known
    )
    loss.backward()
    assert loss == 0 and torch.equal(student.grad, torch.zeros(rows, 2))
