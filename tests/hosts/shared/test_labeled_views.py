"""Views of labeled images that a run does not learn from."""

from ssod.data import build
from tiny_run import differences, read_lines, read_state, tiny_config, train


def test_a_run_is_the_same_without_the_views_that_it_does_not_learn(shapes, tmp_path, monkeypatch):
    make_loader = build.build_two_stream_loader
    train(tiny_config(shapes, tmp_path / "without", "SSOD.LABELED_VIEWS", "weak"))

    def with_strong(*args, **kwargs):
        return make_loader(*args, **kwargs | {"labeled_strong": True})

    monkeypatch.setattr(build, "build_two_stream_loader", with_strong)
    train(tiny_config(shapes, tmp_path / "with", "SSOD.LABELED_VIEWS", "weak"))
    without, expected = ((tmp_path / name) for name in ("without", "with"))
    assert not differences(read_state(without), read_state(expected))
    assert not differences(read_lines(without), read_lines(expected))
