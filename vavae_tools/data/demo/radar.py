"""What a radar hears of a walker: scatterers → echo → power over speed and time.

Every part of the body is a few points, and each sends back a wave whose phase turns as it comes nearer; the sum of
these waves, cut into short pieces and Fourier transformed, shows who moves how fast when: the micro-Doppler spectrogram
(Chen, "The Micro-Doppler Effect in Radar"). Shapes: K scatterers, T poses of the body, N pulses of the radar.
"""

import numpy as np

from vavae_tools.data.demo.walking import JOINTS, Person, joint_positions

CARRIER = 24e9  # Hz, of a continuous wave
WAVELENGTH = 299_792_458.0 / CARRIER  # m
TOP_SPEED = 7.0  # m/s, the rows go from + to - this
PULSE_RATE = 4 * TOP_SPEED / WAVELENGTH  # per second: just enough for these speeds
DURATION = 2.56  # s in one image
WINDOW = 0.05  # s that one column looks at
HEIGHT = 1.0  # m above the ground
NEAR = 5.5  # m, the closest the walker comes
PULSES_PER_POSE = 32  # the body is posed every 14 ms, and interpolated in between to 0.05 radian of phase
# seconds (T,) at which it is posed, from one interval before the first pulse to one after the last
POSE_TIMES = np.arange(-1, round(DURATION * PULSE_RATE / PULSES_PER_POSE) + 2) * PULSES_PER_POSE / PULSE_RATE
BLOCK = 8  # scatterers summed at a time: they stay in the processor's cache

# Part of the body, the joints at its two ends, how far from the first to the second its scatterers sit, and the
# amplitude of their common echo. A torso seen from the front outshines what swings beside it.
SEGMENTS = (
    ("torso", "pelvis", "neck", (0.1, 0.4, 0.7, 0.95), 0.70),
    ("torso", "neck", "head", (0.7,), 0.20),
    *(
        (part, f"{side} {start}", f"{side} {end}", places, amplitude)
        for side in ("left", "right")
        for part, start, end, places, amplitude in (
            ("torso", "hip", "hip", (0.0,), 0.12),
            ("torso", "shoulder", "shoulder", (0.0,), 0.12),
            ("leg", "hip", "knee", (0.2, 0.45, 0.7, 0.9), 0.22),
            ("leg", "knee", "ankle", (0.08, 0.22, 0.36, 0.5, 0.64, 0.78, 0.92), 0.22),
            ("foot", "ankle", "toe", (0.1, 0.45, 0.8), 0.08),
            ("arm", "shoulder", "elbow", (0.5, 0.9), 0.14),
            ("arm", "elbow", "hand", (0.2, 0.45, 0.7, 0.95), 0.16),
        )
    ),
)


_SCATTERERS = [
    (JOINTS.index(start), JOINTS.index(end), place, part, amplitude / len(places) ** 0.5)
    for part, start, end, places, amplitude in SEGMENTS
    for place in places
]
FIRST, LAST, WAY, PARTS, AMPLITUDE = map(np.array, zip(*_SCATTERERS, strict=True))
"""Every scatterer's two joints, its place between them, its part of the body, and its amplitude: (K,) each."""


