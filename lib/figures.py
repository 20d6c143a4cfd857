"""Drawings with Pillow alone: captioned pictures, loss curves, where the model looked."""

import itertools
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.cli import UserError, atomic

INK, PALE, PAPER = (40, 44, 52), (228, 230, 234), (255, 255, 255)
LINES = [(31, 108, 180), (225, 87, 42), (20, 148, 110), (150, 80, 170), (200, 150, 0), (120, 120, 120)]
GAP = 14                                                    # pixels between things
HEAT = np.array([(10, 5, 60), (110, 25, 150), (220, 55, 110), (255, 140, 50), (255, 245, 150)])  # low, high
WIDER_FONTS = "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf", "NotoSans-Regular.ttf"


def save(image: Image.Image, path) -> None:
    """Write a picture in the format that `path` names. Raises what `picture_format` does."""
    form = picture_format(path)
    with atomic(path) as temporary:
        image.save(temporary, format=form)


def picture_format(path) -> str:
    """Pillow's name for the format of `path`. Raises UserError if Pillow cannot write it."""
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form not in Image.SAVE:
        raise UserError(f"{path} does not name a picture format; call it {Path(path).stem}.png")
    return form


@lru_cache
def font(size: int, ascii: bool = True):
    """Pillow's own font, or, as that has little beyond ASCII, one of the system's if there is one."""
    for name in () if ascii else WIDER_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def wrap(text: str, face, width: float) -> list[str]:
    """Break `text` into lines of at most `width` pixels: at spaces, and within words wider than that."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and face.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".lstrip()
            while len(line) > 1 and face.getlength(line) > width:
                cut = next(n for n in range(1, len(line)) if face.getlength(line[: n + 1]) > width)
                lines.append(line[:cut])
                line = line[cut:]
        lines.append(line)
    return lines


def contact_sheet(images: list[Image.Image], texts: list[str], columns: int = 4, tile: int = 224,
                  size: int = 15) -> Image.Image:
    """PIL images, scaled to fit `tile` pixels, with the text of each wrapped below it."""
    rows, step = [], round(size * 1.3)
    width = GAP + (tile + GAP) * max(1, min(columns, len(images)))
    for start in range(0, len(images), columns):
        shown = [fit(image, tile) for image in images[start : start + columns]]
        faces = [font(size, text.isascii()) for text in texts[start : start + columns]]
        lines = [wrap(text[:2000], face, tile) for text, face in zip(texts[start:], faces)]
        height = max(image.height for image in shown)
        row = Image.new("RGB", (width, GAP + height + step * max(map(len, lines)) + GAP), PAPER)
        canvas = ImageDraw.Draw(row)
        for column, (image, face, text) in enumerate(zip(shown, faces, lines)):
            x = GAP + column * (tile + GAP)
            row.paste(image, (x + (tile - image.width) // 2, GAP + height - image.height))
            for n, line in enumerate(text):
                canvas.text((x + tile / 2, 1.5 * GAP + height + n * step), line, INK, face, anchor="ma")
        rows.append(row)
    return stack(rows)


def fit(image: Image.Image, tile: int) -> Image.Image:
    """The picture in RGB, scaled so that its longer side is `tile` pixels."""
    size = [max(1, round(side * tile / max(image.size))) for side in image.size]
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def loss_curve(curves: dict[str, list[tuple]]) -> Image.Image:
    """A line plot of {name: [(step, value), ...]}; values that are not finite leave a gap."""
    finite = [point for points in curves.values() for point in points if math.isfinite(point[1])]
    xs, ys = zip(*finite or [(0, 0), (0, 1)])
    x_ticks = round_ticks(min(0, *xs), max(8, *xs), 8)          # 8: steps are whole numbers
    y_ticks = round_ticks(min(ys), max(ys), 8)
    (x0, *_, x1), (y0, *_, y1) = x_ticks, y_ticks
    left, top, right, bottom = 280, 240, 3720, 1920             # drawn four times as large, then averaged

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    sheet, face = Image.new("RGB", (3840, 2160), PAPER), font(56)
    canvas = ImageDraw.Draw(sheet)
    for y in y_ticks:
        at = place(x0, y)[1]
        canvas.line([left, at, right, at], PALE, 4)
        canvas.text((left - 40, at), f"{y:,.6g}", INK, face, anchor="rm")
    for x in x_ticks:
        at = place(x, y0)[0]
        canvas.line([at, bottom, at, bottom + 20], INK, 4)
        canvas.text((at, bottom + 40), f"{x:,.6g}", INK, face, anchor="ma")
    canvas.line([left, bottom, right, bottom], INK, 4)
    canvas.text(((left + right) / 2, 2120), "step", INK, face, anchor="md")
    end = right                                                 # of the legend, from the right
    for colour, (name, points) in reversed([*zip(itertools.cycle(LINES), curves.items())]):
        for drawable, run in itertools.groupby(points, lambda point: math.isfinite(point[1])):
            if drawable:
                dots = [place(*point) for point in run]
                canvas.line(dots, colour, 8, joint="curve")
                canvas.circle(dots[-1], 12, colour)
        label = f"{name} {points[-1][1]:.4g}" if points else name
        canvas.text((end, 120), label, INK, face, anchor="rm")
        end -= face.getlength(label) + 96
        canvas.line([end, 122, end + 68, 122], colour, 12)
        end -= 112
    return sheet.reduce(4)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten, with `low` and `high` between them."""
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):
        low, high = low - max(0.5, abs(low) / 8), high + max(0.5, abs(high) / 8)
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step, 20 * step)
                if math.ceil(high / s) - math.floor(low / s) <= most)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def attention_sheet(image: Image.Image, words: list[str], maps: list[np.ndarray], columns: int = 7,
                    tile: int = 200) -> Image.Image:
    """A picture as it is, then once for each word under its map (h, w): brighter is where the model looked.

    Each map is scaled by its own maximum: compare places within a picture, not one picture with another.
    """
    image = fit(image, tile)
    tiles = [heat_over(image, np.asarray(m, dtype=np.float32)) for m in maps]
    return contact_sheet([image, *tiles], ["", *words], columns, tile)


def heat_over(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The picture under a map of weights (h, w), enlarged bilinearly."""
    weights = Image.fromarray(weights / max(weights.max(), 1e-12))
    weights = np.asarray(weights.resize(image.size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(HEAT))
    heat = np.stack([np.interp(weights, stops, channel) for channel in HEAT.T], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    seen = weights[..., None]
    mixed = (1 - seen) * 0.45 * grey + seen * 0.7 * np.asarray(image) + 0.4 * heat   # colour where it looked
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole
