"""The figures show what the arrays say. No test checks that they look good."""

import io

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

import tf_dropmax
from tf_dropmax import plots
from tf_dropmax.functional import exact_log_probabilities, expected_log_probabilities

T = 6


@pytest.fixture
def predictions():
    draw = np.random.default_rng(0)
    logits, retain_logits = draw.normal(size=(2, 200, T)) * 2
    log_p = expected_log_probabilities(logits, retain_logits).numpy()
    return log_p, draw.integers(T, size=200), 1 / (1 + np.exp(-retain_logits))


def rendered(drawn):
    """The figure after drawing. Only then the layout is made, and warns if it does not fit."""
    figure = getattr(drawn, "figure", drawn)
    figure.draw_without_rendering()
    return figure


def test_contours():
    figure = rendered(plots.contours([(0.9, 0.4), (0.5, 0.5)]))
    softmax, shifted, _, _ = figure.axes
    assert softmax.get_title() == "softmax"
    # The second class is dropped more often, so the first class wins at equal logits.
    at_centre = np.exp(exact_log_probabilities(np.zeros(2), np.log([9.0, 2 / 3])))[0]
    assert at_centre == pytest.approx(0.9 * 0.6 + (0.9 * 0.4 + 0.1 * 0.6) / 2)
    labels = {text.get_text(): text for text in shifted.texts}
    for text in labels.values():
        x, y = text.get_position()
        p = np.exp(exact_log_probabilities(np.array([x, y]), np.log([9.0, 2 / 3])))[0]
        assert p == pytest.approx(float(text.get_text()), abs=0.02)
    assert labels


def test_decision_boundaries():
    x = np.random.default_rng(0).normal(size=(50, 2)).astype("float32")
    y = (x[:, 0] > 0).astype(int)
    seen = []

    def predict(grid):
        seen.append(grid)
        return np.stack([-grid[:, 0], grid[:, 0]], axis=-1)

    figure = rendered(plots.decision_boundaries({"one": predict, "two": predict}, x, y))
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    assert seen[0].shape == (40_000, 2)
    assert seen[0].dtype == np.float32
    boundary = figure.axes[0].collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(boundary[:, 0], 0, atol=0.05)
    points = [c.get_offsets() for c in figure.axes[0].collections if len(c.get_offsets()) > 1]
    assert sum(map(len, points)) == 50
    with pytest.raises(ValueError, match=r"`output of flat` must have shape \(40000, T\)"):
        plots.decision_boundaries({"flat": lambda grid: grid[:, 0]}, x, y)
    with pytest.raises(ValueError, match=r"must be two classes or more.*'one'"):
        plots.decision_boundaries({"one": lambda grid: grid[:, :1]}, x, y)
    with pytest.raises(ValueError, match=r"in \[0, 2\)"):
        plots.decision_boundaries({"two": predict}, x, y + 1)


@pytest.mark.parametrize("classes", [6, 10, 12])
def test_decision_boundaries_with_many_classes(classes):
    x, y = np.random.default_rng(0).integers(9, size=(50, 2)), np.arange(50) % classes
    figure = plots.decision_boundaries(
        {"near": lambda grid: -np.abs(grid[:, :1] - np.arange(classes))}, x, y
    )
    figure.savefig(io.BytesIO())
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    looks = {
        (c.get_facecolor().tobytes(), c.get_paths()[0].vertices.tobytes())
        for c in legend.legend_handles
    }
    assert len(looks) == classes


