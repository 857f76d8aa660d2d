"""The script that shows what a card does, as far as a CPU goes."""

import json

import pytest
import tiny  # noqa: F401  (one thread)

from benchmarks.gpu_check import Setup, main, run


def test_checks_run_and_end_in_one_json(run_main):
    status, out, err = run_main(main, "--device", "cpu", "--tiny", "--only", "ssim", "sampling", "vavae_light")
    found = json.loads(out)
    assert status == 0 and {"ssim_in_autocast", "sampling", "vavae_light_batch_8", "seconds"} == found.keys()
    assert found["ssim_in_autocast"]["of_equal_images"] == 1
    assert found["sampling"]["32"]["levels_off"] == 0
    assert found["vavae_light_batch_8"]["weights_finite"] and found["vavae_light_batch_8"]["ms_a_step"] > 0
    assert "sampling" in err


def test_a_fault_is_an_answer():
    def fails(setup: Setup) -> dict:
        raise RuntimeError("no kernel image")

    result = run(Setup("cpu", tiny=True), fails, cap=True)
    assert result["error"] == "RuntimeError: no kernel image" and result["seconds"] == pytest.approx(0, abs=1)
