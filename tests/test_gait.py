import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import refuses

from vavae_tools.data.demo import gait, walking
from vavae_tools.data.demo.gait import simulate_image, simulate_walk, write_gait_dataset
from vavae_tools.data.demo.walking import JOINTS, TOP_SPEED, draw_person, echo, joint_positions, spectrogram

AVERAGE = replace(
    draw_person(0, 1),
    **{"height": 1.75, "speed": 1.40, "stride_time": walking.cycle_time(1.40 / (0.53 * 1.75)), "lean": 3, "knee": 0.88},
    **{"arm_swing": 1, "surge": 1, "bob": 1, "ankle": 0.8, "elbow": 0, "step_shift": 0},
    **dict.fromkeys(("arm_asymmetry", "leg_asymmetry", "torso_db", "leg_db", "foot_db", "arm_db"), 0),
)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(gait.__file__).parents[3])}


def rng(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def forward_speed(person, joint):
    """Over the ground, m/s, at 1,000 equal steps of one stride."""
    x = joint_positions(person, np.linspace(0, 1, 1001))[JOINTS.index(joint), :, 0]
    return np.diff(x) * 1000 / person.stride_time + person.speed


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_python(*arguments, cwd=None):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=ENVIRONMENT)


def test_cycle_of_an_average_walker_is_the_published_one():
    assert AVERAGE.relative_speed == pytest.approx(1.509, abs=1e-3)
    assert AVERAGE.stride_time == pytest.approx(1.0956, abs=1e-3)
    assert AVERAGE.speed * AVERAGE.stride_time == pytest.approx(1.53, abs=0.01)
    assert 120 / AVERAGE.stride_time == pytest.approx(110, abs=1)  # steps a minute
    assert walking.relative_support(AVERAGE.relative_speed) == pytest.approx(0.62, abs=0.005)


def test_joint_curves_pass_through_the_published_points():
    for joint, phase, degrees in (("hip", 0.9, 25), ("hip", 0.5, -15), ("knee", 0.75, 70), ("knee", 0.4, 3)):
        curve = walking.joint_curves(1.0)[joint]
        assert curve[0] == curve[-1]
        assert np.interp(phase, np.linspace(0, 1, len(curve)), curve) == pytest.approx(degrees, abs=2)


@pytest.mark.parametrize("person", [AVERAGE, replace(AVERAGE, speed=1.1), draw_person(0, 1)])
def test_a_foot_stands_still_then_swings_at_more_than_three_times_the_walking_speed(person):
    speed = forward_speed(person, "right ankle")
    assert abs(speed[100:450].mean()) < 0.08 and speed[100:450].std() < 0.25
    assert 3.0 < speed.max() / person.speed < 4.0
    assert 0.65 < np.argmax(speed) / 1000 < 0.95  # in the swing of the right leg


def test_left_side_does_what_the_right_one_did_half_a_stride_before():
    phase = np.linspace(0, 1, 200)
    now, later = joint_positions(AVERAGE, phase), joint_positions(AVERAGE, phase + 0.5)
    for joint in ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "hand"):
        left, right = later[JOINTS.index(f"left {joint}")], now[JOINTS.index(f"right {joint}")]
        np.testing.assert_allclose(left, right * (1, -1, 1), atol=1e-9)


def test_people_are_within_human_ranges_and_differ():
    people = [draw_person(3, number) for number in range(1, 101)]
    assert len({person.height for person in people}) == 100 and draw_person(4, 7) != people[6] == draw_person(3, 7)
    for person in people:
        assert 1.5 < person.height < 1.95 and 1.0 < person.speed < 1.7 and 80 < 120 / person.stride_time < 140
    assert np.std([person.speed for person in people]) == pytest.approx(0.17, rel=0.1)


@pytest.mark.parametrize(("speed", "size"), [(-4.0, 256), (-0.5, 300), (1.37, 256), (6.0, 300)])
def test_a_point_that_comes_nearer_at_a_steady_speed_is_a_line_at_that_speed(speed, size):
    ranges = 30.0 - speed * walking.POSE_TIMES[None]
    power = spectrogram(echo(ranges, np.ones_like(ranges)), size)
    speeds = TOP_SPEED * (1 - (2 * np.arange(size) + 1) / size)
    assert power.shape == (size, size)
    assert np.abs(speeds[power.argmax(axis=0)] - speed).max() <= 2 * TOP_SPEED / size
    # Two window widths away from the line there is nothing: the phase runs smoothly between the poses.
    far = np.abs(speeds - speed) > 4 * walking.WAVELENGTH / walking.WINDOW / 2
    assert power[far].max() < 1e-4 * power.max()


def test_walking_away_is_walking_towards_upside_down():
    def heard(towards):
        echoed = echo(*walking.walk_before_radar(AVERAGE, rng(5), towards, aspect=0))
        power = spectrogram(walking.received(echoed, rng(6)), 256)
        return np.maximum(np.log10(power / np.quantile(power, 0.997)) + 4.2, 0)

    towards, away = heard(True), heard(False)
    assert towards[:118].mean() > 2 * towards[138:].mean()
    profiles = towards.mean(axis=1), away[::-1].mean(axis=1)
    assert np.corrcoef(*profiles)[0, 1] > 0.98
    assert towards[:, 192:].mean() > towards[:, :64].mean()  # brighter as it comes nearer
    assert away[:, 192:].mean() < away[:, :64].mean()