def test_convergence():
    curves = {
        "base": {"step": np.arange(3), "test NLL": np.array([[3.0, 2.0, 1.0], [5.0, 2.0, 1.0]])},
        "adaptive": {"step": np.arange(3), "test NLL": np.array([[3.0, 1.0, 0.5]])},
    }
    figure = rendered(plots.convergence(curves, ["test NLL"]))
    (axes,) = figure.axes
    lines = [line.get_ydata().tolist() for line in axes.lines]
    assert lines == [[4, 2, 1], [3, 1, 0.5]]
    assert axes.get_yscale() == "log"
    styles = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 2
    curves["base"]["test NLL"] -= 3
    assert rendered(plots.convergence(curves, ["test NLL"])).axes[0].get_yscale() == "linear"
    for second, ends in ((3, [2 - 2**0.5, 2 + 2**0.5]), (9, [0.5, 5 + 32**0.5])):
        one = {"step": [1], "loss": [[1], [second]]}
        (band,) = plots.convergence({"one": one}, ["loss"]).axes[0].collections
        np.testing.assert_allclose(np.unique(band.get_paths()[0].vertices[:, 1]), ends)
    for seeds in ([[1]], [1, 2], []):
        with pytest.raises(ValueError, match=r"`loss of one` must have shape \(seeds, 2\)"):
            plots.convergence({"one": {"step": [1, 2], "loss": seeds}}, ["loss"])


def test_easy_and_hard(predictions):
    log_p, y, _ = predictions
    easy, hard = plots.easy_and_hard(log_p, y, 3)
    of_label = log_p[np.arange(200), y]
    assert of_label[easy].tolist() == sorted(of_label)[:-4:-1]
    assert of_label[hard].tolist() == sorted(of_label)[:3]
    assert [len(part) for part in plots.easy_and_hard(log_p[:2], y[:2], 3)] == [2, 2]


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_examples(predictions, channels):
    log_p, y, rho = (values[:3] for values in predictions)
    masks = (np.random.default_rng(0).random((3, 4, T)) < rho[:, None]).astype("float32")
    images = np.random.default_rng(1).random((3, 8, 8, *channels))
    figure = rendered(plots.examples(images, rho, log_p, y, masks, class_names="abcdef"))
    assert len(figure.axes) == 3 * 4 + 1  # and the colour bar
    for row, panels in enumerate(np.reshape(figure.axes[:12], (3, 4))):
        image, retained, predicted, drawn = (axes.get_images()[0].get_array() for axes in panels)
        np.testing.assert_array_equal(image, images[row].squeeze())
        np.testing.assert_allclose(retained, rho[row : row + 1])
        np.testing.assert_allclose(predicted, np.exp(log_p[row : row + 1]))
        np.testing.assert_array_equal(drawn, masks[row])
        assert panels[0].get_ylabel() == "abcdef"[y[row]]
        assert [axes.lines[0].get_xdata() for axes in panels[1:]] == [[y[row]]] * 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["true class"]
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_not_all_of_very_many_classes_have_a_name():
    rho, log_p = np.full((2, 1000), 0.5), np.log(np.full((2, 1000), 1e-3))
    figure = rendered(plots.examples(np.zeros((2, 4, 4)), rho, log_p, np.array([0, 999])))
    assert figure.axes[4].get_xticks().tolist() == list(range(0, 1000, 100))
    letters = "abcdefghijklmnopqrstuvwxyz"
    axes = rendered(plots.class_averages(np.eye(26), range(26), letters)).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list("adgjmpsvy")


@pytest.mark.parametrize(
    "image", [np.full((1, 4, 4), 0.4), np.full((1, 4, 4), 102, "uint8"), np.full((1, 1, 8, 3), 0.4)]
)
def test_examples_are_all_on_one_scale(image):
    rho, log_p = np.full((1, 2), 0.5), np.log(np.full((1, 2), 0.5))
    drawn = plots.examples(image, rho, log_p, [0]).axes[0].get_images()[0]
    np.testing.assert_allclose(drawn.get_array(), 0.4)
    assert drawn.get_array().shape == image.shape[1:]
    assert drawn.get_clim() == (0, 1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda p, y, r: plots.contours(),
        lambda p, y, r: plots.examples(np.zeros((4, 8, 8)), r[:4], p[:4], y[:4], r[:4, None]),
        lambda p, y, r: plots.class_averages(r, y),
        lambda p, y, r: plots.confusion(p, y, r),
    ],
    ids=["contours", "examples", "class_averages", "confusion"],
)
def test_zero_is_white_and_larger_values_are_darker(predictions, draw):
    figure = rendered(draw(*predictions))
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert {image.norm.vmin for image in images} == {0}
    assert {image.cmap(0.0) for image in images} == {(1, 1, 1, 1)}
    assert {image.cmap(1.0) for image in images} == {(0, 0, 0, 1)}


