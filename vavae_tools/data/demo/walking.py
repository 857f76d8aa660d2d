"""A walking person as moving points: the global human walking model.

Boulic, Thalmann & Thalmann, "A global human walking model with real-time kinematic personification", The Visual
Computer 6 (1990), describe every joint of a walker as a curve over one stride, fixed by one number: the speed in leg
lengths per second (RV). Chen, "The Micro-Doppler Effect in Radar", puts point scatterers on that body for a radar.

One stride is one turn of the phase u: the right heel strikes at u = 0, the left one at u = 0.5. Lengths are metres,
times seconds, joint angles degrees. The body frame moves along at the mean speed: x forward, y to the left, z up.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

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
    def leg(self) -> float:
        """Height of the hip, m."""
        return LEG * self.height

    @property
    def relative_speed(self) -> float:
        """The model's RV: leg lengths per second."""
        return self.speed / self.leg

    @property
    def stride(self) -> float:
        """Length of two steps, m."""
        return self.speed * self.stride_time


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
    """Seconds per stride at `relative_speed` leg lengths per second (Boulic, Thalmann & Thalmann 1990)."""
    return 1.346 / relative_speed**0.5


def relative_support(relative_speed: float) -> float:
    """The part of a stride during which one foot is on the ground."""
    return 0.752 - 0.143 / cycle_time(relative_speed)


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Return the random generator of a seed's people, of one of them, or of one's image."""
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
    drawn = {name: _normal(rng, *spread) for name, spread in SPREADS.items()}
    return Person(
        height=height,
        speed=speed,
        stride_time=cycle_time(speed / (LEG * height)) / float(1 + 0.055 * even[1]),
        arm_swing=float(np.exp(0.15 + 0.36 * even[2])),
        **{**drawn, **{name: float(np.exp(drawn[name])) for name in ("surge", "bob")}},
    )


def walk_again(person: Person, rng: np.random.Generator) -> Person:
    """Return the same person on another walk: a little faster or slower, arms a little looser, another shirt."""
    faster = 1 + _normal(rng, 0, 0.03)
    changed = {
        "speed": person.speed * faster,
        "stride_time": person.stride_time / faster**0.5 * (1 + _normal(rng, 0, 0.015)),
    }
    for name, deviation in WALK_SPREADS.items():
        now, change = getattr(person, name), _normal(rng, 0, deviation)
        changed[name] = now * (1 + change) if name in ("arm_swing", "surge", "bob") else now + change
    return replace(person, **changed)


def _normal(rng: np.random.Generator, mean: float, deviation: float) -> float:
    return mean + deviation * float(np.clip(rng.standard_normal(), -2.2, 2.2))


def joint_positions(person: Person, phase: np.ndarray) -> np.ndarray:
    """Return where the joints (`JOINTS`) are at each `phase` (T,) of the stride: (17, T, 3) metres in the body frame.

    The pelvis' sideways tilt is left out: it lifts a hip by 7 mm, across the radar's line of sight.
    """
    rv = person.relative_speed
    curves = joint_curves(rv)
    hip_gain = still_foot_gain(person)
    sway = 0.084 * rv * (1 - rv) if rv < 0.5 else 0.021
    nod = 8 * rv * (1 - rv) if rv < 0.5 else 2
    drift = 0.128 * rv * (1 - rv) if rv < 0.5 else 0.032

    pelvis = np.stack(
        (
            -person.surge * sway * person.leg * _sine(2 * phase + 2 * (0.625 - relative_support(rv))),
            -drift * person.leg * _sine(phase - 0.1),
            person.leg * (1 + person.bob * 0.015 * rv * (_sine(2 * phase - 0.35) - 1)),
        ),
        axis=-1,
    )  # (T, 3)
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
    curves = joint_curves(person.relative_speed)
    hip, knee = (np.radians(_at(curves[name], np.array((start, end)))) for name in ("hip", "knee"))

    def creep(gain: float) -> float:
        """Metres the ankle moves over the ground while it should stand."""
        x = THIGH * np.sin(gain * hip) + SHANK * np.sin(gain * hip - person.knee * knee)
        return float((x[1] - x[0]) * person.height + (end - start) * person.stride)

    low, high = 1.0, 1.3
    for _ in range(3):  # secant steps: the curve is all but a line
        low, high = high, high - creep(high) * (high - low) / (creep(high) - creep(low))
    return high


def joint_curves(relative_speed: float) -> dict[str, np.ndarray]:
    """Return degrees over one stride, (513,) and closed, of hip, knee, ankle, elbow, thorax and shoulder."""
    return _curves(round(100 * relative_speed))  # few speeds, so that they are kept


@lru_cache(maxsize=256)
def _curves(speed_in_hundredths: int) -> dict[str, np.ndarray]:
    rv = speed_in_hundredths / 100
    curves = {name: _smooth_curve(knots) for name, knots in _knots(rv).items()}
    u = np.linspace(0, 1, CURVE_POINTS + 1)
    curves["shoulder"] = -9.88 * rv * (0.5 + np.cos(2 * np.pi * u))
    return curves


def _knots(rv: float) -> dict[str, list[tuple[float, float]]]:
    """Return the paper's control points (phase, degrees); its three ranges of speed share one expression here."""
    slow = min(rv / 0.5, 1)
    middle = min(max((rv - 0.5) / 0.8, 0), 1)
    fast = min(max((rv - 1.3) / 1.7, 0), 1)
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


def _smooth_curve(knots: list[tuple[float, float]]) -> np.ndarray:
    """Return the periodic curve through `knots`, without overshoot and without its harmonics above the seventh."""
    from scipy.interpolate import PchipInterpolator

    by_phase = {round(phase % 1, 6): degrees for phase, degrees in knots}  # two knots at one phase count once
    phases = np.array(sorted(by_phase))
    degrees = np.array([by_phase[phase] for phase in phases])
    curve = PchipInterpolator(np.concatenate((phases - 1, phases, phases + 1)), np.tile(degrees, 3))
    spectrum = np.fft.rfft(curve(np.arange(CURVE_POINTS) / CURVE_POINTS))
    spectrum[HARMONICS + 1 :] = 0
    smooth = np.fft.irfft(spectrum, CURVE_POINTS)
    return np.append(smooth, smooth[0])


def _at(curve: np.ndarray, phase: np.ndarray) -> np.ndarray:
    return np.interp(phase % 1, np.linspace(0, 1, CURVE_POINTS + 1), curve)


def _sine(turns: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * turns)


def _hanging(angle: np.ndarray) -> np.ndarray:
    """Unit vectors (T, 3) that point down at angle 0 and forward at a quarter turn."""
    return np.stack((np.sin(angle), np.zeros_like(angle), -np.cos(angle)), axis=-1)


def _across(twist: np.ndarray) -> np.ndarray:
    """Unit vectors (T, 3) that point to the left at twist 0, and forward as it grows."""
    return np.stack((np.sin(twist), np.cos(twist), np.zeros_like(twist)), axis=-1)
