"""Pictures of what a head does: arrays in, matplotlib figures out. Needs `pip install 'tf_dropmax[plots]'`.

Nothing here shows or saves a picture, and nothing registers with pyplot: call `savefig` on what is returned (for axes, on
`axes.figure`). Lines differ by style and marker, not by colour alone, and colours grow darker with the value, so that
all of it can be read in grey print and by the colour-blind. Figures and equations are numbered as in arXiv:1712.07834v1.
"""

import numpy as np

from tf_dropmax import functional
from tf_dropmax.checks import check_number, check_positive_int

try:
    from matplotlib.figure import Figure
    from matplotlib.markers import CARETDOWN
    from matplotlib.ticker import LogLocator, MaxNLocator
    from scipy.stats import spearmanr
except ImportError as error:
    raise ImportError("tf_dropmax.plots needs matplotlib and scipy: pip install 'tf_dropmax[plots]'") from error

_COLOURS = "cividis_r"
_HUES = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINES = tuple(zip(_HUES * 10, "osD^vPX*<>" * 7, strict=True))
_DASHES = ("-", "--", "-.", ":")


def contours(retain_probabilities=((0.9, 0.9), (0.5, 0.5), (0.9, 0.4)), limit=5.0):
    """Figure 2: the probability of the first of two classes, by their logits, for the softmax and for DropMax.

    DropMax is the exact expectation (16) here. Where both classes are dropped as often, contours move apart: the prediction is
    less sure. Where one is dropped more often, they move to its side, and it takes a far larger logit, if any, to win.

    Args:
        retain_probabilities: Sequence of pairs of floats in (0, 1), the retain probabilities of the two classes; one panel
            for each. Defaults to `((0.9, 0.9), (0.5, 0.5), (0.9, 0.4))`.
        limit: Positive float; logits go from `-limit` to `limit`. Defaults to 5.0.

    Returns:
        A `matplotlib.figure.Figure`, one row of `1 + len(retain_probabilities)` panels.

    Raises:
        ValueError: if a retain probability is not between 0 and 1, or `limit` is not positive.

    Example:

    >>> figure = plots.contours([(0.9, 0.2)])
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['softmax', 'DropMax, retained: 0.9, 0.2']
    """
    pairs = np.asarray(retain_probabilities, "float64")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not ((pairs > 0) & (pairs < 1)).all():
        raise ValueError(f"`retain_probabilities` must be pairs of numbers between 0 and 1. Received: {retain_probabilities!r}")
    limit = check_number("limit", limit, "a positive float", lambda value: 0 < value < np.inf)
    line = np.linspace(-limit, limit, 81)
    logits = np.stack(np.meshgrid(line, line), axis=-1)
    panels = {"softmax": functional.softmax(logits)}
    for pair in pairs:
        retain_logits = np.broadcast_to(np.log(pair / (1 - pair)), logits.shape)
        panels[f"DropMax, retained: {pair[0]:g}, {pair[1]:g}"] = functional.exact(logits, retain_logits)
    figure = Figure(figsize=(2.9 * len(panels), 3.1), layout="constrained")
    for axes, (title, log_p) in zip(np.ravel(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True):
        p = np.exp(log_p)[..., 0]
        drawn = axes.contourf(line, line, p, np.linspace(0, 1, 11), cmap=_COLOURS)
        lines = axes.contour(line, line, p, np.linspace(0.1, 0.9, 5), colors="white", linewidths=0.8)
        for text in axes.clabel(lines, fmt="%.1f", fontsize=7, colors="white"):
            text.set_bbox({"facecolor": "black", "alpha": 0.5, "pad": 0.6, "linewidth": 0})
        axes.set(title=title, xlabel="logit of the first class", aspect="equal")
        axes.title.set_fontsize(9)
    figure.axes[0].set_ylabel("logit of the second class")
    figure.colorbar(drawn, ax=figure.axes, label="probability of the first class", shrink=0.85)
    return figure


def decision_boundaries(predictors, x, y):
    """Figure 1(b): which class is predicted where, for inputs of two numbers.

    Args:
        predictors: Dictionary `{title: function}`; a function maps inputs, shape `(N, 2)`, to log-probabilities, logits or
            probabilities, shape `(N, T)`, T at least 2, e.g. `lambda x: model.predict(x, verbose=0)`. One panel for each.
        x: Array, shape `(N, 2)`, the points to draw.
        y: Integer array, shape `(N,)`, their classes, below T.

    Returns:
        A `matplotlib.figure.Figure`, one row of panels: classes as shades and markers, boundaries as lines.

    Raises:
        ValueError: if there is no function, shapes are not as said, or classes are out of range.

    Example:

    >>> x, y = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1])
    >>> figure = plots.decision_boundaries({"nearest": lambda x: x[:, ::-1]}, x, y)
    >>> len(figure.axes)
    1
    """
    x = _array("x", x, "(N, 2)", lambda a: a.ndim == 2 and a.shape[1] == 2)
    y = _labels("y", y, len(x))
    if not predictors:
        raise ValueError("`predictors` must have a function in it. Received: none")
    margin = 0.15 * np.maximum(np.ptp(x, axis=0), 1e-3)
    first, second = (np.linspace(low, high, 200) for low, high in zip(x.min(0) - margin, x.max(0) + margin, strict=True))
    grid = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2).astype(np.result_type(x, "float32"))
    figure = Figure(figsize=(3.4 * len(predictors), 3.4), layout="constrained")
    for axes, (title, predict) in zip(
        np.ravel(figure.subplots(1, len(predictors), sharey=True)), predictors.items(), strict=True
    ):
        outputs = np.asarray(predict(grid))
        if outputs.ndim != 2 or len(outputs) != len(grid) or outputs.shape[1] < 2:
            raise ValueError(f"{title!r} must return shape ({len(grid)}, T), T at least 2. Received: shape {outputs.shape}")
        count = outputs.shape[1]
        _labels("y", y, len(x), count)
        classes = outputs.argmax(-1).reshape(200, 200)
        axes.pcolormesh(first, second, classes, cmap="Greys", vmin=-0.5, vmax=3 * count, rasterized=True)
        for label in range(count):
            if 0 < (classes == label).mean() < 1:
                axes.contour(first, second, classes == label, [0.5], colors="black", linewidths=1)
            colour, marker = _LINES[label % len(_LINES)]
            axes.scatter(
                *x[y == label].T, s=28, color=colour, marker=marker, edgecolors="black", linewidths=0.5, label=str(label)
            )
        axes.set(title=title, xticks=[], yticks=[])
    columns = min(count, 5 * len(predictors))
    figure.set_figheight(3.4 + 0.2 * -(-count // columns))
    style = {"title": "class", "frameon": False, "handlelength": 1, "handletextpad": 0.3, "columnspacing": 1}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **style)
    return figure


def convergence(curves, measures=("train NLL", "test NLL", "test error %")):
    """Figure 3: how training went, method by method: the mean over the seeds, and one standard deviation around it.

    Args:
        curves: `{method: {"step": (points,), measure: (seeds, points), ...}}`, as
            `tf_dropmax.experiments.convergence.curves` returns it.
        measures: Sequence of the measures to draw, one panel for each. Defaults to
            `("train NLL", "test NLL", "test error %")`.

    Returns:
        A `matplotlib.figure.Figure`. Axes that hold positive values only are logarithmic; the bands there do not go below half
        the smallest seed.

    Raises:
        ValueError: if there is no curve, or one lacks a measure, or has not as many values as steps, at least one.

    Example:

    >>> curves = {"base": {"step": [1, 2, 3], "test NLL": [[0.9, 0.5, 0.4], [0.8, 0.6, 0.4]]}}
    >>> figure = plots.convergence(curves, ["test NLL"])
    >>> figure.axes[0].get_ylabel()
    'test NLL'
    """
    if not curves or not measures:
        raise ValueError(f"There must be curves and measures. Received: methods {list(curves)}, measures {list(measures)}")
    for method, curve in curves.items():
        absent = [name for name in ("step", *measures) if name not in curve]
        if absent:
            raise ValueError(f"The curve of {method!r} lacks {absent}. Received: {sorted(curve)}")
        points = np.size(curve["step"])
        for measure in measures:
            sizes = [np.size(seed) for seed in curve[measure]]
            if points == 0 or set(sizes) != {points}:
                raise ValueError(
                    f"{measure!r} of {method!r} must have shape (seeds, points), a value for each step, at least one. "
                    f"Received: {points} steps, seeds of {sizes} values"
                )
    figure = Figure(figsize=(3.6 * len(measures), 3.6), layout="constrained")
    for axes, measure in zip(np.ravel(figure.subplots(1, len(measures))), measures, strict=True):
        positive = all(np.min(curve[measure]) > 0 for curve in curves.values())
        for index, (method, curve) in enumerate(curves.items()):
            colour, marker = _LINES[index % len(_LINES)]
            values = np.asarray(curve[measure], "float64").reshape(-1, np.size(curve["step"]))
            mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
            low, high = mean - spread, mean + spread
            if positive:
                low = np.maximum(low, values.min(0) / 2)
            style = {"color": colour, "linestyle": _DASHES[index % len(_DASHES)], "marker": marker, "markersize": 4}
            axes.plot(curve["step"], mean, label=method, markevery=(index, max(1, len(mean) // 6)), **style)
            axes.fill_between(curve["step"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="training step", ylabel=measure)
        if positive:
            _logarithmic(axes, "y", (1, 2, 5))
        if all(np.min(curve["step"]) > 0 for curve in curves.values()):
            _logarithmic(axes, "x", (1, 3))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(curves), 4), frameon=False)
    return figure


def _logarithmic(axes, which, digits):
    """With plain numbers along the axis, those that begin with one of the digits."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def easy_and_hard(log_probabilities, labels, count=4):
    """Which examples a classifier finds easiest and hardest: those with the highest and the lowest probability of their label.

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`.
        count: Positive int, how many of each; at most `N`. Defaults to 4.

    Returns:
        Two integer arrays of `count` indices: easiest first, hardest first.

    Raises:
        ValueError: if shapes do not go together, values are not log-probabilities, or `count` is not positive.

    Example:

    >>> easy, hard = plots.easy_and_hard(np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), [0, 0, 0], count=1)
    >>> easy.tolist(), hard.tolist()
    ([0], [2])
    """
    log_probabilities, labels = _predictions(log_probabilities, labels)
    order = np.argsort(log_probabilities[np.arange(len(labels)), labels], kind="stable")
    count = min(check_positive_int("count", count), len(order))
    return order[::-1][:count], order[:count]


def examples(images, retain_probabilities, log_probabilities, labels, masks=None, class_names=None):
    """Figure 4(a-c): examples beside what the head makes of them, a row of heat maps for each.

    Args:
        images: Array, shape `(N, height, width)` or `(N, height, width, 1 or 3)`, values in [0, 1] or bytes (uint8).
        retain_probabilities: Array, shape `(N, T)`, from `head.retain_probabilities`.
        log_probabilities: Array, shape `(N, T)`, what the model predicts.
        labels: Integer array, shape `(N,)`; a triangle above the heat maps points at the label.
        masks: Array, shape `(N, S, T)`, sampled masks in [0, 1], drawn below each other; or `None`: no masks. Defaults to
            `None`.
        class_names: Sequence of T strings, or `None`: numbers. Defaults to `None`.

    Returns:
        A `matplotlib.figure.Figure`, N rows.

    Raises:
        ValueError: if shapes do not go together, values are not in [0, 1], or predictions are not log-probabilities.

    Example:

    >>> rho, log_p = np.array([[0.9, 0.2]]), np.log([[0.8, 0.2]])
    >>> figure = plots.examples(np.zeros((1, 8, 8)), rho, log_p, labels=[0])
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['', 'retain probability', 'prediction']
    """
    log_probabilities, labels = _predictions(log_probabilities, labels)
    retain = _shares("retain_probabilities", retain_probabilities, log_probabilities.shape)
    images = _array(
        "images",
        images,
        f"({len(labels)}, height, width[, 1 or 3])",
        lambda a: a.ndim in (3, 4) and len(a) == len(labels) and a.shape[3:] in ((), (1,), (3,)),
    )
    images = _shares("images", images / 255 if images.dtype == "uint8" else images, images.shape)
    names = _names(class_names, log_probabilities.shape[1])
    columns = {"retain probability": retain[:, None], "prediction": np.exp(log_probabilities)[:, None]}
    if masks is not None:
        masks = _array("masks", masks, "(N, S, T)", lambda a: a.ndim == 3)
        columns["sampled masks"] = _shares("masks", masks, (len(labels), masks.shape[1], len(names)))
    height = 0.75 if masks is None else max(0.75, 0.13 * masks.shape[1])
    figure = Figure(figsize=(1 + 3.1 * len(columns), 0.8 + height * len(labels)), layout="constrained")
    grid = figure.subplots(len(labels), 1 + len(columns), squeeze=False, width_ratios=[1, *[3.2] * len(columns)])
    for row, cells in enumerate(grid):
        cells[0].imshow(images[row].squeeze(), cmap="gray_r", vmin=0, vmax=1)
        cells[0].set(xticks=[], yticks=[])
        cells[0].set_ylabel(names[labels[row]], rotation=0, ha="right", va="center")
        for axes, (title, values) in zip(cells[1:], columns.items(), strict=True):
            drawn = axes.imshow(values[row], cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
            axes.plot(labels[row], 1, "k", marker=CARETDOWN, transform=axes.get_xaxis_transform(), clip_on=False)
            axes.set_yticks([])
            axes.set_title(title if row == 0 else "", fontsize=10, pad=9)
            _name_ticks(axes.xaxis, names if row == len(labels) - 1 else [])
    figure.colorbar(drawn, ax=grid, shrink=min(1, 2.5 / figure.get_figheight()), pad=0.02)
    return figure


def class_averages(retain_probabilities, labels, class_names=None, axes=None):
    """Figure 4(d): mean retain probability of every class, over the examples of every class.

    Args:
        retain_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`. Rows of classes without an example stay empty.
        class_names: Sequence of T strings, or `None`: numbers. Defaults to `None`.
        axes: `matplotlib.axes.Axes` to draw into, or `None`: new ones. Defaults to `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if shapes do not go together, or values are not in [0, 1].

    Example:

    >>> axes = plots.class_averages(np.array([[0.9, 0.2], [0.3, 0.7]]), labels=[0, 1])
    >>> axes.get_images()[0].get_array().tolist()
    [[0.9, 0.2], [0.3, 0.7]]
    """
    retain = _shares("retain_probabilities", retain_probabilities)
    labels = _labels("labels", labels, len(retain), retain.shape[1])
    return _matrix(_means_by_class(retain, labels), class_names, "mean retain probability", axes)


def top_and_bottom(retain_probabilities, class_names=None, count=5, label=None, axes=None):
    """Figure 4(e): the classes that are retained most and least for an example, or on average over some.

    Args:
        retain_probabilities: Array, shape `(T,)`, or `(N, T)` to be averaged.
        class_names: Sequence of T strings, or `None`: numbers. Defaults to `None`.
        count: Positive int, how many of each; all, if there are not more than twice as many. Defaults to 5.
        label: `None` or int in [0, T), a class whose bar is hatched, if it is among them. Defaults to `None`.
        axes: `matplotlib.axes.Axes` to draw into, or `None`: new ones. Defaults to `None`.

    Returns:
        The axes, with a horizontal bar for each class, the most retained at the top.

    Raises:
        ValueError: if shapes do not go together, values or `label` are out of range, or `count` is not positive.

    Example:

    >>> axes = plots.top_and_bottom([0.9, 0.5, 0.1, 0.7], ["cat", "dog", "ship", "fox"], count=1)
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['cat', 'ship']
    """
    count = check_positive_int("count", count)
    retain = _shares("retain_probabilities", np.atleast_2d(np.asarray(retain_probabilities, "float64"))).mean(0)
    names = _names(class_names, len(retain))
    if label is not None and label not in range(len(retain)):
        raise ValueError(f"`label` must be in [0, {len(retain)}). Received: label={label!r}")
    order = np.argsort(-retain, kind="stable")
    cut = len(order) > 2 * count
    shown = np.concatenate([order[:count], order[-count:]]) if cut else order
    places = np.arange(len(shown)) + (np.arange(len(shown)) >= count if cut else 0)
    axes = axes or Figure(figsize=(4, 0.6 + 0.27 * (places[-1] + 1)), layout="constrained").subplots()
    axes.barh(places, retain[shown], color="0.6", edgecolor="black", hatch=["///" if k == label else "" for k in shown])
    axes.set(xlim=(0, 1), xlabel="retain probability", yticks=places, yticklabels=[names[k] for k in shown])
    if cut:
        axes.text(0.02, count, f"... {len(order) - 2 * count} more ...", va="center", fontsize=8)
    axes.invert_yaxis()
    return axes


def reliability_diagram(log_probabilities, labels, bins=15, axes=None):
    """Accuracy against confidence, in bins of equal width, and how many examples each bin holds.

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`.
        bins: Positive int. Defaults to 15.
        axes: `matplotlib.axes.Axes` to draw into, or `None`: new ones. Defaults to `None`.

    Returns:
        The axes. The title gives the expected calibration error, of `tf_dropmax.ExpectedCalibrationError`.

    Raises:
        ValueError: if shapes do not go together, values are not log-probabilities, or `bins` is not positive.

    Example:

    >>> axes = plots.reliability_diagram(np.log([[0.9, 0.1], [0.6, 0.4]]), [0, 1], bins=2)
    >>> axes.get_title()
    'calibration error 25.0 %'
    """
    log_probabilities, labels = _predictions(log_probabilities, labels)
    bins = check_positive_int("bins", bins)
    confidence = np.exp(log_probabilities.max(-1))
    right = log_probabilities.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    number = np.bincount(index, minlength=bins)
    full = number > 0
    mean_confidence, accuracy = (
        np.bincount(index, values, bins)[full] / number[full] for values in (confidence, right.astype("float64"))
    )
    gap = 100 * np.sum(number[full] * np.abs(mean_confidence - accuracy)) / len(labels)
    axes = axes or Figure(figsize=(3.8, 3.6), layout="constrained").subplots()
    places = (np.arange(bins) + 0.5) / bins
    axes.bar(places, number / len(labels), 1 / bins, color="0.85", edgecolor="0.6", label="share of the examples")
    axes.plot([0, 1], [0, 1], "k:", linewidth=1, label="perfect calibration")
    axes.plot(mean_confidence, accuracy, "o-", color="#0072B2", markersize=5, label="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", title=f"calibration error {gap:.1f} %")
    axes.legend(frameon=False, fontsize=8)
    return axes


def confusion(log_probabilities, labels, retain_probabilities, class_names=None):
    """Confusion against retain probability: does the head retain the classes that a class is mistaken for?

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`.
        retain_probabilities: Array, shape `(N, T)`.
        class_names: Sequence of T strings, or `None`: numbers. Defaults to `None`.

    Returns:
        A `matplotlib.figure.Figure` of three panels, for every pair of a true and another class: the mean probability of
        the other, its mean retain probability, and the one against the other with their rank correlation. The diagonals are
        left out; colours span the range of what is left.

    Raises:
        ValueError: if shapes do not go together, values are not log-probabilities, or retain probabilities not in [0, 1].

    Example:

    >>> rho = np.array([[0.9, 0.4, 0.1], [0.3, 0.7, 0.2], [0.2, 0.6, 0.9]])
    >>> figure = plots.confusion(np.log(rho / rho.sum(1, keepdims=True)), [0, 1, 2], rho)
    >>> figure.axes[2].get_title()
    'rank correlation 0.99'
    """
    log_probabilities, labels = _predictions(log_probabilities, labels)
    retain = _shares("retain_probabilities", retain_probabilities, log_probabilities.shape)
    confused, retained = (_means_by_class(values, labels) for values in (np.exp(log_probabilities), retain))
    for matrix in (confused, retained):
        np.fill_diagonal(matrix, np.nan)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    first, second, third = figure.subplots(1, 3)
    _matrix(confused, class_names, "mean probability", first, (0, np.nanmax(confused)))
    _matrix(retained, class_names, "mean retain probability", second, (np.nanmin(retained), np.nanmax(retained)))
    known = np.isfinite(confused)
    x, y = retained[known], np.maximum(confused[known], 1e-12)
    size = np.clip(5000 / len(x), 0.5, 16)
    third.scatter(x, y, s=size, facecolors="none", edgecolors="black", linewidths=size / 20)
    third.set(xlabel="mean retain probability", ylabel="mean probability", yscale="log")
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    third.set_title(f"rank correlation {spearmanr(x, y).statistic if varied else np.nan:.2f}")
    return figure


def _matrix(values, class_names, title, axes, limits=(0, 1)):
    names = _names(class_names, len(values))
    axes = axes or Figure(figsize=(4.4, 3.8), layout="constrained").subplots()
    low, high = limits if np.ptp(limits) > 1e-6 else (0, 1)
    drawn = axes.imshow(values, cmap=_COLOURS, vmin=low, vmax=high)
    _name_ticks(axes.xaxis, names)
    _name_ticks(axes.yaxis, names)
    axes.set(title=title, xlabel="class", ylabel="true class")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.9)
    return axes


def _name_ticks(axis, names):
    """Names of classes along an axis: all of up to twenty; of more about ten, evenly spaced."""
    count = len(names)
    ticks = range(count) if count <= 20 else MaxNLocator(10, integer=True).tick_values(0, count - 1)
    ticks = [int(k) for k in ticks if k < count]
    axis.set_ticks(ticks, [names[k] for k in ticks])
    crowded = axis.axis_name == "x" and max((len(names[k]) for k in ticks), default=0) * len(ticks) > 30
    axis.set_tick_params(labelsize=8, labelrotation=90 if crowded else 0)


def _means_by_class(values, labels):
    """Mean of the rows of each class, shape `(T, T)`; NaN for a class without rows."""
    count = values.shape[1]
    means = np.full((count, count), np.nan)
    for label in np.unique(labels):
        means[label] = values[labels == label].mean(0)
    return means


def _array(name, value, shape, fits):
    value = np.asarray(value)
    if not fits(value) or value.size == 0:
        raise ValueError(f"`{name}` must have shape {shape} and at least one value. Received: shape {value.shape}")
    return value


def _labels(name, labels, count, classes=None):
    labels = _array(name, labels, f"({count},)", lambda a: a.shape == (count,))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{name}` must be integers. Received: dtype {labels.dtype}")
    if labels.min() < 0 or (classes and labels.max() >= classes):
        raise ValueError(f"`{name}` must be in [0, {classes or 'T'}). Received: labels from {labels.min()} to {labels.max()}")
    return labels


def _predictions(log_probabilities, labels):
    log_p = _array("log_probabilities", log_probabilities, "(N, T)", lambda a: a.ndim == 2 and a.shape[1] > 1)
    log_p = log_p.astype("float64")
    off = np.abs(np.exp(log_p).sum(-1) - 1) if (log_p <= 1e-3).all() else np.ones(1)
    if not (off < 1e-3).all():
        raise ValueError(
            "`log_probabilities` must be logarithms of probabilities that sum to 1, as a DropMaxHead predicts them; "
            f"of logits, take `tf.nn.log_softmax`. Received: values from {log_p.min():.4g} to {log_p.max():.4g}"
        )
    return log_p, _labels("labels", labels, len(log_p), log_p.shape[1])


def _shares(name, values, shape=None):
    said = "(N, T)" if shape is None else str(tuple(shape))
    values = _array(name, values, said, lambda a: a.ndim == 2 if shape is None else a.shape == tuple(shape)).astype("float64")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"`{name}` must be in [0, 1]. Received: values from {values.min()} to {values.max()}")
    return values


def _names(class_names, classes):
    names = [str(name) for name in (range(classes) if class_names is None else class_names)]
    if len(names) != classes:
        raise ValueError(f"`class_names` must have a name for each of the {classes} classes. Received: {len(names)} names")
    return names
