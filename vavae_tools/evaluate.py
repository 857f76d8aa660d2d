"""Compare generated images with real ones: the right person, distances with real ones as their scale, copies."""

from vavae_tools.runtime.errors import command_parser, run_command


def main() -> None:
    parser = command_parser("python -m vavae_tools.evaluate", __doc__)
    add = parser.add_argument
    add("--generated_dir", required=True, help="folder of person folders (ID_1, ID_2 …) of generated images")
    add("--data_dir", required=True, help="real images: a split, a folder per class, a Hugging Face dataset")
    add("--output_dir", default="outputs/evaluation", help="folder for evaluation.json, figures/ and the classifier")
    add("--image_size", type=int, help="pixels, to which all are resized; without it the generated images' own")
    add("--seed", type=int, default=0, help="of the classifier and of the subsets that are compared")
    args = vars(parser.parse_args())

    from vavae_tools.evaluation.report import evaluate_images

    print(evaluate_images(**args))


if __name__ == "__main__":
    run_command(main)
