"""Fractals in natural colours: images with edges at every scale, made without data.

The shapes are those of Datumaro's synthetic data generator (its FractalImageGenerator, after Kataoka et al. 2020,
"Pre-training without Natural Images"): iterated function systems of 2 to 7 affine maps, kept when they fill enough of
the picture, and varied by a table of weights. Datumaro colours them with a network of 129 MB. Here
they are given known statistics of photographs, which matter more for calibration than their appearance:

- colours along the principal axes of the RGB values of ImageNet (Krizhevsky et al. 2012, section 4.1),
- a background and surfaces whose amplitude falls off as a power of the frequency (Field 1987),
- several fractals that occlude each other, as objects do,
- brightness and contrast that vary from image to image as they do between photographs.

The free constants below were chosen by the distance of BatchNorm statistics on EfficientNet-Lite0, which needs no
photograph; `benchmarks/fractal.py` measures the time. `colorizer` colours them with the network instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovcalib.calibration.sources import Generated, Request
from ovcalib.errors import UsageError, excerpt, require

if TYPE_CHECKING:
    from ovcalib.records.model import ModelSpec

NEEDS: frozenset[str] = frozenset()

Array = NDArray[np.float32]

# Iterations before a point is on the attractor.
BURN_IN = 20
# Orbits that run side by side: enough to hide the interpreter, few enough for the caches.
WIDTH = 2_000
DIVERGED = 1e4
TABLE = 2**16

# A system is kept when so many points, each one pixel, fill this share of a square. The first test is a cheap sieve,
# the second is Datumaro's criterion.
ACCEPTANCE = ((3_000, 80, 0.15), (100_000, 512, 0.2))

# Principal axes (columns) and standard deviations of RGB on the 0..1 scale, and the mean colour.
COLOUR_AXES = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32)
COLOUR_STD = np.sqrt(np.array([0.2175, 0.0188, 0.0045], np.float32))
COLOUR_MEAN = np.array([0.485, 0.456, 0.406], np.float32)

# Fields of coloured noise that images share, shifted and mirrored for each.
NOISE_FIELDS = 16
# Images are painted at this size at least, and averaged down.
CANVAS = 128


@dataclass(frozen=True)
class Options:
    """
    points      of the attractors of one image, all layers together
    systems     different function systems to choose from
    layers      at most so many fractals occlude each other
    colorizer   folder with colorization_deploy_v2.prototxt, colorization_release_v2.caffemodel and pts_in_hull.npy
                (Zhang et al. 2016); colours one fractal an image with the network, as the publication does
    """

    points: int = 200_000
    systems: int = 64
    layers: int = 3
    colorizer: Path | None = None

    def __post_init__(self) -> None:
        if self.points < WIDTH or self.systems < 1 or self.layers < 1:
            raise ValueError(f"points must be at least {WIDTH}, systems and layers at least 1")


def generate(request: Request, options: Options) -> Generated:
    """Pixels, one image for each seed (seed, i)."""
    images = pictures(request.spec, request.seed, range(request.count), options, request.tick)
    return Generated(images, domain="pixels")


def pictures(
    spec: ModelSpec,
    seed: int,
    indices: Sequence[int],
    options: Options,
    tick: Callable[[int, str], None] = lambda done, note: None,
) -> NDArray[np.uint8]:
    """The images with these indices, uint8 [N, H, W, C]; image i comes from (seed, i) alone."""
    _, height, width = spec.input_shape
    systems = _systems(seed, options.systems)
    colour = Colorizer(options.colorizer) if options.colorizer else None
    fields = noise_fields(seed, *canvas_size(height, width))
    images = []
    for done, i in enumerate(indices, start=1):
        rng = np.random.default_rng((seed, 1, i))
        if colour:
            image = colour(rng, plain_fractal(rng, systems, height, width, options.points))
        else:
            image = natural_fractal(rng, systems, fields, height, width, options.points, options.layers)
        images.append(_channels(image, spec))
        tick(done, "")
    return np.stack(images)


@functools.lru_cache(maxsize=4)
def _systems(seed: int, count: int) -> list[System]:
    return [find_system(np.random.default_rng((seed, 0, k))) for k in range(count)]


# Function systems -----------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """Affine maps x' = a x + b y + e, y' = c x + d y + f.

    maps    float32 [n, 6], rows (a, b, c, d, e, f)
    table   int64 [TABLE]; a map occurs in proportion to its probability, to one part in 65,536
    """

    maps: Array
    table: NDArray[np.int64]


def draw_system(rng: np.random.Generator) -> System:
    """2 to 7 maps with parameters in (-1, 1), with probabilities in proportion to their areas, |ad - bc|."""
    maps = rng.uniform(-1, 1, (rng.integers(2, 8), 6)).astype(np.float32)
    area = np.abs(maps[:, 0] * maps[:, 3] - maps[:, 1] * maps[:, 2]).astype(np.float64)
    return System(maps, lookup_table(area / (1e-5 + area.sum())))


def lookup_table(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices 0..n-1 in proportion to their probabilities; drawing from it is seven times faster than a search."""
    # Entry t belongs to the first index whose cumulative probability reaches (t + 1/2) / TABLE.
    ends = np.floor(np.cumsum(probabilities)[:-1] * TABLE + 0.5).astype(np.int64)
    return np.repeat(np.arange(len(probabilities)), np.diff(ends, prepend=0, append=TABLE))


