"""Compare generated images with real ones: the right person, distances with real ones as their scale, copies."""

from vavae_tools.runtime.errors import command_parser, run_command


def main() -> None:
    parser = command_parser("python -m vavae_tools.evaluate", __doc__)
    add = parser.add_argument
    add("--generated_dir", required=True, help="folder of person folders (ID_1, ID_2 …) of generated images")
    add("--data_dir", required=True, help="real images: a split, a folder per class, a Hugging Face dataset")
    add(
        "--output_dir",
        default="outputs/evaluation",
        help="folder for evaluation.html, its numbers and figures, and the classifiers",
    )
    add("--image_size", type=int, help="pixels, to which all are resized; without it the generated images' own")
    add("--seed", type=int, default=0, help="of the first classifier and of the subsets that are compared")
    add("--seeds", type=int, help="classifiers that differ in their seeds alone, of each kind (default: 3)")
    gain = parser.add_argument_group("gain: do they make a classifier better?")
    add = gain.add_argument
    add("--gain", action="store_true", help="train classifiers with and without the generated images instead")
    add("--shares", type=float, nargs="+", help="generated images for each real one (default: 0.5 1 2 4)")
    add("--steps", type=int, help="of each training; by default as many as the number of images asks for")
    add("--images_per_person", type=int, help="real ones to train on; without it all")
    args = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}

    if args.pop("gain"):
        from vavae_tools.evaluation.augmentation import evaluate_gain as evaluate

        del args["seed"]
    else:
        from vavae_tools.evaluation.report import evaluate_images as evaluate

        if given := [name for name in ("shares", "steps", "images_per_person") if name in args]:
            parser.error(f"--{given[0]} is for --gain")
    print(evaluate(**args))


if __name__ == "__main__":
    run_command(main)