def test_contour_lines_stand_out():
    axes = plots.contours().axes[0]
    (lines,) = [item for item in axes.collections if isinstance(item, ContourSet)]
    background = axes.get_images()[0].cmap(lines.levels)
    assert (np.abs(lines.get_edgecolor() - background)[:, 0] > 0.4).all()  # Both are grey.


def test_class_averages_and_confusion(predictions):
    log_p, y, rho = predictions
    axes = rendered(plots.class_averages(rho, y)).axes[0]
    expected = [rho[y == label].mean(0) for label in range(T)]
    np.testing.assert_allclose(axes.get_images()[0].get_array(), expected)
    first, second, third, *_ = rendered(plots.confusion(log_p, y, rho)).axes
    probabilities = [np.exp(log_p[y == label]).mean(0) for label in range(T)]
    off = ~np.eye(T, dtype=bool)
    np.testing.assert_allclose(first.get_images()[0].get_array()[off], np.array(probabilities)[off])
    assert second.get_images()[0].get_array().mask.tolist() == np.eye(T, dtype=bool).tolist()
    points = third.collections[0].get_offsets()
    np.testing.assert_allclose(
        points, np.stack([np.array(expected)[off], np.array(probabilities)[off]], axis=-1)
    )


def test_what_has_no_value_is_hatched(predictions):
    log_p, y, rho = predictions
    absent = rendered(plots.class_averages(rho[y > 0], y[y > 0])).axes[0]
    assert np.ma.getmaskarray(absent.get_images()[0].get_array())[0].all()
    for axes in (absent, *rendered(plots.confusion(log_p, y, rho)).axes[:2]):
        assert axes.patch.get_hatch()
        assert axes.get_xlabel() == "class (hatched: no value)"
    complete = plots.class_averages(rho, y)
    assert not complete.patch.get_hatch()
    assert complete.get_xlabel() == "class"


def test_colours_of_confusion_go_from_zero_to_the_largest_value_off_the_diagonal(predictions):
    log_p, y, rho = predictions
    first, second = (axes.get_images()[0] for axes in plots.confusion(log_p, y, rho).axes[:2])
    assert first.get_clim() == (0, first.get_array().max())
    assert second.get_clim() == (0, second.get_array().max())
    certain = rendered(plots.confusion(np.log(np.eye(2) + 1e-30), [0, 1], np.eye(2)))
    assert certain.axes[0].get_images()[0].get_clim() == (0, 1)
    all_alike = rendered(plots.confusion(log_p, y, np.full_like(rho, 0.5)))
    assert "nan" in all_alike.axes[2].get_title()
    assert all_alike.axes[1].get_images()[0].get_clim() == (0, 0.5)


