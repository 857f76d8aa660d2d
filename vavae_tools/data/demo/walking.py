"""A walking person as moving points, and what a radar hears of them: power over speed and time.

Boulic, Thalmann & Thalmann, "A global human walking model with real-time kinematic personification", The Visual
Computer 6 (1990), describe every joint as a curve over one stride, fixed by the speed in leg lengths per second (RV).
Chen, "The Micro-Doppler Effect in Radar", puts point scatterers on that body, whose waves turn their phase as they come
nearer; their sum, cut into short pieces and Fourier transformed, shows who moves how fast when.

One stride is one turn of the phase u: the right heel strikes at 0, the left one at 0.5. Metres, seconds, degrees. The
body frame moves along: x forward, y to the left, z up. K scatterers, T poses of the body, N pulses of the radar.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

Array, Random = np.ndarray, np.random.Generator

# ---- the body

LEG = 0.53  # height of the hip, in body heights; the other lengths are in body heights too
THIGH, SHANK, FOOT = 0.245, 0.246, 0.143
TORSO, NECK_AND_HEAD = 0.288, 0.182
UPPER_ARM, FOREARM = 0.188, 0.152
HALF_HIPS, HALF_SHOULDERS = 0.0955, 0.1295

LIMB_JOINTS = ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "hand")
JOINTS = ("pelvis", "neck", "head", *(f"{side} {joint}" for side in ("left", "right") for joint in LIMB_JOINTS))
LATTICE = 1.2207440846 ** -np.arange(1.0, 4.0)  # powers of the root of x⁴ = x + 1
CURVE_POINTS = 512
HARMONICS = 7  # the published knots leave jumps in acceleration; people have none


@dataclass(frozen=True)
class Person:
    """How one person is built and walks. Gains are factors on the average walker of that size and speed."""

    height: float  # m
    speed: float  # m/s
    stride_time: float  # s, two steps
    arm_swing: float  # gain of the shoulder's swing
    arm_asymmetry: float  # the left arm swings (1 + this) times as far, the right one (1 - this) times
    elbow: float  # degrees more flexion than average
    knee: float  # gain of the knee's flexion
    ankle: float  # gain of the ankle's flexion
    leg_asymmetry: float  # the left knee flexes (1 + this) times as far, the right one (1 - this) times
    step_shift: float  # the left step comes this part of a stride late
    surge: float  # gain of the trunk's fore-and-aft sway
    bob: float  # gain of the trunk's rise and fall
    lean: float  # degrees the trunk leans forward
    torso_db: float  # echo of the torso, decibels above average
    leg_db: float  # of thighs and shanks
    foot_db: float
    arm_db: float

    @property
    def relative_speed(self) -> float:
        """The model's RV: leg lengths per second."""
        return self.speed / (LEG * self.height)


SPREADS = {  # mean and standard deviation over people, of surge and bob those of the logarithm
    **{"arm_asymmetry": (0.10, 0.20), "elbow": (0, 9), "knee": (0.88, 0.06), "ankle": (0.8, 0.1)},
    **{"leg_asymmetry": (0, 0.035), "step_shift": (0, 0.01), "surge": (0.15, 0.28), "bob": (0, 0.28), "lean": (3, 2.5)},
    **{"torso_db": (0, 2), "leg_db": (0, 2), "foot_db": (0, 2), "arm_db": (0, 2)},
}
WALK_SPREADS = {  # standard deviation over the walks of one person
    **{"arm_swing": 0.10, "arm_asymmetry": 0.03, "elbow": 2, "knee": 0.015, "leg_asymmetry": 0.005},
    **{"step_shift": 0.005, "surge": 0.05, "bob": 0.05, "lean": 0.5},
    **{"torso_db": 1, "leg_db": 1, "foot_db": 1, "arm_db": 1},
}


def cycle_time(relative_speed: float) -> float:
    return 1.346 / relative_speed**0.5


def relative_support(relative_speed: float) -> float:
    """Return the part of a stride during which one foot is on the ground."""
    return 0.752 - 0.143 / cycle_time(relative_speed)


def generator(seed: int, *numbers: int) -> Random:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=numbers)))


def draw_person(seed: int, number: int) -> Person:
    """Return person `number` of the people of `seed`: always the same one, however many are drawn.

    The spreads are those of published gait studies of healthy adults; no value is further than 2.2 standard deviations
    from its mean. Speed, cadence and arm swing, which show most, are spread evenly over the people of a seed (a
    Kronecker sequence of the three-dimensional golden ratio), so that no two of the first few are twins.
    """
    shift = generator(seed).random(3)
    even = 12**0.5 * ((shift + number * LATTICE) % 1 - 0.5)  # (3,), of unit deviation
    rng = generator(seed, number)
    height = _normal(rng, 1.767, 0.064) if rng.random() < 0.5 else _normal(rng, 1.632, 0.051)
    speed = float(1.34 + 0.17 * even[0])
    stride_time = cycle_time(speed / (LEG * height)) / float(1 + 0.055 * even[1])
    arm_swing = float(np.exp(0.15 + 0.36 * even[2]))
    drawn = {name: _normal(rng, *spread) for name, spread in SPREADS.items()}
    drawn |= {name: float(np.exp(drawn[name])) for name in ("surge", "bob")}
    return Person(height, speed, stride_time, arm_swing, **drawn)


def walk_again(person: Person, rng: Random) -> Person:
    """Return the same person on another walk: a little faster or slower, arms a little looser, another shirt."""
    faster = 1 + _normal(rng, 0, 0.03)
    changed = {"speed": person.speed * faster}
    changed["stride_time"] = person.stride_time / faster**0.5 * (1 + _normal(rng, 0, 0.015))
    for name, deviation in WALK_SPREADS.items():
        now, change = getattr(person, name), _normal(rng, 0, deviation)
        changed[name] = now * (1 + change) if name in ("arm_swing", "surge", "bob") else now + change
    return replace(person, **changed)


def _normal(rng: Random, mean: float, deviation: float) -> float:
    return mean + deviation * float(np.clip(rng.standard_normal(), -2.2, 2.2))


def joint_positions(person: Person, phase: Array) -> Array:
    """Return where the joints (`JOINTS`) are at each `phase` (T,) of the stride: (17, T, 3) metres in the body frame.

    The pelvis' sideways tilt is left out: it lifts a hip by 7 mm, across the radar's line of sight.
    """
    rv, leg = person.relative_speed, LEG * person.height
    curves, hip_gain = joint_curves(round(rv, 2)), still_foot_gain(person)
    sway = 0.084 * rv * (1 - rv) if rv < 0.5 else 0.021
    nod = 8 * rv * (1 - rv) if rv < 0.5 else 2
    drift = 0.128 * rv * (1 - rv) if rv < 0.5 else 0.032

    forward = -person.surge * sway * leg * _sine(2 * phase + 2 * (0.625 - relative_support(rv)))
    up = leg * (1 + person.bob * 0.015 * rv * (_sine(2 * phase - 0.35) - 1))
    pelvis = np.stack((forward, -drift * leg * _sine(phase - 0.1), up), axis=-1)  # (T, 3)
    lean = np.radians(person.lean + nod * (_sine(2 * phase - 0.1) - 1))
    along_trunk = np.stack((np.sin(lean), np.zeros_like(lean), np.cos(lean)), axis=-1)
    neck = pelvis + TORSO * person.height * along_trunk
    joints = [pelvis, neck, neck + NECK_AND_HEAD * person.height * along_trunk]

    pelvis_twist = np.radians(-4 * rv * _sine(phase + 0.25))
    thorax_twist = np.radians(_at(curves["thorax"], phase))
    for side in (1, -1):  # left, right
        u = phase + (0.5 + person.step_shift if side == 1 else 0.0)
        flexion = {name: np.radians(_at(curve, u)) for name, curve in curves.items()}
        swing = (1 + side * person.arm_asymmetry) * person.arm_swing
        knee_gain = (1 + side * person.leg_asymmetry) * person.knee

        thigh = hip_gain * flexion["hip"]
        shank = thigh - knee_gain * flexion["knee"]
        foot = shank + person.ankle * flexion["ankle"]
        hip = pelvis + side * HALF_HIPS * person.height * _across(pelvis_twist)
        knee = hip + THIGH * person.height * _hanging(thigh)
        ankle = knee + SHANK * person.height * _hanging(shank)
        toe = ankle + FOOT * person.height * _hanging(foot + np.pi / 2)

        upper_arm = np.radians(3) + swing * flexion["shoulder"]
        forearm = upper_arm + np.maximum(flexion["elbow"] + np.radians(person.elbow), 0)
        shoulder = neck + side * HALF_SHOULDERS * person.height * _across(thorax_twist)
        elbow = shoulder + UPPER_ARM * person.height * _hanging(upper_arm)
        hand = elbow + FOREARM * person.height * _hanging(forearm)
        joints += [hip, knee, ankle, toe, shoulder, elbow, hand]
    return np.stack(joints)  # (17, T, 3)


def still_foot_gain(person: Person) -> float:
    """Return the factor on the hip's swing with which the foot on the ground stands still on average.

    The published curves alone let it creep backwards or forwards, the more so for a person whose cadence is not the
    model's own; on a radar image a foot on the ground is at zero velocity.
    """
    start, end = 0.10, 0.45  # foot flat … heel off
    curves = joint_curves(round(person.relative_speed, 2))
    hip, knee = (np.radians(_at(curves[name], np.array((start, end)))) for name in ("hip", "knee"))

    def creep(gain: float) -> float:
        """Return the metres that the ankle moves over the ground while it should stand."""
        x = THIGH * np.sin(gain * hip) + SHANK * np.sin(gain * hip - person.knee * knee)
        return float((x[1] - x[0]) * person.height + (end - start) * (person.speed * person.stride_time))

    low, high = 1.0, 1.3
    for _ in range(3):  # secant steps: the curve is all but a line
        low, high = high, high - creep(high) * (high - low) / (creep(high) - creep(low))
    return high


@lru_cache(maxsize=256)  # of speeds in hundredths
def joint_curves(relative_speed: float) -> dict[str, Array]:
    """Return degrees over one stride, (513,) and closed, of hip, knee, ankle, elbow, thorax and shoulder."""
    curves = {name: _smooth_curve(knots) for name, knots in _knots(relative_speed).items()}
    u = np.linspace(0, 1, CURVE_POINTS + 1)
    curves["shoulder"] = -9.88 * relative_speed * (0.5 + np.cos(2 * np.pi * u))
    return curves


def _knots(rv: float) -> dict[str, list[tuple[float, float]]]:
    """Return the paper's control points (phase, degrees); its three ranges of speed share one expression here."""
    slow, middle, fast = (min(max((rv - start) / width, 0), 1) for start, width in ((0, 0.5), (0.5, 0.8), (1.3, 1.7)))
    return {
        "hip": [(-0.1 + 0.2 * fast, 25 * slow + 5 * fast), (0.5, -15 * slow), (0.9, 25 * slow + 6 * fast)],
        "knee": [
            (0.17 - 0.05 * fast, 3 + 22 * fast),
            (0.40, 3),
            (0.75 - 0.05 * fast, 70 * slow - 5 * fast),
            (1 - 0.03 * fast, 3 + 3 * fast),
        ],
        "ankle": [
            (0, -3 + 5 * fast),
            (0.08, -3 - 15 * slow + 4 * fast),
            (0.5 - 0.1 * fast, -3 + 11 * slow - 3 * fast),
            (relative_support(rv), -3 - 17 * slow - 8 * fast),
            (0.85, -3 + 5 * fast),
        ],
        "elbow": [
            (0.05, 3 + 3 * slow + 8 * middle - 6 * fast),
            (0.5 + 0.01 * middle + 0.04 * fast, 3 + 17 * slow + 24 * middle + 26 * fast),
            (0.9 - 0.1 * fast, 3 + 5 * slow + 9 * middle - 6 * fast),
        ],
        "thorax": [(0.1, 1.333 * rv), (0.4, -1.5 * rv), (0.6, -1.333 * rv), (0.9, 1.5 * rv)],
    }


def _smooth_curve(knots: list[tuple[float, float]]) -> Array:
    """Return the periodic curve through `knots`, without overshoot and without its harmonics above the seventh."""
    from scipy.interpolate import PchipInterpolator

    by_phase = {round(phase % 1, 6): degrees for phase, degrees in knots}  # two knots at one phase count once
    phases, degrees = map(np.array, zip(*sorted(by_phase.items()), strict=True))
    curve = PchipInterpolator(np.concatenate((phases - 1, phases, phases + 1)), np.tile(degrees, 3))
    spectrum = np.fft.rfft(curve(np.arange(CURVE_POINTS) / CURVE_POINTS))
    spectrum[HARMONICS + 1 :] = 0
    smooth = np.fft.irfft(spectrum, CURVE_POINTS)
    return np.append(smooth, smooth[0])


def _at(curve: Array, phase: Array) -> Array:
    return np.interp(phase % 1, np.linspace(0, 1, CURVE_POINTS + 1), curve)


def _sine(turns: Array) -> Array:
    return np.sin(2 * np.pi * turns)


def _hanging(angle: Array) -> Array:
    """Unit vectors (T, 3) that point down at angle 0 and forward at a quarter turn."""
    return np.stack((np.sin(angle), np.zeros_like(angle), -np.cos(angle)), axis=-1)


def _across(twist: Array) -> Array:
    """Unit vectors (T, 3) that point to the left at twist 0, and forward as it grows."""
    return np.stack((np.sin(twist), np.cos(twist), np.zeros_like(twist)), axis=-1)


# ---- the radar

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
_LIMBS = (
    ("torso", "hip", "hip", (0.0,), 0.12),
    ("torso", "shoulder", "shoulder", (0.0,), 0.12),
    ("leg", "hip", "knee", (0.2, 0.45, 0.7, 0.9), 0.22),
    ("leg", "knee", "ankle", (0.08, 0.22, 0.36, 0.5, 0.64, 0.78, 0.92), 0.22),
    ("foot", "ankle", "toe", (0.1, 0.45, 0.8), 0.08),
    ("arm", "shoulder", "elbow", (0.5, 0.9), 0.14),
    ("arm", "elbow", "hand", (0.2, 0.45, 0.7, 0.95), 0.16),
)
_SEGMENTS = [("torso", "pelvis", "neck", (0.1, 0.4, 0.7, 0.95), 0.70), ("torso", "neck", "head", (0.7,), 0.20)]
for _side in ("left", "right"):
    _SEGMENTS += [(part, f"{_side} {start}", f"{_side} {end}", *rest) for part, start, end, *rest in _LIMBS]
_SCATTERERS = [
    (JOINTS.index(start), JOINTS.index(end), place, part, amplitude / len(places) ** 0.5)
    for part, start, end, places, amplitude in _SEGMENTS
    for place in places
]
FIRST, LAST, WAY, PARTS, AMPLITUDE = map(np.array, zip(*_SCATTERERS, strict=True))
"""Every scatterer's two joints, its place between them, its part of the body, and its amplitude: (K,) each."""


def walk_before_radar(person: Person, rng: Random, towards: bool, aspect: float) -> tuple[Array, Array]:
    """Return how far each scatterer is from the radar, (K, T) metres, and how strong its echo, (K, T).

    The path, `aspect` degrees off the line of sight, ends `NEAR` metres from the radar or begins there.
    """
    times, angle = POSE_TIMES, np.radians(aspect)
    uneven = 0.006 * slow_waves(rng, 1, times, 0.8)[0]  # the strides of one walk differ by about 1.5 %
    phase = rng.random() + times / person.stride_time + uneven
    ahead, aside, up = np.moveaxis(joint_positions(person, phase), -1, 0)  # (17, T) each
    ahead = ahead + person.speed * times
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


def slow_waves(rng: Random, count: int, times: Array, highest: float, whole: bool = False) -> Array:
    """Return (count, T) smooth random curves of unit deviation, of frequencies up to `highest`, or `whole` ones."""
    modes, shape = 3, (3, count, 1)
    frequencies = rng.integers(1, int(highest) + 1, shape) if whole else rng.uniform(0, highest, shape)
    turns = frequencies * times + rng.random(shape)  # (modes, count, T)
    return np.cos((2 * np.pi * turns).astype(np.float32)).sum(0) * (2 / modes) ** 0.5


def echo(ranges: Array, strengths: Array) -> Array:
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


def between(poses: Array) -> Array:
    """Values (K, T) at the pose times → (K, N) float32 at every pulse, by Catmull and Rom's cubic."""
    t = np.arange(PULSES_PER_POSE, dtype=np.float32) / PULSES_PER_POSE
    weights = np.stack((-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)) / 2
    fours = np.lib.stride_tricks.sliding_window_view(poses.astype(np.float32), 4, axis=1)  # (K, T - 3, 4)
    return (np.ascontiguousarray(fours) @ weights).reshape(len(poses), -1)


def received(signal: Array, rng: Random) -> Array:
    """Return the echo `signal` (N,) with the still echo of the room, and with noise."""
    level = np.sqrt(np.mean(np.abs(signal) ** 2))
    room = level * 10 ** (rng.uniform(-30, -18) / 20) * np.exp(2j * np.pi * rng.random())
    gain = 10 * np.log10(WINDOW * PULSE_RATE)  # dB by which a column lifts a tone over the noise
    noise = rng.standard_normal((2, signal.size), dtype=np.float32)
    noise *= level * 10 ** ((gain - rng.uniform(38, 46)) / 20) / 2**0.5
    return (signal + room + noise[0] + 1j * noise[1]).astype(np.complex64)


def spectrogram(signal: Array, size: int) -> Array:
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