def test_a_small_image_is_the_large_one_averaged_and_a_larger_one_shows_the_same_walk():
    large, small, larger = (simulate_walk(AVERAGE, rng(2), size).astype(float) for size in (256, 64, 512))
    assert np.abs(large.reshape(64, 4, 64, 4).mean(axis=(1, 3)) - small).max() <= 1
    assert np.abs(larger.reshape(256, 2, 256, 2).mean(axis=(1, 3)) - large).mean() < 12


def test_people_can_be_told_apart():
    """Ridge regression on the rhythm at each speed, with both directions laid over one another."""
    people, pictures, train = 4, 24, 16
    shown = np.stack([
        [simulate_walk(draw_person(0, p), rng(100 * p + k), 64) for k in range(pictures)] for p in range(1, people + 1)
    ])  # fmt: skip
    rhythm = np.abs(np.fft.rfft(shown / 255, axis=-1))[..., :20]
    features = (rhythm + rhythm[..., ::-1, :]).reshape(people, pictures, -1)
    known, unknown = (part.reshape(-1, features.shape[-1]) for part in (features[:, :train], features[:, train:]))
    mean, scale = known.mean(axis=0), known.std(axis=0) + 1e-3
    known, unknown = (known - mean) / scale, (unknown - mean) / scale
    kernel = known @ known.T
    answers = np.repeat(np.eye(people), train, axis=0)
    weights = np.linalg.solve(kernel + 0.03 * np.trace(kernel) / len(kernel) * np.eye(len(kernel)), answers)
    guess = (unknown @ known.T @ weights).argmax(axis=1)
    assert np.mean(guess == np.repeat(np.arange(people), pictures - train)) > 0.8


def test_same_bytes_with_any_number_of_workers_people_and_images(tmp_path):
    options = {"size": 32, "seed": 7, "progress": False}
    one = contents(write_gait_dataset(tmp_path / "one", 2, 5, workers=1, **options))
    assert contents(write_gait_dataset(tmp_path / "two", 2, 5, workers=2, **options)) == one
    more = contents(write_gait_dataset(tmp_path / "more", 3, 6, **options))
    assert len(more) == 3 * 6 + 1 and len(set(more.values())) == len(more)
    assert all(more[name] == data for name, data in one.items() if name.endswith(".jpg"))
    assert not np.array_equal(simulate_image(7, 1, 1, 32), simulate_image(8, 1, 1, 32))


def test_layout_settings_and_pixels(tmp_path):
    folder = write_gait_dataset(tmp_path / "new" / "gait", 2, 3, 64, seed=1, progress=False)
    names = [f"ID_{person}/walk_00{image}.jpg" for person in (1, 2) for image in (1, 2, 3)]
    assert list(contents(folder)) == [*names, "gait.json"]
    saved = json.loads((folder / "gait.json").read_text())
    assert saved["settings"] == {"people": 2, "pictures": 3, "size": 64, "seed": 1, "colormap": "jet"}
    assert saved["people"]["ID_2"] == asdict(draw_person(1, 2))
    with Image.open(folder / "ID_2" / "walk_003.jpg") as opened:
        assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (64, 64))
        assert np.abs(np.asarray(opened).astype(float) - simulate_image(1, 2, 3, 64)).mean() < 8


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path):
    write_gait_dataset(tmp_path, 1, 2, 16, progress=False)
    image = tmp_path / "ID_1" / "walk_001.jpg"
    image.write_bytes(b"as it was")
    assert write_gait_dataset(tmp_path, 1, 2, 16, progress=False) == tmp_path
    assert image.read_bytes() == b"as it was"
    words = r"'seed': 0.*asked for.*'seed': 1.*another --output_dir"
    refuses(words, write_gait_dataset, tmp_path, 1, 2, 16, seed=1, progress=False)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(gait, "_write_image", stop)
        write_gait_dataset(tmp_path, 1, 3, 16, workers=1, progress=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".partial" / "ID_7").mkdir(parents=True)  # what a kill may leave
    assert len(contents(write_gait_dataset(tmp_path, 1, 3, 16, progress=False))) == 4


@pytest.mark.parametrize(("wrong", "message"), [
    ({"people": 0}, "people is 0: expected 1 or more"),
    ({"size": 8}, "size is 8: expected 16 or more"),
    ({"colormap": "jett"}, "colour map is called 'jett'"),
])  # fmt: skip
def test_bad_numbers_are_said_before_anything_is_written(tmp_path, wrong, message):
    refuses(message, write_gait_dataset, tmp_path / "new", progress=False, **wrong)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "ID_1").mkdir()
    refuses(r"already holds other .*ID_1.*empty folder", write_gait_dataset, tmp_path, 1, 1, 16, progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "ID_1"]
    (tmp_path / "file").touch()
    for name in ("file", "file/new"):
        refuses(r"Cannot write into .*Choose another", write_gait_dataset, tmp_path / name, 1, 1, 16, progress=False)


def test_command_line(tmp_path, run_main):
    words = ["--output_dir", tmp_path / "data", "--people", 2, "--pictures", 2, "--size", 16, "--workers", 2]
    status, out, err = run_main(gait.main, *words)
    assert (status, err) == (0, "") and "4 images of 2 simulated walkers" in out
    assert f"python data_split.py --input_dir {tmp_path / 'data'}" in out
    assert len(list((tmp_path / "data").glob("ID_*/walk_*.jpg"))) == 4
    assert "there already" in run_main(gait.main, *words)[1]
    status, _, err = run_main(gait.main, *words, "--seed", 3)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_importing_it_is_cheap():
    """1,000 images take seconds, torch alone takes three."""
    heavy = "{'torch', 'matplotlib', 'scipy'}"
    done = run_python("-c", f"import sys, vavae_tools.data.demo.gait; print({heavy} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr
