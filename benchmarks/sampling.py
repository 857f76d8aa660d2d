"""What few steps cost in quality, and how fast images are made, by solver and number of calls of the denoiser.

python -m benchmarks.sampling --pipeline outputs/dit/pipeline --data_dir data_split --guidance_scale 2.5

A table: Fréchet distance to real validation images, precision, recall, accuracy, images a second. "fitted" is the
schedule that `fit_schedule` finds for the model.
"""

import argparse
import time
from pathlib import Path

from vavae_tools.diffusion.objectives import NoisePrediction
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.evaluation.report import evaluate_images
from vavae_tools.pipelines.batches import move_to_device
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.pipelines.schedule import fit_schedule
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.runtime.machine import find_device

CALLS_A_STEP = {"heun": 2, "midpoint": 2}  # Heun's last step takes one


def measure(pipe: LatentDiTPipeline, solver: str, calls: int, options: argparse.Namespace) -> str:
    steps = max(1, (calls + (solver == "heun")) // CALLS_A_STEP.get(solver, 1))
    labels = sorted(pipe.people.values()) * options.samples_per_person
    folder = Path(options.output_dir) / f"{solver}_{calls}"
    began = time.perf_counter()
    write_samples(pipe, labels, folder, num_inference_steps=steps, guidance_scale=options.guidance_scale)
    speed = len(labels) / (time.perf_counter() - began)
    found = evaluate_images(folder, options.data_dir, Path(options.output_dir) / "evaluation", progress=False)
    near, far = found.distances and found.distances.neighbourhoods_generated, found.distances
    numbers = [f"{far.frechet_generated:.3g}" if far else "-"]
    numbers += [f"{near[name].value:.2f}" if near else "-" for name in ("precision", "recall")]
    return " | ".join([solver, str(calls), *numbers, f"{100 * found.total.generated_accuracy:.1f}", f"{speed:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help="folder or .ckpt")
    add("--data_dir", required=True, help="split with the real images")
    add("--output_dir", default="sampling")
    add("--guidance_scale", type=float, default=1.25)
    add("--samples_per_person", type=int, default=50)
    add("--calls", type=int, nargs="+", default=[5, 8, 10, 20, 50, 250])
    add("--solvers", nargs="+", default=["euler", "heun", "dpm++", "unipc", "adams", "fitted"])
    options = parser.parse_args()
    pipe = move_to_device(load_pipeline(options.pipeline), find_device())
    if isinstance(pipe.objective, NoisePrediction):
        parser.error("--pipeline predicts noise: solvers of flows are compared here")
    few = [calls for calls in options.calls if calls <= 20]
    began = time.perf_counter()
    fit_schedule(pipe, few, options.guidance_scale)
    fitted = pipe.scheduler
    print(f"fitted in {time.perf_counter() - began:.1f} s", flush=True)
    print("solver | calls | Fréchet distance | precision | recall | accuracy, % | images/s", flush=True)
    for calls in options.calls:
        for solver in options.solvers:
            if solver == "fitted" and calls not in few:
                continue
            pipe.scheduler = fitted if solver == "fitted" else make_solver(solver, pipe.objective)
            print(measure(pipe, solver, calls, options), flush=True)


if __name__ == "__main__":
    main()
