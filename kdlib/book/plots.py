"""The book's one figure style, and its few recurring figures."""

import io
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from torch import Tensor

# Okabe and Ito's palette, which survives colour blindness; a thing has one colour everywhere.
COLOURS = {
    "teacher": "#0072B2",
    "hard": "#D55E00",
    "distilled": "#009E73",
    "other": "#CC79A7",
    "grey": "#666666",
    "light": "#56B4E9",
    "amber": "#E69F00",
}


def use() -> None:
    """Set matplotlib to the book's style: white face, no frame, room for direct labels."""
    # A reader's own matplotlibrc must not change a page, or stop it (text.usetex).
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.prop_cycle": cycler(color=list(COLOURS.values())),
            "font.size": 10,
            "lines.linewidth": 2,
            "legend.frameon": False,
        }
    )


def digits(axes: Any, images: Tensor, titles: list[str] | None = None) -> None:
    """Digits side by side on the axes of a row: images (N, 28, 28), dark ink on white."""
    for number, (axis, image) in enumerate(zip(axes, images.cpu(), strict=False)):
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axis.set_axis_off()
        if titles:
            axis.set_title(titles[number], fontsize=9)


def svg(figure: Any) -> str:
    """A figure as SVG, the same text each time, and closed."""
    drawn = io.StringIO()
    # Without these, ids and the date would differ each time, and every drawing be a change.
    with plt.rc_context({"svg.hashsalt": "kdlib", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"