def test_top_and_bottom():
    axes = rendered(plots.top_and_bottom([0.9, 0.1, 0.5, 0.7, 0.3], count=1, label=1)).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.1]
    assert [bar.get_hatch() for bar in axes.patches] == ["", "///"]
    assert "3 more" in axes.texts[0].get_text()
    assert axes.get_xlabel() == "retain probability (hatched: true class)"
    axes = plots.top_and_bottom(np.array([[0.2, 0.4], [0.4, 1.0]]), count=1)
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [0.7, 0.3])
    assert not axes.texts
    assert axes.get_xlabel() == "retain probability"
    axes = plots.top_and_bottom([0.0, 1.0, 0.0])
    bottom, top = axes.get_ylim()
    assert all(top < bar.get_y() < bar.get_y() + bar.get_height() < bottom for bar in axes.patches)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_reliability_diagram(predictions, bins):
    log_p, y, _ = predictions
    axes = rendered(plots.reliability_diagram(log_p, y, bins)).axes[0]
    error = float(tf_dropmax.ExpectedCalibrationError(bins)(y, log_p))
    assert axes.get_title() == f"calibration error {100 * error:.1f} %"
    shares = np.array([bar.get_height() for bar in axes.patches])
    assert len(shares) == bins
    assert shares.sum() == pytest.approx(1)
    _, accuracy = axes.lines
    gaps = np.abs(accuracy.get_xdata() - accuracy.get_ydata())
    assert shares[shares > 0] @ gaps == pytest.approx(error)


def test_tensors_are_drawn_into_the_axes_of_the_caller(predictions):
    log_p, y, rho = (tf.constant(values) for values in predictions)
    figure = Figure(layout="constrained")
    first, second, third = figure.subplots(1, 3)
    assert plots.reliability_diagram(log_p, y, axes=first) is first
    assert plots.top_and_bottom(rho[0], axes=second) is second
    assert plots.class_averages(rho, y, axes=third) is third
    rendered(figure)
    rendered(plots.confusion(log_p, y, rho))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y, r: plots.reliability_diagram(p + 1, y), "tf.nn.log_softmax"),
        (lambda p, y, r: plots.reliability_diagram(np.exp(p), y), "sum to 1"),
        (lambda p, y, r: plots.reliability_diagram(p * np.nan, y), "sum to 1"),
        (lambda p, y, r: plots.reliability_diagram(p, y[:-1]), r"\(200,\)"),
        (lambda p, y, r: plots.reliability_diagram(p, y + 1.0), "integers"),
        (lambda p, y, r: plots.reliability_diagram(p, y + 1), r"in \[0, 6\)"),
        (lambda p, y, r: plots.reliability_diagram(p[:0], y[:0]), "at least one"),
        (lambda p, y, r: plots.reliability_diagram(p, y, bins=0), "bins"),
        (lambda p, y, r: plots.confusion(p, y, r[:, :3]), r"\(200, 6\)"),
        (lambda p, y, r: plots.confusion(p, y, 2 * r), r"in \[0, 1\]"),
        (lambda p, y, r: plots.class_averages(r, y, class_names="ab"), "each of the 6 classes"),
        (lambda p, y, r: plots.examples(np.zeros((3, 4, 4)), r, p, y), "height"),
        (lambda p, y, r: plots.examples(np.zeros((200, 4, 4)), r, p, y, masks=r), r"\(200, S, 6\)"),
        (lambda p, y, r: plots.decision_boundaries({"a": None}, r, y), r"\(N, 2\)"),
        (
            lambda p, y, r: plots.examples(np.full((200, 4, 4), 16.0), r, p, y),
            r"`images` must be in \[0, 1\]",
        ),
        (lambda p, y, r: plots.class_averages(r[:0], y[:0]), "at least one"),
        (lambda p, y, r: plots.confusion(p[:, :1], y, r), "two classes or more"),
        (lambda p, y, r: plots.contours([0.5, 0.5]), r"\(pairs, 2\)"),
        (lambda p, y, r: plots.contours([(0.5, 1.0)]), "pairs of numbers between 0 and 1"),
        (lambda p, y, r: plots.contours(limit=0), "`limit` must be a positive float"),
        (lambda p, y, r: plots.top_and_bottom([]), "at least one"),
        (lambda p, y, r: plots.top_and_bottom(r, label=6), r"`label` must be in \[0, 6\)"),
        (lambda p, y, r: plots.top_and_bottom(r, count=0), "count"),
    ],
)
def test_bad_input_is_refused(predictions, call, message):
    with pytest.raises(ValueError, match=message):
        call(*predictions)