def walk_before_radar(
    person: Person, rng: np.random.Generator, towards: bool, aspect: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each scatterer is from the radar, (K, T) metres, and how strong its echo, (K, T).

    The path, `aspect` degrees off the line of sight, ends `NEAR` metres from the radar or begins there.
    """
    times = POSE_TIMES
    uneven = 0.006 * slow_waves(rng, 1, times, 0.8)[0]  # the strides of one walk differ by about 1.5 %
    phase = rng.random() + times / person.stride_time + uneven
    ahead, aside, up = np.moveaxis(joint_positions(person, phase), -1, 0)  # (17, T) each
    ahead = ahead + person.speed * times
    angle = np.radians(aspect)
    away = np.cos(angle) * ahead - np.sin(angle) * aside
    x = NEAR + (person.speed * DURATION - away if towards else away)
    y = np.sin(angle) * ahead + np.cos(angle) * aside

    ranges = np.sqrt(sum((c[FIRST] + WAY[:, None] * (c[LAST] - c[FIRST])) ** 2 for c in (x, y, up - HEIGHT)))

    # Real limbs glint: their echo swells and fades with the way they turn, and its centre wanders over them.
    decibels = np.array([getattr(person, f"{part}_db") for part in PARTS])
    glint = 0.30 * slow_waves(rng, len(PARTS), times, 3.0) + 0.30 * slow_waves(rng, len(PARTS), phase, 2, whole=True)
    strengths = (AMPLITUDE * 10 ** (decibels / 20))[:, None] * (NEAR / ranges) ** 2 * np.exp(glint)
    ranges += 0.003 * slow_waves(rng, len(PARTS), times, 1.5) + WAVELENGTH * rng.random((len(PARTS), 1))

    # What is too fast for the pulse rate is filtered out, as before any sampler: it would come back at the far edge.
    speed = np.abs(np.gradient(ranges, times, axis=1))
    return ranges, strengths * np.clip((0.99 - speed / TOP_SPEED) / 0.06, 0, 1)


def slow_waves(
    rng: np.random.Generator, count: int, times: np.ndarray, highest: float, whole: bool = False
) -> np.ndarray:
    """Return (count, T) smooth random curves of unit deviation, of frequencies up to `highest`, or `whole` ones."""
    modes = 3
    shape = (modes, count, 1)
    frequencies = rng.integers(1, int(highest) + 1, shape) if whole else rng.uniform(0, highest, shape)
    turns = frequencies * times + rng.random(shape)  # (modes, count, T)
    return np.cos((2 * np.pi * turns).astype(np.float32)).sum(0) * (2 / modes) ** 0.5


def echo(ranges: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Return the complex echo (N,) of scatterers at `ranges` (K, T) metres with `strengths` (K, T).

    s(t) = sum of strength exp(-4 pi i range / wavelength): what comes nearer turns the phase forwards.
    """
    turns = -2 / WAVELENGTH * (ranges - ranges[0, 0])  # what all have in common is unseen
    signal = np.zeros((2, (ranges.shape[1] - 3) * PULSES_PER_POSE), np.float32)
    for start in range(0, len(ranges), BLOCK):
        phase = between(turns[start : start + BLOCK])
        phase = 2 * np.pi * (phase - np.rint(phase))
        strength = between(strengths[start : start + BLOCK])
        signal[0] += np.einsum("kn,kn->n", strength, np.cos(phase))
        signal[1] += np.einsum("kn,kn->n", strength, np.sin(phase))
    return signal[0] + 1j * signal[1]


def between(poses: np.ndarray) -> np.ndarray:
    """Values (K, T) at the pose times → (K, N) float32 at every pulse, by Catmull and Rom's cubic."""
    t = np.arange(PULSES_PER_POSE, dtype=np.float32) / PULSES_PER_POSE
    weights = np.stack((-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)) / 2
    fours = np.lib.stride_tricks.sliding_window_view(poses.astype(np.float32), 4, axis=1)  # (K, T - 3, 4)
    return (np.ascontiguousarray(fours) @ weights).reshape(len(poses), -1)


def received(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the echo `signal` (N,) with the still echo of the room, and with noise."""
    level = np.sqrt(np.mean(np.abs(signal) ** 2))
    room = level * 10 ** (rng.uniform(-30, -18) / 20) * np.exp(2j * np.pi * rng.random())
    gain = 10 * np.log10(WINDOW * PULSE_RATE)  # dB by which a column lifts a tone over the noise
    noise = rng.standard_normal((2, signal.size), dtype=np.float32)
    noise *= level * 10 ** ((gain - rng.uniform(38, 46)) / 20) / 2**0.5
    return (signal + room + noise[0] + 1j * noise[1]).astype(np.complex64)


def spectrogram(signal: np.ndarray, size: int) -> np.ndarray:
    """Return the power (size, size) float32 of `signal` (N,): speeds from + to - TOP_SPEED downwards, time rightwards.

    Row r is for the speed TOP_SPEED (1 - (2r + 1) / size): upside down, a walk towards the radar is one away from it.
    """
    from scipy.fft import ifft

    length = min(round(WINDOW * PULSE_RATE), size)
    # The window carries the highest speed to frequency 0; an inverse transform then counts the speeds downwards.
    window = np.hanning(length + 2)[1:-1] * np.exp(-1j * np.pi * (1 - 1 / size) * np.arange(length))
    starts = np.rint(np.linspace(0, signal.size - length, size)).astype(int)
    pieces = np.lib.stride_tricks.sliding_window_view(signal, length)[starts] * window.astype(np.complex64)
    spectrum = ifft(pieces, size, axis=1)  # (time, speed)
    return np.ascontiguousarray((spectrum.real**2 + spectrum.imag**2).T)