def find_system(rng: np.random.Generator) -> System:
    """The first system drawn that stays finite and fills enough of the picture."""
    while True:
        system = draw_system(rng)
        if all(_fills(rng, system, *test) for test in ACCEPTANCE):
            return system


def vary(rng: np.random.Generator, system: System) -> System:
    """One of Datumaro's 25 variants: at most one of the six parameters of all maps times 0.2, 0.6, 1.4 or 1.8."""
    row = int(rng.integers(25))
    if row == 0:
        return system
    weights = np.ones(6, np.float32)
    weights[(row - 1) // 4] += (-2, -1, 1, 2)[(row - 1) % 4] * np.float32(0.4)
    return System(system.maps * weights, system.table)


def choose_maps(rng: np.random.Generator, system: System, steps: int, width: int) -> NDArray[np.int64]:
    """The map that each of `width` orbits applies at each step, int64 [steps, width]."""
    return system.table[rng.integers(0, TABLE, (steps, width), dtype=np.uint16)]


def iterate(maps: Array, chosen: NDArray[np.int64]) -> Array:
    """Points of orbits that start at (0, 0), float32 [2, steps, width]; diverging orbits come out not finite.

    maps     float32 [n, 6]
    chosen   int64 [steps, width], the map that each orbit applies at each step
    """
    steps, width = chosen.shape
    # All maps are applied to all orbits by one matrix product, [2 n, 3] @ [3, width], and each orbit takes its own
    # result: less work for the processor than gathering six parameters an orbit.
    affine = np.ascontiguousarray(maps[:, [0, 1, 4, 2, 3, 5]].reshape(-1, 3))
    place = chosen * (2 * width) + np.arange(width)
    results = np.empty((len(affine), width), np.float32)
    x_results, y_results = results.reshape(-1), results.reshape(-1)[width:]
    state = np.zeros((3, width), np.float32)
    state[2] = 1
    points = np.empty((2, steps, width), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            np.matmul(affine, state, out=results)
            # With a mode, numpy writes into `out` without a buffer in between.
            np.take(x_results, place[step], out=state[0], mode="clip")
            np.take(y_results, place[step], out=state[1], mode="clip")
            points[:, step] = state[:2]
    return points


def attractor(rng: np.random.Generator, system: System, points: int) -> tuple[Array, NDArray[np.int64]]:
    """Points on the attractor, float32 [2, M], and the map that led to each, int64 [M].

    M falls short of `points` where orbits diverge.
    """
    width = min(WIDTH, max(1, points // 10))
    chosen = choose_maps(rng, system, -(-points // width) + BURN_IN, width)
    found = iterate(system.maps, chosen)[:, BURN_IN:].reshape(2, -1)
    led = chosen[BURN_IN:].reshape(-1)
    # Comparisons with NaN are false.
    if max(-found.min(), found.max()) < DIVERGED:
        return found, led
    kept = (np.abs(found) < DIVERGED).all(0)
    return found[:, kept], led[kept]


def _fills(rng: np.random.Generator, system: System, points: int, side: int, share: float) -> bool:
    found, _ = attractor(rng, system, points)
    if found.shape[1] < points:
        return False
    low, high = found.min(1, keepdims=True), found.max(1, keepdims=True)
    found -= low
    found /= np.maximum(high - low, 1e-9)
    found *= side - 1
    row, column = found.astype(np.int32)
    filled = np.zeros(side * side, bool)
    filled[row * side + column] = True
    return bool(np.count_nonzero(filled) >= share * side * side)


# Painting -------------------------------------------------------------------------------------


def canvas_size(height: int, width: int) -> tuple[int, int]:
    """Small images are painted several times larger, so that their details are those of photographs scaled down."""
    factor = max(1, -(-CANVAS // min(height, width)))
    return height * factor, width * factor


@functools.lru_cache(maxsize=2)
def noise_fields(seed: int, height: int, width: int, exponent: float = 1.436) -> Array:
    """Periodic noise in natural colours whose amplitude falls as 1 / frequency^exponent.

    returns   float32 [NOISE_FIELDS, H, W, 3], without mean
    """
    rng = np.random.default_rng((seed, 2))
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = np.inf  # no mean
    shape = (NOISE_FIELDS, 3, *frequency.shape)
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency**exponent
    fields = np.fft.irfft2(spectrum, s=(height, width))
    fields /= fields.std((-2, -1), keepdims=True)
    return np.asarray(np.moveaxis(fields, 1, -1).astype(np.float32) * COLOUR_STD @ COLOUR_AXES.T, np.float32)


def natural_colour(rng: np.random.Generator, spread: float = 0.55) -> Array:
    """A colour with the distribution of photographs, float32 [3] on the 0..1 scale, slightly beyond it at times."""
    along = rng.standard_normal(3, dtype=np.float32) * COLOUR_STD * np.float32(spread)
    return np.asarray(COLOUR_MEAN + along @ COLOUR_AXES.T, np.float32)


def natural_fractal(
    rng: np.random.Generator,
    systems: list[System],
    fields: Array,
    height: int,
    width: int,
    points: int,
    layers: int,
) -> NDArray[np.uint8]:
    """Fractals over a textured background, uint8 [height, width, 3].

    fields   float32 [K, H, W, 3], noise of the canvas's size
    points   of all layers together
    """
    size = canvas_size(height, width)
    image = natural_colour(rng) + 0.187 * _texture(rng, fields)
    count = int(rng.integers(1, layers + 1))
    for _ in range(count):
        system = vary(rng, systems[int(rng.integers(len(systems)))])
        found, chosen = attractor(rng, system, max(WIDTH, points // count))
        if found.shape[1] >= WIDTH // 2:
            image = _occlude(rng, image, fields, *_splat(rng, found, chosen, len(system.maps), *size))
    image = _expose(rng, image)
    factor = size[0] // height
    if factor > 1:
        image = image.reshape(height, factor, width, factor, 3).mean((1, 3))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _splat(
    rng: np.random.Generator, found: Array, chosen: NDArray[np.int64], maps: int, height: int, width: int
) -> tuple[Array, Array]:
    """Points a pixel and the mean map index (0..1) of those points, at a random place, angle and size."""
    low, high = np.percentile(found[:, ::64], (1, 99), axis=1)
    angle = rng.uniform(0, 2 * np.pi)
    scale = rng.uniform(0.5, 1.6) * max(height, width) / max(float((high - low).max()), 1e-6)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    place = rng.uniform(0.25, 0.75, 2) * (height, width)
    shift = place - turn @ ((low + high) / 2)
    row, column = (turn.astype(np.float32) @ found + shift.astype(np.float32)[:, None]).astype(np.int32)
    # As unsigned numbers, negative ones are too large as well.
    inside = (row.view(np.uint32) < height) & (column.view(np.uint32) < width)
    index = row[inside] * width + column[inside]
    density = np.bincount(index, minlength=height * width)
    tint = np.bincount(index, weights=chosen[inside], minlength=height * width) / (
        max(maps - 1, 1) * np.maximum(density, 1)
    )
    return density.reshape(height, width).astype(np.float32), tint.reshape(height, width).astype(np.float32)


def _occlude(rng: np.random.Generator, image: Array, fields: Array, density: Array, tint: Array) -> Array:
    """Lay a fractal over the image: dense parts are opaque and lit, each map has its colour."""
    blur = 1.466 * np.exp(0.696 * rng.standard_normal())
    lit = np.log1p(_smooth(density, blur))
    covered = lit[lit > 0.05]
    if not covered.size:
        return image
    lit /= np.percentile(covered[::7], 95)
    opacity = np.clip(8.936 * lit - 0.336, 0, 1)[..., None]
    share = _smooth(tint, blur)[..., None]
    first, second = natural_colour(rng), natural_colour(rng)
    surface = (second - first) * share
    surface += first
    surface *= 0.832 + 0.168 * np.minimum(lit, 1.3)[..., None]
    surface += 0.108 * _texture(rng, fields)
    surface -= image
    surface *= opacity
    return np.asarray(surface + image, np.float32)


def _expose(rng: np.random.Generator, image: Array) -> Array:
    """Give the image a brightness and a contrast that photographs have."""
    luminance = image @ np.full(3, 1 / 3, np.float32)
    mean = np.clip(rng.normal(0.437, 0.172), 0.1, 0.85)
    contrast = 0.201 * np.exp(0.211 * rng.standard_normal()) / (luminance.std() + 1e-6)
    return np.asarray((image - luminance.mean()) * np.float32(contrast) + np.float32(mean), dtype=np.float32)


def _texture(rng: np.random.Generator, fields: Array) -> Array:
    """One of the noise fields, shifted and mirrored."""
    field = fields[int(rng.integers(len(fields)))]
    if rng.random() < 0.5:
        field = field[:, ::-1]
    shift = int(rng.integers(field.shape[0])), int(rng.integers(field.shape[1]))
    return np.roll(field, shift, (0, 1))


def _smooth(values: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, sigma, truncate=3.0, mode="nearest")  # type: ignore[no-any-return]


def _channels(image: NDArray[np.uint8], spec: ModelSpec) -> NDArray[np.uint8]:
    """Grey for one-channel networks, by the luma weights of ITU-R BT.601, as Pillow converts; else RGB, repeated."""
    channels = spec.input_shape[0]
    if channels > 1:
        return image[..., np.arange(channels) % 3]
    luma: NDArray[np.float64] = image @ np.array([0.299, 0.587, 0.114])
    return (luma + 0.5).astype(np.uint8)[..., None]


# The published method -------------------------------------------------------------------------


def plain_fractal(
    rng: np.random.Generator, systems: list[System], height: int, width: int, points: int
) -> NDArray[np.uint8]:
    """Datumaro's grey picture, uint8 [H, W]: a random 3x3 patch of value 127 at every point, 6 pixels of margin."""
    if min(height, width) <= 12:
        raise UsageError(f"The published fractals need more than 12 pixels, not {height}x{width}.")
    found, _ = attractor(rng, vary(rng, systems[int(rng.integers(len(systems)))]), points)
    image = np.zeros((height, width), np.uint8)
    if not found.shape[1]:
        return image
    low, high = found.min(1, keepdims=True), found.max(1, keepdims=True)
    span = np.array([[height - 12], [width - 12]], np.float32)
    row, column = ((found - low) * (span / np.maximum(high - low, 1e-9)) + 6).astype(np.int32)
    hit = np.zeros((height, width), bool)
    hit[row, column] = True
    patch = rng.integers(1, 512)  # a non-empty subset of the nine pixels
    for bit in range(9):
        if patch >> bit & 1:
            image[np.roll(hit, (bit // 3 - 1, bit % 3 - 1), (0, 1))] = 127
    return image


class Colorizer:
    """Zhang et al. 2016, "Colorful Image Colorization", on files that the user has downloaded.

    Called with a generator and a grey picture, uint8 [H, W]; returns uint8 [H, W, 3], augmented as Datumaro does.
    """

    FILES = ("colorization_deploy_v2.prototxt", "colorization_release_v2.caffemodel", "pts_in_hull.npy")

    def __init__(self, folder: Path) -> None:
        missing = [name for name in self.FILES if not (folder / name).is_file()]
        if missing:
            raise UsageError(
                f"-O colorizer={folder}: {', '.join(missing)} is not there. Download it, or leave the option out."
            )
        cv2 = require("cv2", "quantize", "-O colorizer")
        prototxt, weights, hull = (str(folder / name) for name in self.FILES)
        try:
            self.net: Any = cv2.dnn.readNetFromCaffe(prototxt, weights)
            centres = np.load(hull).transpose().reshape(2, 313, 1, 1).astype(np.float32)
        except Exception as error:  # cv2.error, and whatever a damaged array raises
            raise UsageError(f"-O colorizer={folder}: the files cannot be read: {excerpt(error)}") from error
        self.net.getLayer(self.net.getLayerId("class8_ab")).blobs = [centres]
        self.net.getLayer(self.net.getLayerId("conv8_313_rh")).blobs = [np.full((1, 313), 2.606, np.float32)]

    def __call__(self, rng: np.random.Generator, grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        height, width = grey.shape
        lab = cv2.cvtColor(np.repeat(grey[..., None], 3, -1).astype(np.float32) / 255, cv2.COLOR_BGR2LAB)
        small = cv2.resize(lab[..., 0], (224, 224)) - 50
        self.net.setInput(cv2.dnn.blobFromImage(small))
        ab = cv2.resize(self.net.forward()[0].transpose(1, 2, 0), (width, height))
        rgb = cv2.cvtColor(np.concatenate((lab[..., :1], ab), -1).astype(np.float32), cv2.COLOR_LAB2RGB)
        rgb = (rgb - rgb.min()) / max(float(np.ptp(rgb)), 1e-6)
        return _augment(rng, (rgb * 255 + 0.5).astype(np.uint8))


def _augment(rng: np.random.Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirror, rotate by up to 30 degrees, fill black with one colour, and blur with probability 0.7."""
    import cv2

    if rng.random() < 0.5:
        image = np.fliplr(image)
    if rng.random() < 0.5:
        image = np.flipud(image)
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-30, 30), 1)
    image = np.asarray(cv2.warpAffine(np.ascontiguousarray(image), turn, (width, height)), np.uint8)
    colour = np.clip(natural_colour(rng) * 255, 0, 255).astype(np.uint8)
    image[(image == 0).all(-1)] = colour
    if rng.random() < 0.7:
        kernel = 2 * int(rng.integers(1, 8)) + 1
        image = np.asarray(cv2.GaussianBlur(image, (kernel, kernel), 0), np.uint8)
    return image
